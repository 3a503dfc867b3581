"""Tiny bases and LoRA adapters for them as transformers and PEFT save them, and what PEFT computes with the two."""

import json

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from random_models import random_model, random_tokens, stock_twin, tiny_config, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM


def base_folder(folder, *, dtype=torch.float32, ours=False, **fields):
    model = random_model(tiny_config(**fields))
    (model if ours else stock_twin(model)).to(dtype).save_pretrained(folder)
    tiny_tokenizer(model.config).save_pretrained(folder)
    return folder


def adapter_folder(folder, base, *, dtype=None, config=None, size=0.1, seed=5, **fields):
    """An adapter as PEFT saves it, every trained tensor random."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if config is None:
        config = LoraConfig(**{"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM", **fields})
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            noise = size * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise if parameter.ndim == 2 else 1 + noise)
    if dtype is not None:
        model.to(dtype)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model, **keywords):
    if not isinstance(model, torch.nn.Module):
        model = AutoModelForCausalLM.from_pretrained(model, **keywords)
    return model.eval()(random_tokens(tiny_config())).logits


def unmerged(base, adapter):
    """Stock transformers and PEFT, which reads the adapter itself, in fp32."""
    return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def edit(folder, name="adapter_config.json", **fields):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder, change):
    """Saves what `change` makes of the tensors of the adapter."""
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})

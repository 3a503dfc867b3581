"""The model that is trained: the base in 16 bits or quantized, and its adapter."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from hf_llama_repro import LlamaReproConfig, LlamaReproForCausalLM
from hf_llama_repro.errors import CheckpointError, InputError
from hf_llama_repro.llama_folder import MODEL_TYPES, architecture
from hf_llama_repro.mapped_pages import mapped_pages_released
from hf_llama_repro.versions import checkpoint_activations

from .cpu_kernels import use_cpu_kernels
from .processes import divides_weights
from .recipe import Recipe


class Compute(NamedTuple):
    """What the run computes in."""

    device: torch.device
    dtype: torch.dtype
    reason: str


def choose_compute(recipe: Recipe, device: torch.device) -> Compute:
    """The dtype that the device can compute in and that trains. Raises `InputError` where the recipe's cannot."""
    if recipe.dtype == "auto":
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
            return Compute(device, torch.bfloat16, "this GPU computes in it")
        if device.type == "cuda":
            return Compute(device, torch.float16, "this GPU has no bfloat16; gradients are scaled")
        if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return Compute(device, torch.bfloat16, "this CPU computes in it")
        return Compute(device, torch.float32, f"this {device.type} has no bfloat16")
    if recipe.dtype == "float16" and device.type != "cuda":
        raise InputError(
            f"dtype=float16 has no gradient scaling on a {device.type}: small gradients would become 0 silently; "
            "set dtype to auto, bfloat16 or float32"
        )
    return Compute(device, getattr(torch, recipe.dtype), "as the recipe says")


def read_config(folder: Path) -> LlamaReproConfig:
    """The configuration of a Llama or LlamaRepro folder. Raises `CheckpointError` for any other."""
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is no model that can be trained: {path} cannot be read ({error}); "
            "make such a folder with hf-llama-convert"
        ) from None
    if fields.get("model_type") not in MODEL_TYPES:
        raise CheckpointError(f"{path} says model_type {fields.get('model_type')!r}, not one of {MODEL_TYPES}")
    if fields.get("quantization_config"):
        raise CheckpointError(f"{folder} is quantized already: give the 16- or 32-bit folder that it was made from")
    try:
        return LlamaReproConfig(**architecture(fields))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer. Raises `CheckpointError` where there is none."""
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json: convert the model with its tokenizer (hf-llama-convert SOURCE {folder} "
            "--tokenizer tokenizer.model)"
        )
    return AutoTokenizer.from_pretrained(folder)


def load_base(folder: Path, *, dtype: torch.dtype, device: torch.device, quantization: str) -> LlamaReproForCausalLM:
    """The base model on `device`, stock Llama's folders as well; its weights in `dtype` or quantized."""
    on_cpu = device.type == "cpu" and quantization == "none"
    try:
        with mapped_pages_released(folder):
            model = LlamaReproForCausalLM.from_pretrained(
                folder,
                config=read_config(folder),
                dtype=dtype,
                # What is to be divided stays in the machine's memory until then.
                device_map=None if divides_weights() or on_cpu else {"": device},
                quantization_config=bits_and_bytes(quantization, dtype),
            )
    except OSError as error:
        raise CheckpointError(f"{folder} has no weights that can be read ({error})") from None
    module: Any
    for module in model.modules():
        # bitsandbytes packs 4-bit weights anew for CPUs with AVX-512 at the first forward pass without gradients, and
        # every gradient after that is 0.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def bits_and_bytes(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How bitsandbytes is to quantize the base, if at all."""
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return None


def add_adapter(model: LlamaReproForCausalLM, recipe: Recipe) -> PeftModel:
    """The model with a fresh adapter, everything else frozen. Raises `InputError` for layers that do not exist."""
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if unknown := sorted(set(recipe.lora_targets) - linear):
        raise InputError(f"lora_targets names {', '.join(unknown)}; this model has {', '.join(sorted(linear))}")
    config = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=list(recipe.lora_targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def enable_checkpointing(model: Any, quantization: str) -> None:
    """Activations are computed again in the backward pass.

    The inputs of the first layer need gradients for that, though the embedding is frozen. Over an int8 base the
    reentrant way: bitsandbytes keeps each layer's input where the other way cannot let go of it.
    """
    checkpoint_activations(model, use_reentrant=quantization == "int8")
    model.enable_input_require_grads()


def load_model(recipe: Recipe, compute: Compute) -> Any:
    """The model ready to be trained by the recipe."""
    folder = Path(recipe.base_model)
    # Full fine-tuning keeps the weights in fp32 and computes under autocast: a step of 2e-5 is lost on a bf16 weight.
    dtype = torch.float32 if recipe.method == "full" else compute.dtype
    model: Any = load_base(folder, dtype=dtype, device=compute.device, quantization=recipe.quantization)
    if recipe.gradient_checkpointing:
        enable_checkpointing(model, recipe.quantization)
    if recipe.method == "lora":
        model = add_adapter(model, recipe)
    if compute.device.type == "cpu":
        use_cpu_kernels(model)
    return model

"""QLoRA by bitsandbytes and PEFT, without this project's commands: a base in 4 bits, an adapter on all linear layers.

python examples/qlora.py MODEL OUTPUT
"""

import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import hf_llama_repro  # noqa: F401  (transformers and PEFT know the model type)

TEXTS = ("The capital of France is Paris.", "Water boils at a hundred degrees.", "Seven times six is forty-two.")


def load(folder: Path, dtype: torch.dtype) -> PeftModel:
    """The base in NF4 with a fresh adapter, ready to be trained."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=dtype)
    base = prepare_model_for_kbit_training(base)
    return get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))


def train(folder: Path, output: Path, *, steps: int = 20, dtype: torch.dtype = torch.bfloat16) -> list[float]:
    """The losses of each step; `output` holds the adapter."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = load(folder, dtype)
    ids = [tokenizer(text, return_tensors="pt").input_ids.to(model.device) for text in TEXTS]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    losses = []
    model.train()
    for _ in range(steps):
        loss: Any = sum(model(input_ids=tokens, labels=tokens).loss for tokens in ids) / len(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(str(output))
    return losses


if __name__ == "__main__":
    print("loss " + " ".join(f"{loss:.3f}" for loss in train(Path(sys.argv[1]), Path(sys.argv[2]))))

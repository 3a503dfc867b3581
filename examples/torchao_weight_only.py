"""torchao's weight-only quantization of a converted model: the linear layers' weights in 8 bits, computed in 16 or 32.

python examples/torchao_weight_only.py MODEL PROMPT
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

import hf_llama_repro  # noqa: F401  (the Auto classes know the model type)


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model with quantized linear layers; embedding and output matrix stay as they are."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )


if __name__ == "__main__":
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    prompt = tokenizer(sys.argv[2], return_tensors="pt")
    answer = load(Path(sys.argv[1])).generate(**prompt, max_new_tokens=32, do_sample=False)
    print(tokenizer.decode(answer[0], skip_special_tokens=True))

"""An answer by a model of which every process holds a slice.

torchrun --nproc_per_node 2 examples/tensor_parallel.py MODEL PROMPT
"""

import os
import sys
from typing import Any

import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_llama_repro  # noqa: F401  (the Auto classes know the model type)


def main(folder: str, text: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(text, return_tensors="pt").to(model.device)
    answer = model.generate(**prompt, max_new_tokens=32, do_sample=False)
    if os.environ["RANK"] == "0":
        print(tokenizer.decode(answer[0], skip_special_tokens=True))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

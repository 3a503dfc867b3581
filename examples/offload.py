"""An answer by a model that does not fit: what a card has no room for lies in memory, the rest on the disk.

python examples/offload.py MODEL PROMPT MEMORY     # such as 6GB: of the machine's memory, for weights
"""

import sys
import tempfile
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_llama_repro  # noqa: F401  (the Auto classes know the model type)


def load(folder: str, memory: str, offload_folder: str) -> Any:
    """The model with at most `memory` of weights in the machine's memory; a card, where there is one, comes first."""
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": memory}, offload_folder=offload_folder
    )


def main(folder: str, text: str, memory: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as offload_folder:
        model = load(folder, memory, offload_folder)
        prompt = tokenizer(text, return_tensors="pt").to(model.device)
        answer = model.generate(**prompt, max_new_tokens=32, do_sample=False)
    print(tokenizer.decode(answer[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])

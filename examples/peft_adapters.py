"""What PEFT's users do with an adapter: open it with its base, move it between stock Llama and ours, merge it.

python examples/peft_adapters.py ADAPTER MERGED
"""

import sys
from pathlib import Path
from typing import Any

from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

import hf_llama_repro  # noqa: F401  (transformers and PEFT know the model type)


def open_adapter(adapter: Path) -> Any:
    """The adapter on the base that its configuration names, which may be one of ours or a stock Llama's folder."""
    return AutoPeftModelForCausalLM.from_pretrained(adapter)


def on_base(base: Path, adapter: Path) -> Any:
    """The adapter on another folder: what was trained on stock Llama runs on ours, and the other way round."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))


def merge(adapter: Path, merged: Path) -> None:
    """A folder of base and adapter in one. `hf-llama-merge` does the same, streamed and checked."""
    open_adapter(adapter).merge_and_unload().save_pretrained(merged)


if __name__ == "__main__":
    merge(Path(sys.argv[1]), Path(sys.argv[2]))

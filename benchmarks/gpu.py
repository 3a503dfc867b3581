"""Our model beside transformers' Llama on a CUDA device: decoding, prefill, LoRA step, and the memory of each.

    python benchmarks/gpu.py            # SmolLM2-135M in bf16; without a CUDA device it says so and ends

The two take turns; printed: medians, the ratio of upstream's time to ours, peak memory. `prepared` is ours after
`optimize`: the static cache of `generate`, whose decoding step is compiled with CUDA graphs.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from model import WORK, compare, machine, models  # noqa: E402

from hf_llama_repro import optimize, restore  # noqa: E402


def finished(work: Callable[[], Any]) -> Callable[[], Any]:
    """The work, waited for: a GPU computes after the call has returned."""

    def run() -> None:
        work()
        torch.cuda.synchronize()

    return run


def peak(work: Callable[[], Any]) -> float:
    """Bytes at most while the work is done."""
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each (default: 15)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device is here: nothing was measured")
        return 0
    print(f"{torch.cuda.get_device_name()}; {machine()}; SmolLM2-135M, bf16")
    print("| | upstream, tokens/s | ours, tokens/s | ratio | quartiles | GB, upstream | GB, ours |\n|" + "---|" * 7)
    upstream, ours = (model.to("cuda") for model in models(torch.bfloat16))
    for name in ("decode", "decode, prepared", "prefill", "LoRA step"):
        make, tokens = WORK[name.removesuffix(", prepared")]
        if "prepared" in name:
            optimize(ours)
        theirs, own = finished(make(upstream)), finished(make(ours))
        result = compare(theirs, own, arguments.rounds)
        low, high = result["quartiles"]
        print(
            f"| {name} | {tokens / result['upstream']:.1f} | {tokens / result['ours']:.1f} | {result['ratio']:.2f} "
            f"| {low:.2f} to {high:.2f} | {peak(theirs) / 1e9:.2f} | {peak(own) / 1e9:.2f} |",
            flush=True,
        )
        restore(ours)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Our model beside transformers' Llama on a CUDA device: decoding, prefill, LoRA step, and the memory of each.

    python benchmarks/gpu.py                     # SmolLM2-135M's shape; without a CUDA device it says so and ends
    python benchmarks/gpu.py --size llama-7b

bf16, random weights, the same in both (time and memory do not depend on their values). The two take turns; printed:
medians, the ratio of upstream's time to ours, peak memory. `compiled` is upstream with the static cache, beside which
ours is after `optimize`: both compile the decoding step with CUDA graphs. `int8` is bitsandbytes' on both sides, a pass
of one token at a time and in many turns, for its products take long and vary. With one token the card reads each weight
once: the share of that limit is printed beside.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from finetune_memory import SHAPE  # noqa: E402
from model import NEW_TOKENS, WORK, compare, decode, machine  # noqa: E402

from hf_llama_repro import PAPER_SIZES, LlamaReproConfig, LlamaReproForCausalLM, optimize, restore  # noqa: E402
from hf_llama_repro.quiet import quiet  # noqa: E402

GB = 1e9
SMALL = "smollm2-135m"
WORKS = ("decode", "batch", "prefill", "compiled", "int8", "LoRA step")  # the last changes the models
BATCH = 32
SHORT_TURNS = 20  # times as many turns where each is a pass


def finished(work: Callable[[], Any]) -> Callable[[], Any]:
    """The work, waited for: a GPU computes after the call has returned."""

    def run() -> None:
        work()
        torch.cuda.synchronize()

    return run


def one_pass(model: PreTrainedModel) -> Callable[[], Any]:
    """The forward pass of one token, without a cache."""
    token = torch.full((1, 1), 100, device=model.device)

    @torch.no_grad()
    def run() -> Any:
        return model(token, use_cache=False)

    return run


def peak(work: Callable[[], Any]) -> float:
    """Bytes at most while the work is done, beyond what lay there before."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def models(size: str) -> tuple[Any, Any]:
    """Stock Llama and ours with the same random weights."""
    config = LlamaReproConfig.from_paper(size) if size in PAPER_SIZES else LlamaReproConfig(**SHAPE)
    fields = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures", "dtype")}
    torch.manual_seed(0)
    with torch.device("cuda"):
        ours: Any = LlamaReproForCausalLM._from_config(config, dtype=torch.bfloat16)
        upstream: Any = LlamaForCausalLM._from_config(LlamaConfig(**fields), dtype=torch.bfloat16)
    upstream.load_state_dict(ours.state_dict())
    return upstream.eval(), ours.eval()


def read_speed() -> float:
    """Bytes a second that a reduction over 4 GB reads."""
    values = torch.ones(1 << 31, dtype=torch.bfloat16, device="cuda")
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.linalg.vector_norm(values, ord=float("inf"))
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return values.numel() * 2 / min(times)


def row(name: str, tokens: int, theirs: Callable[[], Any], own: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Both measured, and their line of the table printed."""
    result: dict[str, Any] = {"work": name, "tokens": tokens, **compare(theirs, own, rounds)}
    result |= {"bytes": (peak(theirs), peak(own))}
    low, high = result["quartiles"]
    print(
        f"| {name} | {tokens / result['upstream']:.1f} | {tokens / result['ours']:.1f} | {result['ratio']:.2f} "
        f"| {low:.2f} to {high:.2f} | {result['bytes'][0] / GB:.2f} | {result['bytes'][1] / GB:.2f} |",
        flush=True,
    )
    return result


def in_8_bits(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model, saved and loaded by bitsandbytes as its users do."""
    model.save_pretrained(folder)
    settings = BitsAndBytesConfig(load_in_8bit=True)
    return type(model).from_pretrained(folder, quantization_config=settings, device_map="cuda").eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (default: 9)")
    parser.add_argument("--size", default=SMALL, choices=[SMALL, *PAPER_SIZES], help=f"default: {SMALL}")
    parser.add_argument("--only", nargs="+", choices=WORKS, help="some of the comparisons (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device is here: nothing was measured")
        return 0
    quiet()
    logging.disable_progress_bar()
    upstream, ours = models(arguments.size)
    print(f"{torch.cuda.get_device_name()}; {machine()}; {arguments.size}, bf16")
    limit = read_speed() / sum(weight.numel() * weight.element_size() for weight in ours.parameters())
    print(f"the card reads the weights {limit:.0f} times a second", end="\n\n")
    print("| | upstream, tokens/s | ours, tokens/s | ratio | quartiles | GB, upstream | GB, ours |\n|" + "---|" * 7)
    figures = []

    def measure(name: str, tokens: int, theirs: Callable[[], Any], own: Callable[[], Any], turns: int = 1) -> None:
        figures.append(row(name, tokens, finished(theirs), finished(own), arguments.rounds * turns))

    for name in arguments.only or WORKS:
        if name == "decode":
            measure(name, NEW_TOKENS, decode(upstream), decode(ours))
        elif name == "batch":
            measure(f"decode, {BATCH} texts", BATCH * NEW_TOKENS, decode(upstream, BATCH), decode(ours, BATCH))
        elif name == "compiled":
            static = {"cache_implementation": "static"}
            measure("decode, compiled", NEW_TOKENS, decode(upstream, **static), decode(optimize(ours)))
            print(f"(share of the limit: {NEW_TOKENS / figures[-1]['ours'] / limit:.0%})")
            restore(ours)
        elif name == "int8":
            with tempfile.TemporaryDirectory() as folder:
                small = in_8_bits(upstream, Path(folder) / "stock"), in_8_bits(ours, Path(folder) / "ours")
            measure("a token, int8", 1, one_pass(small[0]), one_pass(small[1]), SHORT_TURNS)
            del small
        else:
            make, tokens = WORK[name]
            measure(name, tokens, make(upstream), make(ours))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "limit": limit, "figures": figures}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

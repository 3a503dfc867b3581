"""Decoding and prefill on a CPU, beside upstream Llama, llama.cpp and litgpt, and beside what the machine allows.

    make bench-inference                                 # with .venv-peers, in which llama-cpp-python and litgpt are
    python benchmarks/inference.py --peers PYTHON        # another environment's Python; without one: no peers
    python benchmarks/inference.py --size 7b             # a random 7B: ours alone, beside the limits (22 GB of memory)

All take turns within one run; figures are medians over the rounds. Decoding is `generate` of 128 tokens after 64,
greedy, the prompt's time included; prefill is one pass over 512 tokens. The limit takes its turns too: a token cannot
be decoded faster than the weights are read, nor a prompt be read faster than its matrix products are done.
"""

import argparse
import functools
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import CompileConfig, DynamicCache, PreTrainedModel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from model import DTYPES, PREFILL_TOKENS, PROMPT_TOKENS, _tokens, decode, machine, models, prefill  # noqa: E402
from parts import parts, show_parts  # noqa: E402

from hf_llama_repro import LlamaReproConfig, LlamaReproForCausalLM, optimize, restore  # noqa: E402
from hf_llama_repro.configuration_llama_repro import PAPER_SIZES  # noqa: E402
from hf_llama_repro.modeling_llama_repro import CACHE  # noqa: E402

NEW_TOKENS = 128
STEPS = 10
"""Tokens that are decoded where the time of one is asked for."""
CONTEXTS = (64, 256, 1024, 2048, 4096)
BATCHES = (1, 2, 4, 8, 16)
PREFILLS = (64, 128, 256, 512, 1024, 2048)
PEER_FILES = {"llama.cpp F32": "fp32", "llama.cpp BF16": "bf16", "llama.cpp Q8_0": "int8", "litgpt bf16": "bf16"}


def reading(count: int) -> Callable[[], Any]:
    """Reads so many bytes."""
    memory = torch.randn(count // 4)  # random: a hypervisor may share pages that are equal
    return memory.sum


def product(dtype: torch.dtype) -> Callable[[], Any]:
    """A matrix product of PRODUCT operations."""
    left, right = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    return lambda: left @ right


PRODUCT = 2 * 2048**3


def limit(model: PreTrainedModel, batch: int, new: int = NEW_TOKENS) -> Callable[[], float]:
    """Seconds in which the weights can be read once for each token, or a prompt's products be done (batch 0)."""
    if batch:
        # For each token, as long as decoding takes: a shared machine may give its full speed for a moment only.
        if weight_bytes(model) > 1 << 32:  # in place: a small buffer may lie in pages that are quicker to find
            read = lambda: [weight.view(torch.float32).sum() for weight in weights_read(model)]  # noqa: E731
        else:
            read = reading(weight_bytes(model))
        return lambda: statistics.median(seconds(read) for _ in range(max(new, STEPS))) * new
    operations = 2 * PREFILL_TOKENS * sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    multiply = product(model.dtype)
    return lambda: min(seconds(multiply) for _ in range(8)) * operations / PRODUCT


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Peer:
    """Another environment's process (`peers.py`), which does as it is told and says how long it took."""

    def __init__(self, python: str, gguf: Path):
        command = [python, str(ROOT / "benchmarks" / "peers.py"), str(gguf)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.missing: dict[str, str] = self.ask("missing")["missing"]

    def ask(self, work: str, name: str = "", **numbers: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"work": work, "name": name, **numbers}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the peers' process ended")
        return json.loads(line)

    def columns(self, kinds: set[str], batch: int) -> dict[str, Callable[[], float]]:
        numbers = {"prompt": PROMPT_TOKENS, "new": NEW_TOKENS} if batch else {"prompt": PREFILL_TOKENS, "new": 0}

        def timed(name: str) -> Callable[[], float]:
            return lambda: self.ask("run", name, **numbers)["seconds"]

        return {name: timed(name) for name, kind in PEER_FILES.items() if kind in kinds and name not in self.missing}


def turns(columns: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, float]]:
    """Median, least and most seconds of each; in every second round the order is turned."""
    times: dict[str, list[float]] = {name: [] for name in columns}
    for work in columns.values():
        work()
    for number in range(rounds):
        for name in list(columns) if number % 2 else list(reversed(columns)):
            gc.collect()
            times[name].append(columns[name]())
    return {name: {"median": statistics.median(t), "least": min(t), "most": max(t)} for name, t in times.items()}


def prepared(model: LlamaReproForCausalLM, work: Callable[[], Any], *, int8: bool) -> Callable[[], float]:
    """Seconds of the work on a prepared model, which is restored afterwards; preparing is not counted."""
    before: dict[str, Any] = {}

    def run() -> float:
        if not before:
            before["forward"] = optimize(model, int8=int8).forward
        model.forward = before["forward"]
        try:
            return seconds(work)
        finally:
            restore(model)

    return run


def columns(
    upstream: PreTrainedModel, ours: Any, peers: Peer | None, dtype: str, batch: int, best: bool
) -> dict[str, Callable[[], float]]:
    """Each contestant's seconds for decoding a batch, or for prefill (batch 0)."""

    def timed(work: Callable[[], Any]) -> Callable[[], float]:
        return lambda: seconds(work)

    own = decode(ours, batch, NEW_TOKENS) if batch else prefill(ours)
    found = {
        "limit": limit(ours, batch),
        "upstream": timed(decode(upstream, batch, NEW_TOKENS) if batch else prefill(upstream)),
        "ours": timed(own),
    }
    if batch and best:
        compiled = CompileConfig(fullgraph=False, dynamic=False, mode="default")
        compiled._compile_all_devices = True  # type: ignore[assignment]  # else transformers compiles on accelerators only
        how: dict[str, Any] = {"cache_implementation": "static", "compile_config": compiled}
        found["upstream, static cache, compiled"] = timed(decode(upstream, batch, NEW_TOKENS, **how))
    found["ours, prepared"] = prepared(ours, own, int8=False)
    if batch:
        found["ours, int8"] = prepared(ours, own, int8=True)
    if peers is not None and batch < 2:
        found.update(peers.columns({dtype, "int8"} if dtype == "bf16" else {dtype}, batch))
    return found


def parts_of(batch: int) -> dict[str, dict[str, float]]:
    """Where the time of a step goes, in bf16; prints the table."""
    found = parts(*models(torch.bfloat16), batch, 3)
    show_parts(found, f"batch {batch}, bf16")
    return found


def weights_read(model: PreTrainedModel) -> list[torch.Tensor]:
    """What a token reads: all but the embedding, unless it is the output matrix too."""
    named = model.named_parameters()
    return [p.detach() for name, p in named if "embed_tokens" not in name or model.config.tie_word_embeddings]


def weight_bytes(model: PreTrainedModel) -> int:
    return sum(weight.nbytes for weight in weights_read(model))


def main_table(arguments: argparse.Namespace, peers: Peer | None) -> list[dict[str, Any]]:
    figures = []
    for name, dtype in DTYPES.items():
        upstream, ours = models(dtype)
        for batch in (1, 8, 0):
            contestants = columns(upstream, ours, peers, name, batch, not arguments.no_compile)
            result = turns(contestants, arguments.rounds)
            title = f"decode, batch {batch}, {name}" if batch else f"prefill of {PREFILL_TOKENS}, {name}"
            tokens = NEW_TOKENS * batch or PREFILL_TOKENS
            show(title, result, tokens, dtype.itemsize)
            figures.append({"work": title, "tokens": tokens, "seconds": result})
        figures.append(with_adapters(upstream, ours, arguments.rounds, name))
    return figures


def with_adapters(upstream: PreTrainedModel, ours: Any, rounds: int, dtype: str) -> dict[str, Any]:
    """Decoding with a LoRA adapter attached, of rank 8 on q_proj and v_proj; the models keep it."""
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    runs = {"limit": limit(ours, 1)}
    for name, model in {"upstream": upstream, "ours": ours}.items():
        run = decode(peft.get_peft_model(model, config).eval(), 1, NEW_TOKENS)
        runs[name] = functools.partial(seconds, run)
    result, title = turns(runs, rounds), f"decode, batch 1, {dtype}, adapter attached"
    show(title, result, NEW_TOKENS, DTYPES[dtype].itemsize)
    return {"work": title, "tokens": NEW_TOKENS, "seconds": result}


def show(title: str, result: dict[str, dict[str, float]], tokens: int, itemsize: int) -> None:
    print(f"\n| {title} | tokens/s | x upstream | of the limit | least to most, s |\n|---|---|---|---|---|")
    for name, time_ in result.items():
        share = result["limit"]["median"] / time_["median"] / (itemsize if "int8" in name or "Q8_0" in name else 1)
        ratio = result["upstream"]["median"] / time_["median"]
        spread = f"{time_['least']:.2f} to {time_['most']:.2f}"
        print(f"| {name} | {tokens / time_['median']:.1f} | {ratio:.2f} | {share:.0%} | {spread} |", flush=True)


@torch.no_grad()
def at_context(model: PreTrainedModel, context: int, steps: int = STEPS) -> float:
    """Median seconds of a token that is decoded after `context` others."""
    cache = DynamicCache(config=model.config)
    model(input_ids=_tokens(model, 1, context), use_cache=True, logits_to_keep=1, **{CACHE: cache})
    one = _tokens(model, 1, 1)
    step: Callable[[], Any] = lambda: model(input_ids=one, use_cache=True, **{CACHE: cache})  # noqa: E731
    return statistics.median([seconds(step) for _ in range(steps)][1:])


def scaling(dtype: torch.dtype) -> dict[str, dict[str, list[float]]]:
    """Milliseconds a token by context and by batch, and a prompt's tokens a second by its length."""
    upstream, ours = models(dtype)
    found: dict[str, dict[str, list[float]]] = {"context": {}, "batch": {}, "prefill": {}}
    for name, model in {"upstream": upstream, "ours": ours, "prepared": ours}.items():
        if name == "prepared":
            optimize(ours)
        found["context"][name] = [1e3 * at_context(model, context) for context in CONTEXTS]
        found["batch"][name] = [1e3 * min(seconds(decode(model, batch, 32)) for _ in "12") / 32 for batch in BATCHES]
        if name != "prepared":
            found["prefill"][name] = [length / at_length(model, length) for length in PREFILLS]
        print(f"| {name} |", {what: [round(v, 1) for v in by.get(name, ())] for what, by in found.items()}, flush=True)
    return found


@torch.no_grad()
def at_length(model: PreTrainedModel, length: int) -> float:
    """Least seconds of three passes over a prompt."""
    prompt = _tokens(model, 1, length)
    return min(seconds(lambda: model(prompt, logits_to_keep=1)) for _ in range(3))


def picture(found: dict[str, dict[str, list[float]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    panels = {
        "context": (CONTEXTS, "tokens of context", "ms a token, bf16"),
        "batch": (BATCHES, "batch", "ms a step, bf16"),
        "prefill": (PREFILLS, "tokens of the prompt", "tokens/s, bf16"),
    }
    for axis, (what, (places, across, up)) in zip(axes, panels.items(), strict=True):
        for name, values in found[what].items():
            axis.plot(places, values, marker="o", label=name)
        axis.set(xlabel=across, ylabel=up, ylim=(0, None), xscale="log", xticks=places, xticklabels=places)
        axis.minorticks_off()
    axes[0].legend()
    figure.savefig(file, dpi=110)


def quality(characters: int = 50_000) -> dict[str, Any]:
    """Perplexity on English text (Python's own documentation), and a greedy answer, in bf16 and with int8 weights."""
    from pydoc_data.topics import topics

    _, model = models(torch.bfloat16)
    tokenizer = tokenizer_of_demo()
    text = "\n".join(topics[name] for name in sorted(topics))[:characters]
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    chat = [{"role": "user", "content": "Why is the sky blue?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found: dict[str, Any] = {}
    for name, int8 in (("bf16", False), ("int8", True)):
        optimize(model, int8=int8)
        answer = model.generate(**prompt, max_new_tokens=48, do_sample=False, pad_token_id=0)
        found[name] = {
            "perplexity": perplexity(model, ids),
            "answer": tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :]),
        }
        print(f"| {name} | perplexity {found[name]['perplexity']:.4f} | {found[name]['answer']!r} |", flush=True)
    restore(model)
    return found


def tokenizer_of_demo() -> Any:
    from examples.demo import bring_model

    gguf = bring_model()
    return transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: torch.Tensor, window: int = 512, piece: int = 16) -> float:
    """Of windows of tokens that are read few at a time: longer inputs are read with the model's own weights."""
    total, count = 0.0, 0
    for part in ids.split(window, dim=1):
        cache = DynamicCache(config=model.config)
        logits = torch.cat([model(input_ids=some, **{CACHE: cache}).logits for some in part.split(piece, dim=1)], 1)
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), part[0, 1:], reduction="sum")
        total, count = total + loss.item(), count + part.shape[1] - 1
    return math.exp(total / count)


def at_size(rounds: int) -> list[dict[str, Any]]:
    """A random 7B in bf16: one token, prepared and in int8, and a prompt, beside the limits."""
    config = LlamaReproConfig(**PAPER_SIZES["llama-7b"])
    with torch.device("meta"):
        empty = LlamaReproForCausalLM(config).bfloat16()
    model = empty.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.data.view(torch.int16).random_(0x3800, 0x3C00)  # small positive numbers, written at once
    figures = []
    decoding, prompt = limit(model, 1, new=1), limit(model, 0)
    for name, least, work, prepare in (
        ("decode", decoding, lambda: at_context(model, 8, STEPS), None),
        ("decode, prepared", decoding, lambda: at_context(model, 8, STEPS), False),
        ("prefill of 512", prompt, lambda: seconds(prefill(model)), None),
        ("decode, int8", lambda: decoding() / 2, lambda: at_context(model, 8, STEPS), True),
    ):
        if prepare is not None:
            optimize(model, int8=prepare)
        result = turns({"limit": least, name: work}, rounds)
        restore(model)
        took, bound = result[name]["median"], result["limit"]["median"]
        print(f"| 7B, {name} | {took:.3f} s | limit {bound:.3f} s | {bound / took:.0%} |", flush=True)
        figures.append({"work": name, "seconds": result})
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--peers", metavar="PYTHON", help="a Python that has llama-cpp-python and litgpt")
    parser.add_argument("--no-compile", action="store_true", help="without upstream's compiled decoding")
    parser.add_argument("--size", choices=("smollm2", "7b"), default="smollm2", help="the model (default: smollm2)")
    parser.add_argument("--no-scaling", action="store_true", help="without the picture docs/performance.png")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    print(f"{machine()}; {'LLaMA 7B, random' if arguments.size == '7b' else 'SmolLM2-135M'}")
    report: dict[str, Any] = {"machine": machine()}
    if arguments.size == "7b":
        report["7b"] = at_size(3)
    else:
        peers = None
        if arguments.peers:
            from examples.demo import bring_model

            peers = Peer(arguments.peers, bring_model())
            for name, reason in peers.missing.items():
                print(f"without {name}: {reason}")
        report["figures"] = main_table(arguments, peers)
        report["parts"] = {f"batch {batch}, bf16": parts_of(batch) for batch in (1, 8)}
        report["quality"] = quality()
        if not arguments.no_scaling:
            report["scaling"] = scaling(torch.bfloat16)
            picture(report["scaling"], ROOT / "docs" / "performance.png")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Our model beside transformers' Llama on the same weights: decoding, prefill, LoRA step; bf16 and fp32.

    python benchmarks/model.py

The two take turns within one run, so that a machine that slows down slows both. Printed: the median of each, the ratio
(median over the rounds of upstream's time / ours: above 1, ours is faster) and the quartiles of that ratio.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedModel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from examples.demo import bring_model  # noqa: E402
from hf_llama_repro import LlamaReproConfig, LlamaReproForCausalLM  # noqa: E402

PROMPT_TOKENS, NEW_TOKENS = 64, 64
PREFILL_TOKENS = 512
LORA_BATCH, LORA_TOKENS = 4, 256
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def decode(model: PreTrainedModel, batch: int = 1, new: int = NEW_TOKENS, **how: Any) -> Callable[[], Any]:
    """Greedy `generate` from a prompt; tokens counted are the new ones. `how`: more settings of `generate`."""
    prompt = _tokens(model, batch, PROMPT_TOKENS)
    # No token ends the text; `min_new_tokens` would search the vocabulary for each token, half a millisecond.
    never = model.config.vocab_size
    settings = {"do_sample": False, "max_new_tokens": new, "eos_token_id": never, "pad_token_id": 0, **how}
    generate: Any = model.generate
    return lambda: generate(prompt, attention_mask=torch.ones_like(prompt), **settings)


def prefill(model: PreTrainedModel) -> Callable[[], Any]:
    """One forward over a long prompt, as `generate` does it: with a cache, logits of the last token only."""
    prompt = _tokens(model, 1, PREFILL_TOKENS)

    @torch.no_grad()
    def run() -> Any:
        return model(prompt, use_cache=True, logits_to_keep=1)

    return run


def lora_step(model: PreTrainedModel) -> Callable[[], Any]:
    """Forward and backward of a batch; adapters of rank 8 on q_proj and v_proj."""
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).train()
    batch = _tokens(model, LORA_BATCH, LORA_TOKENS)

    def run() -> None:
        adapted(batch, labels=batch, use_cache=False).loss.backward()
        adapted.zero_grad()

    return run


# Name -> (what makes the work, tokens in one go). LoRA last, because it changes the model.
WORK = {
    "decode": (decode, NEW_TOKENS),
    "prefill": (prefill, PREFILL_TOKENS),
    "LoRA step": (lora_step, LORA_BATCH * LORA_TOKENS),
}


def _tokens(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(100, model.config.vocab_size, (batch, length), generator=generator).to(model.device)


def models(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Stock Llama and ours with the same trained weights."""
    gguf = bring_model()
    # Loaded in fp32 and cast, which is what the loader recommends.
    upstream: Any = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    upstream.to(dtype).eval()
    fields = {k: v for k, v in upstream.config.to_dict().items() if k not in ("model_type", "architectures")}
    ours: Any = LlamaReproForCausalLM(LlamaReproConfig(**fields))
    ours.to(dtype).eval().load_state_dict(upstream.state_dict())
    return upstream, ours


def compare(upstream: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Seconds of each, taking turns; who begins changes every round."""
    times: dict[str, list[float]] = {"upstream": [], "ours": []}
    for work in (upstream, ours):
        work()  # warm up
    for number in range(rounds):
        turn = [("upstream", upstream), ("ours", ours)]
        for name, work in turn if number % 2 else reversed(turn):
            gc.collect()
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    ratios = [theirs / own for theirs, own in zip(times["upstream"], times["ours"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "upstream": statistics.median(times["upstream"]),
        "ours": statistics.median(times["ours"]),
        "ratio": median,
        "quartiles": (low, high),
    }


def machine() -> str:
    """One line on what the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        cpu = next(
            (line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), cpu
        )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return f"{cpu}, {torch.get_num_threads()} threads; {versions}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each (default: 15)")
    parser.add_argument("--only", choices=WORK, help="one of the comparisons")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    print(f"{machine()}; SmolLM2-135M", end="\n\n")
    print("| | dtype | upstream, tokens/s | ours, tokens/s | ratio | quartiles |\n|---|---|---|---|---|---|")
    figures = []
    for dtype_name, dtype in DTYPES.items():
        upstream, ours = models(dtype)
        for name, (make, tokens) in WORK.items():
            if arguments.only not in (None, name):
                continue
            result = compare(make(upstream), make(ours), arguments.rounds)
            low, high = result["quartiles"]
            print(
                f"| {name} | {dtype_name} | {tokens / result['upstream']:.1f} | {tokens / result['ours']:.1f} "
                f"| {result['ratio']:.2f} | {low:.2f} to {high:.2f} |",
                flush=True,
            )
            figures.append({"work": name, "dtype": dtype_name, "tokens": tokens, **result})
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "figures": figures}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

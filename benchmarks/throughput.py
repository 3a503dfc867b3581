"""Thirty-two questions of mixed lengths at once: padded `generate` beside continuous batching (`generate_batch`).

    python benchmarks/throughput.py

Real questions and real weights (SmolLM2-135M-Instruct): each answer ends by itself or at the most tokens allowed.
Counted are the answers' tokens, not the padding; all take turns in one run.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from inference import prepared, seconds, tokenizer_of_demo, turns  # noqa: E402
from model import DTYPES, machine, models  # noqa: E402

REQUESTS, MOST_NEW_TOKENS = 32, 128
RECORDS = ROOT / "finetune" / "data" / "demo.jsonl"


def questions(tokenizer: Any) -> list[list[int]]:
    """Token ids of each question in the chat template: shorter and longer ones, every fourth with a page to read."""
    from pydoc_data.topics import topics

    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    pages = sorted(topics.values(), key=len)[-REQUESTS:]
    found = []
    for number in range(REQUESTS):
        record = records[number % len(records)]
        text = record["instruction"] if number % 4 else f"Summarize in one sentence: {pages[number][:1500]}"
        chat = [{"role": "user", "content": text}]
        found.append(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])
    return found


def settings(tokenizer: Any) -> dict[str, Any]:
    return {
        "do_sample": False,
        "max_new_tokens": MOST_NEW_TOKENS,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id or 0,
    }


def padded(model: PreTrainedModel, tokenizer: Any, asked: list[list[int]], at_a_time: int) -> list[list[int]]:
    """The answers by `generate`, of so many questions at a time, padded on the left."""
    answers, how = [], settings(tokenizer)
    for start in range(0, len(asked), at_a_time):
        part = asked[start : start + at_a_time]
        longest = max(map(len, part))
        ids = torch.tensor([[how["pad_token_id"]] * (longest - len(one)) + one for one in part])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in part])
        generate: Any = model.generate
        answers += generate(ids, attention_mask=mask, **how)[:, longest:].tolist()
    return [_until(answer, how["eos_token_id"]) for answer in answers]


def _until(answer: list[int], eos: int) -> list[int]:
    return answer[: answer.index(eos) + 1] if eos in answer else answer


def continuous(model: Any, tokenizer: Any, asked: list[list[int]]) -> list[list[int]]:
    """The answers by `generate_batch`: who is done makes room for who waits."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        results = model.generate_batch(
            asked,
            generation_config=GenerationConfig(**settings(tokenizer)),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=REQUESTS * 3, max_batch_tokens=512),
        )
    finally:
        model.set_attn_implementation(before)
    return [result.generated_tokens for result in results.values()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="(default: bf16)")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    tokenizer = tokenizer_of_demo()
    upstream, ours = models(DTYPES[arguments.dtype])
    asked = questions(tokenizer)
    lengths = sorted(map(len, asked))
    print(f"{machine()}; SmolLM2-135M, {arguments.dtype}; {REQUESTS} prompts of {lengths[0]} to {lengths[-1]} tokens")
    counts: dict[str, int] = {}

    def timed(name: str, work: Callable[[], list[list[int]]]) -> Callable[[], float]:
        def run() -> float:
            return seconds(lambda: counts.__setitem__(name, sum(map(len, work()))))

        return run

    few = timed("ours, prepared, padded, 16 at a time", lambda: padded(ours, tokenizer, asked, REQUESTS // 2))
    columns = {
        "upstream, padded": timed("upstream, padded", lambda: padded(upstream, tokenizer, asked, REQUESTS)),
        "upstream, generate_batch": timed("upstream, generate_batch", lambda: continuous(upstream, tokenizer, asked)),
        "ours, padded": timed("ours, padded", lambda: padded(ours, tokenizer, asked, REQUESTS)),
        "ours, prepared, padded, 16 at a time": prepared(ours, few, int8=False),
        "ours, generate_batch": timed("ours, generate_batch", lambda: continuous(ours, tokenizer, asked)),
    }
    print("\n| | tokens | tokens/s | x upstream, padded | least to most, s |\n|---|---|---|---|---|")
    result = turns(columns, arguments.rounds)
    for name, time in result.items():
        rate, base = counts[name] / time["median"], counts["upstream, padded"] / result["upstream, padded"]["median"]
        spread = f"{time['least']:.1f} to {time['most']:.1f}"
        print(f"| {name} | {counts[name]} | {rate:.1f} | {rate / base:.2f} | {spread} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How many bits a byte of held-out text costs: by the model, and by xz, which has no model."""

import lzma
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from .prepared import Tokens
from .recipe import Recipe
from .sources import documents, is_held_out

IGNORED = -100
# The level of `xz -9`: a dictionary of 64 MiB.
XZ_LEVEL = 9


def windows(ids: np.ndarray, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets, each (length,), in which every token but the first is a target once.

    After the first window half of each is context alone: no token is predicted from less than half of the length, but
    at the beginning. The last window is filled up with targets that do not count.
    """
    stride = length - length // 2
    begin = scored = 0
    while scored < len(ids) - 1:
        part = ids[begin : begin + length + 1].astype(np.int64)
        inputs, targets = np.zeros(length, np.int64), np.full(length, IGNORED, np.int64)
        inputs[: len(part) - 1], targets[: len(part) - 1] = part[:-1], part[1:]
        targets[: scored - begin] = IGNORED
        yield inputs, targets
        scored = begin + len(part) - 1
        begin += stride


def first_documents(tokens: Tokens, most: int) -> tuple[np.ndarray, int]:
    """Tokens of the first documents, up to the one that reaches `most`, and the bytes of their text."""
    count = int(np.searchsorted(tokens.ends, most)) + 1
    count = min(count, len(tokens))
    return tokens.ids[: int(tokens.ends[count - 1])] if count else tokens.ids, int(tokens.num_bytes[:count].sum())


def next_token_loss(model: Any, inputs: torch.Tensor, targets: torch.Tensor, **options: int) -> torch.Tensor:
    """Cross-entropy, in nats, of targets (batch, seq) that stand in their places: the mean of those that count.

    `num_items_in_batch=1` makes it their sum.
    """
    # The loss without logits takes gradients in its forward pass: of no use where none are wanted, and under FSDP2 each
    # process would exchange weights as often as it has blocks of rows.
    skip_logits = torch.is_grad_enabled() and not isinstance(model, FSDPModule)
    options = {"skip_logits": skip_logits, "use_cache": False, **options}
    return model(input_ids=inputs, labels=targets, shift_labels=targets, **options).loss


@torch.no_grad()
def bits(model: Any, accelerator: Any, ids: np.ndarray, recipe: Recipe) -> float:
    """Bits that the model spends on the tokens, EOS and BOS between documents among them; all processes together."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    all_windows = list(windows(ids, recipe.context_length))
    rows, processes = recipe.micro_batch_size, accelerator.num_processes
    for start in range(0, len(all_windows), rows * processes):
        mine = all_windows[start + accelerator.process_index * rows :][:rows]
        # Every process makes as many passes, of one shape: the model may be spread over them, or compiled.
        empty = (np.zeros(recipe.context_length, np.int64), np.full(recipe.context_length, IGNORED, np.int64))
        mine += [empty] * (rows - len(mine))
        inputs, targets = (torch.from_numpy(np.stack(part)).to(accelerator.device) for part in zip(*mine, strict=True))
        # Not compiled: a compiler would take longer than these few passes.
        with torch.compiler.set_stance("force_eager"):
            total += next_token_loss(model, inputs, targets, num_items_in_batch=1).double().cpu()
    model.train()
    return float(accelerator.reduce(total.to(accelerator.device), "sum")) / math.log(2)


def bits_per_byte(
    model: Any, accelerator: Any, held_out: dict[str, Tokens], recipe: Recipe, most: int
) -> dict[str, tuple[float, int]]:
    """Of each source that has held-out text, of about `most` tokens in all: the bits per byte, and the bytes."""
    available = sum(len(tokens.ids) for tokens in held_out.values())
    found = {}
    for name, tokens in held_out.items():
        ids, num_bytes = first_documents(tokens, math.ceil(len(tokens.ids) * min(1.0, most / max(1, available))))
        if num_bytes:
            found[name] = bits(model, accelerator, ids, recipe) / num_bytes, num_bytes
    return found


def together(found: dict[str, tuple[float, int]]) -> float:
    """Bits per byte of all sources' held-out text."""
    num_bytes = sum(count for _, count in found.values())
    return sum(rate * count for rate, count in found.values()) / num_bytes if num_bytes else math.nan


def xz_bits_per_byte(recipe: Recipe, tell: Callable[[str], None]) -> dict[str, tuple[float, float]]:
    """Of each source's held-out text, and of all: bits per byte by `xz -9`, and by it after all the training text.

    The second is what the held-out text adds to the size, where the training text stands before it.
    """
    train, held_out = bytearray(), {}
    for source in recipe.sources:
        kept = bytearray()
        for text in documents(source):
            (kept if is_held_out(text, recipe.held_out) else train).extend(text.encode("utf-8", "surrogatepass"))
        held_out[source.name] = bytes(kept)
    tell(f"xz          compresses {len(train):,} bytes of training text")
    before = _compressed(bytes(train))
    texts = {name: text for name, text in held_out.items() if text}
    texts["all"] = b"".join(texts.values())
    return {
        name: (8 * _compressed(text) / len(text), 8 * (_compressed(bytes(train) + text) - before) / len(text))
        for name, text in texts.items()
    }


def _compressed(text: bytes) -> int:
    return len(lzma.compress(text, preset=XZ_LEVEL))

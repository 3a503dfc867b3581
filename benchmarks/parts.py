"""Where the time of decoding goes, by part: upstream's Llama, ours, and ours prepared, for `inference.py`.

Each part's own time is taken by a clock around it, which adds some 2 ms a token to upstream's and to ours.
"""

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from model import decode
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama import modeling_llama

from hf_llama_repro import cpu_kernel, modeling_llama_repro, optimize, restore

MODULES = {
    "Linear": "linear layers",
    "RMSNorm": "norms",
    "MLP": "SwiGLU between the linear layers",
    "RotaryEmbedding": "rotary embedding",
    "Attention": "attention",
}
"""The end of a module's class name, and its part; what a module calls has parts of its own."""
NEW_TOKENS = 128
PARTS = (*MODULES.values(), "cache", "compiled code", "rest of the model", "generate's loop", "prompt")


class Clock:
    """Seconds by part; what runs inside of a part counts for the innermost one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    def around(self, part: str | Callable[..., str], function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if "prompt" in self._running:
                return function(*args, **kwargs)
            self._turn(part if isinstance(part, str) else part(*args, **kwargs))
            try:
                return function(*args, **kwargs)
            finally:
                self._turn(None)

        return timed

    def _turn(self, part: str | None) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now
        if part is None:
            self._running.pop()
        else:
            self._running.append(part)


def _prompt_or_token(*args: Any, input_ids: Any = None, **kwargs: Any) -> str:
    return "prompt" if input_ids is not None and input_ids.shape[1] > 1 else "rest of the model"


@contextmanager
def clocked(model: PreTrainedModel, clock: Clock) -> Iterator[None]:
    """While this lasts, the clock runs around each part of the model."""
    with ExitStack() as stack:
        for owner, name in ((modeling_llama, "apply_rotary_pos_emb"), (modeling_llama_repro, "apply_rotary")):
            stack.enter_context(mock.patch.object(owner, name, clock.around("rotary embedding", getattr(owner, name))))
        stack.enter_context(mock.patch.object(DynamicCache, "update", clock.around("cache", DynamicCache.update)))
        prepared = "forward" in model.__dict__
        for module in [] if prepared else model.modules():
            part = _part(module)
            if part is not None:
                stack.enter_context(mock.patch.object(module, "forward", clock.around(part, module.forward)))
        if prepared:
            library = cpu_kernel.load()
            call = clock.around("compiled code", library.llama_repro_forward)
            stack.enter_context(mock.patch.object(library, "llama_repro_forward", call))
        forward = clock.around(_prompt_or_token, model.forward)
        stack.enter_context(mock.patch.object(model, "forward", forward))
        yield


def _part(module: nn.Module) -> str | None:
    names = [kind.__name__ for kind in type(module).__mro__]
    return next((part for end, part in MODULES.items() if any(name.endswith(end) for name in names)), None)


def parts(upstream: PreTrainedModel, ours: Any, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds a step by part, of `generate` as `decode` calls it: the median of the rounds of each part."""
    taken: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(rounds + 1):
        for name, model in (("upstream", upstream), ("ours", ours), ("ours, prepared", ours)):
            if name == "ours, prepared":
                optimize(ours)
            run, clock = decode(model, batch, NEW_TOKENS), Clock()
            if not number:
                run()  # fast paths are taken on in the first pass
                continue
            with clocked(model, clock):
                clock.around("generate's loop", run)()
            taken[name].append(clock.seconds)
        restore(ours)
    return {
        name: {part: 1e3 / NEW_TOKENS * statistics.median(times[part] for times in rounds_) for part in PARTS}
        for name, rounds_ in taken.items()
    }


def show_parts(found: dict[str, dict[str, float]], title: str) -> None:
    print(f"\n| {title}, ms a step | " + " | ".join(found) + " |\n|---|" + "---|" * len(found))
    for part in (*PARTS, "all"):
        values = [by.get(part, sum(by.values())) for by in found.values()]
        print(f"| {part} | " + " | ".join(f"{value:.2f}" if value else "" for value in values) + " |", flush=True)

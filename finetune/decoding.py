"""One answer while it is made: a step at a time, so that several can take turns on one model.

The tokens are those of transformers' `generate` with the same settings and seed.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_llama_repro.errors import CheckpointError, InputError
from hf_llama_repro.modeling_llama_repro import CACHE

from .template import Turn

PROMPT_STEP = 128
"""Tokens of a prompt that are read in one step; a long prompt read at once would keep the other answers waiting."""


class Prompts(Protocol):
    """How a model is asked: by a prompt template, or by its tokenizer's chat template."""

    ends: frozenset[int]
    """Tokens after which an answer is complete."""
    byte_tokens: frozenset[int]
    """Tokens that stand for one byte: what they spell together is known when the last of them is there."""
    takes_system: bool
    """Whether there is a place for a system prompt."""
    takes_turns: bool
    """Whether a conversation can go on after the first answer."""

    def ids(self, turns: tuple[Turn, ...], system: str) -> list[int]:
        """The prompt that asks for the last turn's response. Raises `InputError` where it cannot be asked."""
        ...

    def text(self, prompt: list[int], tokens: list[int]) -> str:
        """The text of an answer's tokens after that prompt."""
        ...


def byte_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """LLaMA's <0x00> to <0xFF>; other tokenizers have none."""
    found = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token for token in found if token is not None)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises `InputError` for what is out of range."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that make up this share."""
    top_k: int = 0
    """Sample among this many of the likeliest tokens; 0: among all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that are there already become less likely."""
    seed: int | None = 0
    """None: another one for every answer."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, whole = getattr(self, field.name), field.name in ("max_new_tokens", "top_k", "seed")
            if value is None and field.name == "seed":
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or (whole and value != int(value)):
                raise InputError(f"{field.name} must be a {'whole ' * whole}number, got {value!r}")
        for name, right, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature <= 100, "0 to 100"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("repetition_penalty", 0.1 <= self.repetition_penalty <= 10, "0.1 to 10"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "0 or more, of 63 bits"),
        ):
            if not right:
                raise InputError(f"{name}={getattr(self, name)} is out of range: {allowed}")

    def processors(self) -> LogitsProcessorList:
        """What changes the logits, in the order of `generate`."""
        steps = LogitsProcessorList()
        if self.repetition_penalty != 1:
            steps.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature:
            if self.temperature != 1:
                steps.append(TemperatureLogitsWarper(float(self.temperature)))
            if self.top_k:
                steps.append(TopKLogitsWarper(int(self.top_k)))
            if self.top_p < 1:
                steps.append(TopPLogitsWarper(float(self.top_p)))
        return steps


class Answer:
    """An answer that `step` makes longer until `end` says why it is complete."""

    def __init__(self, prompts: Prompts, prompt: list[int], sampling: Sampling, *, with_adapter: bool = True):
        self.prompts, self.prompt, self.sampling, self.with_adapter = prompts, prompt, sampling, with_adapter
        self.tokens: list[int] = []
        self.end: str | None = None
        """None while it is made; "complete", "length", "stopped" or "failed"."""
        self.error: Exception | None = None
        self._processors = sampling.processors()
        self._cache: Any = None
        self._read = 0  # tokens of the prompt that are in the cache
        self._generator: torch.Generator | None = None

    @property
    def text(self) -> str:
        """What there is so far, without what may still change: it begins with what it was before."""
        is_complete, tokens = self.end is not None, self.tokens[:]
        while not is_complete and tokens and tokens[-1] in self.prompts.byte_tokens:
            tokens.pop()
        text = self.prompts.text(self.prompt, tokens)
        # Of a character whose bytes are not all there.
        return text if is_complete else text.rstrip("\ufffd")

    def stop(self) -> None:
        """What there is stays."""
        self._finish("stopped")

    def fail(self, error: Exception) -> None:
        self.error = error
        self._finish("failed")

    @torch.no_grad()
    def step(self, model: Any) -> None:
        """Reads the next part of the prompt, or the last token, and chooses a token after the whole prompt."""
        if self.end is not None:
            return
        cache = self._cache  # `stop`, from another thread, takes it away
        if cache is None:
            cache = self._cache = DynamicCache(config=model.config)
        given = self.prompt[self._read : self._read + PROMPT_STEP] or self.tokens[-1:]
        self._read = min(self._read + PROMPT_STEP, len(self.prompt))
        ids = torch.tensor([given], device=model.device)
        logits = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits[:, -1]
        if self._read < len(self.prompt) or self.end is not None:
            return
        token = self._choose(logits)
        if token in self.prompts.ends:
            return self._finish("complete")
        self.tokens.append(token)
        room = model.config.max_position_embeddings - len(self.prompt)
        if len(self.tokens) >= min(self.sampling.max_new_tokens, room):
            self._finish("length")

    def _choose(self, logits: torch.Tensor) -> int:
        """A token by its logits (1, vocab_size)."""
        if not torch.isfinite(logits).all():
            raise CheckpointError(f"the model computes NaN or infinity in {logits.dtype}: try another dtype")
        so_far: Any = torch.tensor([self.prompt + self.tokens], device=logits.device)
        scores = self._processors(so_far, logits.float())
        if not self.sampling.temperature:
            return int(scores.argmax(-1))
        if self._generator is None:
            self._generator = torch.Generator(logits.device)
            if self.sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(int(self.sampling.seed))
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))

    def _finish(self, end: str) -> None:
        """The first end counts; the cache is given back."""
        if self.end is None:
            self.end = end
        self._cache = None

"""What the page and the terminal talk to: a shared model, the way it is asked, and the limits."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_llama_repro.errors import CheckpointError, InputError

from .answering import InstructionPrompts, ask, check_folder, find_template, load_answering, open_tokenizer
from .chat_prompt import ChatPrompts
from .decoding import Answer, Prompts, Sampling
from .encoding import Encoder
from .model import read_config
from .shared_model import SharedModel
from .template import Turn, load_template

LETTERS_PER_TOKEN = 8
"""A text with more letters than this for each token of the context is refused before it is encoded."""


@dataclass
class Assistant:
    """Answers whoever asks, several at the same time."""

    model: SharedModel
    prompts: Prompts
    is_chat: bool
    """Whether it holds a conversation; else every instruction stands by itself."""
    sampling: Sampling
    """What is used where nothing else is asked for."""
    name: str
    adapter: str = ""

    @property
    def context(self) -> int:
        return self.model.model.config.max_position_embeddings

    @property
    def most_letters(self) -> int:
        """Of all texts of a question together."""
        return self.context * LETTERS_PER_TOKEN

    def ask(
        self, turns: tuple[Turn, ...], *, system: str = "", sampling: Sampling | None = None, with_adapter: bool = True
    ) -> Answer:
        """The answer to the last turn, not begun. Raises `InputError` saying what is wrong with the question."""
        self._check(turns, system)
        settings = sampling or self.sampling
        return ask(self.prompts, turns, system.strip(), settings, context=self.context, with_adapter=with_adapter)

    def close(self) -> None:
        self.model.close()

    def stream(self, *answers: Answer, pause: float = 0.0) -> Iterator[None]:
        """Makes the answers; see `SharedModel.stream`."""
        return self.model.stream(*answers, pause=pause)

    def _check(self, turns: tuple[Turn, ...], system: str) -> None:
        if not turns[-1].instruction.strip():
            raise InputError(f"the {'message' if self.is_chat else 'instruction'} is empty: write one")
        letters = len(system) + sum(len(text) for turn in turns for text in turn)
        if letters > self.most_letters:
            what = "the conversation has" if len(turns) > 1 else "the question has"
            raise InputError(
                f"{what} {letters:,} characters, at most {self.most_letters:,} are allowed: {self._remedy}"
            )
        if len(turns) > 1 and not self.prompts.takes_turns:
            raise InputError("the template is for one turn: begin anew")

    @property
    def _remedy(self) -> str:
        return "shorten it, or clear the conversation" if self.is_chat else "shorten it"


def make_assistant(arguments: argparse.Namespace) -> Assistant:
    """Loads what the command line names. Raises `InputError` for what cannot be used, before the weights are read."""
    if not 1 <= arguments.at_once <= 64:
        raise InputError(f"--at-once must be 1 to 64, got {arguments.at_once}")
    check_folder(arguments.model)
    read_config(arguments.model)
    prompts, is_chat = make_prompts(arguments.model, arguments.adapter, arguments.template, arguments.mode)
    sampling = default_sampling(arguments)
    model = load_answering(
        arguments.model, arguments.adapter, quantization=arguments.quantization, dtype=arguments.dtype
    )
    return Assistant(
        model=SharedModel(model, at_once=arguments.at_once),
        prompts=prompts,
        is_chat=is_chat,
        sampling=sampling,
        name=arguments.model.resolve().name,
        adapter=arguments.adapter.resolve().name if arguments.adapter else "",
    )


def make_prompts(model: Path, adapter: Path | None, template: str | None, mode: str) -> tuple[Prompts, bool]:
    """How the model is asked, and whether in conversations.

    By itself: by the template that is named or lies with the adapter or model, an instruction at a time; else by the
    tokenizer's chat template, in conversations; else as Alpaca's.
    """
    tokenizer = open_tokenizer(model, adapter)
    found = find_template(model, adapter, template)
    if found is None and (mode == "chat" or (mode == "auto" and tokenizer.chat_template)):
        return ChatPrompts(tokenizer, model), True
    prompts = InstructionPrompts(Encoder(tokenizer, load_template(found or "alpaca")))
    if mode == "chat" and not prompts.takes_turns:
        raise InputError(f"the template {found} is for one turn: --mode instruction, or another --template")
    return prompts, mode == "chat"


def default_sampling(arguments: argparse.Namespace) -> Sampling:
    """The flags; where they are silent, the model's generation_config.json; else the likeliest token."""
    path = arguments.model / "generation_config.json"
    stored: Any = {}
    if path.is_file():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error})") from None
    stored = stored if isinstance(stored, dict) and stored.get("do_sample") else {}
    settings: dict[str, Any] = {"temperature": 1.0} if stored else {}
    for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
        for value in (stored.get(name), getattr(arguments, name, None)):
            if value is not None:
                settings[name] = value
    return Sampling(max_new_tokens=arguments.max_new_tokens, seed=arguments.seed, **settings)

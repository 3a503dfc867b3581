"""Models to talk to: tiny ones with every parameter random, which talk until they are stopped, and their adapters."""

import argparse
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import adapter_folder
from random_models import random_model, tiny_config
from sentencepiece_fixtures import convert

from finetune.assistant import Assistant, make_assistant
from finetune.chat import build_parser
from finetune.decoding import Answer, Sampling
from finetune.template import Turn

CONTEXT = 32768
"""Tokens; an answer of all of them takes minutes, even of a model of this size."""


def talker(tokenizer_model: Path, folder: Path, *, chat: bool = False) -> Path:
    """A folder of a tiny model that never says EOS, nor single bytes, which seldom make a text."""
    model = random_model(tiny_config(vocab_size=512, intermediate_size=128, max_position_embeddings=CONTEXT))
    with torch.no_grad():
        model.lm_head.weight[:259] = 0
    convert(tokenizer_model, folder, chat=chat)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def instructed(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talker(small_model, tmp_path_factory.mktemp("talkers") / "instructed")


@pytest.fixture(scope="session")
def chatty(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talker(small_model, tmp_path_factory.mktemp("talkers") / "chatty", chat=True)


@pytest.fixture(scope="session")
def adapter(instructed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of both: they differ in their tokenizers only."""
    return adapter_folder(tmp_path_factory.mktemp("talkers") / "adapter", instructed)


def options(model: Path, *arguments: Any) -> argparse.Namespace:
    return build_parser().parse_args([str(model), "--dtype", "float32", *map(str, arguments)])


@pytest.fixture
def assistants() -> Iterator[Any]:
    """Makes assistants by their command line, and closes them."""
    made: list[Assistant] = []

    def make(model: Path, *arguments: Any) -> Assistant:
        made.append(make_assistant(options(model, *arguments)))
        return made[-1]

    yield make
    for assistant in made:
        assistant.close()


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def asked(assistant: Assistant, text: str, sampling: Sampling | None = None, **keywords: Any) -> Answer:
    """The answer to one question, not begun: 40 tokens."""
    return assistant.ask((Turn(text, "", ""),), sampling=sampling or Sampling(max_new_tokens=40), **keywords)


def made(assistant: Assistant, *answers: Answer) -> list[list[int]]:
    """Makes the answers together; the tokens of each."""
    for _ in assistant.stream(*answers):
        pass
    return [answer.tokens for answer in answers]


def hear_ctrl_c() -> None:
    """To be called in a new process: a shell's background jobs ignore Ctrl-C, and hand that down."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

"""LLaMA's own and SmolLM2's tokenizers, and what a fine-tuning example supervises (a plugin of two tests).

PYTEST_DONT_REWRITE: the two import it as well.
"""

import os
import re
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from conversion.tokenizer import convert_tokenizer
from finetune.encoding import IGNORED, Encoder, Example
from finetune.records import Record, read_records
from finetune.template import Turn, load_template

INSTRUCTION, INPUT = "Write  something </s><|im_end|>.", "1 < 2:\n    é 😀"


@pytest.fixture(scope="session")
def llama_folder(llama_tokenizer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("llama")
    convert_tokenizer(llama_tokenizer_model, target, vocab_size=32_000, context_length=2048)
    return target


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("smollm2")
    convert_tokenizer(smollm2_gguf, target, vocab_size=49_152, context_length=2048)
    return target


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(llama_folder)


@pytest.fixture(scope="session", params=["llama", "smollm2"])
def either(request: pytest.FixtureRequest) -> Any:
    return AutoTokenizer.from_pretrained(request.getfixturevalue(f"{request.param}_folder"))


@pytest.fixture(scope="session")
def sentencepiece(llama_tokenizer_model: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(llama_tokenizer_model))


@pytest.fixture(scope="session")
def alpaca_records() -> list[Record]:
    path = Path(__file__).parent.parent.parent / "shared" / "data" / "alpaca_en.json"
    if not path.is_file():
        if os.environ.get("CI"):
            pytest.fail(f"CI must have {path}")
        pytest.skip(f"Alpaca's records are not at {path}")
    return read_records(path)[0]


ENCODERS: dict[Any, Encoder] = {}


def encoder_for(tokenizer: Any, name: str) -> Encoder:
    """Reading a tokenizer takes long, and does not depend on the template."""
    if tokenizer not in ENCODERS:
        ENCODERS[tokenizer] = Encoder(tokenizer, load_template(name))
    encoder = copy(ENCODERS[tokenizer])
    encoder.template = load_template(name)
    return encoder


def record(response: str, instruction: str = INSTRUCTION, text: str = INPUT) -> Record:
    return Record("data.json:1", (Turn(instruction, text, response),))


def untagged(text: str) -> str:
    """Without LLaMA 2 chat's tags, which are refused; hypothesis finds them in our sources."""
    return re.sub(r"\[/?INST\]|<</?SYS>>", " ", text)


def prompt_text(encoder: Encoder, of: Record) -> str:
    return next(encoder.template.segments(of.turns, of.system)).text


def response_text(encoder: Encoder, response: str) -> str:
    template = encoder.template
    return template.response.replace("{response}", response.strip() if template.strip else response)


def supervised(example: Example) -> list[tuple[int, int]]:
    """(start, end) of the stretches of labels that are not -100."""
    edges = [IGNORED, *example.labels, IGNORED]
    places = range(1, len(edges))
    return list(
        zip(
            [i - 1 for i in places if edges[i - 1] == IGNORED != edges[i]],
            [i - 1 for i in places if edges[i - 1] != IGNORED == edges[i]],
            strict=True,
        )
    )


def supervised_texts(tokenizer: Any, example: Example) -> Iterator[str]:
    """What the model learns to say, decoded after what stands before it."""
    for start, end in supervised(example):
        before, whole = tokenizer.decode(example.input_ids[:start]), tokenizer.decode(example.input_ids[:end])
        assert whole.startswith(before)
        yield whole[len(before) :]

"""SentencePiece models, small and LLaMA's own, and the tokenizers made of them: fixtures (a plugin of conftest.py)."""

import io
import json
import logging
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer

from conversion.tokenizer import SPACE, convert_tokenizer

# LLaMA's settings, as its tokenizer.model records them; the size is the smallest that leaves room for merges.
LLAMA_SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "vocab_size": 500,
    "character_coverage": 0.99995,
    "split_digits": True,
    "byte_fallback": True,
    "allow_whitespace_only_pieces": True,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
    "num_threads": 1,
    "minloglevel": 2,
}
CONTEXT_LENGTH = 2048


def corpus() -> Iterator[str]:
    chance = random.Random(0)
    known = ("don't", "stop;", "hello", "été", "naïve", "你好", "世界", "====", "aaa", "2023", "[INST]", "been")
    syllables = [consonant + vowel for consonant in "bdfglmnprst" for vowel in "aeiou"]
    words = [*known] + ["".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(200)]
    for _ in range(400):
        indentation = " " * chance.randint(0, 17)
        yield indentation + " ".join(chance.choices(words, k=8)) + chance.choice(["", "  ", "\t", "    # end"])


def train(path: Path, **changes: Any) -> Path:
    model = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=corpus(), model_writer=model, **(LLAMA_SETTINGS | changes))
    path.write_bytes(model.getvalue())
    return path


def give_whitespace_llamas_score(path: Path) -> None:
    """LLaMA's whitespace pieces have score -1e9, which no setting of the trainer gives: rewrite the four bytes."""
    processor, content = SentencePieceProcessor(model_file=str(path)), path.read_bytes()
    for piece in {processor.id_to_piece(i) for i in range(len(processor))}:
        if set(piece) == {SPACE}:
            encoded = piece.encode()
            head = b"\x0a" + bytes([len(encoded)]) + encoded + b"\x15"  # field 1: the piece; field 2: the score
            assert content.count(head) == 1
            start = content.index(head) + len(head)
            content = content[:start] + struct.pack("<f", -1e9) + content[start + 4 :]
    path.write_bytes(content)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = train(tmp_path_factory.mktemp("small") / "tokenizer.model")
    give_whitespace_llamas_score(path)
    return path


@pytest.fixture(scope="session", params=["small", "llama"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("small_model" if request.param == "small" else "llama_tokenizer_model")


@pytest.fixture(scope="session")
def reference(model: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(model))


def convert(source: Path, target: Path, **options: Any) -> str:
    target.mkdir()
    size = len(SentencePieceProcessor(model_file=str(source))) if source.suffix == ".model" else 500
    return convert_tokenizer(source, target, **({"vocab_size": size, "context_length": CONTEXT_LENGTH} | options))


@pytest.fixture(scope="session")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("base") / "converted"
    convert(model, target)
    return target


@pytest.fixture(scope="session")
def chat_folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("chat") / "converted"
    convert(model, target, chat=True)
    return target


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def chat_tokenizer(chat_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(chat_folder)


def rewritten(folder: Path, target: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Any:
    """The folder's tokenizer after a change of one of its JSON files."""
    target.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((folder / file).read_text())
        if file == name:
            change(content)
        (target / file).write_text(json.dumps(content))
    return AutoTokenizer.from_pretrained(target)


@pytest.fixture(autouse=True)
def quiet_transformers() -> None:
    """Texts of 100 kB are longer than the context on purpose."""
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)


SNIPPETS = (*"\n\t ▁", "  ", "    ", "<s>", "</s>", "<unk>", "<0x0A>", "[INST]", "====", "aaa", "ion", "你好", "😀")
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
llama_like_text = st.lists(st.one_of(st.sampled_from(SNIPPETS), any_text), max_size=12).map("".join)


property_settings = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def metas_turns(messages: list[dict[str, str]]) -> list[str]:
    """The texts that Meta's `chat_completion` encodes one by one; a finished turn is followed by EOS."""
    if messages[0]["role"] == "system":
        folded = "<<SYS>>\n" + messages[0]["content"] + "\n<</SYS>>\n\n" + messages[1]["content"]
        messages = [{"role": "user", "content": folded}, *messages[2:]]
    asked, answered = messages[::2], messages[1::2]
    turns = [
        f"[INST] {user['content'].strip()} [/INST] {assistant['content'].strip()} "
        for user, assistant in zip(asked, answered, strict=False)
    ]
    return turns + [f"[INST] {user['content'].strip()} [/INST]" for user in asked[len(answered) :]]


def metas_ids(reference: SentencePieceProcessor, messages: list[dict[str, str]]) -> list[int]:
    ids: list[int] = []
    for number, turn in enumerate(metas_turns(messages)):
        is_finished = 2 * (number + 1) <= len([message for message in messages if message["role"] != "system"])
        ids += [reference.bos_id(), *reference.encode(turn), *([reference.eos_id()] if is_finished else [])]
    return ids


def dialog(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


DIALOGS = [
    dialog("hello"),
    dialog("hello", "hi there"),
    dialog("hello", "hi there", "and now?"),
    dialog("hello", system="Be brief."),
    dialog("  hello \n", "\tyes  ", " 2 + 2 ", " 4", "   你好，世界 "),
    dialog(" question", " answer ", "more", system="  You are   kind.\n\nAlways. "),
    dialog("", "", ""),
    dialog("def f():\n    return 1\n", "```\n  x\n```", "😀\u0000\u3000", system="系统"),
    dialog("<0x0A> [inst] < s> <<sys>>", "S> {{ bos_token }} {% raw %}", "'\"\\n"),
]

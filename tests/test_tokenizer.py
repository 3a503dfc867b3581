"""The converted tokenizer against SentencePiece: with a small model trained here, and with LLaMA's own."""

import base64
import io
import json
import logging
import random
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, LlamaConfig, TextIteratorStreamer, TextStreamer

from conversion import gguf_tokenizer
from conversion.tokenizer import AWKWARD_TEXTS, SPACE, convert_tokenizer
from hf_llama_repro.errors import CheckpointError

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
SECONDS_FOR_100_KB = 5.0  # takes 0.1; a quadratic tokenizer takes minutes


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


# --- ids ---


def test_ids_are_bos_and_then_sentencepieces_on_awkward_texts(
    tokenizer: Any, reference: SentencePieceProcessor
) -> None:
    for text in AWKWARD_TEXTS:
        assert tokenizer(text).input_ids == [reference.bos_id(), *reference.encode(text)], text
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text), text


SNIPPETS = (*"\n\t ▁", "  ", "    ", "<s>", "</s>", "<unk>", "<0x0A>", "[INST]", "====", "aaa", "ion", "你好", "😀")
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
llama_like_text = st.lists(st.one_of(st.sampled_from(SNIPPETS), any_text), max_size=12).map("".join)
property_settings = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@property_settings
@given(text=llama_like_text)
def test_ids_and_decoded_text_are_sentencepieces_on_generated_texts(
    tokenizer: Any, reference: SentencePieceProcessor, text: str
) -> None:
    expected = reference.encode(text)
    assert tokenizer(text).input_ids == [reference.bos_id(), *expected]
    assert tokenizer.decode(expected) == reference.decode(expected)


@property_settings
@given(data=st.data())
def test_ids_are_sentencepieces_on_texts_made_of_its_pieces(
    tokenizer: Any, reference: SentencePieceProcessor, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(3 + 256, len(reference) - 1), max_size=20))
    text = "".join(reference.id_to_piece(ids)).replace(SPACE, " ")
    assert tokenizer(text, add_special_tokens=False).input_ids == reference.encode(text)


def test_merges_in_the_order_of_ids_would_give_other_ids(
    folder: Path, tokenizer: Any, reference: SentencePieceProcessor, tmp_path: Path
) -> None:
    def sort_by_id(content: dict[str, Any]) -> None:
        content["model"]["merges"].sort(key=lambda pair: content["model"]["vocab"]["".join(pair)])

    wrong = rewritten(folder, tmp_path / "wrong", "tokenizer.json", sort_by_id)
    assert any(wrong.encode(text) != tokenizer.encode(text) for text in AWKWARD_TEXTS)


def test_the_class_that_rebuilds_the_tokenizer_would_give_other_ids(
    folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    def change_class(config: dict[str, Any]) -> None:
        config["tokenizer_class"] = "LlamaTokenizer"

    wrong = rewritten(folder, tmp_path / "wrong", "tokenizer_config.json", change_class)
    assert type(wrong).__name__ == "LlamaTokenizer"
    assert any(wrong.encode(text) != tokenizer.encode(text) for text in AWKWARD_TEXTS)


def test_without_split_special_tokens_a_text_could_spell_a_control_id(
    tokenizer: Any, reference: SentencePieceProcessor
) -> None:
    assert tokenizer("a</s>").input_ids == [1, *reference.encode("a</s>")]
    assert tokenizer("a</s>", split_special_tokens=False).input_ids[-1] == reference.eos_id()


def test_100_kb_in_one_piece_have_sentencepieces_ids_in_reasonable_time(
    tokenizer: Any, reference: SentencePieceProcessor
) -> None:
    mixed = ("    return hello world, été 你好 😀\t" * 4000)[:100_000]
    for text in (mixed, " " * 100_000, "a" * 100_000, "龘" * 33_333):
        start = time.perf_counter()
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert time.perf_counter() - start < SECONDS_FOR_100_KB
        assert ids == reference.encode(text)


@pytest.mark.parametrize("text", ["\ud800", "a\udfff b"])
def test_a_lone_surrogate_is_refused_as_by_sentencepiece(
    tokenizer: Any, reference: SentencePieceProcessor, text: str
) -> None:
    with pytest.raises(RuntimeError):
        reference.encode(text)
    with pytest.raises((TypeError, UnicodeEncodeError)):
        tokenizer(text)


# --- decoding ---


def test_decoding_gives_back_the_text_as_sentencepiece_does(tokenizer: Any, reference: SentencePieceProcessor) -> None:
    for text in AWKWARD_TEXTS:
        ids = reference.encode(text)
        assert tokenizer.decode(ids) == reference.decode(ids)
        assert tokenizer.decode([1, *ids, 2], skip_special_tokens=True) == reference.decode([1, *ids, 2])


@property_settings
@given(data=st.data())
def test_decoding_ids_that_no_text_has_is_sentencepieces(
    tokenizer: Any, reference: SentencePieceProcessor, data: st.DataObject
) -> None:
    # Not byte pieces: a run of them that is not UTF-8 differs, see the next test.
    ids = data.draw(st.lists(st.one_of(st.integers(1, 2), st.integers(3 + 256, len(reference) - 1)), max_size=20))
    assert tokenizer.decode(ids, skip_special_tokens=True) == reference.decode(ids)


def test_known_limit_one_broken_byte_spoils_the_whole_run_of_byte_pieces(
    tokenizer: Any, reference: SentencePieceProcessor
) -> None:
    # The tokenizers library decodes a run of byte pieces as a whole; the number of characters is then off.
    ids = [3 + byte for byte in "😀".encode() + b"\xf0"]
    assert reference.decode(ids) == "😀\ufffd"
    assert tokenizer.decode(ids) == "\ufffd" * 5


def streamed(tokenizer: Any, ids: list[int]) -> str:
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    for index in ids:
        streamer.put(torch.tensor([index]))
    streamer.end()
    return "".join(streamer)


STREAMABLE = [text for text in AWKWARD_TEXTS if "\n " not in text and "\n▁" not in text]


def test_text_streamers_give_the_decoded_text(
    tokenizer: Any, reference: SentencePieceProcessor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(STREAMABLE) > len(AWKWARD_TEXTS) - 5
    for text in STREAMABLE:
        ids = reference.encode(text)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)
        streamer = TextStreamer(tokenizer)
        for index in ids:
            streamer.put(torch.tensor([index]))
        streamer.end()
        assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"


def test_decoding_token_by_token_as_servers_do_gives_the_decoded_text(
    tokenizer: Any, reference: SentencePieceProcessor
) -> None:
    for text in AWKWARD_TEXTS:
        ids, stream = reference.encode(text), DecodeStream(skip_special_tokens=True)
        parts = [stream.step(tokenizer.backend_tokenizer, index) or "" for index in ids]
        assert "".join(parts) == tokenizer.decode(ids)


def test_known_limit_text_streamers_lose_one_space_after_a_newline(
    tokenizer: Any, reference: SentencePieceProcessor
) -> None:
    # They decode each line by itself, and the ids of "  b" after a newline are those of the text " b": no tokenizer
    # can satisfy them and SentencePiece. A failure here is good news: transformers has mended its streamers.
    ids = reference.encode("a\n  b")
    assert ids[-len(reference.encode(" b")) :] == reference.encode(" b")
    assert tokenizer.decode(ids) == "a\n  b"
    assert streamed(tokenizer, ids) == "a\n b"


# --- the folder ---


def test_the_folder_holds_what_stock_classes_and_other_programs_read(folder: Path, model: Path, tokenizer: Any) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["add_bos_token"] is True
    assert config["clean_up_tokenization_spaces"] is False
    assert (folder / "tokenizer.model").read_bytes() == model.read_bytes()
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2]
    assert tokenizer.pad_token is None
    assert tokenizer.model_max_length == CONTEXT_LENGTH
    assert tokenizer.chat_template is None


def test_saving_and_loading_again_changes_nothing(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()
    for text in AWKWARD_TEXTS:
        assert again(text).input_ids == tokenizer(text).input_ids
    assert again.model_max_length == CONTEXT_LENGTH
    # transformers copies tokenizer.model with no stock class that has a tokenizer.json
    assert not (tmp_path / "tokenizer.model").exists()


def test_beside_a_llama_config_the_class_and_the_ids_stay(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    beside_config = AutoTokenizer.from_pretrained(tmp_path)
    assert type(beside_config) is type(tokenizer)
    for text in AWKWARD_TEXTS:
        assert beside_config(text).input_ids == tokenizer(text).input_ids


@pytest.mark.parametrize("options", [{"add_bos_token": True}, {"use_fast": True}])
def test_asking_for_bos_does_not_add_a_second_one(folder: Path, options: dict[str, bool]) -> None:
    ids = AutoTokenizer.from_pretrained(folder, **options)("hello").input_ids
    assert ids.count(1) == 1


def test_opening_the_folder_imports_neither_sentencepiece_nor_protobuf_nor_us(folder: Path) -> None:
    program = textwrap.dedent("""
        import importlib.machinery, json, sys
        BLOCKED = ("sentencepiece", "google.protobuf", "hf_llama_repro", "conversion")
        find_spec = importlib.machinery.PathFinder.find_spec
        def find_others(name, path=None, target=None):
            return None if name.startswith(BLOCKED) else find_spec(name, path, target)
        importlib.machinery.PathFinder.find_spec = find_others
        from transformers import AutoTokenizer
        ids = AutoTokenizer.from_pretrained(sys.argv[1])("  hello\\n").input_ids
        print(json.dumps([ids, [name for name in sys.modules if name.startswith(BLOCKED)]]))
    """)
    run = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr
    reference = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert json.loads(run.stdout) == [[1, *reference.encode("  hello\n")], []]


def test_importing_the_module_is_instant() -> None:
    program = (
        "import sys, conversion.tokenizer; print({'transformers', 'tokenizers', 'sentencepiece'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.stdout.strip() == "set()", run.stderr


def test_the_line_for_humans_says_kind_size_bos_and_template(small_model: Path, tmp_path: Path) -> None:
    said = convert(small_model, tmp_path / "base")
    assert said.startswith(
        "SentencePiece BPE, 500 tokens, BOS <s>, no EOS, no chat template; ids equal SentencePiece's on "
    )
    assert "EOS, chat template;" in convert(small_model, tmp_path / "chat", chat=True)


# --- sources that are refused, or nearly ---


def test_an_embedding_with_more_rows_is_accepted_and_mentioned(small_model: Path, tmp_path: Path) -> None:
    assert "has 12 rows more" in convert(small_model, tmp_path / "target", vocab_size=512)


def test_an_embedding_with_fewer_rows_is_refused_and_nothing_is_written(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"500 tokens.* 499 rows.*--tokenizer FILE.*--no-tokenizer"):
        convert(small_model, tmp_path / "target", vocab_size=499)
    assert not list((tmp_path / "target").iterdir())


TIKTOKEN = "".join(f"{base64.b64encode(word).decode()} {i}\n" for i, word in enumerate((b"!", b" the", b"ing")))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>403 Forbidden</body></html>", "web page"),
        (TIKTOKEN.encode(), "Llama 3's tiktoken file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:9e55\nsize 499723\n", "Git LFS pointer"),
        (b'{"model": {}}', "JSON"),
        (random.Random(0).randbytes(1000), "damaged or foreign"),
    ],
)
def test_a_file_that_is_no_sentencepiece_model_is_told_by_its_looks(content: bytes, said: str, tmp_path: Path) -> None:
    source = tmp_path / "tokenizer.model"
    source.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"tokenizer\.model.*{said}.*--no-tokenizer"):
        convert_tokenizer(source, tmp_path, vocab_size=32000, context_length=CONTEXT_LENGTH)


def test_a_missing_source_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    for source, said in ((tmp_path / "nowhere.model", "no such file"), (tmp_path, "neither tokenizer.json nor")):
        with pytest.raises(CheckpointError, match=said):
            convert_tokenizer(source, tmp_path, vocab_size=500, context_length=CONTEXT_LENGTH)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "unigram"}, "type unigram"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises Unicode"),
        ({"remove_extra_whitespaces": True}, "removes extra spaces"),
        ({"byte_fallback": False}, "byte_fallback"),
        ({"user_defined_symbols": ["<|user|>"]}, "user-defined"),
    ],
)
def test_a_sentencepiece_model_that_cannot_be_exact_is_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=said):
        convert(train(tmp_path / "tokenizer.model", vocab_size=450, **changes), tmp_path / "target")
    assert not list((tmp_path / "target").iterdir())


def test_a_model_whose_pieces_all_have_one_score_is_refused(small_model: Path, tmp_path: Path) -> None:
    # Leftmost-first cannot be said in a list of merges, so the comparison must notice.
    processor, content = SentencePieceProcessor(model_file=str(small_model)), bytearray(small_model.read_bytes())
    for index in range(len(processor)):
        encoded = processor.id_to_piece(index).encode()
        start = content.find(b"\x0a" + bytes([len(encoded)]) + encoded + b"\x15") + len(encoded) + 3
        content[start : start + 4] = struct.pack("<f", 0.0)
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match="equal score"):
        convert(tmp_path / "tokenizer.model", tmp_path / "target")


def test_a_model_without_dummy_prefix_keeps_its_ids_and_its_first_space(tmp_path: Path) -> None:
    source = train(tmp_path / "tokenizer.model", add_dummy_prefix=False)
    convert(source, tmp_path / "target")
    tokenizer, reference = (
        AutoTokenizer.from_pretrained(tmp_path / "target"),
        SentencePieceProcessor(model_file=str(source)),
    )
    for text in AWKWARD_TEXTS:
        assert tokenizer(text, add_special_tokens=False).input_ids == reference.encode(text)
        assert tokenizer.decode(reference.encode(text)) == reference.decode(reference.encode(text)), text


# --- LLaMA 2 chat ---


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


@pytest.mark.parametrize("messages", DIALOGS)
def test_a_chats_ids_are_metas_turn_by_turn(
    chat_tokenizer: Any, reference: SentencePieceProcessor, messages: list[dict[str, str]]
) -> None:
    expected = metas_ids(reference, messages)
    assert chat_tokenizer.apply_chat_template(messages, return_dict=False) == expected
    assert chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == expected
    rendered = chat_tokenizer.apply_chat_template(messages, tokenize=False)
    assert chat_tokenizer(rendered, add_special_tokens=False).input_ids == expected
    assert rendered.startswith("<s>[INST]")


@property_settings
@given(
    contents=st.lists(
        llama_like_text.map(lambda text: text.replace("<", "‹").replace("[", "(")), min_size=1, max_size=5
    )
)
def test_a_generated_chats_ids_are_metas(
    chat_tokenizer: Any, reference: SentencePieceProcessor, contents: list[str]
) -> None:
    messages = dialog(*contents, system=contents[-1])
    assert chat_tokenizer.apply_chat_template(messages, return_dict=False) == metas_ids(reference, messages)


def test_a_chat_encoded_in_one_piece_would_have_other_ids(reference: SentencePieceProcessor) -> None:
    messages = dialog("hello", "hi", "more")
    assert metas_ids(reference, messages) != [1, *reference.encode("".join(metas_turns(messages)))]


def test_a_chat_with_split_special_tokens_would_have_other_ids(
    chat_tokenizer: Any, reference: SentencePieceProcessor
) -> None:
    rendered = chat_tokenizer.apply_chat_template(dialog("hello"), tokenize=False)
    ids = chat_tokenizer(rendered, add_special_tokens=False, split_special_tokens=True).input_ids
    assert reference.bos_id() not in ids


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>", "<unk>"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_message_with_a_special_tag_is_refused(chat_tokenizer: Any, tag: str, place: int) -> None:
    messages = dialog("hello", "hi", system="kind")
    messages[place]["content"] += f"x{tag}y"
    with pytest.raises(Exception, match="must not contain the special tag"):
        chat_tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (dialog("a", "b")[::-1], "roles must be"),
        (dialog("a") + dialog("b"), "roles must be"),
        (dialog("a", system="s")[::-1], "roles must be"),
        (dialog(system="s"), "no message of the user"),
        ([{"role": "tool", "content": "a"}], "roles must be"),
        ([{"role": "user", "content": None}], "must be text"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "must be text"),
    ],
)
def test_a_chat_that_meta_would_not_encode_is_refused(
    chat_tokenizer: Any, messages: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(Exception, match=said):
        chat_tokenizer.apply_chat_template(messages)


def test_an_answer_that_is_to_be_continued_has_no_eos(chat_tokenizer: Any, reference: SentencePieceProcessor) -> None:
    messages = dialog("hello", "hi the")
    ids = chat_tokenizer.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    assert ids == [1, *reference.encode("[INST] hello [/INST] hi the")]


def test_the_chat_template_survives_saving(chat_tokenizer: Any, tmp_path: Path) -> None:
    chat_tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for messages in DIALOGS:
        expected = chat_tokenizer.apply_chat_template(messages, return_dict=False)
        assert again.apply_chat_template(messages, return_dict=False) == expected


def test_plain_texts_of_a_chat_tokenizer_have_sentencepieces_ids_unless_they_spell_control_tokens(
    chat_tokenizer: Any, reference: SentencePieceProcessor
) -> None:
    for text in AWKWARD_TEXTS:
        expected = [1, *reference.encode(text)]
        assert chat_tokenizer(text, split_special_tokens=True).input_ids == expected
        if not any(token in text for token in ("<s>", "</s>", "<unk>")):
            assert chat_tokenizer(text).input_ids == expected


# --- GGUF ---


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    target = tmp_path_factory.mktemp("smollm2")
    said = convert_tokenizer(smollm2_gguf, target, vocab_size=49152, context_length=8192)
    assert said == "byte-level BPE (smollm) from GGUF, 49,152 tokens, no BOS, no EOS, chat template"
    return AutoTokenizer.from_pretrained(target)


def test_smollm2s_digits_are_single_tokens(smollm2: Any) -> None:
    assert smollm2.tokenize("in 2024, 365") == ["in", "Ġ", "2", "0", "2", "4", ",", "Ġ", "3", "6", "5"]
    # The digits are split off before the spaces are, so these spaces stay together.
    assert smollm2.tokenize("a  2024") == ["a", "ĠĠ", "2", "0", "2", "4"]


def test_transformers_own_gguf_loader_ignores_the_pre_tokenizer(smollm2: Any, smollm2_gguf: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    assert theirs.tokenize("hello world") == smollm2.tokenize("hello world")
    assert theirs.tokenize("a  2024") == ["a", "Ġ", "Ġ", "2", "0", "2", "4"]


def test_smollm2s_special_tokens_and_chat_template_are_the_files(smollm2: Any) -> None:
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
    assert smollm2.convert_ids_to_tokens(range(4)) == names
    assert sorted(smollm2.get_added_vocab().values()) == list(range(17))
    assert len(smollm2) == 49152
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id, smollm2.unk_token_id) == (1, 2, 2, 0)
    assert smollm2("hello").input_ids == smollm2("hello", add_special_tokens=False).input_ids  # add_bos_token: false
    ids = smollm2.apply_chat_template(dialog("hello"), add_generation_prompt=True, return_dict=False)
    assert ids[0] == 1
    assert ids.count(2) == 2
    assert smollm2.decode(ids, skip_special_tokens=True).endswith("user\nhello\nassistant\n")


def test_smollm2_gives_back_every_text_of_bytes_it_has(smollm2: Any) -> None:
    for text in AWKWARD_TEXTS:
        if "\x04" in text:  # one of 21 bytes that SmolLM2's own vocabulary lacks
            continue
        assert smollm2.decode(smollm2(text).input_ids) == text


def write_gguf(path: Path, **fields: Any) -> Path:
    """A GGUF file with nothing but a tokenizer; a field of None is left out."""
    writer = GGUFWriter(path, "llama")
    for name, value in fields.items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sentencepiece_fields(model: Path) -> dict[str, Any]:
    reference = SentencePieceProcessor(model_file=str(model))
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(reference) - 259)]
    return {
        "tokenizer_model": "llama",
        "token_list": [reference.id_to_piece(i) for i in range(len(reference))],
        "token_scores": [reference.get_score(i) for i in range(len(reference))],
        "token_types": kinds,
    }


BYTE_LEVEL_FIELDS = {
    "tokenizer_model": "gpt2",
    "tokenizer_pre": "gpt-2",
    "token_list": ["a", "b", "ab", "Ġ", "Ġab", "<|end|>", "<tool>", "1", "2", "12"],
    "token_types": [1, 1, 1, 1, 1, 3, 4, 1, 1, 1],
    "token_merges": ["a b", "Ġ ab", "1 2"],
    "eos_token_id": 5,
}


def gguf_tokenizer_of(tmp_path: Path, **fields: Any) -> Any:
    convert(write_gguf(tmp_path / "model.gguf", **fields), tmp_path / "target")
    return AutoTokenizer.from_pretrained(tmp_path / "target")


def test_a_sentencepiece_tokenizer_from_gguf_has_sentencepieces_ids(small_model: Path, tmp_path: Path) -> None:
    tokenizer = gguf_tokenizer_of(tmp_path, **sentencepiece_fields(small_model))
    reference = SentencePieceProcessor(model_file=str(small_model))
    for text in AWKWARD_TEXTS:
        assert tokenizer(text).input_ids == [1, *reference.encode(text)]
        assert tokenizer.decode(reference.encode(text)) == reference.decode(reference.encode(text))
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert not (tmp_path / "target" / "tokenizer.model").exists()


def test_a_gguf_decides_on_bos_eos_and_the_first_space(small_model: Path, tmp_path: Path) -> None:
    fields = sentencepiece_fields(small_model) | {
        "add_bos_token": False,
        "add_eos_token": True,
        "add_space_prefix": False,
    }
    tokenizer = gguf_tokenizer_of(tmp_path, **fields)
    ids = tokenizer("hello").input_ids
    assert ids[0] != 1
    assert ids[-1] == 2
    assert not tokenizer.convert_ids_to_tokens(ids)[0].startswith(SPACE)


def test_a_sentencepiece_gguf_without_template_gets_llama_2s_if_asked(small_model: Path, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", **sentencepiece_fields(small_model))
    convert(source, tmp_path / "target", chat=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "target")
    reference = SentencePieceProcessor(model_file=str(small_model))
    for messages in DIALOGS:
        assert tokenizer.apply_chat_template(messages, return_dict=False) == metas_ids(reference, messages)


def test_a_ggufs_control_and_user_defined_tokens_are_added_tokens(tmp_path: Path) -> None:
    tokenizer = gguf_tokenizer_of(tmp_path, **BYTE_LEVEL_FIELDS)
    assert tokenizer("ab ab<|end|><tool>").input_ids == [2, 4, 5, 6]
    assert tokenizer.decode([2, 5, 6], skip_special_tokens=True) == "ab<tool>"
    assert tokenizer.pad_token is None


@pytest.mark.parametrize(("pre", "ids"), [("gpt-2", [9]), ("smollm", [7, 8]), ("llama-bpe", [9])])
def test_each_pre_tokenizer_splits_digits_its_own_way(pre: str, ids: list[int], tmp_path: Path) -> None:
    tokenizer = gguf_tokenizer_of(tmp_path, **BYTE_LEVEL_FIELDS | {"tokenizer_pre": pre, "add_bos_token": False})
    assert tokenizer("12").input_ids == ids


def test_llama_3s_pre_tokenizer_begins_with_bos_unless_told_otherwise(tmp_path: Path) -> None:
    fields = BYTE_LEVEL_FIELDS | {"tokenizer_pre": "llama-bpe", "bos_token_id": 6}
    assert gguf_tokenizer_of(tmp_path, **fields)("ab").input_ids == [6, 2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer_model": "bert"}, "kind 'bert'"),
        ({"tokenizer_model": None}, "no tokenizer"),
        ({"tokenizer_pre": "klingon"}, "pre-tokenizer is 'klingon'.*gpt-2, smollm, llama-bpe"),
        ({"tokenizer_pre": None}, "pre-tokenizer is None"),
        ({"token_merges": None}, "no tokenizer.ggml.merges"),
        ({"token_list": None}, "no tokenizer.ggml.tokens"),
        ({"token_types": [1, 1]}, "10 tokens, 10 of them distinct, and 2 token types"),
        ({"token_list": ["a"] * 10}, "1 of them distinct"),
        ({"token_merges": ["a q"]}, "merge 'a q'"),
        ({"eos_token_id": 99}, "eos.* is 99"),
        ({"add_bos_token": True}, "names no id"),
        ({"tokenizer_model": "llama"}, "no tokenizer.ggml.scores"),
    ],
)
def test_a_gguf_with_a_tokenizer_that_is_not_known_is_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    source = write_gguf(tmp_path / "model.gguf", **BYTE_LEVEL_FIELDS | changes)
    with pytest.raises(CheckpointError, match=said):
        convert(source, tmp_path / "target")
    assert not list((tmp_path / "target").iterdir())


def test_a_truncated_gguf_and_one_with_too_many_tokens_are_refused(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", **BYTE_LEVEL_FIELDS)
    with pytest.raises(CheckpointError, match=r"10 tokens.* 9 rows"):
        convert(source, tmp_path / "target", vocab_size=9)
    whole = source.read_bytes()
    for size in (4, 20, 100, len(whole) // 2):
        source.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="not a readable GGUF file"):
            convert_tokenizer(source, tmp_path / "target", vocab_size=10, context_length=CONTEXT_LENGTH)


def test_without_the_gguf_package_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_gguf(tmp_path / "model.gguf", **BYTE_LEVEL_FIELDS)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install hf-llama-repro\[gguf\]"):
        gguf_tokenizer.read_gguf_tokenizer(source)


# --- Hugging Face folders ---


@pytest.fixture
def hugging_face_folder(small_model: Path, tmp_path: Path) -> Path:
    source = tmp_path / "source"
    convert(small_model, source, chat=True)
    (source / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    (source / "model.safetensors").write_bytes(b"not a tokenizer file")
    return source


@pytest.mark.parametrize("name", [".", "tokenizer.json"])
def test_a_hugging_face_tokenizer_is_copied_as_it_is(hugging_face_folder: Path, name: str, tmp_path: Path) -> None:
    said = convert(hugging_face_folder / name, tmp_path / "target")
    assert said == "Hugging Face tokenizer, 500 tokens, copied, chat template"
    copied = {path.name: path.read_bytes() for path in (tmp_path / "target").iterdir()}
    original = {path.name: path.read_bytes() for path in hugging_face_folder.iterdir()}
    del original["model.safetensors"]
    assert copied == original


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast"])
def test_only_a_class_that_would_rebuild_the_tokenizer_is_replaced(
    hugging_face_folder: Path, name: str, tmp_path: Path
) -> None:
    config_file = hugging_face_folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"tokenizer_class": name, "legacy": True}))
    said = convert(hugging_face_folder, tmp_path / "target")
    assert f"class {name} replaced by PreTrainedTokenizerFast" in said
    assert json.loads((tmp_path / "target" / "tokenizer_config.json").read_text()) == config | {"legacy": True}
    ids = AutoTokenizer.from_pretrained(tmp_path / "target")("    x\n  y").input_ids
    assert ids == Tokenizer.from_file(str(hugging_face_folder / "tokenizer.json")).encode("    x\n  y").ids


def test_a_lone_tokenizer_json_beside_a_llama_config_keeps_its_ids(hugging_face_folder: Path, tmp_path: Path) -> None:
    (hugging_face_folder / "tokenizer_config.json").unlink()
    convert(hugging_face_folder, tmp_path / "target")
    LlamaConfig().save_pretrained(tmp_path / "target")
    ids = AutoTokenizer.from_pretrained(tmp_path / "target")("    x\n  y").input_ids
    assert ids == Tokenizer.from_file(str(hugging_face_folder / "tokenizer.json")).encode("    x\n  y").ids


def test_a_folder_with_only_a_sentencepiece_model_is_converted(small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    said = convert_tokenizer(small_model.parent, tmp_path / "target", vocab_size=500, context_length=CONTEXT_LENGTH)
    assert said.startswith("SentencePiece BPE, 500 tokens")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", "<html>", "not readable as JSON"),
        ("tokenizer.json", "[]", "JSON object, not a list"),
        ("tokenizer.json", "{}", "no model.vocab"),
        ("tokenizer.json", '{"model": {"vocab": {}}}', "no model.vocab"),
        ("tokenizer_config.json", "{", "not readable as JSON"),
    ],
)
def test_damaged_json_is_refused_and_nothing_is_written(
    hugging_face_folder: Path, name: str, content: str, said: str, tmp_path: Path
) -> None:
    (hugging_face_folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=said):
        convert(hugging_face_folder, tmp_path / "target")
    assert not list((tmp_path / "target").iterdir())


def test_a_hugging_face_tokenizer_with_more_tokens_than_rows_is_refused(
    hugging_face_folder: Path, tmp_path: Path
) -> None:
    # Alpaca's folders have a padding token that the embedding of the base model has no row for.
    tokenizer = AutoTokenizer.from_pretrained(hugging_face_folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(hugging_face_folder)
    with pytest.raises(CheckpointError, match=r"501 tokens.* 500 rows"):
        convert(hugging_face_folder, tmp_path / "target")


@pytest.fixture(autouse=True)
def quiet_transformers() -> None:
    """Texts of 100 kB are longer than the context on purpose."""
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)

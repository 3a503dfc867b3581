"""The converted tokenizer against SentencePiece: with a small model trained here, and with LLaMA's own."""

import base64
import json
import random
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from sentencepiece import SentencePieceProcessor
from sentencepiece_fixtures import CONTEXT_LENGTH, convert, llama_like_text, property_settings, rewritten, train
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, LlamaConfig, TextIteratorStreamer, TextStreamer

from conversion.tokenizer import AWKWARD_TEXTS, SPACE, convert_tokenizer
from hf_llama_repro.errors import CheckpointError


def test_ids_are_bos_and_then_sentencepieces_on_awkward_texts(
    tokenizer: Any, reference: SentencePieceProcessor
) -> None:
    for text in AWKWARD_TEXTS:
        assert tokenizer(text).input_ids == [reference.bos_id(), *reference.encode(text)], text
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text), text


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


def test_100_kb_in_one_piece_have_sentencepieces_ids(tokenizer: Any, reference: SentencePieceProcessor) -> None:
    mixed = ("    return hello world, été 你好 😀\t" * 4000)[:100_000]
    for text in (mixed, " " * 100_000, "a" * 100_000, "龘" * 33_333):
        assert tokenizer(text, add_special_tokens=False).input_ids == reference.encode(text)


@pytest.mark.parametrize("text", ["\ud800", "a\udfff b"])
def test_a_lone_surrogate_is_refused_as_by_sentencepiece(
    tokenizer: Any, reference: SentencePieceProcessor, text: str
) -> None:
    with pytest.raises(RuntimeError):
        reference.encode(text)
    with pytest.raises((TypeError, UnicodeEncodeError)):
        tokenizer(text)


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


def test_text_streamers_keep_the_spaces_after_a_newline_since_transformers_5_24(
    tokenizer: Any, reference: SentencePieceProcessor
) -> None:
    # Older ones decode each line by itself, and the ids of "  b" after a newline are those of the text " b": no
    # tokenizer can satisfy them and SentencePiece.
    ids = reference.encode("a\n  b")
    assert ids[-len(reference.encode(" b")) :] == reference.encode(" b")
    assert tokenizer.decode(ids) == "a\n  b"
    is_right = Version(transformers.__version__) >= Version("5.24")
    assert streamed(tokenizer, ids) == ("a\n  b" if is_right else "a\n b")


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
        importlib.machinery.PathFinder.find_spec = staticmethod(find_others)
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

"""Tokenizers of GGUF files and of Hugging Face folders."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from sentencepiece import SentencePieceProcessor
from sentencepiece_fixtures import CONTEXT_LENGTH, DIALOGS, convert, dialog, metas_ids
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig

from conversion import gguf_tokenizer
from conversion.tokenizer import AWKWARD_TEXTS, SPACE, convert_tokenizer
from hf_llama_repro.errors import CheckpointError


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
        with pytest.raises(CheckpointError, match="is truncated or damaged"):
            convert_tokenizer(source, tmp_path / "target", vocab_size=10, context_length=CONTEXT_LENGTH)


def test_without_the_gguf_package_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_gguf(tmp_path / "model.gguf", **BYTE_LEVEL_FIELDS)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install hf-llama-repro\[gguf\]"):
        gguf_tokenizer.read_gguf_tokenizer(source)


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
    assert said == "Hugging Face tokenizer, 500 tokens, copied, chat template; ids equal SentencePiece's on 530 texts"
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

"""Searches through tokenizers: bytes of tokenizer.model, bytes and values of tokenizer.json."""

import functools
import json
import shutil

import pytest
from hypothesis import strategies as st
from meta_checkpoints import VOCAB, meta_params, meta_weights, write_meta, write_sentencepiece
from searches import JSON_BYTES, Search, search_bytes, search_json, searching_costly
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from conversion.convert import convert

TEXTS = ["the quick  brown fox\n", "", " ", "日本 </s><0x0A>", "a\tb" * 20]


@pytest.fixture
def meta(tmp_path):
    params = meta_params(dim=4, n_heads=2, n_kv_heads=1, n_layers=1, multiple_of=2)
    return write_meta(tmp_path / "meta", params, meta_weights(params, vocab=VOCAB))


def assert_ids(target, source):
    """The ids of what was written are those of the file as it is, read by the library that it is for."""
    found = AutoTokenizer.from_pretrained(target)
    if source.suffix == ".model":
        processor = SentencePieceProcessor(model_file=str(source))
        expected = [[processor.bos_id(), *ids] if processor.bos_id() >= 0 else ids for ids in processor.encode(TEXTS)]
    else:
        raw = Tokenizer.from_file(str(source))
        raw.encode_special_tokens = found.split_special_tokens  # which only transformers' own configuration says
        expected = [encoding.ids for encoding in raw.encode_batch(TEXTS)]
    assert [found(text).input_ids for text in TEXTS] == expected


def tokenizer_search(meta, source, folder):
    return Search(folder, functools.partial(convert, meta, tokenizer=source), lambda target: assert_ids(target, source))


def test_bytes_of_a_tokenizer_model(meta, tmp_path):
    path = write_sentencepiece(tmp_path / "tokenizer.model")
    search = tokenizer_search(meta, path, tmp_path / "target")
    search_bytes(path, search, range(path.stat().st_size))
    search.assert_both_kinds()


@pytest.mark.slow
def test_bytes_of_llamas_tokenizer_model(tmp_path, llama_tokenizer_model):
    params = meta_params(dim=4, n_heads=2, n_kv_heads=1, n_layers=1, multiple_of=2)
    meta = write_meta(tmp_path / "meta", params, meta_weights(params, vocab=32000))
    path = tmp_path / "tokenizer.model"
    shutil.copyfile(llama_tokenizer_model, path)
    search = tokenizer_search(meta, path, tmp_path / "target")
    search_bytes(path, search, range(path.stat().st_size), profile=searching_costly)
    search.assert_both_kinds()


@pytest.fixture
def tokenizer_json(meta, tmp_path):
    """A folder with tokenizer.json and tokenizer_config.json."""
    convert(meta, tmp_path / "first", tokenizer=write_sentencepiece(tmp_path / "tokenizer.model"))
    (tmp_path / "folder").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "first" / name, tmp_path / "folder")
    return tmp_path / "folder/tokenizer.json"


def test_bytes_of_a_tokenizer_json(meta, tokenizer_json, tmp_path):
    search = tokenizer_search(meta, tokenizer_json, tmp_path / "target")
    text = json.dumps(json.loads(tokenizer_json.read_text()))  # without the blanks of its indentation
    tokenizer_json.write_text(text)
    search_bytes(tokenizer_json, search, range(len(text)), replacement=JSON_BYTES)
    search.assert_both_kinds()


@pytest.mark.parametrize("part", [None, "model", "normalizer", "decoder", "post_processor"])
def test_values_of_a_tokenizer_json(meta, tokenizer_json, tmp_path, part):
    search = tokenizer_search(meta, tokenizer_json, tmp_path / "target")
    content = json.loads(tokenizer_json.read_text())
    search_json(tokenizer_json, search, st.sampled_from(sorted(content[part] if part else content)), part=part)
    assert search.refused

"""Searches through each format from its inside: headers, directories, tensors, names, configurations, tokenizers."""

import functools
import json
import struct
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from meta_checkpoints import meta_params, meta_weights, write_meta
from random_models import random_model, stock_twin, tiny_config
from searches import (
    ENTRIES,
    JSON_BYTES,
    JSON_VALUES,
    REPLACEMENT,
    Search,
    assert_same,
    meta_says,
    read_safetensors,
    search_bytes,
    search_json,
    searching,
    stock_says,
    tensors_of,
    write_safetensors,
)
from tensor_changes import IMPOSSIBLE, NAMES, TENSORS, changed, changes

from conversion.convert import convert


@pytest.fixture
def tiny_meta(tmp_path, request):
    params = meta_params(dim=4, n_heads=2, n_kv_heads=1, n_layers=1, multiple_of=2)
    shards = getattr(request, "param", 2)
    return write_meta(tmp_path / "meta", params, meta_weights(params, vocab=6), shards=shards)


def search_of(source, folder, says):
    """Conversions of `source`, which must have the tensors that `says` reads in it."""
    return Search(
        folder,
        functools.partial(convert, source, with_tokenizer=False, allow_nonfinite=True),
        lambda target: assert_same(tensors_of(target), says(source)),
    )


@pytest.fixture
def meta_search(tiny_meta, tmp_path):
    return search_of(tiny_meta, tmp_path / "target", meta_says)


@pytest.mark.parametrize("replacement", [REPLACEMENT, JSON_BYTES], ids=["any", "JSON"])
def test_bytes_of_a_params_json(tiny_meta, meta_search, replacement):
    path = tiny_meta / "params.json"
    search_bytes(path, meta_search, range(path.stat().st_size), replacement=replacement)
    assert meta_search.refused


def test_values_of_a_params_json(tiny_meta, meta_search):
    more = ["ffn_dim_multiplier", "rope_theta", "head_dim", "max_seq_len"]
    search_json(tiny_meta / "params.json", meta_search, st.sampled_from([*meta_params(), *more]))
    meta_search.assert_both_kinds()


def zip_positions(path):
    """Positions of bytes in a zip file of torch's: local headers, the pickle, the values, the directory and its end."""
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries, directory = archive.infolist(), archive.start_dir
    parts = {"local headers": [], "pickle": [], "values": [], "directory": [*range(directory, len(content))]}
    for entry in entries:
        start = entry.header_offset
        parts["local headers"] += range(start, start + 30)
        start += 30 + sum(struct.unpack_from("<2H", content, start + 26))
        if entry.filename.endswith("data.pkl"):
            parts["pickle"] += range(start, start + entry.file_size)
        elif "/data/" in entry.filename:
            parts["values"] += range(start, start + entry.file_size)
    return parts


@pytest.mark.parametrize("part", ["local headers", "pickle", "values", "directory"])
def test_bytes_of_a_shard(tiny_meta, meta_search, part):
    path = tiny_meta / "consolidated.01.pth"
    if part in ("local headers", "directory"):
        # The values are not touched, and torch's own reading without memory-mapping is misled by some of the changes.
        expected = meta_says(tiny_meta)
        meta_search.holds = lambda target: assert_same(tensors_of(target), expected)
    search_bytes(path, meta_search, zip_positions(path)[part])
    meta_search.assert_both_kinds()


@pytest.mark.parametrize("tiny_meta", [1, 2], indirect=True, ids=["one shard", "two shards"])
def test_tensors_of_a_shard(tiny_meta, meta_search):
    path = tiny_meta / "consolidated.00.pth"
    shard = torch.load(path, weights_only=True)

    @searching
    @given(changes(list(shard)))
    def check(edits):
        try:
            hostile = changed(shard, edits)
        except IMPOSSIBLE:
            return
        torch.save(hostile, path)
        meta_search.case()

    check()
    meta_search.assert_both_kinds()


@pytest.mark.parametrize("tiny_meta", [1], indirect=True)
@pytest.mark.parametrize("kind", TENSORS)
def test_each_tensor_of_a_shard_in_turn(tiny_meta, meta_search, kind):
    path = tiny_meta / "consolidated.00.pth"
    shard = torch.load(path, weights_only=True)
    for name in shard:
        torch.save(changed(shard, [(kind, name, None)]), path)
        meta_search.case()


@pytest.fixture
def stock(tmp_path):
    """A folder of stock Llama in two files, so that there is an index."""
    config = tiny_config(
        vocab_size=6, hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    stock_twin(random_model(config)).save_pretrained(tmp_path / "stock", max_shard_size=400)
    assert len(list((tmp_path / "stock").glob("*.safetensors"))) == 2
    return tmp_path / "stock"


@pytest.fixture
def stock_search(stock, tmp_path):
    return search_of(stock, tmp_path / "target", stock_says)


def test_header_of_a_safetensors_file(stock, stock_search):
    path = min(stock.glob("*.safetensors"))
    entries, data = read_safetensors(path)
    names = [name for name in entries if name != "__metadata__"]
    edits = st.dictionaries(st.sampled_from(names), ENTRIES, max_size=2)
    renamed = st.dictionaries(st.sampled_from(names), st.one_of(NAMES.map(str), st.sampled_from(names)), max_size=1)
    metadata = st.one_of(st.just({}), st.fixed_dictionaries({"__metadata__": JSON_VALUES}))
    lengths = st.one_of(st.none(), st.none(), st.none(), st.sampled_from([0, 1, 7, 99_999_999, 2**40, 2**64 - 1]))

    @searching
    @given(edits, renamed, metadata, lengths)
    def check(edits, renamed, metadata, length):
        spoilt = {renamed.get(name, name): entry | edits.get(name, {}) for name, entry in entries.items()} | metadata
        write_safetensors(path, spoilt, data, length=length)
        stock_search.case()

    check()
    stock_search.assert_both_kinds()


def test_bytes_of_a_safetensors_file(stock, stock_search):
    path = min(stock.glob("*.safetensors"))
    search_bytes(path, stock_search, range(path.stat().st_size))
    stock_search.assert_both_kinds()


def test_index_of_safetensors_files(stock, stock_search, tmp_path):
    path = stock / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = [*set(index["weight_map"].values())]
    outside = [f"../{stock.name}/{files[0]}", str(stock / files[0]), "..", ".", "", "/", "/etc/passwd"]
    odd = ["\x00", "\ud800", "a" * 300, "a/b", "config.json", "model.safetensors.index.json", "nothing.safetensors"]
    target = st.one_of(st.sampled_from(files), st.sampled_from(files), st.sampled_from(outside + odd), JSON_VALUES)
    names = st.one_of(st.sampled_from([*index["weight_map"]]), st.text(max_size=3))

    @searching
    @given(st.dictionaries(names, target, max_size=2), st.one_of(st.just({}), st.dictionaries(
        st.sampled_from(["weight_map", "metadata"]), JSON_VALUES, max_size=1)))  # fmt: skip
    def check(edits, replaced):
        path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | edits} | replaced))
        stock_search.case()

    check()
    stock_search.assert_both_kinds()


def test_values_of_a_config_json(stock, stock_search):
    path = stock / "config.json"
    known = sorted(json.loads(path.read_text()))
    more = ["num_labels", "id2label", "torch_dtype", "rope_scaling", "rope_theta", "auto_map", "quantization_config"]
    odd = ["to_dict", "to_diff_dict", "validate_rope", "__class__", "_attn_implementation", "tokenizer_class", "a"]
    search_json(path, stock_search, st.sampled_from([*known, *more, *odd]))
    stock_search.assert_both_kinds()


def test_bytes_of_a_config_json(stock, stock_search):
    path = stock / "config.json"
    search_bytes(path, stock_search, range(path.stat().st_size), replacement=JSON_BYTES)
    stock_search.assert_both_kinds()

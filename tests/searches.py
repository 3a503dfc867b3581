"""Searches through damaged files: what is changed, and what must come of each case."""

import functools
import json
import shutil
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import META_NAMES
from safetensors.torch import load_file
from transformers import AutoConfig, GenerationConfig

from hf_llama_repro.errors import CheckpointError

# Registered in conftest.py: `pytest --long` asks for ten times as many.
searching = settings.get_profile("search")
searching_costly = settings.get_profile("costly search")

# Where numbers of 1, 2, 4 and 8 bytes begin and end.
EXTREMES = [b"\0", b"\xff", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0" * 8, b"\xff" * 8]
REPLACEMENT = st.one_of(st.binary(min_size=1, max_size=4), st.sampled_from(EXTREMES))
# Bytes of which JSON is made: others are refused by the first look at the file.
JSON_BYTES = st.text('0123456789-.e"{}[]:, anul\\', min_size=1, max_size=3).map(str.encode)
JSON_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 16),
    st.sampled_from([2**31, 2**63, 2**64, 10**12, 10**400]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["float16", "int8", "nn", "load", "../x", "/", "\x00", "a" * 300]),
    st.lists(st.integers(-1, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
# What an entry of a safetensors header may say instead.
SIZES = st.one_of(st.integers(0, 8), st.sampled_from([-1, 2**31, 2**32 + 1, 2**62, 2**63, 2**64, 10**12, 1.5, "4"]))
ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(
                ["F32", "F16", "BF16", "F64", "I8", "U8", "BOOL", "C64", "F8_E4M3", "F4", "F6_E2M3", "F8_E8M0", "X"]
            )
        }
    ),
    st.fixed_dictionaries({"shape": st.one_of(st.lists(SIZES, max_size=9), st.just([2**32, 2**32, 1]), SIZES)}),
    st.fixed_dictionaries({"data_offsets": st.lists(SIZES, max_size=3)}),
    st.fixed_dictionaries({"more": JSON_VALUES}),
)

LEAST = 2
"""Cases that must be refused, and that must be converted, lest a search look at one kind only."""


class Search:
    """Counts how its cases end; `holds` is what a conversion's tensors are compared with."""

    def __init__(self, folder, convert, holds):
        self.folder, self.convert, self.holds = folder, convert, holds
        self.refused, self.converted = [], 0

    def case(self):
        """Refused with nothing left, or converted to what the source says."""
        shutil.rmtree(self.folder, ignore_errors=True)  # what a failing case left is not the next one's
        self.folder.mkdir()
        target = self.folder / "ours"
        try:
            self.convert(target)
        except CheckpointError as error:
            assert not list(self.folder.iterdir())
            self.refused.append(str(error))
        else:
            assert [path.name for path in self.folder.iterdir()] == ["ours"]
            self.holds(target)
            AutoConfig.from_pretrained(target)
            GenerationConfig.from_pretrained(target)
            self.converted += 1

    def assert_both_kinds(self):
        assert min(len(self.refused), self.converted) >= LEAST, (len(self.refused), self.converted)


def search_bytes(path, search, positions, *, replacement=REPLACEMENT, profile=searching):
    """Cases in which bytes of the file `path`, which begin at one of `positions`, are others."""
    content = path.read_bytes()

    @profile
    @given(st.lists(st.tuples(st.sampled_from(positions), replacement), min_size=1, max_size=4))
    def check(edits):
        spoilt = bytearray(content)
        for at, replacement in edits:
            spoilt[at : at + len(replacement)] = replacement
        path.write_bytes(spoilt[: len(content)])
        search.case()

    try:
        check()
    finally:
        path.write_bytes(content)


def search_json(path, search, fields, *, part=None, profile=searching):
    """Cases in which fields of the JSON object in the file `path`, or of its `part`, have other values, or are gone."""
    text = path.read_text()

    @profile
    @given(st.dictionaries(fields, JSON_VALUES, min_size=1, max_size=3), st.lists(fields, max_size=1))
    def check(changed, removed):
        content = json.loads(text)
        before = content[part] if part else content
        after = {name: value for name, value in (before | changed).items() if name not in removed}
        path.write_text(json.dumps({**content, part: after} if part else after))
        search.case()

    try:
        check()
    finally:
        path.write_text(text)


def tensors_of(folder: Path):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(found, expected):
    """Bit for bit, NaN too."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        bits = [one.contiguous().view(-1).view(torch.uint8) for one in (found[name], tensor)]
        assert torch.equal(*bits), name


def meta_says(folder: Path):
    """The whole tensors of a Meta folder under our names, read without memory-mapping and joined by a rule of its own.

    The output matrix is left out where it is the embedding.
    """
    params = json.loads((folder / "params.json").read_text())
    paths = sorted(folder.glob("consolidated.*.pth"))
    shards = [torch.load(path, map_location="cpu", weights_only=True) for path in paths]
    heads = {"wq": params["n_heads"], "wk": params.get("n_kv_heads") or params["n_heads"]}
    says = {}
    for name in shards[0]:
        if name.endswith("rope.freqs"):
            continue
        pieces = [torch.Tensor.detach(shard[name]).resolve_neg() for shard in shards]
        kind = name.split(".")[-2]
        if kind.endswith("norm"):
            whole = pieces[0]
        else:
            whole = torch.cat(pieces, dim=1 if kind in ("wo", "w2", "tok_embeddings") else 0)
        if kind in heads:
            order = torch.arange(len(whole)).view(heads[kind], 2, -1).transpose(1, 2).flatten()
            whole = torch.empty_like(whole).index_copy_(0, order, whole)
        says[_our_name(name)] = whole
    output, embedding = (says[name].contiguous().view(torch.uint8) for name in ("lm_head.weight", _our_embedding))
    if output.shape == embedding.shape and torch.equal(output, embedding):
        del says["lm_head.weight"]
    return says


_our_embedding = "model.embed_tokens.weight"


@functools.cache
def _our_name(name):
    if name == "norm.weight":
        return "model.norm.weight"
    for ours, metas in META_NAMES.items():
        if metas != "norm":
            name = name.replace(metas, ours)
    return name


def write_safetensors(path, entries, data, *, length=None):
    """A file with the header `entries` (JSON), before which stands `length` instead of its own."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def read_safetensors(path):
    """Its header, and the bytes behind it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


_TORCH_NAMES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def stock_says(folder):
    """The tensors that the headers of a folder's safetensors files name, without the library."""
    says = {}
    for path in folder.glob("*.safetensors"):
        entries, data = read_safetensors(path)
        for name, entry in entries.items():
            if name != "__metadata__" and not name.endswith("inv_freq"):
                start, end = entry["data_offsets"]
                flat = torch.frombuffer(bytearray(data[start:end]), dtype=_TORCH_NAMES[entry["dtype"]])
                says[name] = flat.view(entry["shape"])
    return says

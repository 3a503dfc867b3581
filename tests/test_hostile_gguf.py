"""Searches through GGUF files: bytes of the header, kinds and values of the metadata, tensors."""

import functools
import struct

import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from meta_checkpoints import VOCAB, write_sentencepiece
from random_models import random_model, tiny_config
from searches import Search, assert_same, search_bytes, searching, searching_costly, tensors_of
from sentencepiece import SentencePieceProcessor
from test_convert_gguf import NAMES, gguf_tensors, write_gguf
from transformers import AutoTokenizer

from conversion.convert import convert
from conversion.keys import TENSORS  # names only
from hf_llama_repro.errors import CheckpointError


@pytest.fixture
def model():
    sizes = {"vocab_size": 6, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1}
    return random_model(tiny_config(**sizes, num_attention_heads=2, num_key_value_heads=1))


def gguf_says(path):
    """The tensors of the file under our names, in the order of our rows, read by the gguf package alone."""
    reader = GGUFReader(path)

    def value(name, default):
        found = reader.fields[name].contents() if name in reader.fields else default
        return int(found[0] if isinstance(found, list) else found)

    heads = value("llama.attention.head_count", None)
    heads = {"attn_q": heads, "attn_k": value("llama.attention.head_count_kv", heads)}
    says = {}
    for tensor in reader.tensors:
        kind = tensor.name.split(".")[-2]
        if kind == "attn_rot_embd":
            continue
        shape = tuple(int(size) for size in reversed(tensor.shape))
        rows = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).reshape(shape).copy())
        if kind in heads:
            order = torch.arange(len(rows)).view(heads[kind], 2, -1).transpose(1, 2).flatten()
            rows = torch.empty_like(rows).index_copy_(0, order, rows)
        says[_our_name(tensor.name)] = rows
    return says


def _our_name(name):
    if name == "output_norm.weight":
        return "model.norm.weight"
    parts = {theirs: metas for metas, theirs in NAMES.items()}
    head, _, last = name.removesuffix(".weight").rpartition(".")
    head = head.replace("blk", "layers")
    metas = ".".join([part for part in (head, parts.get(last, last)) if part]) + ".weight"
    layer = head.partition(".")[2]
    return next(row.ours.format(layer) for row in TENSORS if row.meta.format(layer) == metas)


def gguf_search(path, folder):
    def holds(target):
        found = {name: tensor.float() for name, tensor in tensors_of(target).items()}
        assert_same(found, gguf_says(path))

    return Search(folder, functools.partial(convert, path, with_tokenizer=False, allow_nonfinite=True), holds)


@pytest.mark.parametrize("part", ["numbers of the file", "metadata", "tensors"])
def test_header_of_a_gguf_file(tmp_path, model, part):
    path = write_gguf(tmp_path / "m.gguf", model)
    tensors = GGUFReader(path).tensors
    start, end = tensors[0].field.offset, tensors[0].data_offset
    search = gguf_search(path, tmp_path / "target")
    search_bytes(path, search, {"numbers of the file": range(4, 24), "metadata": range(24, start),
                                "tensors": range(start, end)}[part])  # fmt: skip
    assert search.refused
    assert search.converted or part == "numbers of the file"


# Kind of value -> values of it.
METADATA = st.one_of(
    st.tuples(st.just(GGUFValueType.UINT32), st.sampled_from([0, 1, 2, 3, 8, 2**31, 2**32 - 1])),
    st.tuples(st.just(GGUFValueType.UINT64), st.sampled_from([0, 2, 10**12, 2**63, 2**64 - 1])),
    st.tuples(st.just(GGUFValueType.INT32), st.sampled_from([-1, 2])),
    st.tuples(st.just(GGUFValueType.FLOAT32), st.floats(width=32)),
    st.tuples(st.just(GGUFValueType.BOOL), st.booleans()),
    st.tuples(st.just(GGUFValueType.STRING), st.sampled_from(["", "llama", "x" * 1000, "\x1b[2J"])),
    st.tuples(st.just(GGUFValueType.ARRAY), st.sampled_from([[1], [1, 2, 3], ["a", "b"], [1.5]])),
)
KEYS = [
    *("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"),
    *("attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base"),
    *("vocab_size", "expert_count", "rope.scaling.type"),
]


def metadata(path):
    """Name -> kind and value, but of what the writer adds by itself."""
    return {
        name: (field.types[0], field.contents())
        for name, field in GGUFReader(path).fields.items()
        if not name.startswith("GGUF.") and name != "general.architecture"
    }


def written_again(path, values, model):
    """The file with other metadata."""
    writer = GGUFWriter(path, "llama")
    for name, (kind, value) in values.items():
        writer.add_key_value(name, value, kind)
    for name, data in gguf_tensors(model).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_metadata_of_a_gguf_file(tmp_path, model):
    path = write_gguf(tmp_path / "m.gguf", model)
    values = metadata(path)
    search = gguf_search(path, tmp_path / "target")
    keys = st.sampled_from([*(f"llama.{key}" for key in KEYS), "general.alignment", "general.name"])

    @searching
    @given(st.dictionaries(keys, METADATA, min_size=1, max_size=3), st.lists(keys, max_size=1))
    def check(changed, removed):
        written_again(path, {k: v for k, v in (values | changed).items() if k not in removed}, model)
        search.case()

    check()
    search.assert_both_kinds()


def tokenizer_metadata(model_file):
    processor = SentencePieceProcessor(model_file=str(model_file))
    ids = range(len(processor))
    kinds = [
        2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
        for i in ids
    ]
    return {
        "tokenizer.ggml.model": (GGUFValueType.STRING, "llama"),
        "tokenizer.ggml.tokens": (GGUFValueType.ARRAY, [processor.id_to_piece(i) for i in ids]),
        "tokenizer.ggml.scores": (GGUFValueType.ARRAY, [processor.get_score(i) for i in ids]),
        "tokenizer.ggml.token_type": (GGUFValueType.ARRAY, kinds),
        "tokenizer.ggml.bos_token_id": (GGUFValueType.UINT32, 1),
        "tokenizer.ggml.eos_token_id": (GGUFValueType.UINT32, 2),
    }


def test_tokenizer_of_a_gguf_file(tmp_path):
    """What is converted has the ids of the tokenizer that the metadata were made of, where they were not touched."""
    model = random_model(tiny_config(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                     num_key_value_heads=1))  # fmt: skip
    path = write_gguf(tmp_path / "m.gguf", model)
    pieces = write_sentencepiece(tmp_path / "tokenizer.model")
    values = metadata(path) | tokenizer_metadata(pieces)
    keys = [*tokenizer_metadata(pieces), "tokenizer.ggml.pre", "tokenizer.ggml.merges", "tokenizer.chat_template"]
    keys += [f"tokenizer.ggml.{name}" for name in ("add_bos_token", "add_space_prefix", "padding_token_id")]
    untouched = {"tokenizer.ggml.pre", "tokenizer.ggml.merges", "tokenizer.ggml.padding_token_id"}
    changed = {}

    def holds(target):
        found = AutoTokenizer.from_pretrained(target)
        if not changed.keys() - untouched:
            expected = [[1, *ids] for ids in SentencePieceProcessor(model_file=str(pieces)).encode(["the fox", " a"])]
            assert [found(text).input_ids for text in ("the fox", " a")] == expected

    search = Search(tmp_path / "target", functools.partial(convert, path), holds)

    @searching_costly
    @given(st.dictionaries(st.sampled_from(keys), METADATA, max_size=2), st.lists(st.sampled_from(keys), max_size=1))
    def check(edits, removed):
        changed.clear()
        changed.update(edits, **dict.fromkeys(removed))
        kept = {name: value for name, value in (values | edits).items() if name not in removed}
        written_again(path, kept, model)
        search.case()

    check()
    search.assert_both_kinds()


@pytest.mark.parametrize("count", [10**12, 2**63, 2**64 - 1])
@pytest.mark.parametrize("kind", [0, 8, 9])  # bytes, texts, lists
def test_lists_that_are_not_there_are_refused_at_once(tmp_path, model, kind, count):
    """The gguf package would make an object for each element until memory is used up."""
    path = write_gguf(tmp_path / "m.gguf", model)
    values = metadata(path) | {"llama.many": (GGUFValueType.ARRAY, [1, 2, 3])}
    written_again(path, values, model)
    content = bytearray(path.read_bytes())
    at = content.index(b"llama.many") + len("llama.many") + 4
    content[at : at + 12] = struct.pack("<IQ", kind, count)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m\.gguf is truncated or damaged \(lists of \d+ elements\)"):
        convert(path, tmp_path / "ours", with_tokenizer=False)


def test_tensors_that_share_their_bytes_are_refused(tmp_path, model):
    """A small file could ask for any amount of memory."""
    path = write_gguf(tmp_path / "m.gguf", model)
    reader = GGUFReader(path)
    content = bytearray(path.read_bytes())
    first = int(reader.tensors[0].field.parts[-1][0])
    for tensor in reader.tensors:
        field = tensor.field
        at = field.offset + sum(part.nbytes for part in field.parts[:-1])
        content[at : at + 8] = struct.pack("<Q", first)
    path.write_bytes(content[: reader.data_offset + max(tensor.n_bytes for tensor in reader.tensors)])
    with pytest.raises(CheckpointError, match="its tensors overlap"):
        convert(path, tmp_path / "ours", with_tokenizer=False)

"""What searches through damaged files came upon, and what a file may claim: one explicit test for each."""

import json
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch
from meta_checkpoints import VOCAB, fingerprint, meta_folder, write_sentencepiece
from tensor_changes import TENSORS
from test_convert_hugging_face import stock_folder

from conversion.convert import convert, main
from hf_llama_repro.errors import CheckpointError

NORM, GATE = "norm.weight", "layers.0.feed_forward.w1.weight"


@pytest.fixture
def meta(tmp_path):
    return meta_folder(tmp_path / "meta", vocab_size=VOCAB)


@pytest.fixture
def shard(meta):
    return meta / "consolidated.00.pth"


@pytest.fixture
def refused(tmp_path, capsys):
    """Asserts that function and command refuse, the latter with exit code 2, and that nothing changes on the disk."""

    def check(source, message, *, tokenizer=None):
        before = fingerprint(tmp_path)
        with pytest.raises(CheckpointError, match=message):
            convert(source, tmp_path / "ours", with_tokenizer=tokenizer is not None, tokenizer=tokenizer)
        options = ["--no-tokenizer"] if tokenizer is None else ["--tokenizer", str(tokenizer)]
        assert main([str(source), str(tmp_path / "ours"), *options]) == 2
        assert "Traceback" not in capsys.readouterr().err
        assert fingerprint(tmp_path) == before
        assert not list(tmp_path.rglob("*ours*"))

    return check


def change_tensor(path, name, change):
    tensors = torch.load(path, weights_only=True)
    torch.save({**tensors, name: change(tensors[name])}, path)


def rewrite_zip(path, *, compression=zipfile.ZIP_STORED, change=lambda name, content: content):
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))


REFUSED_TENSORS = {
    "endless": ("tok_embeddings.weight", "has 96,000,000,000,000 values, but the file holds only 4 bytes"),
    "endless rows and columns": (GATE, "has 1,000,000,000,000,000,000 values"),
    "without rows": (GATE, "has no matrix layers.0.feed_forward.w1.weight with values"),
    "on the meta device": (NORM, "no dictionary of tensors"),
    "endless on the meta device": ("tok_embeddings.weight", "no dictionary of tensors"),
    "nested": (NORM, "no dictionary of tensors"),
    "quantized": (NORM, "qint8, but a LLaMA weight is"),
    "torch.int8": (NORM, "int8, but a LLaMA weight is"),
    "torch.complex64": (NORM, "complex64, but a LLaMA weight is"),
    "torch.float8_e4m3fn": (NORM, "float8_e4m3fn, but a LLaMA weight is"),
    "torch.bool": (NORM, "bool, but a LLaMA weight is"),
}


@pytest.mark.parametrize("kind", REFUSED_TENSORS)
def test_tensor_is_refused(meta, shard, refused, kind):
    name, message = REFUSED_TENSORS[kind]
    change_tensor(shard, name, TENSORS[kind])
    refused(meta, message)


def test_values_negated_lazily_are_those_that_torch_shows(tmp_path, meta, shard):
    convert(meta, tmp_path / "before", with_tokenizer=False)
    # The negative of the negative, which torch keeps as a flag of the tensor.
    change_tensor(shard, NORM, lambda tensor: torch._neg_view(-tensor))
    convert(meta, tmp_path / "after", with_tokenizer=False)
    before, after = (fingerprint(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert [*before.values()] == [*after.values()]


def test_attributes_of_tensor_and_dictionary_are_passed_over(tmp_path, meta, shard):
    change_tensor(shard, NORM, TENSORS["with methods of its own"])
    tensors = OrderedDict(torch.load(shard, weights_only=True))
    tensors.itemz = 1  # Python itself could not write the dictionary with another method than its own
    torch.save(tensors, shard)
    shard.write_bytes(shard.read_bytes().replace(b"itemz", b"items"))
    convert(meta, tmp_path / "ours", with_tokenizer=False)


def test_compressed_shard_is_refused(meta, shard, refused):
    """Memory-mapped, its compressed bytes would be taken for values."""
    rewrite_zip(shard, compression=zipfile.ZIP_DEFLATED)
    refused(meta, "is compressed or encrypted, which torch.save never does")


def test_record_that_is_shorter_than_its_tensor_is_refused(meta, shard, refused):
    """The bytes of the next record would be taken for the rest."""
    rewrite_zip(shard, change=lambda name, content: content[:-8] if name.endswith("data/0") else content)
    refused(meta, "its tensors are of another size than its data")


def test_record_that_is_not_behind_its_header_is_refused(meta, shard, refused):
    """One byte further on, all values would be others."""
    content = bytearray(shard.read_bytes())
    with zipfile.ZipFile(shard) as archive:
        at = archive.getinfo(f"{shard.stem}/data/0").header_offset + 28  # length of the header's extra field
    struct.pack_into("<H", content, at, struct.unpack_from("<H", content, at)[0] + 1)
    shard.write_bytes(content)
    refused(meta, "data/0 is not where it should be")


def test_record_that_another_one_stands_for_is_refused(meta, shard, refused):
    """The directory of the archive would swap two tensors of one shape."""
    content = bytearray(shard.read_bytes())
    with zipfile.ZipFile(shard) as archive:
        keys, values = (archive.getinfo(f"{shard.stem}/data/{key}").header_offset for key in (2, 3))
        start = archive.start_dir
    at = content.index(struct.pack("<I", keys), start)
    struct.pack_into("<I", content, at, values)
    shard.write_bytes(content)
    refused(meta, "data/2 is not where it should be")


def test_file_of_old_torch_that_claims_more_than_it_holds_is_refused(meta, shard, refused):
    tensors = torch.load(shard, weights_only=True)
    torch.save(tensors, shard, _use_new_zipfile_serialization=False)
    content = shard.read_bytes()
    # The number of values of the first storage, 4 bytes of the pickle, becomes 2 ** 31 - 1.
    count = struct.pack("<BH", ord("M"), VOCAB * 96)
    assert content.count(count) >= 1
    shard.write_bytes(content.replace(count, b"J\xff\xff\xff\x7f", 1))
    refused(meta, "is truncated or damaged|of another size than its data")


DEEP = "[" * 100_000
REFUSED_FIELDS = {
    "no value": ({"attention_bias": None}, "attention_bias"),
    "name of a method": ({"to_dict": 1}, "to_dict is not a field"),
    "name of the class": ({"__class__": 1}, "__class__ is not a field"),
    "dtype that is a module": ({"dtype": "nn"}, "dtype = 'nn' is not"),
    "dtype that is a list": ({"dtype": [1]}, r"dtype = \[1\] is not"),
    "a name for each of a billion": ({"num_labels": 10**9}, "num_labels = 1000000000 is more"),
    "text for a number": ({"hidden_size": "64"}, "hidden_size"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED_FIELDS.values(), ids=REFUSED_FIELDS)
def test_config_json_is_refused(tmp_path, refused, fields, message):
    stock = stock_folder(tmp_path / "stock")
    content = json.loads((stock / "config.json").read_text())
    (stock / "config.json").write_text(json.dumps(content | fields))
    refused(stock, message)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_of_any_depth_is_refused(tmp_path, refused, name):
    stock = stock_folder(tmp_path / "stock")
    (stock / name).write_text(DEEP)
    refused(stock, f"{name} cannot be read as JSON")


@pytest.fixture
def tokenizer_model(tmp_path):
    return write_sentencepiece(tmp_path / "tokenizer.model")


def test_piece_that_is_no_text_is_refused(tmp_path, meta, refused, tokenizer_model):
    content = tokenizer_model.read_bytes()
    at = content.index("▁".encode())
    tokenizer_model.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    refused(meta, "a piece is not UTF-8|not a SentencePiece model", tokenizer=tokenizer_model)


@pytest.fixture
def tokenizer_folder(tmp_path, meta, tokenizer_model):
    convert(meta, tmp_path / "tokenizer", tokenizer=tokenizer_model)
    (tmp_path / "tokenizer/tokenizer.model").unlink()
    return tmp_path / "tokenizer"


@pytest.mark.parametrize(
    "fields", [{"model": {"type": "BPE", "vocab": {"a": 0}}}, {"added_tokens": [{"id": 0}]}, {"decoder": 7}]
)
def test_tokenizer_json_that_cannot_be_loaded_is_refused(meta, refused, tokenizer_folder, fields):
    path = tokenizer_folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    refused(meta, "not a tokenizer that can be loaded", tokenizer=path)


def without_its_unknown_token(content):
    content["model"] |= {"unk_token": "", "byte_fallback": False}


def without_the_token_that_it_adds(content):
    content["post_processor"]["special_tokens"] = {}


@pytest.mark.parametrize("change", [without_its_unknown_token, without_the_token_that_it_adds])
def test_tokenizer_json_that_fails_at_a_text_is_refused(meta, refused, tokenizer_folder, change):
    path = tokenizer_folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    refused(meta, "not a tokenizer that can be loaded", tokenizer=path)


def test_code_of_a_tokenizer_is_not_run(tmp_path, meta, tokenizer_folder, monkeypatch):
    """Nor is anybody asked whether it may be."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    evidence = tmp_path / "evidence"
    (tokenizer_folder / "hostile.py").write_text(f"open({str(evidence)!r}, 'w').close()\nclass Hostile: pass\n")
    path = tokenizer_folder / "tokenizer_config.json"
    hostile = {"auto_map": {"AutoTokenizer": ["hostile.Hostile", "hostile.Hostile"]}, "tokenizer_class": "Hostile"}
    path.write_text(json.dumps(json.loads(path.read_text()) | hostile))
    notes = convert(meta, tmp_path / "ours", tokenizer=tokenizer_folder).source.notes
    assert not evidence.exists()
    assert "auto_map of tokenizer_config.json is left out: a tokenizer's own code is not run" in notes
    written = json.loads((tmp_path / "ours/tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in written

"""Damaged or foreign checkpoints: one message that names file, value and remedy, exit code 2, and nothing written."""

import json
import os
import shutil

import pytest
import torch
from meta_checkpoints import (
    fingerprint,
    meta_folder,
    meta_params,
    meta_shard,
    meta_weights,
    read_meta,
    write_meta,
    write_sentencepiece,
)

from conversion import convert as convert_command
from conversion.convert import convert
from hf_llama_repro.errors import CheckpointError


@pytest.fixture
def meta(tmp_path):
    """A sound folder of 4 shards with its tokenizer, to be spoilt."""
    params = meta_params()
    tokenizer = write_sentencepiece(tmp_path / "tokenizer.model")
    return write_meta(tmp_path / "meta", params, meta_weights(params), shards=4, tokenizer=tokenizer)


@pytest.fixture
def refused(tmp_path, capfd):
    """Asserts that function and commands refuse `source` with the same message, and returns it."""

    def check(source, *options, message="", **keywords):
        before = fingerprint(tmp_path)
        with pytest.raises(CheckpointError, match=message) as refusal:
            convert(source, tmp_path / "ours", **keywords)
        capfd.readouterr()
        assert convert_command.main([str(source), str(tmp_path / "ours"), *options]) == 2
        output = capfd.readouterr()
        assert output.err == f"error: {refusal.value}\n"
        assert not output.out or output.out.startswith("space ")
        assert "\n" not in str(refusal.value)
        assert fingerprint(tmp_path) == before
        assert not list(tmp_path.glob("**/.*")), "leftovers"
        return str(refusal.value)

    return check


def shard(folder, rank):
    return folder / f"consolidated.{rank:02d}.pth"


def change(folder, rank, **tensors):
    """Replaces tensors of a shard, given by the end of their names."""
    content = torch.load(shard(folder, rank), weights_only=True)
    for ending, tensor in tensors.items():
        (name,) = [name for name in content if name.endswith(f"{ending.replace('__', '.')}.weight")]
        content[name] = tensor
    torch.save(content, shard(folder, rank))


# Shards


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, r"lacks consolidated\.00\.pth, but has consolidated\.03\.pth: download what is missing"),
        (1, r"lacks consolidated\.01\.pth, but has consolidated\.03\.pth: download what is missing"),
        (3, r"width of 288, but 3 shard\(s\) of 72 rows make 216; 4 shards would fit: missing or extra files\?"),
    ],
    ids=["first", "middle", "last"],
)
def test_missing_shard(meta, refused, rank, message):
    shard(meta, rank).unlink()
    refused(meta, message=message)


def test_missing_last_shard_without_the_feed_forward_rule(meta, refused):
    """Old params.json have no multiple_of; the other shapes tell it."""
    shard(meta, 3).unlink()
    (meta / "params.json").write_text(json.dumps(meta_params(multiple_of=None)))
    refused(meta, message=r"consolidated\.00\.pth: .* has shape .* params\.json and 3 shard\(s\) ask for")


def test_extra_shard(meta, refused):
    shutil.copy(shard(meta, 3), shard(meta, 4))
    refused(meta, message=r"5 shard\(s\) of 72 rows make 360; 4 shards would fit")


def test_no_shards(meta, refused):
    for rank in range(4):
        shard(meta, rank).unlink()
    refused(meta, message="has params.json but no consolidated.00.pth: the weights are missing")


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.01, 0.5, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("rank", [0, 2])
def test_truncated_shard(meta, refused, rank, share):
    path = shard(meta, rank)
    os.truncate(path, int(share * path.stat().st_size))
    assert "download it again" in refused(meta, message=rf"consolidated\.0{rank}\.pth is truncated")


def test_shard_that_is_a_web_page(meta, refused):
    shard(meta, 1).write_text("<!DOCTYPE html><title>404 Not Found</title>" * 100)
    refused(meta, message=r"consolidated\.01\.pth is truncated or not a PyTorch file \(4,300 bytes\)")


def test_shard_of_another_size(meta, tmp_path, refused):
    other = meta_folder(tmp_path / "other", shards=4, dim=144, n_heads=9, n_kv_heads=3)
    shutil.copy(shard(other, 2), shard(meta, 2))
    refused(meta, message=r"consolidated\.02\.pth: tok_embeddings\.weight has shape \[288, 36\].*ask for \[288, 24\]")


def test_shard_of_another_model_of_the_same_size(meta, refused):
    torch.save(meta_shard(meta_weights(meta_params(), seed=1), 2, 4), shard(meta, 2))
    refused(meta, message=r"consolidated\.02\.pth: .*norm\.weight differs from consolidated\.00\.pth")


@pytest.mark.parametrize(("rank", "copied"), [(1, 0), (3, 2)])
def test_same_shard_twice(meta, refused, rank, copied):
    shutil.copy(shard(meta, copied), shard(meta, rank))
    refused(meta, message=rf"consolidated\.0{rank}\.pth repeats consolidated\.0{copied}\.pth")


def test_shards_of_different_dtypes(meta, refused):
    torch.save({name: tensor.half() for name, tensor in read_meta(meta)[3].items()}, shard(meta, 3))
    refused(meta, message=r"consolidated\.03\.pth: .* is torch\.float16, but torch\.float32 in consolidated\.00\.pth")


def test_missing_and_unknown_tensors_are_named_together(meta, refused):
    content = read_meta(meta)[1]
    content["layers.0.attention.wq.lora"] = content.pop("norm.weight")
    torch.save(content, shard(meta, 1))
    refused(
        meta, message=r"\.01\.pth .*missing tensors \(norm\.weight\); .*unknown tensors \(layers.0.attention.wq.lora"
    )


NO_TENSORS = {
    "a list": [torch.ones(3)],
    "a tensor": torch.ones(3),
    "a number": 3,
    "numbers for tensors": {"norm.weight": 3},
    "nested": {"model": {"norm.weight": torch.ones(3)}},
    "numbered": {0: torch.ones(3)},
    "sparse": {"norm.weight": torch.eye(3).to_sparse()},
    "empty": {},
}


@pytest.mark.parametrize("content", NO_TENSORS.values(), ids=NO_TENSORS)
@pytest.mark.parametrize("rank", [0, 1])
def test_shard_that_holds_no_dictionary_of_tensors(meta, refused, rank, content):
    torch.save(content, shard(meta, rank))
    refused(meta, message=rf"consolidated\.0{rank}\.pth")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn, torch.complex64], ids=str)
@pytest.mark.parametrize("rank", [0, 2])
def test_tensor_that_is_no_floating_point_number(meta, refused, rank, dtype):
    change(meta, rank, layers__1__feed_forward__w2=torch.ones(96, 72).to(dtype))
    refused(meta, message=rf"consolidated\.0{rank}\.pth: layers\.1\.feed_forward\.w2\.weight is {dtype}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(meta, refused, value):
    content = read_meta(meta)[2]
    content["layers.0.attention.wo.weight"][3, 4] = value
    torch.save(content, shard(meta, 2))
    refused(meta, message=r"layers\.0\.self_attn\.o_proj\.weight holds 1 NaN or infinite values.*--allow-nonfinite")


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_nan_and_infinity_are_converted_and_reported_when_allowed(meta, tmp_path, capsys, dtype):
    content = read_meta(meta)[2]
    content["layers.0.attention.wo.weight"][3, :2] = torch.tensor([float("nan"), float("inf")])
    torch.save(content, shard(meta, 2))
    arguments = [str(meta), str(tmp_path / "ours"), "--allow-nonfinite", "--dtype", dtype]
    assert convert_command.main(arguments) == 0
    assert "in 1 tensors: model.layers.0.self_attn.o_proj.weight (2)" in capsys.readouterr().out
    assert "**2 values are NaN or infinite, as in the source.**" in (tmp_path / "ours/README.md").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("params.json", rf"params\.json has the md5 \w+, but checklist\.chk says {'0' * 32}: download it again"),
        ("consolidated.04.pth", r"checklist\.chk names consolidated\.04\.pth, which is not there: download it"),
    ],
)
def test_file_that_is_not_as_metas_checklist_says(meta, refused, name, message):
    (meta / "checklist.chk").write_text(f"{'0' * 32}  {name}\n")
    refused(meta, message=message)


# params.json

BAD_PARAMS = {
    "empty": ("", "is empty: download it again"),
    "blank": (" \n", "is empty"),
    "web page": ("<html><body>403 Forbidden</body></html>", "is a web page, not JSON"),
    "not JSON": ('{"dim": 96,', "is not valid JSON"),
    "nested without end": ("[" * 100_000, "is not valid JSON"),
    "a number of many digits": ('{"dim": ' + "9" * 5000 + "}", "is not valid JSON"),
    "not UTF-8": (json.dumps({**meta_params(), "rope_theta": 5e5}).replace("theta", "th\udceb"), "is not UTF-8"),
    "list": ("[1, 2]", "holds a list, not a JSON object"),
    "null": ("null", "holds a NoneType"),
    "empty object": ("{}", "lacks dim, n_heads, n_layers, norm_eps"),
    "null for a number": ({"dim": None}, "lacks dim"),
    "string for a number": ({"dim": "96"}, "dim = '96' is not a positive whole number"),
    "list for a number": ({"n_heads": [4]}, r"n_heads = '\[4\]' is not"),
    "truth for a number": ({"n_layers": True}, "n_layers = 'True' is not"),
    "fraction": ({"dim": 96.5}, "dim = '96.5' is not"),
    "negative": ({"n_layers": -2}, "n_layers = '-2' is not"),
    "zero": ({"n_heads": 0}, "n_heads = '0' is not"),
    "NaN": ({"norm_eps": float("nan")}, "norm_eps = 'nan' is not a positive number"),
    "Infinity": ({"rope_theta": float("inf")}, "rope_theta = 'inf' is not"),
    "huge": ({"n_layers": 10**9}, "holds 2 layers, but params.json asks for 1000000000"),
    "beyond all floats": ({"dim": 10**400}, r"dim = '1000+' is not"),
    "huge width": ({"dim": 10**10, "multiple_of": None}, "has shape"),
    "huge context": ({"max_seq_len": 10**13}, "max_seq_len = '10000000000000' is not"),
    "another width": ({"dim": 192, "multiple_of": None}, r"tok_embeddings\.weight has shape \[288, 24\].* \[288, 48\]"),
    "another FFN rule": ({"multiple_of": 256}, "says a feed-forward width of 256, but 4 .* make 288"),
    "more layers": ({"n_layers": 3}, "holds 2 layers, but params.json asks for 3"),
    "fewer layers": ({"n_layers": 1}, "holds 2 layers, but params.json asks for 1"),
    "other K/V heads": ({"n_kv_heads": 1}, r"attention\.wk\.weight has shape"),
    "heads do not divide": ({"n_heads": 7, "n_kv_heads": 7}, "dim = 96 is not a multiple of n_heads = 7"),
    "K/V heads do not divide": ({"n_kv_heads": 3}, "n_heads = 4 is not a multiple of n_kv_heads = 3"),
    "odd head size": ({"n_heads": 32, "n_kv_heads": 16}, "head_dim=3 must be even"),
    "Llama 3.1": ({"use_scaled_rope": True}, "says use_scaled_rope = True, as Llama 3.1"),
}


@pytest.mark.parametrize(("content", "message"), BAD_PARAMS.values(), ids=BAD_PARAMS)
def test_params_json(meta, refused, content, message):
    text = content if isinstance(content, str) else json.dumps({**meta_params(), **content})
    (meta / "params.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "params.json" in refused(meta, message=message)


def test_params_json_is_missing(meta, refused):
    (meta / "params.json").unlink()
    refused(meta, message=r"params\.json is missing: it comes with the consolidated\.NN\.pth files")


@pytest.mark.parametrize("length", [0, -1])
def test_context_length_that_is_none(meta, refused, length):
    refused(meta, f"--context-length={length}", message=f"={length} must be at least 1", context_length=length)


# Sources that are no checkpoint, and tokenizers

NO_CHECKPOINT = {
    "empty folder": ({}, "is not a checkpoint: neither params.json"),
    "folder of texts": ({"notes.txt": "x"}, "is not a checkpoint: neither params.json"),
    "text file": ("x", "is not a GGUF file: give a .gguf file, or the folder of a checkpoint"),
    "empty file": ("", "is not a GGUF file"),
    "configuration alone": ({"config.json": '{"model_type": "llama"}'}, "has config.json but no weights"),
    "configuration of something else": ({"config.json": "{}"}, "model_type None, not one of llama"),
    "configuration that is no JSON": ({"config.json": "<html>"}, "cannot be read as JSON"),
}


@pytest.mark.parametrize(("content", "message"), NO_CHECKPOINT.values(), ids=NO_CHECKPOINT)
def test_source_that_is_no_checkpoint(tmp_path, refused, content, message):
    source = tmp_path / "source"
    if isinstance(content, str):
        source.write_text(content)
    else:
        source.mkdir()
        for name, text in content.items():
            (source / name).write_text(text)
    refused(source, message=message)


def test_source_that_does_not_exist(tmp_path, refused):
    refused(tmp_path / "source", message=r"source does not exist")


def test_missing_tokenizer(meta, tmp_path, refused):
    (meta / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.model").unlink()
    message = "no tokenizer was found .*: name one by --tokenizer, or say --no-tokenizer"
    refused(meta, message=message)


def test_tokenizer_with_more_tokens_than_the_embedding_has_rows(meta, tmp_path, refused):
    write_sentencepiece(meta / "tokenizer.model", 289)
    refused(meta, message="289 tokens, but the model's embedding has 288 rows")


def test_tokenizer_that_does_not_exist(meta, tmp_path, refused):
    options = ["--tokenizer", str(tmp_path / "none")]
    refused(meta, *options, message="none: no such file", tokenizer=tmp_path / "none")

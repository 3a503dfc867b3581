"""Meta -> ours -> Meta gives the files back, bit for bit, in any number of shards."""

import json

import pytest
import torch
from meta_checkpoints import (
    HEADS,
    METAS,
    VOCAB,
    fingerprint,
    meta_folder,
    meta_params,
    meta_shard,
    meta_weights,
    read_meta,
    write_meta,
    write_sentencepiece,
)
from random_models import random_model, tiny_config

from conversion.convert import convert
from conversion.export import export, main, params
from conversion.params import ffn_size
from conversion.source import open_source
from hf_llama_repro import LlamaReproConfig, LlamaReproForCausalLM
from hf_llama_repro.errors import CheckpointError

heads = pytest.mark.parametrize("fields", HEADS.values(), ids=HEADS)
forms = pytest.mark.parametrize("model_type", ["llama_repro", "llama"])

papers = pytest.mark.parametrize("name", METAS)


def assert_bits_equal(found, expected):
    """Two dictionaries of tensors with the same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def round_trip(tmp_path, meta, *, model_type="llama_repro", shards=1):
    convert(meta, tmp_path / "ours", model_type=model_type, with_tokenizer=False)
    export(tmp_path / "ours", tmp_path / "back", shards=shards)
    return read_meta(tmp_path / "back")


@forms
@heads
def test_round_trip_gives_every_bit_back(tmp_path, fields, model_type):
    meta = meta_folder(tmp_path / "meta", max_seq_len=64, **fields)
    for found, expected in zip(round_trip(tmp_path, meta, model_type=model_type), read_meta(meta), strict=True):
        assert_bits_equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_round_trip_keeps_the_dtype(tmp_path, dtype):
    meta = meta_folder(tmp_path / "meta", dtype=dtype)
    assert_bits_equal(round_trip(tmp_path, meta)[0], read_meta(meta)[0])


def test_round_trip_of_mixed_dtypes_keeps_each(tmp_path):
    weights = meta_weights(meta_params(), dtype=torch.bfloat16)
    weights |= {name: tensor.float() for name, tensor in weights.items() if "norm" in name}
    meta = write_meta(tmp_path / "meta", meta_params(), weights)
    assert_bits_equal(round_trip(tmp_path, meta)[0], weights)


@pytest.mark.parametrize("frequencies", ["beside", "per layer"])
def test_round_trip_leaves_out_only_the_rotary_frequencies(tmp_path, frequencies):
    weights = meta_weights(meta_params())
    meta = write_meta(tmp_path / "meta", meta_params(), weights, frequencies=frequencies)
    assert_bits_equal(round_trip(tmp_path, meta)[0], weights)


@pytest.mark.parametrize("shards", [2, 3, 4, 8, 16])
def test_shards_are_cut_as_metas(tmp_path, shards):
    weights = meta_weights(meta_params())
    meta = write_meta(tmp_path / "meta", meta_params(), weights)
    found = round_trip(tmp_path, meta, shards=shards)
    assert len(found) == shards
    for rank, shard in enumerate(found):
        assert_bits_equal(shard, meta_shard(weights, rank, shards))


def test_number_of_shards_can_change_again_and_again(tmp_path):
    first = folder = meta_folder(tmp_path / "1")
    for step, shards in enumerate([3, 8, 2, 6, 1]):
        export(folder, tmp_path / f"{step}-{shards}", shards=shards)
        folder = tmp_path / f"{step}-{shards}"
    assert_bits_equal(read_meta(folder)[0], read_meta(first)[0])


def test_tied_model_writes_the_embedding_as_output_too(tmp_path):
    random_model(tiny_config(tie_word_embeddings=True)).save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "meta")
    (shard,) = read_meta(tmp_path / "meta")
    assert torch.equal(shard["output.weight"], shard["tok_embeddings.weight"])


def test_tied_model_comes_back_tied(tmp_path):
    random_model(tiny_config(tie_word_embeddings=True)).save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "meta", shards=1)
    assert open_source(tmp_path / "meta", context_length=256).config.tie_word_embeddings


@pytest.mark.parametrize("shards", [1, 4])
def test_no_file_carries_storage_that_its_tensors_do_not_use(tmp_path, shards):
    meta = write_meta(tmp_path / "meta", meta_params(), meta_weights(meta_params()), shared_norms=True)
    round_trip(tmp_path, meta, shards=shards)
    for path in (tmp_path / "back").glob("*.pth"):
        tensors = torch.load(path, weights_only=True).values()
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
        assert path.stat().st_size < sum(tensor.nbytes for tensor in tensors) + 512 * len(tensors)


@papers
def test_feed_forward_rule_gives_the_papers_width(name):
    content = METAS[name]
    width = ffn_size(content["dim"], content["multiple_of"], content.get("ffn_dim_multiplier"))
    assert width == LlamaReproConfig.from_paper(name).intermediate_size


@papers
def test_params_json_is_metas(name):
    config = LlamaReproConfig.from_paper(name, rms_norm_eps=METAS[name]["norm_eps"])
    assert params(config) == {**METAS[name], "vocab_size": 32000}


SCALED_DOWN = {
    "32/32, multiple of 32": {"dim": 128, "multiple_of": 256, "n_heads": 32},
    "64/8, multiplier": {"dim": 128, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8},
}


@pytest.mark.parametrize("fields", SCALED_DOWN.values(), ids=SCALED_DOWN)
def test_params_json_survives_the_round_trip(tmp_path, fields):
    content = {"n_layers": 2, "norm_eps": 1e-05, "vocab_size": VOCAB, **fields}
    tokenizer = write_sentencepiece(tmp_path / "tokenizer.model")
    weights = meta_weights(content, dtype=torch.bfloat16)
    meta = write_meta(tmp_path / "meta", content, weights, tokenizer=tokenizer)
    convert(meta, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "params.json").read_text()) == content


ODD = {
    "odd width": {"intermediate_size": 113},
    "theta": {"rope_theta": 5e5},
    "narrow": {"intermediate_size": 24},
    "MQA": {"num_key_value_heads": 1},
    "eps": {"rms_norm_eps": 3e-7},
    "long context": {"max_position_embeddings": 16384},
    "LLaMA 1 in bfloat16": {"max_position_embeddings": 2048, "dtype": "bfloat16", "rms_norm_eps": 1e-6},
}


@pytest.mark.parametrize("fields", ODD.values(), ids=ODD)
def test_configuration_that_meta_never_had_survives(tmp_path, fields):
    config = tiny_config(**fields)
    LlamaReproForCausalLM(config).save_pretrained(tmp_path / "ours")
    said = export(tmp_path / "ours", tmp_path / "meta")
    assert f"to convert this back, say --context-length {config.max_position_embeddings}" in said
    fields = ("hidden_size", "intermediate_size", "head_dim", "num_key_value_heads", "rope_theta", "rms_norm_eps")
    back = open_source(tmp_path / "meta", context_length=config.max_position_embeddings).config
    for name in (*fields, "max_position_embeddings", "vocab_size"):
        assert getattr(back, name) == getattr(config, name), name


def test_context_is_recognised_by_the_weights_not_by_the_configurations_dtype(tmp_path):
    """config.json may say float16 where the weights are bfloat16: float16 would speak for LLaMA 1."""
    fields = {"num_key_value_heads": 4, "intermediate_size": 256, "dtype": "bfloat16"}
    config = tiny_config(max_position_embeddings=2048, rms_norm_eps=1e-6, **fields)
    LlamaReproForCausalLM(config).bfloat16().save_pretrained(tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    path.write_text(path.read_text().replace("bfloat16", "float16"))
    assert "say --context-length 2048" in export(tmp_path / "ours", tmp_path / "meta")
    with pytest.raises(CheckpointError, match="bfloat16 weights speaks for LLaMA 2; norm_eps 1e-06 speaks for LLaMA 1"):
        open_source(tmp_path / "meta")


def test_tokenizer_model_is_the_original_file(tmp_path):
    tokenizer = write_sentencepiece(tmp_path / "tokenizer.model")
    meta = write_meta(tmp_path / "7B", meta_params(), meta_weights(meta_params()))
    convert(meta, tmp_path / "ours", tokenizer=tokenizer)
    export(tmp_path / "ours", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


REFUSED = {
    "attention_bias": ({"attention_bias": True}, 1, "attention_bias = True"),
    "mlp_bias": ({"mlp_bias": True}, 1, "mlp_bias = True"),
    "wide heads": ({"head_dim": 20}, 1, "head_dim = 20"),
    "activation": ({"hidden_act": "gelu"}, 1, "hidden_act = gelu"),
    "rope scaling": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, 1, "linear"),
    "dividing the width, not the vocabulary": ({}, 2, "2 shards do not divide the 131 of output.weight"),
    "dividing the vocabulary, not the width": ({}, 131, "131 shards do not divide the 64 of tok_embeddings.weight"),
    "no shards": ({}, 0, "0 shards"),
    "negative": ({}, -1, "-1 shards"),
}


@pytest.mark.parametrize(("fields", "shards", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_what_metas_layout_cannot_hold(tmp_path, capsys, fields, shards, message):
    random_model(tiny_config(**fields)).save_pretrained(tmp_path / "ours")
    before = fingerprint(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        export(tmp_path / "ours", tmp_path / "meta", shards=shards)
    assert main([str(tmp_path / "ours"), str(tmp_path / "meta"), "--shards", str(shards)]) == 2
    assert message in capsys.readouterr().err
    assert fingerprint(tmp_path) == before


def test_command_writes_what_the_function_writes(tmp_path, capsys):
    meta = meta_folder(tmp_path / "meta")
    export(meta, tmp_path / "by function", shards=2)
    assert main([str(meta), str(tmp_path / "by command"), "--shards", "2"]) == 0
    assert "2 shard(s)" in capsys.readouterr().out
    for found, expected in zip(*(read_meta(tmp_path / f"by {way}") for way in ("command", "function")), strict=True):
        assert_bits_equal(found, expected)

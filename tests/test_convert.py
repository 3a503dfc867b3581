"""Meta -> ours: the logits are those of Meta's mathematics on Meta's files, and every bit is kept."""

import json

import pytest
import torch
from meta_checkpoints import HEADS, VOCAB, meta_folder, meta_params, meta_weights, write_meta
from meta_reference import meta_logits
from random_models import TOLERANCE, relative_difference
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conversion.convert import convert, main
from hf_llama_repro.errors import CheckpointError

TOKENS = torch.randint(3, VOCAB, (2, 80), generator=torch.Generator().manual_seed(1))
forms = pytest.mark.parametrize("model_type", ["llama_repro", "llama"])


def reference_logits(params, weights):
    heads = params["n_heads"]
    return meta_logits(
        {name: tensor.float() for name, tensor in weights.items()},
        TOKENS,
        n_heads=heads,
        n_kv_heads=params.get("n_kv_heads", heads),
        norm_eps=params["norm_eps"],
        rope_theta=params.get("rope_theta", 10000.0),
    )


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS).logits


# 8/1 in 4 shards: each holds a quarter of the one K/V head.
LAYOUTS = [
    *[("4/4", shards) for shards in (1, 2, 3, 4, 6, 8, 12, 16)],
    *[("9/3", shards) for shards in (1, 2, 3, 6)],
    *[("32/4", shards) for shards in (1, 4, 8, 16)],
    *[("8/1", shards) for shards in (1, 2, 4, 12)],
]


@forms
@pytest.mark.parametrize(("heads", "shards"), LAYOUTS)
def test_logits_are_those_of_metas_mathematics(tmp_path, heads, shards, model_type):
    params = meta_params(max_seq_len=128, **HEADS[heads])
    weights = meta_weights(params)
    source = write_meta(tmp_path / "meta", params, weights, shards=shards)
    convert(source, tmp_path / "ours", model_type=model_type, with_tokenizer=False)
    assert relative_difference(logits(tmp_path / "ours"), reference_logits(params, weights)) < TOLERANCE


@pytest.mark.parametrize(
    "fields",
    [{"rope_theta": 500.0}, {"norm_eps": 0.1}, {"multiple_of": 16, "ffn_dim_multiplier": 1.3}, {"n_layers": 1}],
    ids=str,
)
def test_every_hyperparameter_reaches_the_model(tmp_path, fields):
    params = meta_params(**fields)
    weights = meta_weights(params)
    meta = write_meta(tmp_path / "meta", params, weights)
    convert(meta, tmp_path / "ours", with_tokenizer=False, context_length=4096)
    assert relative_difference(logits(tmp_path / "ours"), reference_logits(params, weights)) < TOLERANCE


def test_wrong_permutation_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("conversion.meta.to_half_split", lambda rows, heads: rows)
    params = meta_params()
    convert(meta_folder(tmp_path / "meta"), tmp_path / "ours", with_tokenizer=False)
    assert relative_difference(logits(tmp_path / "ours"), reference_logits(params, meta_weights(params))) > 0.1


@forms
@pytest.mark.parametrize("shards", [1, 4])
def test_equal_output_matrix_is_tied(tmp_path, shards, model_type):
    params = meta_params()
    weights = meta_weights(params, tied=True)
    source = write_meta(tmp_path / "meta", params, weights, shards=shards)
    convert(source, tmp_path / "ours", model_type=model_type, with_tokenizer=False)
    assert json.loads((tmp_path / "ours/config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "ours/model.safetensors")
    assert relative_difference(logits(tmp_path / "ours"), reference_logits(params, weights)) < TOLERANCE


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("row", [0, VOCAB - 1])
def test_output_matrix_that_differs_in_one_value_is_not_tied(tmp_path, row, shards):
    params = meta_params()
    weights = meta_weights(params, tied=True)
    weights["output.weight"][row, -1] += 1
    source = write_meta(tmp_path / "meta", params, weights, shards=shards)
    assert not convert(source, tmp_path / "ours", with_tokenizer=False).config.tie_word_embeddings
    assert torch.equal(load_file(tmp_path / "ours/model.safetensors")["lm_head.weight"], weights["output.weight"])


def renamed(weights, params):
    """What the weights must be in our folder, by other means: names by hand, rows by index."""
    names = {"feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "attention.wq": "self_attn.q_proj"}
    ours = {}
    for metas, name in names.items():
        tensor = weights[f"layers.1.{metas}.weight"]
        if metas.endswith("wq"):
            order = torch.arange(len(tensor)).view(params["n_heads"], -1, 2).transpose(1, 2).flatten()
            tensor = tensor[order]
        ours[f"model.layers.1.{name}.weight"] = tensor
    return ours | {"model.norm.weight": weights["norm.weight"]}


@forms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_bit_is_kept(tmp_path, dtype, model_type):
    params = meta_params()
    weights = meta_weights(params, dtype=dtype)
    source = write_meta(tmp_path / "meta", params, weights, shards=2)
    convert(source, tmp_path / "ours", model_type=model_type, with_tokenizer=False)
    found = load_file(tmp_path / "ours/model.safetensors")
    for name, tensor in renamed(weights, params).items():
        assert found[name].dtype is dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_mixed_dtypes_stay_mixed_and_the_configuration_names_the_wider(tmp_path):
    params = meta_params()
    weights = meta_weights(params, dtype=torch.bfloat16)
    weights |= {name: tensor.float() * 1.001 for name, tensor in weights.items() if "norm" in name}
    source = write_meta(tmp_path / "meta", params, weights)
    convert(source, tmp_path / "ours", with_tokenizer=False)
    found = load_file(tmp_path / "ours/model.safetensors")
    assert {str(tensor.dtype) for name, tensor in found.items() if "norm" in name} == {"torch.float32"}
    assert {str(tensor.dtype) for name, tensor in found.items() if "norm" not in name} == {"torch.bfloat16"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(model.model.norm.weight, weights["norm.weight"])


@pytest.mark.parametrize(
    ("before", "after", "loses_bits"),
    [
        (torch.float32, torch.bfloat16, True),
        (torch.float32, torch.float16, True),
        (torch.float16, torch.bfloat16, True),
        (torch.bfloat16, torch.float16, True),
        (torch.float16, torch.float32, False),
        (torch.bfloat16, torch.float32, False),
    ],
    ids=str,
)
def test_cast_says_how_many_values_lost_bits(tmp_path, capsys, before, after, loses_bits):
    weights = meta_weights(meta_params(), dtype=before)
    values = torch.cat([tensor.flatten() for tensor in weights.values()])
    changed = (values.to(after).to(before) != values).double().mean().item()
    assert loses_bits == (changed > 0)
    share = f"{changed:.2%} of the values lost bits" if loses_bits else "without loss"
    name = str(after).removeprefix("torch.")
    source = write_meta(tmp_path / "meta", meta_params(), weights)
    assert main([str(source), str(tmp_path / "ours"), "--no-tokenizer", "--dtype", name]) == 0
    for text in (capsys.readouterr().out, (tmp_path / "ours/README.md").read_text()):
        assert f"cast to {name}, {share}" in text


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_no_cast_says_that_every_bit_is_kept(tmp_path, capsys, dtype):
    assert main([str(meta_folder(tmp_path / "meta")), str(tmp_path / "ours"), "--no-tokenizer", "--dtype", dtype]) == 0
    for text in (capsys.readouterr().out, (tmp_path / "ours/README.md").read_text()):
        assert "every value bit for bit that of the source" in text


@pytest.mark.parametrize("model_type", ["llama_repro", "llama"])
def test_values_beyond_float16_are_refused(tmp_path, model_type):
    weights = meta_weights(meta_params())
    weights["layers.1.ffn_norm.weight"][3] = 65520  # rounds up to infinity in float16
    source = write_meta(tmp_path / "meta", meta_params(), weights)
    with pytest.raises(CheckpointError, match=r"layers\.1\.post_attention_layernorm.* 1 values .*--dtype bfloat16"):
        convert(source, tmp_path / "ours", model_type=model_type, with_tokenizer=False, dtype="float16")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_cast_gives_every_tensor_the_dtype_asked_for(tmp_path, dtype):
    convert(meta_folder(tmp_path / "meta"), tmp_path / "ours", with_tokenizer=False, dtype=dtype)
    assert {str(t.dtype) for t in load_file(tmp_path / "ours/model.safetensors").values()} == {f"torch.{dtype}"}
    assert json.loads((tmp_path / "ours/config.json").read_text())["dtype"] == dtype


def test_vocabulary_is_the_rows_of_the_embedding(tmp_path):
    params = meta_params()
    source = write_meta(tmp_path / "meta", params, meta_weights(params, vocab=131))
    assert convert(source, tmp_path / "ours", with_tokenizer=False).config.vocab_size == 131
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").lm_head.weight.shape == (131, 96)


@pytest.mark.parametrize("frequencies", ["beside", "per layer"])
def test_rotary_frequencies_are_dropped(tmp_path, frequencies):
    source = write_meta(tmp_path / "meta", meta_params(), meta_weights(meta_params()), frequencies=frequencies)
    convert(source, tmp_path / "ours", with_tokenizer=False)
    assert not [name for name in load_file(tmp_path / "ours/model.safetensors") if "freq" in name]


def test_norms_that_share_storage_do_not_make_the_output_larger(tmp_path):
    weights = meta_weights(meta_params())
    source = write_meta(tmp_path / "meta", meta_params(), weights, shared_norms=True)
    convert(source, tmp_path / "ours", with_tokenizer=False)
    size = (tmp_path / "ours/model.safetensors").stat().st_size
    assert 0 < size - sum(tensor.nbytes for tensor in weights.values()) < 5000

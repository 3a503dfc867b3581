"""The proof of a conversion: right ones pass, every planted fault is found and named."""

import json
import math
import shutil

import pytest
import torch
from meta_checkpoints import HEADS, meta_params, meta_weights, write_meta, write_sentencepiece
from random_models import random_model, tiny_config
from safetensors.torch import load_file, save_file

from conversion.checks import table
from conversion.convert import convert
from conversion.keys import to_half_split, to_interleaved
from conversion.reference import MetaReference
from conversion.verify import MAX_HIDDEN, main, verify
from hf_llama_repro.errors import CheckpointError


def source_folder(folder, *, heads="9/3", shards=1, dtype=torch.float32, **fields):
    params = meta_params(n_layers=3, **HEADS[heads], **fields)
    tokenizer = write_sentencepiece(folder.parent / "tokenizer.model")
    return write_meta(folder, params, meta_weights(params, dtype=dtype), shards=shards, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    source = source_folder(folder / "meta", shards=3)
    convert(source, folder / "ours")
    return source, folder / "ours"


CHECKS = [
    *("configuration", "context", "generation", "special ids", "tokenizer", "chat template"),
    *("code", "weights", "computation"),
]


def failed(checks):
    return {check.name: check for check in checks if check.outcome == "FAILED"}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("model_type", ["llama_repro", "llama"])
def test_a_right_conversion_passes(tmp_path, heads, shards, model_type):
    if heads == "9/3" and shards == 2:
        pytest.skip("9 heads are not cut into 2")
    source = source_folder(tmp_path / "meta", heads=heads, shards=shards, dtype=torch.bfloat16)
    convert(source, tmp_path / "ours", model_type=model_type)
    checks = verify(source, tmp_path / "ours", num_tokens=64)
    assert not failed(checks), table(checks)
    assert [check.name for check in checks] == [name for name in CHECKS if name != "code" or model_type != "llama"]
    figures = checks[-1].figures
    assert len(figures["hidden_relative"]) == 1 + 3
    assert 0 < max(figures["hidden_relative"]) < MAX_HIDDEN / 100
    assert figures["kl_mean"] < 1e-8
    assert figures["top_1_agreement"] == 1


@pytest.mark.parametrize(
    ("name", "parts_at"),
    [
        ("layers.1.feed_forward.w2.weight", "layer 1"),
        ("tok_embeddings.weight", "the embedding"),
        ("output.weight", "the output matrix"),
    ],
)
def test_a_source_with_nan_is_not_held_against_its_conversion(tmp_path, name, parts_at):
    clean = source_folder(tmp_path / "clean")
    damaged = source_folder(tmp_path / "damaged")
    path = damaged / "consolidated.00.pth"
    weights = torch.load(path, weights_only=True)
    weights[name][:, 3] = math.nan
    torch.save(weights, path)
    convert(clean, tmp_path / "ours")
    convert(damaged, tmp_path / "ours with NaN", allow_nonfinite=True, verify=True)
    (computation,) = (check for check in verify(damaged, tmp_path / "ours with NaN") if check.name == "computation")
    assert "tokens have no finite logits in the source either" in computation.found
    # Negative control: NaN on one side only.
    for source, target in ((clean, "ours with NaN"), (damaged, "ours")):
        checks = failed(verify(source, tmp_path / target))
        assert checks.keys() == {"weights", "computation"}
        assert checks["computation"].figures["parts_at"] == parts_at


def test_a_cast_is_told_and_not_held_against_it(tmp_path):
    source = source_folder(tmp_path / "meta")
    convert(source, tmp_path / "ours", dtype="bfloat16")
    checks = verify(source, tmp_path / "ours")
    assert not failed(checks), table(checks)
    assert "to bfloat16" in checks[-2].found
    assert max(checks[-1].figures["hidden_relative"]) < MAX_HIDDEN / 100


def test_tied_output(tmp_path):
    params = meta_params()
    source = write_meta(tmp_path / "meta", params, meta_weights(params, tied=True))
    convert(source, tmp_path / "ours", with_tokenizer=False)
    checks = verify(source, tmp_path / "ours")
    assert not failed(checks), table(checks)
    tensors = load_file(tmp_path / "ours/model.safetensors")
    assert "lm_head.weight" not in tensors


@pytest.mark.parametrize("model_type", ["llama_repro", "llama"])
def test_a_hugging_face_source(tmp_path, model_type):
    random_model(tiny_config()).save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "ours", model_type=model_type, with_tokenizer=False)
    assert not failed(verify(tmp_path / "stock", tmp_path / "ours"))
    tensors = load_file(tmp_path / "ours/model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, tmp_path / "ours/model.safetensors", metadata={"format": "pt"})
    assert failed(verify(tmp_path / "stock", tmp_path / "ours")).keys() == {"weights"}


# Planted faults: what is done to the converted tensors or the configuration, what must be named, where it parts.

LAYER = "model.layers.{}."


def swap(tensors, one, other):
    tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()


def no_permutation(tensors):
    name = LAYER.format(1) + "self_attn.q_proj.weight"
    tensors[name] = to_interleaved(tensors[name], 9)


def wrong_head_count(tensors):
    name = LAYER.format(2) + "self_attn.k_proj.weight"
    tensors[name] = to_half_split(to_interleaved(tensors[name], 3), 9 // 3 * 2)


def swapped_norms(tensors):
    swap(tensors, LAYER.format(1) + "input_layernorm.weight", LAYER.format(1) + "post_attention_layernorm.weight")


def swapped_gate_and_up(tensors):
    swap(tensors, LAYER.format(0) + "mlp.gate_proj.weight", LAYER.format(0) + "mlp.up_proj.weight")


def flipped_bit(tensors):
    tensors[LAYER.format(2) + "mlp.down_proj.weight"].view(torch.int32)[5, 7] ^= 1


def shifted_vocabulary(tensors):
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0)


def shifted_output(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(1, 0)


def not_a_number(tensors):
    tensors[LAYER.format(1) + "mlp.up_proj.weight"][0, 0] = math.nan


TENSOR_FAULTS = {
    no_permutation: ("model.layers.1.self_attn.q_proj.weight", "layer 1"),
    wrong_head_count: ("model.layers.2.self_attn.k_proj.weight", "layer 2"),
    swapped_norms: ("model.layers.1.input_layernorm.weight", "layer 1"),
    swapped_gate_and_up: ("model.layers.0.mlp.gate_proj.weight", "layer 0"),
    flipped_bit: ("model.layers.2.mlp.down_proj.weight (1)", None),
    shifted_vocabulary: ("model.embed_tokens.weight", "the embedding"),
    shifted_output: ("lm_head.weight", "the output matrix"),
    not_a_number: ("model.layers.1.mlp.up_proj.weight (1)", "layer 1"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_of_the_weights_is_named(converted, tmp_path, capsys, fault):
    source, right = converted
    named, parts_at = TENSOR_FAULTS[fault]
    shutil.copytree(right, tmp_path / "ours")
    tensors = load_file(right / "model.safetensors")
    fault(tensors)
    save_file(tensors, tmp_path / "ours/model.safetensors", metadata={"format": "pt"})
    assert main([str(source), str(tmp_path / "ours"), "--json", str(tmp_path / "figures.json")]) == 1
    printed = capsys.readouterr().out
    assert "FAILED       weights" in printed
    assert named in printed
    figures = {check["name"]: check for check in json.loads((tmp_path / "figures.json").read_text())}
    assert figures["computation"]["figures"]["parts_at"] == parts_at
    assert ("parts at " + str(parts_at) in printed) == (parts_at is not None)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("rope_theta", 500000.0, "rope_theta is 500000.0, not 10000.0"),
        ("rms_norm_eps", 1e-6, "rms_norm_eps is 1e-06, not 1e-05"),
    ],
)
def test_a_fault_of_the_configuration_is_named(converted, tmp_path, capsys, field, value, named):
    source, right = converted
    shutil.copytree(right, tmp_path / "ours")
    path = tmp_path / "ours/config.json"
    config = json.loads(path.read_text())
    config[field] = value
    if field == "rope_theta":
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": value}
    path.write_text(json.dumps(config))
    assert main([str(source), str(tmp_path / "ours")]) == 1
    printed = capsys.readouterr().out
    assert f"FAILED       configuration  {named}" in printed
    assert field == "rms_norm_eps" or "parts at layer 0" in printed


def test_another_model_is_not_run(converted, tmp_path):
    source, _ = converted
    other = source_folder(tmp_path / "meta", heads="8/1")
    convert(other, tmp_path / "ours")
    checks = failed(verify(source, tmp_path / "ours"))
    assert checks.keys() == {"configuration", "weights", "computation"}
    assert "hidden_size is 96, not 144" in checks["configuration"].found
    assert "not run" in checks["computation"].found


def test_a_model_of_more_layers_is_named(converted, tmp_path):
    _, right = converted
    shallow = meta_params(n_layers=2, **HEADS["9/3"])
    source = write_meta(tmp_path / "meta", shallow, meta_weights(shallow))
    checks = failed(verify(source, right))
    assert "num_hidden_layers is 3, not 2" in checks["configuration"].found
    assert "model.layers.2.self_attn.q_proj.weight" in checks["weights"].figures["differing"]


def test_a_folder_that_was_to_have_no_tokenizer_is_right(tmp_path):
    source = source_folder(tmp_path / "meta")
    conversion = convert(source, tmp_path / "ours", with_tokenizer=False, verify=True)
    (tokenizer,) = (check for check in conversion.checks if check.name == "tokenizer")
    assert (tokenizer.outcome, tokenizer.found) == ("ok", "none, as was asked for at the conversion")


def test_a_shifted_tokenizer_is_named(converted, tmp_path, capsys):
    source, right = converted
    shutil.copytree(right, tmp_path / "ours")
    path = tmp_path / "ours/tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = (name for name, index in vocabulary.items() if index in (60, 61))
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(content))
    assert main([str(source), str(tmp_path / "ours")]) == 1
    assert "FAILED       tokenizer" in capsys.readouterr().out


def test_other_shards_of_the_same_model_are_the_same(converted, tmp_path):
    _, right = converted
    again = source_folder(tmp_path / "meta", shards=1)
    assert not failed(verify(again, right))


def test_the_reference_is_that_of_the_tests(converted):
    """Two implementations of the papers, by different hands."""
    from meta_reference import meta_hidden_states

    source, _ = converted
    params = json.loads((source / "params.json").read_text())
    weights = meta_weights(meta_params(n_layers=3, **HEADS["9/3"]))
    tokens = torch.arange(3, 90)
    reference = MetaReference(source)
    x = reference.embedding(tokens)
    states = meta_hidden_states(
        weights, tokens[None], n_heads=9, n_kv_heads=3, norm_eps=params["norm_eps"], rope_theta=10000.0
    )
    for number, expected in enumerate(states[:-1]):
        torch.testing.assert_close(x, expected[0], rtol=1e-4, atol=1e-5)
        x = reference.layer(number, x)
    torch.testing.assert_close(reference.logits(x), states[-1][0] @ weights["output.weight"].T, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_read_is_exit_code_2(converted, tmp_path, capsys):
    source, right = converted
    assert main([str(source), str(tmp_path / "nothing")]) == 2
    assert main([str(tmp_path / "nothing"), str(right)]) == 2
    assert main([str(source), str(right), "--tokens", "0"]) == 2
    assert capsys.readouterr().err.count("error: ") == 3


def test_convert_verifies_before_the_folder_has_its_name(tmp_path, monkeypatch, capsys):
    from conversion import convert as command
    from conversion import meta

    source = source_folder(tmp_path / "meta")
    assert command.main([str(source), str(tmp_path / "ours"), "--verify"]) == 0
    assert "verified   computation" in capsys.readouterr().out
    assert "hidden states within" in (tmp_path / "ours/README.md").read_text()
    monkeypatch.setattr(meta, "to_half_split", lambda rows, heads: rows)
    with pytest.raises(CheckpointError, match="not its source: FAILED       weights"):
        convert(source, tmp_path / "wrong", verify=True)
    assert not (tmp_path / "wrong").exists()

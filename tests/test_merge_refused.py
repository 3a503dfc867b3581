"""Adapters and bases that hf-llama-merge does not merge: one message, exit code 2, nothing written."""

import re
import shutil

import pytest
import torch
from adapters import adapter_folder, base_folder, edit, edit_tensors, weights
from meta_checkpoints import fingerprint
from peft import IA3Config
from safetensors.torch import load_file, save_file

from conversion.merge import main, merge
from hf_llama_repro.errors import CheckpointError


@pytest.fixture
def base(tmp_path):
    return base_folder(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path, base):
    return adapter_folder(tmp_path / "adapter", base, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def refused(tmp_path, capfd):
    """Asserts that function and command refuse with one and the same message, and leave nothing."""

    def check(adapter, message, *options, **keywords):
        before = fingerprint(tmp_path)
        with pytest.raises(CheckpointError, match=message) as refusal:
            merge(adapter, tmp_path / "ours", **keywords)
        capfd.readouterr()
        assert main([str(adapter), str(tmp_path / "ours"), *options]) == 2
        output = capfd.readouterr()
        # The space is told before weights are read.
        assert re.fullmatch(r"(space .*\n)?", output.out)
        assert output.err == f"error: {refusal.value}\n"
        assert "\n" not in str(refusal.value)
        assert fingerprint(tmp_path) == before
        assert not list(tmp_path.rglob(".*"))

    return check


REFUSED_FIELDS = {
    "IA3": ({"peft_type": "IA3"}, "peft_type = 'IA3' cannot be merged here, only 'LORA'"),
    "no type": ({"peft_type": None}, "peft_type = None cannot be merged here"),
    "another task": ({"task_type": "SEQ_CLS"}, "task_type = 'SEQ_CLS' cannot"),
    "biases": ({"bias": "all"}, "bias = 'all' cannot be merged here, only 'none'"),
    "lora biases": ({"lora_bias": True}, "lora_bias = True cannot be merged here, only matrices A and B"),
    "DoRA": ({"use_dora": True}, "use_dora = True cannot be merged here.*merge_and_unload"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out = True cannot"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' cannot"),
    "trained tokens": ({"trainable_token_indices": [3]}, "another base: it lacks .*trainable_tokens_delta"),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "of the future": ({"use_xora": 1}, "use_xora = 1 cannot be merged here"),
    "rank 0": ({"r": 0}, "r = 0 is not a positive whole number"),
    "rank of text": ({"r": "4"}, "r = '4' is not"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha = None is not a positive number"),
    "endless alpha": ({"lora_alpha": float("inf")}, "lora_alpha = inf is not"),
    "alpha beyond all floats": ({"lora_alpha": 10**400}, "lora_alpha = 1000+ is not a positive number"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config = .* cannot be merged here"),
    "a list of ranks": ({"rank_pattern": [4]}, r"rank_pattern = \[4\] is no object"),
    "rank of a module": ({"rank_pattern": {"q_proj": -1}}, "q_proj = -1 is not a positive"),
    "another rank": ({"r": 8}, r"another base: .*q_proj.lora_A.weight has shape \[4, 64\], not \[8, 64\]"),
    "more targets": ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "another base: it lacks .*o_proj.lora_A"),
    "fewer targets": ({"target_modules": ["q_proj"]}, "another base: it has .*v_proj.lora_A"),
    "unknown targets": ({"target_modules": ["query_key_value"]}, "another base: .*query_key_value"),
    "a broken pattern": ({"target_modules": "(q_proj"}, "another base: "),
    "a broken rank pattern": ({"rank_pattern": {"(q": 4}}, "another base: "),
    "saved and not there": ({"modules_to_save": ["lm_head"]}, "another base: it lacks base_model.model.lm_head.weight"),
    "no base": ({"base_model_name_or_path": None}, "names no base: name its folder by --base"),
    "base elsewhere": ({"base_model_name_or_path": "meta-llama/Llama-2-7b-hf"}, "Llama-2-7b-hf, which is no .*--base"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED_FIELDS.values(), ids=REFUSED_FIELDS)
def test_configuration_is_refused(adapter, refused, fields, message):
    edit(adapter, **fields)
    refused(adapter, message)


def test_adapters_of_other_types_as_peft_saves_them(tmp_path, base, refused):
    """Not only their names in a configuration."""
    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    refused(adapter_folder(tmp_path / "ia3", base, config=ia3), "peft_type = 'IA3'")
    refused(adapter_folder(tmp_path / "dora", base, target_modules=["q_proj"], use_dora=True), "use_dora = True")
    refused(adapter_folder(tmp_path / "bias", base, target_modules=["q_proj"], bias="all"), "bias = 'all'")


def first(tensors, letter):
    return min(name for name in tensors if f"lora_{letter}" in name)


def with_value(value):
    def change(tensors):
        tensors[first(tensors, "B")][1, 2] = value
        return tensors

    return change


REFUSED_TENSORS = {
    "no tensors": (lambda _: {}, r"holds no tensors \(\d+ bytes\): what was trained was not saved"),
    "only A": (
        lambda tensors: {k: v for k, v in tensors.items() if "lora_B" not in k},
        "another base: it lacks .*lora_B",
    ),
    "NaN": (with_value(float("nan")), r"q_proj\.lora_B\.weight holds 1 NaN or infinite values"),
    "infinity": (with_value(float("inf")), "holds 1 NaN or infinite values"),
    "untrained": (
        lambda tensors: {k: v * ("lora_B" not in k) for k, v in tensors.items()},
        "was never trained: .*--force",
    ),
    "quantized": (
        lambda tensors: {k: v.to(torch.int8) for k, v in tensors.items()},
        "is torch.int8, not a 16- or 32-bit",
    ),
    "another name": (
        lambda tensors: {k.replace("self_attn", "attention"): v for k, v in tensors.items()},
        "another base: it lacks .*self_attn.*; it has .*attention",
    ),
    "transposed": (lambda tensors: {k: v.t().contiguous() for k, v in tensors.items()}, "another base: .* has shape"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED_TENSORS.values(), ids=REFUSED_TENSORS)
def test_tensors_are_refused(adapter, refused, change, message):
    edit_tensors(adapter, change)
    refused(adapter, message)


OTHER_BASES = {
    "wider": ({"hidden_size": 96}, "has shape"),
    "other K/V heads": ({"num_key_value_heads": 1}, r"v_proj.lora_B.weight has shape"),
    "more layers": ({"num_hidden_layers": 3}, r"it lacks .*layers\.2\."),
    "fewer layers": ({"num_hidden_layers": 1}, r"it has .*layers\.1\."),
}


@pytest.mark.parametrize(("fields", "message"), OTHER_BASES.values(), ids=OTHER_BASES)
def test_adapter_for_another_base(tmp_path, adapter, refused, fields, message):
    other = base_folder(tmp_path / "other", **fields)
    refused(adapter, f"is an adapter for another base: .*{message}", "--base", str(other), base=other)


@pytest.mark.parametrize("fields", [{"vocab_size": 140}, {}], ids=["vocabulary", "weights"])
def test_copies_in_the_adapter_tell_another_base(tmp_path, base, refused, fields):
    """PEFT saves the output matrix beside a LoRA on it."""
    adapter = adapter_folder(tmp_path / "adapter", base, target_modules=["embed_tokens", "q_proj"])
    other = base_folder(tmp_path / "other", **fields)
    if not fields:
        content = load_file(other / "model.safetensors")
        content["model.embed_tokens.weight"] *= 1.5
        save_file(content, other / "model.safetensors", metadata={"format": "pt"})
    refused(adapter, "is an adapter for another base: ", "--base", str(other), base=other)


def test_copies_may_be_rounded_to_the_dtype_of_the_training(tmp_path, base):
    adapter = adapter_folder(tmp_path / "adapter", base, target_modules=["lm_head", "q_proj"], dtype=torch.bfloat16)
    merge(adapter, tmp_path / "ours")
    before, after = (weights(folder)["model.embed_tokens.weight"] for folder in (base, tmp_path / "ours"))
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("content", [b"", b"x", b"\x00" * 443], ids=["empty", "one byte", "443 bytes"])
def test_weights_that_are_no_weights(adapter, refused, name, content):
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / name).write_bytes(content)
    refused(adapter, rf"{name} is truncated or ")


def test_the_empty_adapter_of_443_bytes(adapter, refused):
    """alpaca-lora's: an empty dictionary, as saved after model.state_dict was replaced."""
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")
    refused(adapter, r"adapter_model\.bin holds no tensors .*without replacing model\.state_dict")


def test_folders_that_are_no_adapter(tmp_path, base, adapter, refused):
    refused(tmp_path / "nothing", "nothing is no adapter: it has no adapter_config.json")
    refused(base, "base is no adapter")
    (adapter / "adapter_model.safetensors").unlink()
    refused(adapter, r"has adapter_config\.json but no weights")
    (adapter / "adapter_config.json").write_text("<html>")
    refused(adapter, "cannot be read as JSON")


def test_bases_that_are_none(tmp_path, base, adapter, refused):
    missing = tmp_path / "missing"
    refused(adapter, "missing is no Hugging Face folder", "--base", str(missing), base=missing)
    shutil.copy(adapter / "adapter_config.json", base)
    refused(adapter, "base holds an adapter beside the base")


def test_adapters_tokenizer_that_is_damaged(adapter, refused):
    (adapter / "tokenizer.json").write_text("{}")
    refused(adapter, r"the adapter.s tokenizer cannot be used: .*tokenizer\.json: not a tokenizer")


def test_base_with_nan(base, adapter, refused):
    content = load_file(base / "model.safetensors")
    content["model.layers.1.self_attn.q_proj.weight"][3, 4] = float("nan")
    save_file(content, base / "model.safetensors", metadata={"format": "pt"})
    refused(adapter, r"layers\.1\.self_attn\.q_proj\.weight holds 1 NaN or infinite values")


def test_sum_beyond_the_range_of_float16(tmp_path, refused):
    base = base_folder(tmp_path / "base", dtype=torch.float16)
    adapter = adapter_folder(tmp_path / "adapter", base, target_modules=["q_proj"], size=300.0)
    refused(adapter, r"q_proj\.weight holds \d+ values beyond the range of torch\.float16: choose --dtype bfloat16")
    merge(adapter, tmp_path / "ours", dtype="float32")


def test_target_in_base_or_adapter(tmp_path, base, adapter):
    for where in (base / "ours", adapter / "ours", base, adapter):
        with pytest.raises(CheckpointError, match="are inside of one another"):
            merge(adapter, where, overwrite=True)


def test_target_that_exists(tmp_path, base, adapter):
    merge(adapter, tmp_path / "ours")
    assert main([str(adapter), str(tmp_path / "ours")]) == 2
    assert main([str(adapter), str(tmp_path / "ours"), "--overwrite"]) == 0


def test_untrained_adapter_is_merged_by_force(tmp_path, base, adapter):
    edit_tensors(adapter, REFUSED_TENSORS["untrained"][0])
    assert main([str(adapter), str(tmp_path / "ours"), "--force"]) == 0
    before, after = weights(base), weights(tmp_path / "ours")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_quantized_base_is_refused_with_the_reason(base, adapter, refused):
    edit(base, "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    refused(adapter, r"base is quantized: merging into int8 costs about 1\.9 % .* by --base, or .* with --force")


@pytest.mark.parametrize(
    "config",
    [{"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes", "load_in_4bit": True}],
    ids=["gptq", "nf4"],
)
def test_other_quantization_is_refused_even_by_force(base, adapter, refused, config):
    edit(base, "config.json", quantization_config=config)
    refused(adapter, r"is quantized \(\w+\), which is not bitsandbytes' int8", "--force", force=True)

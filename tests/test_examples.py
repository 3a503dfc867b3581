"""The scripts of examples/ that use TRL, PEFT, bitsandbytes and torchao as their users do, on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters import adapter_folder, base_folder, logits
from finetune_runs import adapter
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import offload, peft_adapters, qlora
from hf_llama_repro import LlamaReproForCausalLM, optimize
from hf_llama_repro.errors import InputError

ROOT = Path(__file__).parent.parent
PROMPT = "river hill stone"


@torch.no_grad()
def probe(model):
    return model.eval()(torch.arange(48)[None] + 5).logits


def mean(losses):
    return sum(losses) / len(losses)


@pytest.mark.parametrize("example", ["trl_sft", "trl_dpo"])
def test_trl_trains_an_adapter_without_being_told_its_layers(tiny_base, tmp_path, example):
    pytest.importorskip("trl", reason="pip install 'hf-llama-repro[train]'")
    module = __import__(f"examples.{example}", fromlist=["train"])
    trainer = module.train(tiny_base, tmp_path / "out", steps=8, use_cpu=True, bf16=False, max_length=128)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 8
    assert mean(losses[-3:]) < mean(losses[:3])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"q_proj", "v_proj"}
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    without = probe(base)
    with_adapter = probe(PeftModel.from_pretrained(base, tmp_path / "out"))
    assert torch.allclose(with_adapter, probe(trainer.model), atol=1e-5)
    assert not torch.allclose(with_adapter, without, atol=1e-3)


def test_trl_learns_eos_as_one_token(tiny_base):
    """It is appended as text, which without the example's line is four tokens of a base model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    text = "river" + tokenizer.eos_token
    assert tokenizer(text).input_ids[-1] != tokenizer.eos_token_id
    tokenizer.split_special_tokens = False
    assert tokenizer(text).input_ids[-1] == tokenizer.eos_token_id


def test_qlora_trains_over_four_bits(tiny_base, tmp_path):
    losses = qlora.train(tiny_base, tmp_path / "out", steps=8, dtype=torch.float32)
    assert mean(losses[-3:]) < mean(losses[:3]) - 0.05
    tensors = adapter(tmp_path / "out")
    layers = {name.split(".")[-3] for name in tensors}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


@pytest.mark.parametrize(("trained_on", "opened_on"), [("llama", "llama_repro"), ("llama_repro", "llama")])
def test_an_adapter_goes_from_stock_llama_to_ours_and_back(tmp_path, plain_paths, trained_on, opened_on):
    bases = {name: base_folder(tmp_path / name, ours=name == "llama_repro") for name in ("llama", "llama_repro")}
    folder = adapter_folder(tmp_path / "adapter", bases[trained_on], base_model_name_or_path=str(bases[trained_on]))
    expected = logits(peft_adapters.on_base(bases[trained_on], folder))
    found = peft_adapters.on_base(bases[opened_on], folder)
    assert type(found.get_base_model()).__name__ == {"llama": "LlamaForCausalLM"}.get(
        opened_on, "LlamaReproForCausalLM"
    )
    assert torch.equal(logits(found), expected)
    assert not torch.allclose(logits(bases[opened_on]), expected, atol=1e-3)


def test_an_adapter_is_opened_with_its_base_and_merged(tmp_path):
    base = base_folder(tmp_path / "base", ours=True)
    folder = adapter_folder(tmp_path / "adapter", base)
    opened = peft_adapters.open_adapter(folder)
    assert isinstance(opened.get_base_model(), LlamaReproForCausalLM)
    expected = logits(opened)
    peft_adapters.merge(folder, tmp_path / "merged")
    assert torch.allclose(logits(tmp_path / "merged"), expected, atol=1e-4)
    assert not torch.allclose(logits(base), expected, atol=1e-3)


def test_torchao_quantizes_the_weights_of_linear_layers(tiny_base):
    pytest.importorskip("torchao", reason="torchao is not installed: make test-scale")
    from examples import torchao_weight_only

    whole = AutoModelForCausalLM.from_pretrained(tiny_base)
    model = torchao_weight_only.load(tiny_base, torch.float32)
    unrounded = probe(whole)
    quantized = {name: p for name, p in model.named_parameters() if "Int8" in type(p).__name__}
    assert len(quantized) == 7 * whole.config.num_hidden_layers
    for name, parameter in quantized.items():
        weight, rounded = whole.get_parameter(name).data, parameter.dequantize()
        step = weight.abs().amax(dim=1, keepdim=True) / 127  # of each row
        assert ((weight - rounded).abs() <= 0.51 * step).all()
        weight.copy_(rounded)
    torch.testing.assert_close(probe(model), probe(whole), rtol=0, atol=1e-4)
    assert not torch.allclose(probe(model), unrounded, atol=1e-2)
    tokens = torch.arange(20)[None] + 5
    generated = [
        m.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=c) for m, c in ((model, True), (model, False))
    ]
    assert torch.equal(*generated)
    with pytest.raises(InputError, match="a quantized form runs on the ordinary path"):
        optimize(model)


def test_a_model_that_does_not_fit_lies_on_the_disk(tiny_base, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(tiny_base)
    model = offload.load(str(tiny_base), "450KB", str(tmp_path / "offload"))
    places = set(model.hf_device_map.values())
    assert places == {"cpu", "disk"}
    assert any(parameter.is_meta for parameter in model.parameters())  # nothing of them is in memory
    # accelerate's hooks hide the layers from the fast path, which rounds in another order.
    torch.testing.assert_close(probe(model), probe(whole), rtol=0, atol=1e-5)
    tokens = torch.arange(20)[None] + 5
    assert torch.equal(*(m.generate(tokens, max_new_tokens=8, do_sample=False) for m in (model, whole)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("trl_sft.py", "BASE", "OUT"),
        ("trl_dpo.py", "BASE", "OUT"),
        ("qlora.py", "BASE", "OUT"),
        ("torchao_weight_only.py", "BASE", PROMPT),
        ("offload.py", "BASE", PROMPT, "450KB"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_documented_command_runs(tiny_base, tmp_path, arguments):
    words = [{"BASE": str(tiny_base), "OUT": str(tmp_path / "out")}.get(word, word) for word in arguments[1:]]
    command = [sys.executable, str(ROOT / "examples" / arguments[0]), *words]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stderr

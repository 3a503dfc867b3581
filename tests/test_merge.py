"""hf-llama-merge: the folder computes what base and adapter do, by PEFT's own words, or there is no folder."""

import json
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from adapters import adapter_folder, base_folder, edit, logits, unmerged, weights
from meta_checkpoints import fingerprint
from peft import PeftModel
from random_models import (
    ARCHITECTURES,
    BIASES,
    relative_difference,
    tiny_config,
    tiny_tokenizer,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

import conversion.adapter  # before its reader is replaced in a test
import conversion.hugging_face
from conversion import merge as merge_command
from conversion.convert import convert
from conversion.export import export
from conversion.merge import main, merge
from conversion.source import StoredTensor
from hf_llama_repro.errors import CheckpointError

ROOT = Path(__file__).parent.parent
# Largest difference over the largest magnitude, fp32: a merged matrix sums in another order than base and adapter.
TOLERANCE = 2e-5
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SHAPES = {**{name: ARCHITECTURES[name] for name in ("9/3", "8/1", "wide heads", "tied")}, "biases": BIASES}
KINDS = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "all linear": {"target_modules": "all-linear", "r": 3, "lora_alpha": 7},
    "rslora": {"target_modules": ATTENTION, "r": 8, "use_rslora": True},
    "patterns": {
        "target_modules": ATTENTION,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "k_proj": 6},
        "alpha_pattern": {r"layers.\d.self_attn.k_proj": 40, "o_proj": 1},
    },
    "one layer": {"target_modules": r".*layers\.1\..*(up|down)_proj"},
    "output matrix": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "output matrix saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "norms and both ends saved": {
        "target_modules": ["down_proj"],
        "modules_to_save": ["embed_tokens", "lm_head", "input_layernorm"],
    },
}
ENDS = [name for name in KINDS if re.search("output|embedding|ends", name)]
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture
def base(tmp_path):
    return base_folder(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path, base):
    return adapter_folder(tmp_path / "adapter", base, target_modules=["q_proj", "v_proj"])


# What is computed


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        *(("9/3", kind) for kind in KINDS),
        *((shape, "all linear") for shape in SHAPES if shape != "9/3"),
        *(("tied", kind) for kind in ENDS),
    ],
)
def test_logits_are_those_of_base_and_adapter(tmp_path, shape, kind):
    base = base_folder(tmp_path / "base", **SHAPES[shape])
    adapter = adapter_folder(tmp_path / "adapter", base, **KINDS[kind])
    merge(adapter, tmp_path / "ours")
    expected = logits(unmerged(base, adapter))
    assert relative_difference(logits(tmp_path / "ours"), expected) < TOLERANCE
    # The comparison can fail: the adapter is not nothing.
    assert relative_difference(logits(base), expected) > 100 * TOLERANCE


@kinds
def test_weights_are_those_of_merge_and_unload(tmp_path, kind):
    base = base_folder(tmp_path / "base", **ARCHITECTURES["9/3"])
    adapter = adapter_folder(tmp_path / "adapter", base, **kind)
    merge(adapter, tmp_path / "ours")
    expected = unmerged(base, adapter).merge_and_unload().state_dict()
    found = weights(tmp_path / "ours")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["9/3", "8/1"])
def test_sixteen_bits_are_rounded_once(tmp_path, dtype, shape):
    """The sum of fp32, rounded; PEFT in 16 bits rounds what is added as well."""
    base = base_folder(tmp_path / "base", dtype=dtype, **ARCHITECTURES[shape])
    adapter = adapter_folder(tmp_path / "adapter", base, dtype=dtype, target_modules="all-linear")
    merge(adapter, tmp_path / "ours")
    expected = unmerged(base, adapter).merge_and_unload().state_dict()
    for name, tensor in weights(tmp_path / "ours").items():
        assert tensor.dtype == dtype
        # Where the fp32 sums differ in their last bit, a tie may fall to the other side.
        assert (tensor != expected[name].to(dtype)).sum() <= 1e-3 * tensor.numel(), name
    # Each weight off by up to 2^-11 or 2^-8, which the layers make several times as much.
    difference = relative_difference(logits(tmp_path / "ours", dtype=torch.float32), logits(unmerged(base, adapter)))
    assert difference < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_is_cast_to_in_one_rounding(tmp_path, stored, dtype):
    base = base_folder(tmp_path / "base", dtype=stored)
    adapter = adapter_folder(tmp_path / "adapter", base, target_modules=ATTENTION)
    assert main([str(adapter), str(tmp_path / "ours"), "--dtype", dtype]) == 0
    expected = unmerged(base, adapter).merge_and_unload().state_dict()
    for name, tensor in weights(tmp_path / "ours").items():
        assert tensor.dtype == getattr(torch, dtype)
        different = (tensor - expected[name].to(tensor.dtype)).abs() > 1e-6 * expected[name].abs()
        assert different.sum() <= 1e-3 * tensor.numel(), name
    assert json.loads((tmp_path / "ours/config.json").read_text())["dtype"] == dtype


def test_what_is_not_targeted_is_the_bases_bit_for_bit(tmp_path):
    base = base_folder(tmp_path / "base", dtype=torch.bfloat16)
    adapter = adapter_folder(tmp_path / "adapter", base, target_modules=["q_proj"])
    merge(adapter, tmp_path / "ours")
    before, after = weights(base), weights(tmp_path / "ours")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}


@pytest.mark.parametrize("ours", [False, True], ids=["llama", "llama_repro"])
def test_as_llama_opens_in_stock_llama_with_equal_logits(tmp_path, ours, plain_paths):
    base = base_folder(tmp_path / "base", ours=ours, **ARCHITECTURES["9/3"])
    adapter = adapter_folder(tmp_path / "adapter", base, target_modules="all-linear")
    merge(adapter, tmp_path / "ours")
    assert main([str(adapter), str(tmp_path / "stock"), "--as", "llama"]) == 0
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "stock")
    assert stock.config.model_type == "llama"
    assert torch.equal(logits(stock), logits(tmp_path / "ours"))


def test_merged_model_goes_to_metas_layout_and_back_bit_for_bit(tmp_path):
    base = base_folder(tmp_path / "base", dtype=torch.bfloat16, **ARCHITECTURES["9/3"])
    adapter = adapter_folder(tmp_path / "adapter", base, target_modules="all-linear")
    merge(adapter, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "meta", with_tokenizer=False)
    convert(tmp_path / "meta", tmp_path / "back", with_tokenizer=False, context_length=256)
    before, after = weights(tmp_path / "ours"), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_are_cut_into_shards(tmp_path, adapter):
    merge(adapter, tmp_path / "whole")
    assert main([str(adapter), str(tmp_path / "ours"), "--max-shard-size", "50KB"]) == 0
    assert (tmp_path / "ours/model.safetensors.index.json").is_file()
    assert torch.equal(logits(tmp_path / "ours"), logits(tmp_path / "whole"))


def test_tensors_are_read_one_at_a_time(tmp_path, base, adapter, monkeypatch):
    alive, most = weakref.WeakSet(), []
    read = conversion.hugging_face.read_safetensors

    def counting(path):
        def watched(tensor):
            found = tensor.read()
            alive.add(found)
            most.append(len(alive))
            return found

        return {
            name: StoredTensor(tensor.shape, tensor.dtype, lambda tensor=tensor: watched(tensor))
            for name, tensor in read(path).items()
        }

    monkeypatch.setattr(conversion.hugging_face, "read_safetensors", counting)
    merge(adapter, tmp_path / "ours", max_shard_size="1B")
    # To be written, and both sides of the check.
    assert len(most) == 3 * 21
    # One that was written last, one that is read, one to compare with.
    assert max(most) <= 3


# Embedding and output matrix in one


@pytest.mark.parametrize("name", ENDS)
def test_tied_matrices_are_untied_when_the_adapter_changes_one(tmp_path, name):
    base = base_folder(tmp_path / "base", tie_word_embeddings=True)
    adapter = adapter_folder(tmp_path / "adapter", base, **KINDS[name])
    lines = "\n".join(merge(adapter, tmp_path / "ours").lines())
    assert "embedding and output matrix are one in the base: untied, as the adapter has" in lines
    assert json.loads((tmp_path / "ours/config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in weights(tmp_path / "ours")


def test_tied_matrices_stay_tied_otherwise(tmp_path):
    base = base_folder(tmp_path / "base", tie_word_embeddings=True)
    merge(adapter_folder(tmp_path / "adapter", base, target_modules=ATTENTION), tmp_path / "ours")
    assert json.loads((tmp_path / "ours/config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in weights(tmp_path / "ours")


# The folder


def test_folder_is_as_convert_writes_it(tmp_path, base, adapter):
    (base / "generation_config.json").write_text('{"temperature": 0.9}')
    convert(base, tmp_path / "converted")
    merge(adapter, tmp_path / "ours")
    names = {path.name for path in (tmp_path / "converted").iterdir()}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == names
    for name in names - {"README.md", "manifest.json", "model.safetensors"}:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "converted" / name).read_bytes(), name


def test_lines_and_card_say_what_was_done(tmp_path, base, adapter, capsys):
    assert main([str(adapter), str(tmp_path / "ours")]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    space, *lines = output.out.splitlines()
    assert space.startswith("space ")
    assert [line.split()[0] for line in lines] == (
        ["source", "adapter", "tokenizer", "weights", "checked", "checked", "written"]
    )
    assert f"{adapter}: LoRA of rank 4, scaling 2.5, 4 matrices (q_proj, v_proj)" in lines[1]
    assert re.search(r"largest difference \S+e-0[5-9], \S+e-0[6-9] relative", lines[5])
    card = (tmp_path / "ours/README.md").read_text()
    assert "(`hf-llama-merge`) from the base `base`" in card
    for part in (
        "and the adapter `adapter`: LoRA of rank 4, scaling 2.5",
        *(line.split(maxsplit=1)[1] for line in lines[4:6]),
    ):
        assert part in card


def test_template_of_the_training_is_copied_as_it_is(tmp_path, adapter):
    (adapter / "prompt_template.json").write_bytes(b'{"any": "\xc3\xa9"} \n')
    merge(adapter, tmp_path / "ours")
    assert (tmp_path / "ours/prompt_template.json").read_bytes() == b'{"any": "\xc3\xa9"} \n'


def test_tokenizer_of_the_adapter_is_preferred(tmp_path, adapter):
    tokenizer = tiny_tokenizer(tiny_config())
    tokenizer.pad_token = "w7"
    tokenizer.save_pretrained(adapter)
    assert "decided    tokenizer of the adapter" in merge(adapter, tmp_path / "ours").lines()
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").pad_token_id == 7


def test_tokenizer_with_more_tokens_than_the_model_is_left_aside(tmp_path, adapter):
    tokenizer = tiny_tokenizer(tiny_config())
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(adapter)
    lines = merge(adapter, tmp_path / "ours").lines()
    assert "decided    tokenizer of the base: the adapter's has 132 tokens, the model 131" in lines
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").pad_token is None


def test_base_without_a_tokenizer(tmp_path, base, adapter):
    for path in base.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer  none" in merge(adapter, tmp_path / "ours").lines()


@pytest.mark.parametrize("where", ["beside the adapter", "in the working folder", "by --base"])
def test_base_is_found(tmp_path, base, adapter, monkeypatch, where):
    named = {"beside the adapter": "../base", "in the working folder": "base", "by --base": "meta-llama/Llama-2-7b-hf"}
    edit(adapter, base_model_name_or_path=named[where])
    monkeypatch.chdir(tmp_path if where != "beside the adapter" else "/")
    merge(adapter, tmp_path / "ours", base=base if where == "by --base" else None)
    assert (tmp_path / "ours/model.safetensors").is_file()


def test_older_adapter_is_read(tmp_path, base, adapter):
    """Of PEFT 0.3: adapter_model.bin, and few fields."""
    expected = logits(unmerged(base, adapter))
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    fields = json.loads((adapter / "adapter_config.json").read_text())
    names = ("base_model_name_or_path", "r", "lora_alpha", "peft_type", "task_type", "target_modules", "bias")
    older = {"enable_lora": None, "merge_weights": False, "fan_in_fan_out": False, "modules_to_save": None}
    (adapter / "adapter_config.json").write_text(json.dumps({**{name: fields[name] for name in names}, **older}))
    merge(adapter, tmp_path / "ours")
    assert relative_difference(logits(tmp_path / "ours"), expected) < TOLERANCE


# Its own proof


def unscaled(pair):
    return pair.b.read().float() @ pair.a.read().float()


WRONG_SUMS = {
    "scaling forgotten": unscaled,
    "scaling inverted": lambda pair: unscaled(pair) / pair.scaling,
    "transposed": lambda pair: pair.scaling * unscaled(pair).t(),
    "subtracted": lambda pair: -pair.scaling * unscaled(pair),
    "nothing": lambda pair: torch.zeros(pair.b.shape[0], pair.a.shape[1]),
}
wrong_sums = pytest.mark.parametrize("wrong", WRONG_SUMS.values(), ids=WRONG_SUMS)


@pytest.fixture
def square(tmp_path):
    """bf16, and matrices that can be transposed."""
    base = base_folder(tmp_path / "base", dtype=torch.bfloat16)
    return adapter_folder(tmp_path / "adapter", base, target_modules=["q_proj", "o_proj"])


@wrong_sums
@pytest.mark.parametrize("check", ["tensors", "logits"])
def test_wrong_merge_is_caught_and_leaves_nothing(tmp_path, square, monkeypatch, capfd, wrong, check):
    """By the comparison of tensors alone, and by that of logits alone."""
    before = fingerprint(tmp_path)
    monkeypatch.setattr(merge_command, "delta", wrong)
    if check == "tensors":
        monkeypatch.setattr(merge_command, "LOGITS_UP_TO", 0)
    else:
        monkeypatch.setattr(merge_command, "_check_tensor", lambda *_: None)
    capfd.readouterr()
    assert main([str(square), str(tmp_path / "ours")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: the merged model is not base and adapter: ")
    assert re.search({"tensors": r"proj\.weight is off by", "logits": "logits of up to .* differ by"}[check], error)
    assert fingerprint(tmp_path) == before


def test_slightly_wrong_scaling_is_caught_in_sixteen_bits(tmp_path, square, monkeypatch):
    """Where logits would pass for rounding."""
    monkeypatch.setattr(merge_command, "delta", lambda pair: 1.01 * pair.scaling * unscaled(pair))
    with pytest.raises(CheckpointError, match=r"more than one rounding to torch\.bfloat16 explains"):
        merge(square, tmp_path / "ours")


def test_another_weight_changed_is_caught(tmp_path, adapter, monkeypatch):
    honest = merge_command.merged_source

    def spoilt(*arguments):
        source = honest(*arguments)
        norm = source.tensors["model.norm.weight"]
        source.tensors["model.norm.weight"] = StoredTensor(norm.shape, norm.dtype, lambda: norm.read() * 1.0001)
        return source

    monkeypatch.setattr(merge_command, "merged_source", spoilt)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is not the base's"):
        merge(adapter, tmp_path / "ours")


def test_large_model_is_checked_by_its_tensors_and_says_so(tmp_path, adapter, monkeypatch):
    monkeypatch.setattr(merge_command, "LOGITS_UP_TO", 1000)
    monkeypatch.setattr(merge_command, "ROWS_AT_ONCE", 7)
    merge(adapter, tmp_path / "ours")
    assert "logits were not computed: not with 1e+03 parameters and more" in (tmp_path / "ours/README.md").read_text()


def test_adapter_that_drowns_in_rounding_is_told(tmp_path):
    base = base_folder(tmp_path / "base", dtype=torch.bfloat16)
    adapter = adapter_folder(tmp_path / "adapter", base, target_modules=ATTENTION, size=0.005)
    said = r"rounding changes the logits \d+% as much as the adapter does.*--dtype float32"
    assert re.search(said, "\n".join(merge(adapter, tmp_path / "ours").lines()))
    assert re.search(said, (tmp_path / "ours/README.md").read_text())
    assert not re.search("WARNING", "\n".join(merge(adapter, tmp_path / "wide", dtype="float32").lines()))


# A quantized base


@pytest.fixture
def int8(tmp_path):
    """A base of 8 bits as transformers and bitsandbytes save it."""
    base = base_folder(tmp_path / "wide", dtype=torch.float16, **ARCHITECTURES["9/3"])
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(tmp_path / "int8")
    tiny_tokenizer(tiny_config()).save_pretrained(tmp_path / "int8")
    adapter = adapter_folder(tmp_path / "adapter", base, target_modules="all-linear")
    edit(adapter, base_model_name_or_path=str(tmp_path / "int8"))
    return adapter


def test_int8_base_is_merged_by_force(tmp_path, int8):
    assert weights(tmp_path / "int8")["model.layers.0.self_attn.q_proj.weight"].dtype == torch.int8
    lines = "\n".join(merge(int8, tmp_path / "ours", force=True, dtype="float32").lines())
    assert "decided    the base is quantized to int8" in lines
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", dtype=torch.float32).dequantize().float()
    expected = logits(PeftModel.from_pretrained(base, int8))
    assert relative_difference(logits(tmp_path / "ours"), expected) < TOLERANCE
    # int8 did cost something, and the 16-bit base is still merged without it.
    exact = logits(unmerged(tmp_path / "wide", int8))
    assert relative_difference(expected, exact) > 100 * TOLERANCE
    merge(int8, tmp_path / "exact", base=tmp_path / "wide", dtype="float32")
    assert relative_difference(logits(tmp_path / "exact"), exact) < TOLERANCE


def test_int8_base_gives_the_dtype_of_its_other_weights(tmp_path, int8):
    assert main([str(int8), str(tmp_path / "ours"), "--force"]) == 0
    assert {tensor.dtype for tensor in weights(tmp_path / "ours").values()} == {torch.float16}
    assert "quantization_config" not in json.loads((tmp_path / "ours/config.json").read_text())


def test_help_is_instant():
    """Neither torch nor transformers is imported for it."""
    code = "import sys, conversion.merge as command; command.build_parser(); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"

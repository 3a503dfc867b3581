"""Hugging Face Llama folders -> ours and back: not a bit changes, and the configuration means the same."""

import json
import re

import pytest
import torch
from random_models import (
    ARCHITECTURES,
    BIASES,
    TOLERANCE,
    random_model,
    random_tokens,
    relative_difference,
    stock_twin,
    tiny_config,
    tiny_tokenizer,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.convert import convert, main
from hf_llama_repro.errors import CheckpointError

CASES = {**ARCHITECTURES, "biases": BIASES, "theta": {"rope_theta": 5e5}, "untied": {}}
cases = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)


def stock_folder(folder, *, dtype=torch.float32, max_shard_size="5GB", **fields):
    """A stock Llama folder with a tokenizer."""
    model = random_model(tiny_config(**fields))
    stock_twin(model).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer(model.config).save_pretrained(folder)
    return folder


def as_pytorch_files(folder, *, split):
    """The same folder as transformers 4 wrote it before safetensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if not split:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[:7], "pytorch_model-00002-of-00002.bin": names[7:]}
    for file, part in parts.items():
        torch.save({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_same_weights(folder, other):
    tensors, others = (
        {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for path in (folder, other)
    )
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype
        assert torch.equal(tensor.view(torch.uint8), others[name].view(torch.uint8)), name


@cases
def test_stock_llama_comes_back_bit_for_bit(tmp_path, fields):
    stock = stock_folder(tmp_path / "stock", **fields)
    convert(stock, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", model_type="llama")
    assert_same_weights(stock, tmp_path / "back")


@cases
def test_stock_llamas_logits_are_kept(tmp_path, fields):
    stock = stock_folder(tmp_path / "stock", **fields)
    convert(stock, tmp_path / "ours")
    tokens = random_tokens(tiny_config())
    with torch.no_grad():
        theirs, ours = (
            AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (stock, tmp_path / "ours")
        )
    assert relative_difference(ours, theirs) < TOLERANCE


@cases
def test_configuration_comes_back_as_stock_llama_wrote_it(tmp_path, fields):
    stock = stock_folder(tmp_path / "stock", **fields)
    convert(stock, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", model_type="llama")
    before, after = (json.loads((path / "config.json").read_text()) for path in (stock, tmp_path / "back"))
    assert after.pop("rope_theta") == before["rope_parameters"]["rope_theta"]
    assert after == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_are_kept(tmp_path, dtype):
    stock = stock_folder(tmp_path / "stock", dtype=dtype)
    convert(stock, tmp_path / "ours")
    assert_same_weights(stock, tmp_path / "ours")


def test_several_safetensors_files_are_read(tmp_path):
    stock = stock_folder(tmp_path / "stock", max_shard_size="100KB")
    assert (stock / "model.safetensors.index.json").is_file()
    convert(stock, tmp_path / "ours")
    assert_same_weights(stock, tmp_path / "ours")


@pytest.mark.parametrize("split", [False, True])
def test_older_pytorch_files_are_read(tmp_path, split):
    stock = stock_folder(tmp_path / "stock")
    convert(stock, tmp_path / "expected")
    as_pytorch_files(stock, split=split)
    convert(stock, tmp_path / "ours")
    assert_same_weights(tmp_path / "expected", tmp_path / "ours")


def test_transposed_views_and_parameters_in_pytorch_files_are_written_row_by_row(tmp_path):
    stock = stock_folder(tmp_path / "stock")
    convert(stock, tmp_path / "expected")
    tensors = load_file(stock / "model.safetensors")
    as_pytorch_files(stock, split=False)
    views = {name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    torch.save({name: torch.nn.Parameter(view) for name, view in views.items()}, stock / "pytorch_model.bin")
    convert(stock, tmp_path / "ours")
    assert_same_weights(tmp_path / "expected", tmp_path / "ours")


def test_rotary_buffers_of_older_files_are_dropped(tmp_path):
    stock = stock_folder(tmp_path / "stock")
    tensors = load_file(stock / "model.safetensors")
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in (0, 1)}
    save_file(tensors | buffers, stock / "model.safetensors", metadata={"format": "pt"})
    convert(stock, tmp_path / "ours")
    assert load_file(tmp_path / "ours/model.safetensors").keys() == tensors.keys()


def test_older_rope_theta_and_scaling_are_read(tmp_path):
    stock = stock_folder(tmp_path / "stock")
    fields = json.loads((stock / "config.json").read_text())
    del fields["rope_parameters"]
    fields |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": fields.pop("dtype")}
    (stock / "config.json").write_text(json.dumps(fields))
    expected = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
    assert convert(stock, tmp_path / "ours").config.rope_parameters == expected


@pytest.mark.parametrize("differs", [False, True])
def test_stored_output_matrix_of_a_tied_model_counts_where_it_differs(tmp_path, differs):
    """As in transformers: two different matrices are not tied, whatever config.json says."""
    stock = stock_folder(tmp_path / "stock", tie_word_embeddings=True)
    tensors = load_file(stock / "model.safetensors")
    output = tensors["model.embed_tokens.weight"] + (1 if differs else 0)
    save_file(tensors | {"lm_head.weight": output.clone()}, stock / "model.safetensors", metadata={"format": "pt"})
    convert(stock, tmp_path / "ours")
    tokens = random_tokens(tiny_config())
    with torch.no_grad():
        theirs, ours = (
            AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (stock, tmp_path / "ours")
        )
    assert relative_difference(ours, theirs) < TOLERANCE
    assert json.loads((tmp_path / "ours/config.json").read_text())["tie_word_embeddings"] is not differs


def test_generation_configuration_is_copied_even_where_transformers_would_not_save_it(tmp_path):
    """Llama-2-7b-hf has shipped sampling values without do_sample, which transformers 5 refuses to save."""
    stock = stock_folder(tmp_path / "stock")
    content = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6, "transformers_version": "4.31.0"}
    (stock / "generation_config.json").write_text(json.dumps(content))
    convert(stock, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/generation_config.json").read_text()) == content


def test_tokenizer_gives_the_same_ids(tmp_path):
    stock = stock_folder(tmp_path / "stock")
    convert(stock, tmp_path / "ours")
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")("w7 w9 w130").input_ids == [7, 9, 130]


def changed(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


REFUSED = {
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, r"is quantized \(gptq\)"),
    "another architecture": ({"model_type": "mistral"}, "model_type 'mistral', not one of llama"),
    "other shapes": ({"hidden_size": 72}, r"has shape .* but config.json asks for"),
    "another number of layers": ({"num_hidden_layers": 10**9}, "holds 2 layers, but config.json asks for 1000000000"),
    "another head count": ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple"),
    "unknown rotary embedding": ({"rope_parameters": {"rope_type": "su"}}, "'su' is not one of"),
    "a dtype that is none": ({"dtype": "float17"}, "float17"),
    "untied without an output matrix": ({"tie_word_embeddings": False}, r"has no output matrix \(lm_head.weight\)"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_hugging_face_folder_is_refused(tmp_path, capsys, fields, message):
    stock = stock_folder(tmp_path / "stock", tie_word_embeddings=True)
    changed(stock, **fields)
    with pytest.raises(CheckpointError, match=message):
        convert(stock, tmp_path / "ours")
    assert main([str(stock), str(tmp_path / "ours")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]


@pytest.mark.parametrize("option", [["--context-length", "2048"], ["--chat"], ["--no-chat"]], ids=str)
def test_option_for_meta_folders_is_not_passed_over_in_silence(tmp_path, capsys, option):
    assert main([str(stock_folder(tmp_path / "stock")), str(tmp_path / "ours"), *option]) == 2
    assert "is no Meta folder" in capsys.readouterr().err

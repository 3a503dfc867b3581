"""GGUF files: the values of transformers' own loader, and what that loader passes over in silence."""

import re

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from random_models import (
    ARCHITECTURES,
    TOLERANCE,
    meta_weights,
    random_model,
    random_tokens,
    relative_difference,
    tiny_config,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from conversion.convert import convert, main
from conversion.export import export
from conversion.source import open_source
from hf_llama_repro.errors import CheckpointError

NAMES = {
    "tok_embeddings": "token_embd",
    "layers": "blk",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
}
# Rows of 32, which quantization works on, in every matrix.
BLOCKS_OF_32 = {
    "4/4": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96},
    "9/3": {"hidden_size": 288, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 96},
    "8/1": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 1, "intermediate_size": 96},
    "tied": {"intermediate_size": 96, "tie_word_embeddings": True},
}
architectures = pytest.mark.parametrize("fields", ARCHITECTURES.values(), ids=ARCHITECTURES)
TOKENS = random_tokens(tiny_config())


def gguf_tensors(model):
    """The weights under llama.cpp's names, in whose files Q and K are interleaved as in Meta's."""
    config = model.config
    found = meta_weights(model, q_heads=config.num_attention_heads, k_heads=config.num_key_value_heads)
    if config.tie_word_embeddings:
        del found["output.weight"]
    tensors = {}
    for name, tensor in found.items():
        name = "output_norm.weight" if name == "norm.weight" else name
        for metas, theirs in NAMES.items():
            name = name.replace(metas, theirs)
        tensors[name] = tensor.float().numpy()
    return tensors


def write_gguf(
    path,
    model,
    *,
    kind="F32",
    kv_heads=True,
    architecture="llama",
    extra=(),
    without=(),
    options=None,
    ids=None,
    **metadata,
):
    """`model` as llama.cpp's converter writes it, norms in fp32; `extra` tensors; `metadata` of the architecture.

    `without`: metadata left out; `ids`: of special tokens; `options`: of the writer, for files in parts or in another
    byte order.
    """
    config = model.config
    writer = GGUFWriter(path, architecture, **(options or {}))
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if kv_heads:
        writer.add_head_count_kv(config.num_key_value_heads)
    for name, value in metadata.items():
        add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool}.get(
            type(value), writer.add_uint32
        )
        add(f"llama.{name.replace('__', '.')}", value)
    for name, index in (ids or {}).items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    for name in without:
        del writer.kv_data[0][f"llama.{name}"]
    quantization = GGMLQuantizationType[kind]
    for name, data in gguf_tensors(model).items():
        if data.ndim == 1 or kind == "F32":
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, quantize(data, quantization), raw_dtype=quantization)
    for name in extra:
        writer.add_tensor(name, numpy.ones(8, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@architectures
def test_unquantized_weights_are_the_original_ones_bit_for_bit(tmp_path, fields):
    model = random_model(tiny_config(**fields))
    convert(write_gguf(tmp_path / "m.gguf", model), tmp_path / "ours", with_tokenizer=False)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("fields", BLOCKS_OF_32.values(), ids=BLOCKS_OF_32)
def test_values_are_those_of_transformers_own_loader(tmp_path, fields, kind):
    write_gguf(tmp_path / "m.gguf", random_model(tiny_config(**fields)), kind=kind)
    convert(tmp_path / "m.gguf", tmp_path / "ours", with_tokenizer=False)
    stock = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).state_dict()
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in stock.items())


@pytest.mark.parametrize("model_type", ["llama_repro", "llama"])
@pytest.mark.parametrize("fields", BLOCKS_OF_32.values(), ids=BLOCKS_OF_32)
def test_logits_are_those_of_the_model_that_was_written(tmp_path, fields, model_type):
    model = random_model(tiny_config(**fields))
    convert(write_gguf(tmp_path / "m.gguf", model), tmp_path / "ours", model_type=model_type, with_tokenizer=False)
    assert (
        relative_difference(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")), logits(model)) < TOLERANCE
    )


def test_file_without_a_number_of_kv_heads_has_one_for_each_head(tmp_path):
    """transformers' loader leaves Q and K of such a file interleaved."""
    model = random_model(tiny_config(**BLOCKS_OF_32["4/4"]))
    write_gguf(tmp_path / "m.gguf", model, kv_heads=False)
    convert(tmp_path / "m.gguf", tmp_path / "ours", with_tokenizer=False)
    stock = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert (
        relative_difference(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")), logits(model)) < TOLERANCE
    )
    assert relative_difference(logits(stock), logits(model)) > 0.1


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_sixteen_bit_matrices_stay_sixteen_bits_and_norms_keep_theirs(tmp_path, kind):
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[kind]
    write_gguf(tmp_path / "m.gguf", random_model(), kind=kind)
    convert(tmp_path / "m.gguf", tmp_path / "ours", with_tokenizer=False)
    tensors = load_file(tmp_path / "ours/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values() if tensor.ndim == 2} == {dtype}
    assert {tensor.dtype for tensor in tensors.values() if tensor.ndim == 1} == {torch.float32}


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("theta", [10000.0, 500000.0, 12345.678])
def test_single_precision_numbers_read_as_they_were_written(tmp_path, eps, theta):
    model = random_model(tiny_config(rms_norm_eps=eps, rope_theta=theta))
    config = open_source(write_gguf(tmp_path / "m.gguf", model)).config
    assert (config.rms_norm_eps, config.rope_theta) == (eps, pytest.approx(theta, rel=1e-7))


def test_context_length_is_the_files(tmp_path):
    model = random_model(tiny_config(max_position_embeddings=777))
    assert open_source(write_gguf(tmp_path / "m.gguf", model)).config.max_position_embeddings == 777


def test_vocabulary_is_the_rows_of_the_embedding(tmp_path):
    assert open_source(write_gguf(tmp_path / "m.gguf", random_model(), vocab_size=32000)).config.vocab_size == 131


def test_rotary_frequencies_of_old_files_are_dropped(tmp_path):
    write_gguf(tmp_path / "m.gguf", random_model(), extra=["blk.0.attn_rot_embd.weight"])
    assert len(open_source(tmp_path / "m.gguf").tensors) == 21


def test_file_without_a_tokenizer_can_be_exported(tmp_path):
    model = random_model()
    export(write_gguf(tmp_path / "m.gguf", model), tmp_path / "meta", shards=1)
    expected = meta_weights(model, q_heads=4, k_heads=2)
    found = torch.load(tmp_path / "meta/consolidated.00.pth", weights_only=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


REFUSED = {
    "another architecture": ({"architecture": "qwen2"}, "holds the architecture 'qwen2', not 'llama'"),
    "experts": ({"expert_count": 8}, "llama.expert_count = 8"),
    "scaled rotary embedding": (
        {"rope__scaling__type": "longrope", "rope__scaling__factor": 4},
        "llama.rope.scaling.type = longrope",
    ),
    "Llama 3.1's frequencies": ({"extra": ["rope_freqs.weight"]}, "rope_freqs.weight"),
    "biases": ({"extra": ["blk.0.attn_q.bias"]}, "tensors that LLaMA does not have: blk.0.attn_q.bias"),
    "another width": ({"embedding_length": 72}, "has shape .* its metadata say"),
    "another number of layers": (
        {"block_count": 4_000_000_000},
        "holds 2 layers, but its metadata asks for 4000000000",
    ),
    "no heads": ({"attention__head_count": 0}, "num_attention_heads"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_file_is_refused(tmp_path, capsys, changes, message):
    write_gguf(tmp_path / "m.gguf", random_model(), **changes)
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "m.gguf", tmp_path / "ours", with_tokenizer=False)
    assert main([str(tmp_path / "m.gguf"), str(tmp_path / "ours"), "--no-tokenizer"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_quantization_that_gguf_cannot_undo_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", random_model(tiny_config(**BLOCKS_OF_32["4/4"])), kind="Q8_0")
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    # Name, two dimensions, then the type: Q8_0 (8) becomes Q8_1 (9), which has no way back.
    at = content.index(b"blk.1.ffn_up.weight") + len("blk.1.ffn_up.weight") + 4 + 16
    assert content[at] == GGMLQuantizationType.Q8_0
    content[at] = GGMLQuantizationType.Q8_1
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        convert(tmp_path / "m.gguf", tmp_path / "ours", with_tokenizer=False)


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file_is_refused(tmp_path, share):
    path = write_gguf(tmp_path / "m.gguf", random_model())
    content = path.read_bytes()
    path.write_bytes(content[: max(5, int(share * len(content)))])
    with pytest.raises(CheckpointError, match=r"m\.gguf is truncated or damaged .* download it again"):
        convert(path, tmp_path / "ours", with_tokenizer=False)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]

"""Files as people have them: what they say is used, refused with a remedy of its own, or reported in one line."""

import json
import re
import shutil
from dataclasses import make_dataclass

import pytest
import torch
from gguf import GGUFEndian
from meta_checkpoints import VOCAB, meta_folder, meta_params, meta_weights, write_meta, write_sentencepiece
from random_models import TOLERANCE, random_model, random_tokens, relative_difference, stock_twin, tiny_config
from safetensors.torch import load_file, save_file
from test_convert_gguf import write_gguf
from transformers import LlamaForCausalLM

from conversion.convert import convert, main
from conversion.export import export
from conversion.source import open_source
from hf_llama_repro.errors import CheckpointError

BF16 = torch.bfloat16
MHA = {"n_kv_heads": None}
TOKENS = random_tokens(tiny_config())


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def said_of(source):
    return " | ".join(source.notes)


# What a Meta folder's context is


OTHER_RELEASES = {
    "Code Llama 7B": ({**MHA, "rope_theta": 1e6, "ffn_dim_multiplier": 1.0}, 32016, "rope_theta 1000000", 16384),
    "Code Llama 34B": ({"rope_theta": 1e6, "ffn_dim_multiplier": 1.0}, VOCAB, "ffn_dim_multiplier 1", 16384),
    "Code Llama 70B Python": ({"ffn_dim_multiplier": 1.3}, 32016, "an embedding of 32016 rows", 4096),
    "Llama 3": ({"rope_theta": 5e5, "ffn_dim_multiplier": 1.3}, 128256, "an embedding of 128256 rows", 8192),
    "another theta": ({**MHA, "rope_theta": 2e5}, VOCAB, "rope_theta 200000", "TOKENS"),
    "another eps": ({"norm_eps": 1e-8}, VOCAB, "norm_eps 1e-08", "TOKENS"),
}


@pytest.mark.parametrize(("fields", "rows", "sign", "remedy"), OTHER_RELEASES.values(), ids=OTHER_RELEASES)
def test_context_is_asked_for_where_a_field_contradicts_llama_1_and_2(tmp_path, fields, rows, sign, remedy):
    params = meta_params(**{"dim": 16, "n_layers": 1, **fields})
    write_meta(tmp_path / "m", params, meta_weights(params, dtype=BF16, vocab=rows), frequencies="beside")
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(sign)}\b.*not LLaMA 1's or 2's: say --context-length {remedy}"
    ):
        open_source(tmp_path / "m")
    config = open_source(tmp_path / "m", context_length=777).config
    assert (config.max_position_embeddings, config.rope_theta) == (777, fields.get("rope_theta", 1e4))


def test_vocabulary_of_llama_3_without_its_theta_is_refused(tmp_path):
    params = meta_params(dim=16, n_layers=1)
    write_meta(tmp_path / "m", params, meta_weights(params, dtype=BF16, vocab=128256))
    with pytest.raises(CheckpointError, match=r'write "rope_theta": 500000\.0 there'):
        open_source(tmp_path / "m", context_length=8192)


def test_shards_cut_as_llama_3s_are_named_so(tmp_path):
    weights = meta_weights(meta_params(), dtype=BF16)
    meta = write_meta(tmp_path / "m", meta_params(), weights, shards=2)
    for rank in range(2):
        shard = torch.load(meta / f"consolidated.0{rank}.pth", weights_only=True)
        shard["tok_embeddings.weight"] = weights["tok_embeddings.weight"].chunk(2)[rank].clone()
        torch.save(shard, meta / f"consolidated.0{rank}.pth")
    with pytest.raises(CheckpointError, match="cut along the vocabulary, as Llama 3's"):
        open_source(meta)


@pytest.mark.parametrize(
    ("fields", "context", "sign"),
    [({"rope_theta": 1e6}, 16384, "rope_theta 1000000"), ({**MHA, "norm_eps": 1e-6}, 2048, "a context of 2048 tokens")],
)
def test_chat_in_the_folders_name_is_no_proof_against_the_files(tmp_path, fields, context, sign):
    meta = meta_folder(tmp_path / "some-chat", **fields)
    write_sentencepiece(meta / "tokenizer.model")
    source = open_source(meta, context_length=context)
    assert not source.chat
    assert f"the folder's name says chat, but {sign} is not LLaMA 2's (--chat " in said_of(source)
    assert open_source(meta, context_length=context, chat=True).chat


def test_context_that_is_asked_for_against_params_json_is_reported(tmp_path):
    source = open_source(meta_folder(tmp_path / "m", max_seq_len=512), context_length=4096)
    assert source.config.max_position_embeddings == 4096
    assert "as asked for, though params.json says max_seq_len 512" in said_of(source)


# Keys of params.json

KEYS = {
    "quantized 3.2": ({"quantization_args": {"group_size": 256}}, "quantization_args .* of the quantized Llama 3.2"),
    "adapters": ({"lora_args": {"rank": 16}}, "lora_args .* of the quantized Llama 3.2"),
    "vision": ({"vision_chunk_size": 448}, "vision_chunk_size = 448, a key of Llama 3.2 with vision"),
    "experts": ({"moe_args": {}}, "moe_args = {}, a key of Llama 4"),
    "pruned": ({"hidden_dim": 6400}, "hidden_dim = 6400, a key of the pruned Llama Guard 3 1B"),
    "the base under another name": ({"rope_freq_base": 5e5}, r"rope_freq_base = 500000\.0, a key of .*Llama Guard 3"),
    "scaled": ({"use_scaled_rope": True}, "use_scaled_rope = True, as Llama 3.1 .* Hugging Face folder"),
    "a stranger": ({"qk_norm": True}, "qk_norm = True, a key that .* does not have .*: remove it if"),
    "another vocabulary": ({"vocab_size": 32000}, f"vocab_size = 32000, but the embedding has {VOCAB} rows"),
    "truth for a vocabulary": ({"vocab_size": True}, "vocab_size = True, but"),
}


@pytest.mark.parametrize(("fields", "message"), KEYS.values(), ids=KEYS)
def test_key_that_would_change_the_computation_is_refused_by_name(tmp_path, capsys, fields, message):
    meta = meta_folder(tmp_path / "m", **fields)
    assert main([str(meta), str(tmp_path / "ours"), "--no-tokenizer", "--context-length", "4096"]) == 2
    assert re.search(rf"params\.json says {message}", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_keys_without_effect_are_accepted(tmp_path):
    meta = meta_folder(tmp_path / "m", use_scaled_rope=False, max_batch_size=32, vocab_size=VOCAB)
    content = json.loads((meta / "params.json").read_text())
    (meta / "params.json").write_text(json.dumps({**content, "moe_args": None, "anything": None}))
    assert "max_batch_size 32 left out" in said_of(open_source(meta))


# Rotary parameters of Hugging Face


@pytest.fixture
def stock(tmp_path):
    """A folder of stock Llama, one layer."""
    stock_twin(random_model(tiny_config(num_hidden_layers=1))).save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def change_config(folder, **fields):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **fields}))


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def test_rope_key_that_transformers_only_warns_about_is_accepted_and_reported(stock, tmp_path):
    change_config(stock, rope_scaling={**YARN, "finetuned": True}, rope_parameters=None)
    conversion = convert(stock, tmp_path / "ours", with_tokenizer=False, model_type="llama")
    assert "rope_scaling: finetuned = True left out: without effect on the type 'yarn'" in said_of(conversion.source)
    expected = logits(LlamaForCausalLM.from_pretrained(stock))
    assert relative_difference(logits(LlamaForCausalLM.from_pretrained(tmp_path / "ours")), expected) < TOLERANCE
    change_config(stock, rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    assert relative_difference(logits(LlamaForCausalLM.from_pretrained(stock)), expected) > 0.01


ROPE = {
    "a factor of no kind": ({"factor": 4.0}, 'factor = 4.0, but not of which kind: add "rope_type"'),
    "part of a head": ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "another type": ({"rope_type": "longrope", "long_factor": [1.0]}, "'longrope' is not one of"),
    "no factor": ({"rope_type": "yarn"}, "needs"),
}


@pytest.mark.parametrize(("rope", "message"), ROPE.values(), ids=ROPE)
def test_rope_parameters_that_are_refused_are_not_called_damage(stock, rope, message):
    change_config(stock, rope_scaling=rope, rope_parameters=None)
    with pytest.raises(CheckpointError, match=message) as refusal:
        open_source(stock)
    assert "download" not in str(refusal.value)


# Weight files that are whole, but not as expected


def meta_and_bin(tmp_path, stock, save):
    """A Meta folder and a Hugging Face folder whose weights `save` writes."""
    meta = meta_folder(tmp_path / "m")
    save(torch.load(meta / "consolidated.00.pth", weights_only=True), meta / "consolidated.00.pth")
    save(load_file(stock / "model.safetensors"), stock / "pytorch_model.bin")
    (stock / "model.safetensors").unlink()
    return meta, stock


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("is_zip", [True, False])
def test_pickle_protocol_that_cannot_be_read_is_named(tmp_path, stock, protocol, is_zip):
    def save(tensors, path):
        torch.save(tensors, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)

    for folder in meta_and_bin(tmp_path, stock, save):
        with pytest.raises(CheckpointError, match=f"pickle protocol {protocol}.*save it again") as refusal:
            open_source(folder)
        assert "download" not in str(refusal.value)


WRAPPED = {
    "DistributedDataParallel": lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
    "torch.compile": lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()},
    "compiled layers": lambda tensors: {
        re.sub(r"(layers\.\d+)", r"\1._orig_mod", name): tensor for name, tensor in tensors.items()
    },
    "FSDP": lambda tensors: {f"_fsdp_wrapped_module.{name}": tensor for name, tensor in tensors.items()},
    "a trainer's module": lambda tensors: {f"model.{name}": tensor for name, tensor in tensors.items()},
    "a trainer's file": lambda tensors: {"model": tensors, "optimizer": {"lr": 0.1}, "step": 3},
    "both": lambda tensors: {"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_weights_are_read_right_and_reported(tmp_path, stock, wrap):
    expected = {name: tensor.read() for name, tensor in open_source(stock).tensors.items()}
    plain = {name: tensor.read() for name, tensor in open_source(meta_folder(tmp_path / "plain")).tensors.items()}
    meta, stock = meta_and_bin(tmp_path, stock, lambda tensors, path: torch.save(wrap(tensors), path))
    for folder, tensors in ((meta, plain), (stock, expected)):
        source = open_source(folder)
        assert source.tensors.keys() == tensors.keys()
        assert all(torch.equal(tensor.read(), tensors[name]) for name, tensor in source.tensors.items())
        assert re.search("are read as|its entry '(model|state_dict)'", said_of(source))
    if wrap is WRAPPED["a trainer's file"]:
        assert "left out: optimizer, step" in said_of(source)


def test_weights_of_the_base_model_of_a_tied_one_are_read_right(tmp_path):
    model = random_model(tiny_config(num_hidden_layers=1, tie_word_embeddings=True))
    stock_twin(model).save_pretrained(tmp_path / "stock")
    tensors = load_file(tmp_path / "stock/model.safetensors")
    base = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(base, tmp_path / "stock/model.safetensors", metadata={"format": "pt"})
    source = open_source(tmp_path / "stock")
    assert all(torch.equal(tensor.read(), tensors[name]) for name, tensor in source.tensors.items())
    assert "are read as model." in said_of(source)


HEADLESS = {
    "a base model": ({}, "saved from the base model"),
    "a classifier": ({"score.weight": torch.ones(2, 64)}, "with score.weight it is a classifier"),
    "an adapter in it": ({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 64)}, "holds LoRA matrices"),
}


@pytest.mark.parametrize(("more", "message"), HEADLESS.values(), ids=HEADLESS)
def test_folder_without_an_output_matrix_is_diagnosed(stock, more, message):
    tensors = load_file(stock / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file({**tensors, **more}, stock / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        open_source(stock)


def test_shard_without_an_output_matrix_is_diagnosed(tmp_path):
    meta = meta_folder(tmp_path / "m")
    shard = torch.load(meta / "consolidated.00.pth", weights_only=True)
    del shard["output.weight"]
    torch.save(shard, meta / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"has no output\.weight, which Meta's files hold even where"):
        open_source(meta)


def test_consolidated_pth_is_read_as_the_only_shard(tmp_path):
    meta = meta_folder(tmp_path / "m")
    expected = {name: tensor.read() for name, tensor in open_source(meta).tensors.items()}
    (meta / "consolidated.00.pth").rename(meta / "consolidated.pth")
    source = open_source(meta)
    assert all(torch.equal(tensor.read(), expected[name]) for name, tensor in source.tensors.items())
    assert "consolidated.pth read as the only shard" in said_of(source)
    assert "verified" in str(convert(meta, tmp_path / "ours", with_tokenizer=False, verify=True).lines())


@pytest.mark.parametrize("name", ["model.pth", "consolidated.0.pth", "llama.pt"])
def test_shard_under_another_name_is_named_with_its_remedy(tmp_path, name):
    meta = meta_folder(tmp_path / "m")
    (meta / "consolidated.00.pth").rename(meta / name)
    with pytest.raises(CheckpointError, match=rf"there is {re.escape(name)}; .* rename it to consolidated\.00\.pth"):
        open_source(meta)


def test_pointer_of_git_lfs_is_named(tmp_path, stock):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"
    meta = meta_folder(tmp_path / "m")
    for path in (meta / "consolidated.00.pth", stock / "model.safetensors", tmp_path / "m.gguf"):
        path.write_text(pointer)
        with pytest.raises(CheckpointError, match=rf"{path.name} is a Git LFS pointer.*git lfs pull"):
            open_source(path if path.suffix == ".gguf" else path.parent)


def test_params_json_beside_a_hugging_face_folder_does_not_make_it_metas(stock):
    (stock / "params.json").write_text(json.dumps(meta_params()))
    assert open_source(stock).description == "Hugging Face folder (llama)"


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def split(stock):
    """The folder in two files; their index as a dictionary."""
    tensors = load_file(stock / "model.safetensors")
    (stock / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1-of-2.safetensors": names[:4], "model-2-of-2.safetensors": names[4:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, stock / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index(stock, weight_map)
    return weight_map


def test_every_file_that_an_index_misses_is_named(stock, split):
    for file in set(split.values()):
        (stock / file).unlink()
    message = r"names model-1-of-2\.safetensors, model-2-of-2\.safetensors, which are not there \(2 of 2 files\)"
    with pytest.raises(CheckpointError, match=message):
        open_source(stock)


def test_tensor_that_is_not_in_the_file_of_the_index_is_named(stock, split):
    index(stock, {**split, "lm_head.weight": "model-2-of-2.safetensors"})
    with pytest.raises(
        CheckpointError, match=r"names lm_head\.weight in model-2-of-2\.safetensors, which does not hold"
    ):
        open_source(stock)


def test_of_two_tensors_of_one_name_the_indexed_one_counts(stock, split):
    right = load_file(stock / "model-1-of-2.safetensors")["lm_head.weight"]
    other = load_file(stock / "model-2-of-2.safetensors")
    save_file({**other, "lm_head.weight": torch.zeros_like(right)}, stock / "model-2-of-2.safetensors")
    assert torch.equal(open_source(stock).tensors["lm_head.weight"].read(), right)
    del split["lm_head.weight"]
    index(stock, split)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is in two files"):
        open_source(stock)


def test_index_beside_a_whole_file_is_left_out_as_transformers_does(stock):
    index(stock, {"model.norm.weight": "gone.safetensors"})
    assert "model.safetensors.index.json left out" in said_of(open_source(stock))


# GGUF


def test_factor_without_a_type_is_linear_as_in_llama_cpp(tmp_path):
    model = random_model(tiny_config(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}))
    for number, key in enumerate(("rope__scaling__factor", "rope__scale_linear")):
        path = write_gguf(tmp_path / f"{number}.gguf", model, **{key: 4.0})
        conversion = convert(path, tmp_path / str(number), with_tokenizer=False)
        assert "scaled by 4, linearly, as llama.cpp does where no type is named" in said_of(conversion.source)
    converted = LlamaForCausalLM.from_pretrained(convert_to_stock(path, tmp_path / "stock"))
    assert relative_difference(logits(converted), logits(model)) < TOLERANCE


def convert_to_stock(path, target):
    convert(path, target, with_tokenizer=False, model_type="llama")
    return target


ROPES = {
    "yarn": (
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4},
        "",
    ),
    "none": (
        {"rope__scaling__type": "none", "rope__scaling__factor": 4.0},
        {"rope_type": "default", "rope_theta": 1e4},
        "not scaled: type none, factor 4",
    ),
    "linear without a factor": (
        {"rope__scaling__type": "linear", "rope__scaling__finetuned": True},
        {"rope_type": "default", "rope_theta": 1e4},
        "llama.rope.scaling.finetuned left out",
    ),
}


@pytest.mark.parametrize(("metadata", "rope", "note"), ROPES.values(), ids=ROPES)
def test_scaling_types_of_gguf_are_used_or_reported(tmp_path, metadata, rope, note):
    source = open_source(write_gguf(tmp_path / "m.gguf", random_model(), **metadata))
    assert source.config.rope_parameters == rope
    assert note in said_of(source)


@pytest.mark.parametrize("key", ["attention.layer_norm_rms_epsilon", "context_length"])
def test_missing_metadata_is_refused_not_replaced_by_a_default(tmp_path, key):
    path = write_gguf(tmp_path / "m.gguf", random_model(), without=[key])
    with pytest.raises(CheckpointError, match=rf"lacks llama\.{key}, .*make it again"):
        open_source(path)


COMPUTED_OTHERWISE = {
    "attention scale": {"attention__scale": 0.5},
    "logit scale": {"logit_scale": 0.25},
    "window": {"attention__sliding_window": 4096},
    "not causal": {"attention__causal": False},
    "attention factor": {"rope__scaling__attn_factor": 2.0},
    "unknown": {"rope__dimension_sections": 3},
}


@pytest.mark.parametrize("metadata", COMPUTED_OTHERWISE.values(), ids=COMPUTED_OTHERWISE)
def test_metadata_that_change_the_computation_are_refused_by_name(tmp_path, metadata):
    ((name, value),) = metadata.items()
    path = write_gguf(tmp_path / "m.gguf", random_model(), **metadata)
    with pytest.raises(CheckpointError, match=re.escape(f"says llama.{name.replace('__', '.')} = {value}")):
        open_source(path)


def test_key_length_is_the_width_of_a_head_and_other_widths_are_refused(tmp_path):
    model = random_model(tiny_config(head_dim=20))
    path = write_gguf(tmp_path / "m.gguf", model, attention__key_length=20, without=["rope.dimension_count"])
    assert open_source(path).config.head_dim == 20
    path = write_gguf(tmp_path / "m.gguf", model, attention__key_length=20, attention__value_length=16)
    with pytest.raises(CheckpointError, match=r"llama\.attention\.value_length = 16.* equally wide"):
        open_source(path)


def test_neutral_metadata_are_accepted(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", random_model(), logit_scale=1.0, expert_count=0, attention__causal=True)
    assert len(open_source(path).tensors) == 21


def test_another_number_of_tokens_than_rows_is_reported(tmp_path):
    source = open_source(write_gguf(tmp_path / "m.gguf", random_model(), vocab_size=32000))
    assert "vocabulary of 131, the rows of the embedding, though llama.vocab_size says 32000" in said_of(source)


@pytest.fixture
def parts(tmp_path):
    """A file in three parts, and the model."""
    model = random_model()
    write_gguf(tmp_path / "m.gguf", model, options={"split_max_tensors": 8})
    found = sorted(tmp_path.glob("*.gguf"))
    assert [path.name for path in found] == [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    return found, model


def test_split_gguf_is_read_whole_from_any_of_its_parts(parts, tmp_path):
    paths, model = parts
    for number, path in enumerate(paths):
        conversion = convert(path, tmp_path / str(number), with_tokenizer=False)
        assert "all of its 3 parts read" in said_of(conversion.source)
        found = load_file(tmp_path / str(number) / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
        manifest = json.loads((tmp_path / str(number) / "manifest.json").read_text())
        assert set(manifest["source"]) == {part.name for part in paths}


def test_part_that_is_missing_renamed_or_of_another_file_is_named(parts, tmp_path):
    paths, _ = parts
    shutil.copy(paths[0], tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"one of 3 parts .* is not named so.*llama-gguf-split --merge"):
        open_source(tmp_path / "renamed.gguf")
    kept = paths[1].read_bytes()
    shutil.copy(paths[2], paths[1])
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf is not part 2 of 3"):
        open_source(paths[0])
    paths[1].write_bytes(kept)
    paths[2].unlink()
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003\.gguf is not beside it: download what is missing"):
        open_source(paths[1])


def test_big_endian_gguf_is_named_with_its_remedy(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", random_model(), options={"endianess": GGUFEndian.BIG})
    with pytest.raises(CheckpointError, match=r"big-endian GGUF .*gguf-convert-endian") as refusal:
        open_source(path)
    assert "download" not in str(refusal.value)


FORMATS = {
    "GGUF 1": (b"GGUF\1\0\0\0" + bytes(64), "version 1 of GGUF"),
    "before GGUF": (b"tjgg\3\0\0\0" + bytes(64), "from before GGUF"),
}


@pytest.mark.parametrize(("content", "message"), FORMATS.values(), ids=FORMATS)
def test_older_files_of_llama_cpp_are_named(tmp_path, content, message):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as refusal:
        open_source(tmp_path / "m.gguf")
    assert "download" not in str(refusal.value)


def test_special_ids_are_those_of_the_files_tokenizer(tmp_path):
    """A file without them has LLaMA's; Llama 3's are others."""
    path = write_gguf(tmp_path / "m.gguf", random_model(), ids={"bos": 128, "eos": 129, "padding": 500})
    source = open_source(path)
    assert (source.config.bos_token_id, source.config.eos_token_id, source.config.pad_token_id) == (128, 129, None)
    assert "padding_token_id = 500 left out: it is no row of the embedding" in said_of(source)


# What is exported

_1 = ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "norm_eps")
_2 = (*_1, "n_kv_heads", "ffn_dim_multiplier")
LOADERS = {
    "LLaMA 1": (_1, {"num_key_value_heads": 4, "intermediate_size": 256}),
    "LLaMA 1, another width": (_1, {"num_key_value_heads": 4, "intermediate_size": 200}),
    "LLaMA 2": (_2, {"intermediate_size": 112, "max_position_embeddings": 32768}),
    "Code Llama": ((*_2, "rope_theta"), {"rope_theta": 1e6, "max_position_embeddings": 16384}),
}


@pytest.mark.parametrize(("known", "fields"), LOADERS.values(), ids=LOADERS)
def test_exported_params_json_holds_only_keys_that_the_releases_own_loader_accepts(tmp_path, known, fields):
    """Each loader makes its ModelArgs with max_seq_len, max_batch_size and **params."""
    arguments = make_dataclass(
        "ModelArgs", [(name, object, None) for name in (*known, "max_batch_size", "max_seq_len")]
    )
    config = tiny_config(num_hidden_layers=1, **fields)
    random_model(config).save_pretrained(tmp_path / "ours")
    said = export(tmp_path / "ours", tmp_path / "m", with_tokenizer=False)
    content = json.loads((tmp_path / "m/params.json").read_text())
    assert arguments(max_seq_len=512, max_batch_size=1, **content).vocab_size == 131
    assert f"context of {config.max_position_embeddings} tokens, which it does not name" in said
    back = open_source(tmp_path / "m", context_length=config.max_position_embeddings).config
    for name in ("intermediate_size", "rope_theta", "num_key_value_heads", "vocab_size"):
        assert getattr(back, name) == getattr(config, name), name


def test_what_was_decided_of_the_source_is_reported_by_the_export_too(stock, tmp_path, capsys):
    from conversion.export import main as export_main

    change_config(stock, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "finetuned": True})
    assert export_main([str(stock), str(tmp_path / "m"), "--no-tokenizer"]) == 0
    assert "decided    rope_parameters: finetuned = True left out" in capsys.readouterr().out


def test_width_of_a_head_that_no_loader_of_metas_knows_is_refused(tmp_path):
    random_model(tiny_config(num_hidden_layers=1, head_dim=20)).save_pretrained(tmp_path / "ours")
    with pytest.raises(CheckpointError, match="head_dim = 20, only hidden_size / num_attention_heads = 16"):
        export(tmp_path / "ours", tmp_path / "m", with_tokenizer=False)

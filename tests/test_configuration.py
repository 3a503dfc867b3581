"""The configuration: defaults, what follows from them, what it refuses, what it reads and what it writes."""

import json
import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from random_models import tiny_config
from transformers import LlamaConfig

from hf_llama_repro import PAPER_SIZES, LlamaReproConfig, LlamaReproForCausalLM

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 2048}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ROPES = {
    "default": DEFAULT_ROPE,
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": YARN,
    "llama3": LLAMA3,
}
ropes = pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)


def saved(config: LlamaReproConfig, folder) -> dict:
    """What `config.json` says."""
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 32000),
        ("hidden_size", 4096),
        ("intermediate_size", 11008),
        ("num_hidden_layers", 32),
        ("num_attention_heads", 32),
        ("max_position_embeddings", 2048),
        ("rms_norm_eps", 1e-6),
        ("rope_parameters", DEFAULT_ROPE),
        ("tie_word_embeddings", False),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("pad_token_id", None),
        ("bos_token_id", 1),
        ("eos_token_id", 2),
    ],
)
def test_default_is_that_of_llama_7b(field, value):
    assert getattr(LlamaReproConfig(), field) == value


@pytest.mark.parametrize(
    ("fields", "derived"),
    [
        ({"num_attention_heads": 64}, {"num_key_value_heads": 64, "head_dim": 64}),
        ({"num_key_value_heads": 8}, {"num_key_value_heads": 8, "head_dim": 128}),
        ({"hidden_size": 100, "num_attention_heads": 8, "head_dim": 6}, {"num_key_value_heads": 8, "head_dim": 6}),
    ],
)
def test_missing_heads_follow_from_the_others(fields, derived):
    config = LlamaReproConfig(**fields)
    assert {name: getattr(config, name) for name in derived} == derived


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ({"hidden_size": 100, "num_attention_heads": 32}, ["100", "32", "head_dim"]),
        ({"num_attention_heads": 32, "num_key_value_heads": 5}, ["num_attention_heads=32", "num_key_value_heads=5"]),
        ({"num_attention_heads": 4, "num_key_value_heads": 8}, ["num_attention_heads=4", "num_key_value_heads=8"]),
        ({"num_attention_heads": 0}, ["num_attention_heads=0"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads=0", "1"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers=0", "1"]),
        ({"vocab_size": -1}, ["vocab_size=-1", "1"]),
        ({"head_dim": 7}, ["head_dim=7", "even"]),
        ({"rms_norm_eps": 0.0}, ["rms_norm_eps=0.0", "positive"]),
        ({"vocab_size": 32000, "pad_token_id": 32000}, ["pad_token_id=32000", "vocab_size=32000"]),
        ({"pad_token_id": -2}, ["pad_token_id=-2", "vocab_size=32000"]),
        ({"rope_parameters": {"rope_type": "longest"}}, ["'longest'", "default, linear, dynamic, yarn, llama3"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["'linear'", "['factor']"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, ["factor=0.5", "1"]),
        ({"rope_parameters": {**DEFAULT_ROPE, "factor": 2.0}}, ["'default'", "['factor']"]),
        ({"rope_parameters": {**YARN, "beta": 3}}, ["'yarn'", "['beta']"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["high_freq_factor", "low_freq_factor"]),
        (
            {"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}},
            ["high_freq_factor=1.0", "low_freq_factor=1.0"],
        ),
        ({"rope_theta": 0.0}, ["rope_theta=0.0", "positive"]),
        ({"rope_theta": 5e5, "rope_parameters": DEFAULT_ROPE}, ["rope_theta=500000.0", "rope_theta=10000.0"]),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": ROPES["dynamic"]},
            ["rope_type=linear", "rope_type=dynamic"],
        ),
    ],
)
def test_contradiction_is_refused_with_the_values(fields, values):
    with pytest.raises(ValueError, match=re.escape(values[0])) as refusal:
        LlamaReproConfig(**fields)
    assert [value for value in values if value not in str(refusal.value)] == []


def test_contradiction_made_later_is_refused_when_saving(tmp_path):
    config = tiny_config()
    config.num_key_value_heads = 3
    with pytest.raises(Exception, match="num_key_value_heads=3"):
        config.save_pretrained(tmp_path)


def test_value_of_the_wrong_type_is_refused():
    with pytest.raises(StrictDataclassFieldValidationError, match="hidden_size"):
        LlamaReproConfig(hidden_size="4096")


@ropes
def test_rope_parameters_are_kept(rope):
    assert LlamaReproConfig(rope_parameters=rope).rope_parameters == rope


@ropes
def test_older_rope_scaling_and_theta_are_read(rope):
    scaling = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta")}
    older = {"rope_theta": rope["rope_theta"]}
    if rope["rope_type"] != "default":
        older["rope_scaling"] = {"type": rope["rope_type"], **scaling}
    assert LlamaReproConfig(**older).rope_parameters == rope


def test_rope_parameters_without_theta_get_the_papers_theta():
    assert LlamaReproConfig(rope_parameters={"rope_type": "linear", "factor": 2.0}).rope_theta == 10000.0


def test_callers_rope_dictionary_is_left_alone():
    rope = {"type": "linear", "factor": 2.0}
    LlamaReproConfig(rope_parameters=rope)
    assert rope == {"type": "linear", "factor": 2.0}


def test_two_configurations_do_not_share_rope_parameters():
    first, second = LlamaReproConfig(), LlamaReproConfig()
    first.rope_theta = 5e5
    assert second.rope_theta == 10000.0


@ropes
def test_config_json_has_rope_theta_beside_rope_parameters(rope, tmp_path):
    fields = saved(LlamaReproConfig(rope_parameters=rope), tmp_path)
    assert (fields["rope_theta"], fields["rope_parameters"]) == (rope["rope_theta"], rope)


@ropes
def test_saved_configuration_loads_as_it_was(rope, tmp_path):
    config = tiny_config(rope_parameters=rope, head_dim=6, attention_bias=True, pad_token_id=0, eos_token_id=[2, 5])
    config.save_pretrained(tmp_path)
    assert LlamaReproConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_saved_configuration_saves_as_it_was(tmp_path):
    first = saved(tiny_config(), tmp_path)
    assert saved(LlamaReproConfig.from_pretrained(tmp_path), tmp_path) == first


@ropes
def test_config_json_of_stock_llama_is_read(rope, tmp_path):
    stock = LlamaConfig(
        vocab_size=99, hidden_size=48, num_attention_heads=6, num_key_value_heads=2, rope_parameters=dict(rope)
    )
    stock.save_pretrained(tmp_path)
    config = LlamaReproConfig.from_pretrained(tmp_path)
    for name, value in json.loads((tmp_path / "config.json").read_text()).items():
        if name not in ("model_type", "transformers_version", "pretraining_tp"):
            assert getattr(config, name) == value, name


def test_config_json_of_llama_2_as_published_in_2023_is_read(tmp_path):
    published = {
        "_name_or_path": "meta-llama/Llama-2-70b-hf",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 8192,
        "initializer_range": 0.02,
        "intermediate_size": 28672,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.31.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    read, paper = LlamaReproConfig.from_pretrained(tmp_path), LlamaReproConfig.from_paper("llama-2-70b")
    assert {name: getattr(read, name) for name in PAPER_SIZES["llama-2-70b"]} == PAPER_SIZES["llama-2-70b"] | {
        "dtype": torch.bfloat16
    }
    assert (read.rope_parameters, read.head_dim) == (paper.rope_parameters, paper.head_dim)


def test_configuration_read_from_stock_llamas_is_saved_as_ours(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    assert saved(LlamaReproConfig.from_pretrained(tmp_path), tmp_path)["model_type"] == "llama_repro"


@pytest.mark.parametrize("folder_holds_older_spelling", [False, True])
def test_rope_theta_given_to_from_pretrained_overrides_the_folders(folder_holds_older_spelling, tmp_path):
    fields = saved(tiny_config(), tmp_path)
    if folder_holds_older_spelling:
        del fields["rope_parameters"]
        (tmp_path / "config.json").write_text(json.dumps(fields))
    config = LlamaReproConfig.from_pretrained(tmp_path, rope_theta=5e5)
    assert (config.rope_theta, config.rope_parameters["rope_theta"]) == (5e5, 5e5)


def test_rope_parameters_given_to_from_pretrained_override_the_folders(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert LlamaReproConfig.from_pretrained(tmp_path, rope_parameters=dict(LLAMA3)).rope_parameters == LLAMA3


def test_setting_rope_theta_sets_it_in_rope_parameters():
    config = tiny_config()
    config.rope_theta = 5e5
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("name", "parameters", "context", "eps", "dtype"),
    [
        ("llama-7b", 6_738_415_616, 2048, 1e-6, torch.float16),
        ("llama-13b", 13_015_864_320, 2048, 1e-6, torch.float16),
        ("llama-33b", 32_528_943_616, 2048, 1e-6, torch.float16),
        ("llama-65b", 65_285_660_672, 2048, 1e-6, torch.float16),
        ("llama-2-7b", 6_738_415_616, 4096, 1e-5, torch.bfloat16),
        ("llama-2-13b", 13_015_864_320, 4096, 1e-5, torch.bfloat16),
        ("llama-2-70b", 68_976_648_192, 4096, 1e-5, torch.bfloat16),
    ],
)
def test_size_of_the_papers_has_its_exact_numbers(name, parameters, context, eps, dtype):
    config = LlamaReproConfig.from_paper(name)
    with torch.device("meta"):
        model = LlamaReproForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert (config.max_position_embeddings, config.rms_norm_eps, config.dtype) == (context, eps, dtype)


def test_every_size_is_listed_by_name():
    assert set(PAPER_SIZES) == {f"llama-{size}" for size in ("7b", "13b", "33b", "65b", "2-7b", "2-13b", "2-70b")}


def test_size_of_the_papers_can_be_changed():
    assert LlamaReproConfig.from_paper("llama-2-70b", num_hidden_layers=2).num_hidden_layers == 2


def test_unknown_size_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'llama-30b'.*llama-33b"):
        LlamaReproConfig.from_paper("llama-30b")


def test_a_padding_id_of_minus_one_means_none():
    assert LlamaReproConfig(pad_token_id=-1).pad_token_id is None

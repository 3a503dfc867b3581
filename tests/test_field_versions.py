"""The cache's two names, arguments that nothing reads, and versions of transformers that were not tested."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from random_models import random_model, random_tokens, relative_difference, stock_twin
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from conversion.convert import convert
from conversion.convert import main as convert_main
from conversion.sums import file_sums
from hf_llama_repro import LlamaReproForSequenceClassification, LlamaReproModel, versions
from hf_llama_repro.modeling_llama_repro import CACHE, LlamaReproAttention

MODELING = "modeling_llama_repro.py"
NAMES = ["cache", "past_key_values"]
GREEDY = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_cache_is_used_under_both_names(name, model):
    tokens = random_tokens(model.config)
    cache = DynamicCache(config=model.config)
    pieces = [model(piece, **{name: cache}).logits for piece in tokens.split([56, 1, 23], dim=1)]
    assert cache.get_seq_length() == tokens.shape[1]
    assert relative_difference(torch.cat(pieces, dim=1), model(tokens).logits) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_base_model_and_attention_take_both_names(name, model):
    tokens, cache = random_tokens(model.config), DynamicCache(config=model.config)
    model.model(tokens[:, :40], **{name: cache})
    rest = model.model(tokens[:, 40:], **{name: cache}).last_hidden_state
    assert relative_difference(rest, model.model(tokens).last_hidden_state[:, 40:]) < 1e-5

    attention: LlamaReproAttention = model.model.layers[0].self_attn
    hidden, positions = torch.randn(1, 8, model.config.hidden_size), torch.arange(8)[None]
    cache = DynamicCache(config=model.config)
    attention(hidden, model.model.rotary_emb(hidden, positions), **{name: cache})
    assert cache.layers[0].get_seq_length() == 8


@torch.no_grad()
def test_output_has_the_cache_under_the_versions_name(model):
    output = model(random_tokens(model.config), use_cache=True)
    stock = stock_twin(model)(random_tokens(model.config), use_cache=True)
    assert output.keys() == stock.keys() == {"logits", CACHE}
    assert getattr(output, CACHE).get_seq_length() == 80


def filled_cache(model, *, seed=1):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_tokens(model.config, seed=seed), cache=cache)
    return cache


def test_two_filled_caches_are_refused(model):
    one, other = filled_cache(model), filled_cache(model, seed=2)
    for each in (model, model.model):
        with pytest.raises(ValueError, match="past_key_values"):
            each(random_tokens(model.config), cache=one, past_key_values=other)


@pytest.mark.parametrize("filled", NAMES)
@torch.no_grad()
def test_an_empty_cache_beside_a_filled_one_says_nothing(filled, model):
    tokens = random_tokens(model.config)
    both = {name: filled_cache(model) if name == filled else DynamicCache(config=model.config) for name in NAMES}
    expected = model(tokens, cache=filled_cache(model)).logits
    assert torch.equal(model(tokens, **both).logits, expected)


def test_generation_goes_on_from_a_learned_prefix():
    """PEFT gives it as `past_key_values` at every step, beside the `cache` of transformers 5.24."""
    model = random_model()
    tuned = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    tokens = random_tokens(model.config, batch=1, seq=9)
    expected = tokens
    with torch.no_grad():
        bare = model(tokens).logits[:, -1]
        assert relative_difference(tuned(tokens).logits[:, -1], bare) > 1e-2  # or the prefix would not show
        for _ in range(12):
            expected = torch.cat([expected, tuned(expected).logits[:, -1:].argmax(-1)], dim=1)
    generated = tuned.generate(input_ids=tokens, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("name", NAMES)
def test_generation_continues_from_a_cache_under_both_names(name, model):
    tokens = random_tokens(model.config, batch=1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :50], **{name: cache})
    continued = model.generate(tokens, **{CACHE: cache}, **GREEDY)
    assert torch.equal(continued, stock_twin(model).generate(tokens, **GREEDY))


UNKNOWN = {
    "a cache": lambda config: {"past_key_value": DynamicCache(config=config)},
    "legacy tuples": lambda config: {"past": ((torch.zeros(1), torch.zeros(1)),)},
    "a mistyped mask": lambda config: {"atention_mask": torch.zeros(2, 64)},
    "token types": lambda config: {"token_type_ids": torch.ones(2, 64, dtype=torch.long)},
    "tensors by name": lambda config: {"extra": {"full": torch.zeros(1)}},
}


@pytest.mark.parametrize("made", UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tensors_that_nothing_reads_are_refused(made, attention, model):
    unknown = made(model.config)
    classifier = LlamaReproForSequenceClassification(model.config)
    for each in (model, model.model, classifier):
        each.set_attn_implementation(attention)
        with pytest.raises(TypeError, match=next(iter(unknown))):
            each(random_tokens(model.config), **unknown)
    model.set_attn_implementation("sdpa")


def test_an_attention_function_of_ones_own_reads_any_name(model):
    seen = []

    def scaled(module, query, key, value, attention_mask, temperature=None, **kwargs):
        seen.append(temperature)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("own", scaled)
    AttentionMaskInterface.register("own", sdpa_mask)
    twin = LlamaReproModel(model.config)
    twin.set_attn_implementation("own")
    twin(random_tokens(model.config), temperature=torch.ones(1))
    assert len(seen) == model.config.num_hidden_layers
    assert seen[0] is not None


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refresh")
    model.save_pretrained(folder / "source")
    convert(folder / "source", folder / "converted", with_tokenizer=False)
    return folder / "converted"


@pytest.fixture
def converted_earlier(converted, tmp_path):
    """A folder whose modeling file is an older one, as its manifest says."""
    folder = shutil.copytree(converted, tmp_path / "earlier")
    (folder / MODELING).write_text("# an older file\n")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][MODELING] = file_sums(folder / MODELING)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_code_of_a_folder_converted_earlier_is_renewed(converted_earlier, converted, capsys):
    assert convert_main(["--refresh-code", str(converted_earlier)]) == 0
    out = capsys.readouterr().out
    assert f"renewed     {converted_earlier / MODELING}" in out
    assert "up to date" in out
    for path in converted.iterdir():
        if path.name != "manifest.json":
            assert (converted_earlier / path.name).read_bytes() == path.read_bytes()
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (converted, converted_earlier)]
    assert manifests[0] == manifests[1]
    assert not list(converted_earlier.glob(".*"))


def test_edited_code_is_not_replaced(converted_earlier, capsys):
    (converted_earlier / MODELING).write_text("# edited by hand\n")
    assert convert_main(["--refresh-code", str(converted_earlier)]) == 2
    assert "was edited after it was written" in capsys.readouterr().err
    assert (converted_earlier / MODELING).read_text() == "# edited by hand\n"


def test_folders_without_our_code_are_refused(converted, tmp_path, capsys):
    stock = tmp_path / "stock"
    stock.mkdir()
    (stock / "config.json").write_text('{"model_type": "llama"}')
    bare = shutil.copytree(converted, tmp_path / "bare", ignore=shutil.ignore_patterns("*.py"))
    for folder, reason in ((stock, "not of the model type"), (bare, "has no configuration"), (tmp_path, "config.json")):
        assert convert_main(["--refresh-code", str(folder)]) == 2
        assert reason in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert_main(["--refresh-code", str(converted), "--dtype", "float16"])
    assert "not dtype" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("installed", "tested"),
    [
        ("5.16.0", True),
        ("5.24.3", True),
        ("5.24.0.post1", True),
        ("5.15.9", False),
        ("5.25.0.dev0", False),
        ("6.0", False),
    ],
)
def test_untested_transformers_is_reported_in_one_line(installed, tested, monkeypatch, caplog):
    monkeypatch.setattr(versions, "version", lambda name: installed)
    versions.report_untested()
    assert len(caplog.messages) == (not tested)
    if not tested:
        assert installed in caplog.text
        assert f"pip install 'transformers{versions.TRANSFORMERS}'" in caplog.text


def test_tested_range_is_the_required_one():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert f"transformers{versions.TRANSFORMERS}" in project["dependencies"]
    assert f"transformers[serving]{versions.TRANSFORMERS}" in project["optional-dependencies"]["serve"]

"""SmolLM2-135M (9 heads, 3 K/V heads): GGUF -> Meta's layout -> ours computes what transformers' own loader does."""

import copy
import json
import shutil

import pytest
import torch
from meta_checkpoints import read_meta
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from conversion.convert import convert
from conversion.export import export
from conversion.keys import to_interleaved
from conversion.tokenizer import convert_tokenizer
from hf_llama_repro import LlamaReproForCausalLM

# Long enough for a wrong rotary embedding to show.
PROMPT = (
    "The old lighthouse stood at the end of a narrow path of stones, and every evening the keeper climbed its one "
    "hundred and twelve steps with a lamp in one hand and a book in the other. He knew the names of all the ships "
    "that passed, the harbours from which they came and the winds that had brought them. On the third day of the "
    "storm, when no ship had been seen since Sunday, he"
)
LOGIT_TOLERANCE = 1e-4
NEW_TOKENS = 64


@pytest.fixture(scope="session", params=[1, 3], ids=["1 shard", "3 shards"])
def meta(request, smollm2_gguf, tmp_path_factory):
    """Meta's layout, written from the GGUF file."""
    target = tmp_path_factory.mktemp("meta") / f"{request.param} shards"
    export(smollm2_gguf, target, shards=request.param)
    yield target
    shutil.rmtree(target)


@pytest.fixture(scope="session")
def ours(meta, tmp_path_factory):
    target = tmp_path_factory.mktemp("ours") / "smollm2"
    convert(meta, target, context_length=8192)
    yield AutoModelForCausalLM.from_pretrained(target)
    shutil.rmtree(target)


@pytest.fixture(scope="session")
def reference(smollm2_gguf):
    """Stock Llama, its weights brought by transformers' own loader."""
    return LlamaForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32)


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


def greedy(model, tokens):
    return model.generate(tokens, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)


@pytest.fixture(scope="session")
def tokens(smollm2_gguf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    convert_tokenizer(smollm2_gguf, folder, vocab_size=49152, context_length=8192)
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    assert tokens.shape[1] >= 64
    return tokens


@pytest.fixture(scope="session")
def continuation(reference, tokens):
    return greedy(reference, tokens)


def test_our_classes_run_it(ours):
    assert isinstance(ours, LlamaReproForCausalLM)


def test_params_json_is_as_meta_would_write_it(meta):
    content = json.loads((meta / "params.json").read_text())
    assert {name: content[name] for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size")} == {
        "dim": 576,
        "n_layers": 30,
        "n_heads": 9,
        "n_kv_heads": 3,
        "vocab_size": 49152,
    }


def test_shards_have_metas_shapes(meta):
    shards = read_meta(meta)
    count = int(meta.name.split()[0])
    assert len(shards) == count
    for shard in shards:
        assert shard["layers.29.attention.wk.weight"].shape == (192 // count, 576)
        assert shard["layers.29.feed_forward.w2.weight"].shape == (576, 1536 // count)


def test_every_weight_is_that_of_transformers_own_loader(ours, reference):
    expected = reference.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


def test_logits_are_the_sources(ours, reference, tokens):
    assert (logits(ours, tokens) - logits(reference, tokens)).abs().max() < LOGIT_TOLERANCE


def test_greedy_continuation_is_the_sources(ours, continuation, tokens):
    assert torch.equal(greedy(ours, tokens), continuation)


def test_wrong_permutation_would_be_seen(reference, continuation, tokens):
    """K in Meta's order: what a converter does that takes the number of heads from the query."""
    wrong = copy.deepcopy(reference)
    for layer in wrong.model.layers:
        layer.self_attn.k_proj.weight.data = to_interleaved(layer.self_attn.k_proj.weight.data, 3)
    assert (logits(wrong, tokens) - logits(reference, tokens)).abs().max() > 1000 * LOGIT_TOLERANCE
    assert not torch.equal(greedy(wrong, tokens), continuation)

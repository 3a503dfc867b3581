"""The fast paths beside the plain ones: attention, one-token products, and a cache that keeps what it handed out."""

import copy
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from random_models import ARCHITECTURES, random_model, random_tokens, relative_difference, tiny_config
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_llama_repro import cpu_kernel, fast_paths, modeling_llama_repro, optimize
from hf_llama_repro.fast_paths import KVBuffer, append, few_tokens_linear, most_tokens
from hf_llama_repro.modeling_llama_repro import CACHE

SHAPES = {  # batch, heads, kv_heads, head_dim, seq, cached before
    "9/3": (1, 9, 3, 64, 130, 0),
    "32/4": (2, 32, 4, 16, 77, 0),
    "8/1 after a cache": (2, 8, 1, 20, 65, 70),
    "wide heads": (1, 4, 4, 96, 70, 5),
    "one short": (1, 4, 2, 64, 2, 0),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def random_attention(shape, dtype):
    batch, heads, kv_heads, head_dim, seq, past = shape
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, seq, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)
    key, value = (
        torch.randn(batch, seq + past, kv_heads, head_dim, generator=generator).to(dtype).transpose(1, 2) for _ in "kv"
    )
    mask = torch.ones(seq, seq + past, dtype=torch.bool).tril(past).expand(batch, 1, -1, -1).clone()
    return query, key, value, mask


def reference(query, key, value, mask):
    return F.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_compiled_attention_equals_sdpa(shape, dtype):
    query, key, value, mask = random_attention(shape, dtype)
    scaling = shape[3] ** -0.5
    expected = reference(query, key, value, mask)
    assert relative_difference(cpu_kernel.attention(query, key, value, mask, scaling), expected) < TOLERANCE[dtype]
    if not shape[-1]:
        assert relative_difference(cpu_kernel.attention(query, key, value, None, scaling), expected) < TOLERANCE[dtype]
    mask[:, :, 1:, 0] = False  # padding
    masked = reference(query, key, value, mask)
    assert relative_difference(masked, expected) > 1e-3  # it would be seen
    assert relative_difference(cpu_kernel.attention(query, key, value, mask, scaling), masked) < TOLERANCE[dtype]


def test_compiled_attention_of_a_query_that_may_look_at_nothing_is_zero():
    query, key, value, mask = random_attention(SHAPES["9/3"], torch.float32)
    mask[:, :, 3] = False
    output = cpu_kernel.attention(query, key, value, mask, 0.125)
    assert not output[:, 3].any()
    assert output.isfinite().all()


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"])
@pytest.mark.parametrize("prepare", [False, True])
def test_nan_is_not_hidden(name, prepare):
    """A softmax that leaves out what compares with nothing would turn NaN scores into plain numbers."""
    model = random_model(tiny_config())
    module = next(module for path, module in model.named_modules() if path.endswith(name))
    with torch.no_grad():
        module.weight[:] = float("nan")
        tokens = random_tokens(model.config, batch=1, seq=12 if prepare else 80)
        assert (optimize(model) if prepare else model)(input_ids=tokens).logits.isnan().all()


@pytest.mark.parametrize("masked", [False, True])
def test_a_model_that_looks_both_ways_takes_sdpa(masked, monkeypatch):
    model = random_model(tiny_config())
    tokens = random_tokens(model.config)
    mask = torch.ones(2, 1, 80, 80, dtype=torch.bool) if masked else None
    with torch.no_grad():
        causal = model(tokens).logits
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
        both_ways = model(tokens, attention_mask=mask).logits
        monkeypatch.setattr(modeling_llama_repro, "FAST_PATHS", {})
        assert relative_difference(both_ways, model(tokens, attention_mask=mask).logits) < 1e-5
    assert relative_difference(both_ways, causal) > 1e-2


def test_switched_off_everything_is_stock_llamas_to_the_bit():
    script = """
import torch
from random_models import random_model, random_tokens, stock_twin
from hf_llama_repro.modeling_llama_repro import CACHE
model = random_model().bfloat16()
stock, tokens = stock_twin(model), random_tokens(model.config)
with torch.no_grad():
    caches = [getattr(each(tokens, use_cache=True), CACHE) for each in (model, stock)]
    logits = [each(tokens[:, :1], **{CACHE: cache}).logits for each, cache in zip((model, stock), caches)]
assert torch.equal(*logits)
assert type(caches[0].layers[0]).__name__ == "DynamicLayer"
"""
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "HF_LLAMA_REPRO_FAST": "off", "PYTHONPATH": f"{tests}:{Path(tests).parent}"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (5, 1), (7, 1), (16, 1), (1, 16), (3, 4), (2, 8)])
@pytest.mark.parametrize("bias", [False, True])
def test_few_tokens_linear_equals_linear(shape, bias, dtype):
    linear = torch.nn.Linear(83, 61, bias=bias).to(dtype)
    x = torch.randn(*shape, 83).to(dtype)
    with torch.no_grad():
        output = few_tokens_linear(x, linear.weight, linear.bias)
        assert relative_difference(output, linear(x)) < TOLERANCE[dtype]
        assert few_tokens_linear(x.double(), linear.weight, linear.bias) is None
        assert few_tokens_linear(x[:1, :1].expand(1, most_tokens() + 1, 83), linear.weight, linear.bias) is None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert few_tokens_linear(x, linear.weight, linear.bias) is None
    assert few_tokens_linear(x, linear.weight, linear.bias) is None  # gradients are taken


@pytest.mark.parametrize("fields", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_fast_paths_give_the_plain_ones_logits(fields, monkeypatch):
    model = random_model(tiny_config(**fields))
    tokens = random_tokens(model.config, seq=80)

    def logits():
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            return torch.cat([model(piece, **{CACHE: cache}).logits for piece in tokens.split([64, *[1] * 16], 1)], 1)

    fast = logits()
    monkeypatch.setattr(modeling_llama_repro, "FAST_PATHS", {})
    assert relative_difference(fast, logits()) < 1e-5


def test_lora_over_fast_linears():
    """Attached, the base's layers are fast inside of the adapter's, in either order of attaching and running."""
    model = random_model(tiny_config(eos_token_id=None))
    prompt, how = random_tokens(model.config, batch=1), {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    model.generate(prompt, **how)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    attached = adapted.generate(input_ids=prompt, **how)
    assert torch.equal(adapted.merge_and_unload().generate(prompt, **how), attached)


def lengthened(cache, key, value):
    """Append to the cache's only layer as the model does."""
    both = append(cache, key, value, 0)
    assert both is not None
    assert all(mine is given for mine, given in zip((cache.layers[0].keys, cache.layers[0].values), both, strict=True))
    return both


def filled(length):
    """Return a cache of one layer in whose buffer there are so many tokens: a prompt, and one more."""
    cache = DynamicCache()
    with torch.no_grad():
        for seq in (length - 1, 1):
            lengthened(cache, torch.randn(2, 3, seq, 8), torch.randn(2, 3, seq, 8))
    return cache


@torch.no_grad()
def test_cache_appends_in_place():
    cache = filled(10)
    layer, places = cache.layers[0], []
    first = layer.keys.clone()
    for _ in range(40):
        lengthened(cache, torch.randn(2, 3, 1, 8), torch.randn(2, 3, 1, 8))
        places.append(layer.keys.data_ptr())
    assert len(set(places[:16])) == 1
    assert 1 < len(set(places)) < 5
    assert torch.equal(layer.keys[:, :, :10], first)
    assert layer.get_seq_length() == 50


@torch.no_grad()
def test_cache_of_a_prompt_takes_no_room():
    model = random_model(tiny_config())
    layer = getattr(model(random_tokens(model.config, seq=64), use_cache=True), CACHE).layers[0]
    assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
    sizes = [KVBuffer([DynamicLayer()], 0, (1, 1, seq, 2), layer.keys).capacity - seq for seq in (1, 400, 100_000)]
    assert sizes == [16, 50, 256]


@torch.no_grad()
def test_memory_of_a_cache_is_released_with_it():
    cache = filled(10)
    buffer = weakref.ref(fast_paths._BUFFERS[cache.layers[0]])
    assert buffer() is not None
    del cache
    assert buffer() is None


def cropped(cache):
    cache.crop(-4)
    return cache


def with_copied_layers(cache):
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


@pytest.mark.parametrize(
    "other", [with_copied_layers, copy.deepcopy, cropped], ids=["shallow copy", "deep copy", "the same, cropped"]
)
@torch.no_grad()
def test_cache_never_overwrites_what_it_handed_out(other):
    cache = filled(10)
    handed_out = cache.layers[0].keys
    kept, new = handed_out.clone(), torch.randn(2, 3, 2, 8)
    second = other(cache)
    lengthened(second, new, new)
    assert torch.equal(second.layers[0].keys[:, :, -2:], new)
    if second is not cache:
        lengthened(cache, -new, -new)
        assert torch.equal(cache.layers[0].keys[:, :, -2:], -new)
    assert torch.equal(second.layers[0].keys[:, :, -2:], new)
    assert torch.equal(handed_out, kept)


def test_cache_changes_with_the_batch_and_between_inference_modes():
    cache = filled(6)
    layer, ones = cache.layers[0], torch.ones(1, 3, 1, 8)
    with torch.no_grad():
        layer.keys, layer.values = layer.keys[:1], layer.values[:1]  # a view of the same memory
        keys, _ = lengthened(cache, ones, ones)
        assert keys.shape == (1, 3, 7, 8)
        layer.reorder_cache(torch.tensor([0]))
    with torch.inference_mode():
        lengthened(cache, ones, ones)
    with torch.no_grad():
        keys, _ = lengthened(cache, 2 * ones, ones)
    assert keys[0, 0, :, 0].tolist()[-3:] == [1, 1, 2]


def test_gradients_flow_through_the_cache():
    model = random_model(tiny_config())
    cache = DynamicCache(config=model.config)
    model(random_tokens(model.config, seq=8), **{CACHE: cache})
    logits = model(random_tokens(model.config, seq=4), **{CACHE: cache}).logits
    logits.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_a_tracer_sees_the_plain_way(monkeypatch):
    model = random_model(tiny_config()).requires_grad_(False)
    mlp, x = model.model.layers[0].mlp, torch.randn(1, 1, model.config.hidden_size)
    monkeypatch.setattr(cpu_kernel, "linear", lambda *_: pytest.fail("hidden from the tracer"))
    with torch.no_grad():
        torch.jit.trace(mlp, x, check_trace=False)

"""After `optimize`, whatever is done to the model is seen by the next call, also under a running cache."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from random_models import random_model, random_tokens, relative_difference, tiny_config
from torch import nn
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_llama_repro import cpu_kernel, optimize
from hf_llama_repro.errors import InputError
from hf_llama_repro.modeling_llama_repro import CACHE, LlamaReproForCausalLM, LlamaReproRMSNorm

pytestmark = pytest.mark.skipif(not cpu_kernel.available(), reason="there is no compiled code here")


def talker(**fields):
    return random_model(tiny_config(eos_token_id=None, **fields))


@pytest.fixture
def compiled(monkeypatch):
    """Count the passes of the compiled code."""
    calls, library = [], cpu_kernel.load()
    inner = library.llama_repro_forward

    class Library:
        def __getattr__(self, name):
            return getattr(library, name)

        def llama_repro_forward(self, *inputs):
            calls.append(1)
            return inner(*inputs)

    monkeypatch.setattr(cpu_kernel, "load", Library)
    return calls


@torch.no_grad()
def begun(model, seq=5):
    """Return a cache of a few tokens, and the next token."""
    cache, tokens = DynamicCache(config=model.config), random_tokens(model.config, batch=1, seq=seq + 1)
    model(input_ids=tokens[:, :seq], past_key_values=cache)
    return cache, tokens[:, seq:]


@torch.no_grad()
def both_paths(model, cache, token):
    """Return the next logits of the prepared model and of its ordinary pass, each after the same cache."""
    logits = model(input_ids=token, past_key_values=cache).logits
    cache.crop(-1)
    return logits, type(model).forward(model, input_ids=token, past_key_values=cache).logits


class Doubling(nn.Linear):
    def forward(self, x):
        return 4 * super().forward(x)


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 4 * self.inner(x)


class Norm(LlamaReproRMSNorm):
    def forward(self, x):
        return 4 * super().forward(x)


def subclass(layer):
    layer.mlp.up_proj.__class__ = Doubling


def wrap(layer):
    layer.mlp = Wrapped(layer.mlp)


def replace_activation(layer):
    layer.mlp.act_fn = nn.GELU()


def replace_norm(layer):
    layer.input_layernorm.__class__ = Norm


def set_eps(layer):
    layer.input_layernorm.eps = 1.0


def set_scaling(layer):
    layer.self_attn.scaling *= 9


def look_ahead(layer):
    layer.mlp.forward = lambda x: 4 * type(layer.mlp).forward(layer.mlp, x)


def parametrize(layer):
    nn.utils.parametrizations.weight_norm(layer.mlp.up_proj)
    layer.mlp.up_proj.parametrizations.weight.original0.data.mul_(4)


def hook(layer):
    layer.mlp.register_forward_hook(lambda module, inputs, output: 4 * output)


def pre_hook(layer):
    layer.self_attn.o_proj.register_forward_pre_hook(lambda module, inputs: (4 * inputs[0],))


def replace_parameter(layer):
    layer.mlp.up_proj.weight = nn.Parameter(4 * layer.mlp.up_proj.weight.detach())


def edit_in_place(layer):
    with torch.no_grad():
        layer.mlp.up_proj.weight.mul_(4)


def edit_one_row(layer):
    with torch.no_grad():
        layer.mlp.up_proj.weight[3] *= 50


def edit_data(layer):
    layer.mlp.up_proj.weight.data.mul_(4)


def set_data(layer):
    layer.mlp.up_proj.weight.data = 4 * layer.mlp.up_proj.weight.data


def transpose_data(layer):
    square = layer.self_attn.q_proj.weight
    square.data = square.data.T


def add_bias(layer):
    layer.mlp.up_proj.bias = nn.Parameter(torch.ones(layer.mlp.up_proj.out_features))


def swap_weights(layer):
    mlp = layer.mlp
    mlp.up_proj, mlp.gate_proj = mlp.gate_proj, mlp.up_proj


CHANGES = [
    *(subclass, wrap, replace_activation, replace_norm, set_eps, set_scaling, look_ahead, parametrize, hook, pre_hook),
    *(replace_parameter, edit_in_place, edit_one_row, edit_data, set_data, transpose_data, add_bias, swap_weights),
]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_under_a_running_cache_is_seen(change, int8):
    model = optimize(talker(), int8=int8)
    cache, token = begun(model)
    before, _ = both_paths(model, cache, token)
    change(model.model.layers[1])
    after, ordinary = both_paths(model, cache, token)
    assert relative_difference(ordinary, before) > 0.2  # it matters
    assert relative_difference(after, ordinary) < (0.05 if int8 else 1e-5)


def test_edits_of_single_rows_through_data_are_seen_before_the_next_prompt():
    model = optimize(talker(), int8=True)
    tokens = random_tokens(model.config, batch=1, seq=4)
    with torch.no_grad():
        model(input_ids=tokens)
        for row in (0, 57, model.config.vocab_size - 1):
            model.lm_head.weight.data[row] = 0
            assert not model(input_ids=tokens).logits[..., row].any()
            assert model(input_ids=tokens).logits[..., row - 5 if row else 1].all()


def test_an_unchanged_model_is_packed_once(compiled, monkeypatch):
    model = optimize(talker(), int8=True)
    packed, inner = [], model.forward._pack
    monkeypatch.setattr(model.forward, "_pack", lambda: packed.append(1) or inner())
    for _ in range(3):
        both_paths(model, *begun(model))
    assert (len(packed), len(compiled)) == (1, 6)


def test_a_hook_comes_and_goes_between_calls(compiled):
    model, calls = optimize(talker()), []
    cache, token = begun(model)
    assert len(compiled) == 1
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    first, _ = both_paths(model, cache, token)
    assert (len(calls), len(compiled)) == (2, 1)
    handle.remove()
    cache.crop(-1)
    second, _ = both_paths(model, cache, token)
    assert (len(calls), len(compiled)) == (2, 2)
    assert relative_difference(second, first) < 1e-5


def test_global_hooks_are_called_for_every_module():
    model, calls = optimize(talker()), []
    cache, token = begun(model)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module))
    try:
        with torch.no_grad():
            model(input_ids=token, past_key_values=cache)
    finally:
        handle.remove()
    containers = [model.model.layers]
    assert {*calls} == {*model.modules()} - {*containers}


def test_a_removed_layer_is_left_out_or_named(caplog):
    model = optimize(talker())
    tokens = random_tokens(model.config, batch=1, seq=4)
    logging.getLogger("transformers").propagate = True
    with torch.no_grad():
        complete = model(input_ids=tokens).logits
        del model.model.layers[1]
        rest = model(input_ids=tokens, use_cache=False).logits
        assert torch.equal(rest, type(model).forward(model, input_ids=tokens, use_cache=False).logits)
        assert relative_difference(rest, complete) > 1e-2
    logging.getLogger("transformers").propagate = False
    with pytest.raises(InputError, match="1 layers"):
        optimize(model)


def test_a_layer_left_out_by_the_config_is_left_out():
    model = optimize(talker())
    cache, token = begun(model)
    model.config.num_hidden_layers = 1
    after, ordinary = both_paths(model, cache, token)
    assert relative_difference(after, ordinary) < 1e-5


@pytest.mark.parametrize("prepare", [False, True])
def test_an_attention_function_of_the_user_is_called(prepare, monkeypatch):
    calls = []

    def own(*inputs, **options):
        calls.append(1)
        return sdpa_attention_forward(*inputs, **options)

    model = talker()
    if prepare:
        optimize(model)
    cache, token = begun(model)
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", own)
    with torch.no_grad():
        model(input_ids=token, past_key_values=cache)
    assert len(calls) == 2


def test_an_adapter_attached_after_optimize_is_applied():
    model = optimize(talker())
    cache, token = begun(model)
    before, _ = both_paths(model, cache, token)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()
    after, ordinary = both_paths(model, cache, token)
    assert relative_difference(after, ordinary) < 1e-5
    assert relative_difference(after, before) > 1e-2


@pytest.mark.parametrize(
    "change", [subclass, wrap, replace_activation, replace_norm, set_scaling, transpose_data], ids=lambda c: c.__name__
)
def test_optimize_refuses_modules_that_the_compiled_code_is_not(change):
    model = talker()
    change(model.model.layers[1])
    with pytest.raises(InputError, match=r"ordinary path|config|contiguous"):
        optimize(model)


def test_optimize_refuses_a_subclass_with_a_forward_of_its_own():
    class Own(LlamaReproForCausalLM):
        def forward(self, *inputs, **options):
            return super().forward(*inputs, **options)

    with pytest.raises(InputError, match="forward of its own"):
        optimize(random_model(tiny_config(), Own))


def test_positional_arguments_take_the_compiled_path(compiled):
    model = optimize(talker())
    tokens = random_tokens(model.config, batch=1, seq=4)
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        assert torch.equal(model(tokens, torch.ones_like(tokens)).logits, expected)
    assert len(compiled) == 2


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_is_taken_under_both_names_and_returned_under_the_versions_own(name, compiled):
    model = optimize(talker())
    cache, token = begun(model)
    with torch.no_grad():
        output = model(token, **{name: cache})
    assert output[CACHE] is cache
    assert cache.get_seq_length() == 6
    assert len(compiled) == 2


@pytest.mark.parametrize("prepare", [False, True])
def test_unknown_and_repeated_arguments_are_refused_alike(prepare):
    model = optimize(talker()) if prepare else talker()
    tokens = random_tokens(model.config, batch=1, seq=4)
    with torch.no_grad():
        with pytest.raises(TypeError, match="token_type"):
            model(tokens, token_type=tokens)
        with pytest.raises(TypeError, match="multiple values"):
            model(tokens, input_ids=tokens)
        with pytest.raises(ValueError, match="once"):
            model(tokens, cache=begun(model)[0], past_key_values=begun(model, seq=7)[0])


@torch.no_grad()
def test_layers_of_the_cache_may_hold_memory_of_different_sizes():
    model = optimize(talker())
    cache, token = begun(model, seq=40)
    both_paths(model, cache, token)
    layer = cache.layers[1]
    layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    for _ in range(3):
        after, ordinary = both_paths(model, cache, token)
        assert relative_difference(after, ordinary) < 1e-5


@torch.no_grad()
def test_masks_count_as_true_and_false():
    model = optimize(talker())
    tokens = random_tokens(model.config, batch=1, seq=4)
    mask = torch.ones_like(tokens)
    mask[:, 0] = 0
    expected = model(input_ids=tokens, attention_mask=mask).logits
    for other in (mask * 256, mask * 0.5, mask.bool()):
        assert torch.equal(model(input_ids=tokens, attention_mask=other).logits, expected)

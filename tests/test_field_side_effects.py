"""Running a model leaves it, its cache and PyTorch's own tools as they were."""

import copy
import io
import pickletools
import zipfile

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from peft import GloraConfig, LoraConfig, get_peft_model
from random_models import random_model, random_tokens, relative_difference, tiny_config
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from hf_llama_repro import cpu_kernel, modeling_llama_repro

compiled = pytest.mark.skipif(not cpu_kernel.available(), reason="there are no fast paths here")


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config())


@pytest.fixture
def plain(monkeypatch):
    """Return a call that computes without the fast paths."""

    def call(function, *inputs, **options):
        with monkeypatch.context() as patch:
            patch.setattr(modeling_llama_repro, "FAST_PATHS", {})
            return function(*inputs, **options)

    return call


@pytest.fixture
def counted(monkeypatch):
    """Count the matmuls and the attentions of the compiled code."""
    calls = []
    for name in ("linear", "attention"):
        inner = getattr(cpu_kernel, name)
        monkeypatch.setattr(cpu_kernel, name, lambda *inputs, inner=inner: calls.append(1) or inner(*inputs))
    return calls


@torch.no_grad()
def run(model, cache=None, seq=3):
    """Return the logits of a few tokens and of one after them."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    tokens = random_tokens(model.config, seq=seq + 1)
    return torch.cat([model(piece, past_key_values=cache).logits for piece in tokens.split([seq, 1], 1)], 1)


def anatomy(model):
    """Return the class, the attributes and the hooks of every module."""
    return {
        name: (
            type(module),
            {key: id(value) for key, value in vars(module).items()},
            {key: len(value) for key, value in vars(module).items() if "hooks" in key},
            type(module).forward,
            type(module).__call__,
        )
        for name, module in model.named_modules()
    }


def test_a_pass_replaces_nothing_of_the_modules():
    model = random_model(tiny_config())
    before = anatomy(model)
    run(model)
    assert anatomy(model) == before


@compiled
def test_the_default_path_stays_fast_without_replacing_anything(model, counted):
    run(model)
    assert len(counted) == 2 * 15 + 2  # seven matmuls a layer and the head, in two passes; attention of three tokens


def test_quantize_dynamic_after_a_pass_quantizes_every_linear_layer():
    model = random_model(tiny_config())
    run(model)
    quantized = torch.ao.quantization.quantize_dynamic(model.model, {nn.Linear}, dtype=torch.qint8)
    kinds = [type(module).__module__ for module in quantized.modules()]
    assert sum("quantized.dynamic" in kind and "linear" in kind for kind in kinds) == 14
    assert not any(type(module) is nn.Linear for module in quantized.modules())


def names_in_a_file_of(value):
    """Return the classes and functions that `torch.save` writes down."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        operations = list(pickletools.genops(archive.read(name)))
    return {argument for operation, argument, _ in operations if operation.name == "GLOBAL"}


def test_a_saved_model_names_what_it_named_before_a_pass_and_a_saved_cache_nothing_of_ours():
    model = random_model(tiny_config())
    cache, before = DynamicCache(config=model.config), names_in_a_file_of(model)
    run(model, cache)
    assert "torch.nn.modules.linear Linear" in before
    assert names_in_a_file_of(model) == before
    names = names_in_a_file_of(cache)
    assert "transformers.cache_utils DynamicLayer" in names
    assert not any(name.startswith("hf_llama_repro") for name in names)


def test_peft_attaches_glora_after_a_pass():
    model = random_model(tiny_config())
    run(model)
    adapted = get_peft_model(model, GloraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert adapted(random_tokens(model.config)).logits.isfinite().all()


def test_the_users_cache_keeps_its_layers_and_its_values(model, plain):
    cache, other = DynamicCache(config=model.config), DynamicCache()
    reference = DynamicCache(config=model.config)
    layers, keys = list(cache.layers), {name for layer in cache.layers for name in vars(layer)}
    logits = run(model, cache)
    run(model, other)
    assert cache.layers == layers
    assert {name for layer in cache.layers for name in vars(layer)} - keys <= {"device", "dtype"}
    expected = plain(run, model, reference)
    assert relative_difference(logits, expected) < 1e-5
    for layer, twin, stock in zip(cache.layers, other.layers, reference.layers, strict=True):
        assert type(layer) is type(twin) is type(stock)
        assert vars(layer).keys() == vars(stock).keys()
        for tensors in (layer, twin):
            assert relative_difference(tensors.keys, stock.keys) < 1e-5
            assert relative_difference(tensors.values, stock.values) < 1e-5


@pytest.mark.parametrize("where", ["cache", "layer", "class"])
def test_a_users_own_update_of_the_cache_is_called(where, model, monkeypatch):
    cache, calls = DynamicCache(config=model.config), []
    place = {"cache": cache, "layer": cache.layers[1], "class": DynamicCache}[where]
    inner = place.update
    monkeypatch.setattr(place, "update", lambda *inputs, **more: calls.append(1) or inner(*inputs, **more))
    run(model, cache)
    assert len(calls) == (2 if where == "layer" else 4)


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "global hook", "global pre-hook", "forward", "class", "compiled"])
def test_what_is_hung_on_a_linear_layer_is_called(kind, monkeypatch):
    model, calls = random_model(tiny_config()), []
    linear, modules = model.model.layers[1].mlp.up_proj, torch.nn.modules.module

    def seen(module, *_):
        if module is linear:
            calls.append(kind)

    def counting(self, x, inner=nn.Linear.forward):
        seen(self)
        return inner(self, x)

    handle = None
    if kind == "forward":
        linear.forward = counting.__get__(linear)
    elif kind == "class":
        monkeypatch.setattr(nn.Linear, "forward", counting)
    elif kind == "compiled":
        linear._compiled_call_impl = counting.__get__(linear)
    else:
        register = {
            "hook": linear.register_forward_hook,
            "pre-hook": linear.register_forward_pre_hook,
            "global hook": modules.register_module_forward_hook,
            "global pre-hook": modules.register_module_forward_pre_hook,
        }[kind]
        handle = register(seen)
    try:
        run(model)
    finally:
        if handle is not None:
            handle.remove()
    assert len(calls) == 2


class Counting(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.nn.functional.linear
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Counting, Dispatched])
def test_a_mode_sees_every_matmul(mode, model):
    with mode() as counting:
        run(model)
    assert counting.calls == 30


def test_the_flop_counter_counts_all_of_a_pass(model, plain):
    def flops(seq):
        with FlopCounterMode(display=False) as counter:
            run(model, seq=seq)
        return counter.get_total_flops()

    for seq in (2, 79):
        assert flops(seq) == plain(flops, seq) > 0


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("transform", ["vmap", "jvp"])
def test_a_transform_computes_through_a_pass(transform, cached, model, plain):
    tokens = random_tokens(model.config, batch=2, seq=4)
    embeddings = model.model.embed_tokens(tokens)

    def logits(x):
        cache = DynamicCache(config=model.config) if cached else None
        if cached:
            model(inputs_embeds=x[:, :2], past_key_values=cache)
            model(inputs_embeds=x[:, 2:3], past_key_values=cache)
        return model(inputs_embeds=x[:, 3:], past_key_values=cache, use_cache=cached).logits

    def transformed():
        if transform == "vmap":
            return torch.func.vmap(logits)(embeddings[:, None])
        return torch.func.jvp(logits, (embeddings,), (torch.ones_like(embeddings),))[1]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        result, expected = transformed(), plain(transformed)
    assert relative_difference(result, expected) < 1e-5
    assert expected.abs().max() > 1e-2


@torch.no_grad()
def test_a_tangent_survives_a_pass(model):
    embeddings = model.model.embed_tokens(random_tokens(model.config, batch=1, seq=2))
    eps, direction = 1e-3, torch.ones_like(embeddings)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), forward_ad.dual_level():
        output = model(inputs_embeds=forward_ad.make_dual(embeddings, direction), use_cache=False).logits
        tangent = forward_ad.unpack_dual(output).tangent
    assert tangent is not None
    wide = copy.deepcopy(model).double()
    up, down = (wide(inputs_embeds=embeddings.double() + step * direction).logits for step in (eps, -eps))
    assert relative_difference(tangent, (up - down) / (2 * eps)) < 1e-3


@torch.no_grad()
def test_functional_call_takes_the_given_weights(model):
    tokens = random_tokens(model.config, batch=1, seq=2)
    doubled = {"lm_head.weight": 2 * model.lm_head.weight}
    output = torch.func.functional_call(model, doubled, (tokens,)).logits
    assert relative_difference(output, 2 * model(tokens).logits) < 1e-5


@torch.no_grad()
def test_a_traced_graph_holds_the_matmuls(model):
    embeddings = model.model.embed_tokens(random_tokens(model.config, batch=1, seq=2))
    layer = model.model.layers[0].mlp
    graph = make_fx(layer)(embeddings)
    assert sum("mm" in str(node.target) for node in graph.graph.nodes) == 3
    assert relative_difference(graph(2 * embeddings), layer(2 * embeddings)) < 1e-5


@torch.no_grad()
def test_fake_tensors_pass_through(model):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tokens = mode.from_tensor(random_tokens(model.config, batch=1, seq=2))
        output = model(tokens, use_cache=True).logits
    assert tuple(output.shape) == (1, 2, model.config.vocab_size)
    assert type(output).__name__ == "FakeTensor"


@compiled
def test_adapters_keep_the_fast_matmuls_of_their_base(counted):
    model = random_model(tiny_config())
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    before = anatomy(adapted)
    fast = run(adapted)
    # As without adapters, and two matmuls more for each of the four layers in each of the two passes.
    assert len(counted) == 2 * 15 + 2 + 2 * 8
    assert anatomy(adapted) == before
    with Counting() as counting:
        assert relative_difference(fast, run(adapted)) < 1e-5
    assert counting.calls == 46

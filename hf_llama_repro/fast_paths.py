"""Faster ways of what the model does, in inference on a CPU: matmuls of few tokens, attention, growing caches.

The model file asks for them by name (`FAST_PATHS`); each gives the plain way's result, to rounding, or returns None and
leaves the work to it. None of them changes an object of the user's: no class, attribute or method of a module or of a
cache is replaced, and whatever watches or transforms PyTorch's operations sees the plain ways only.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from . import cpu_kernel


@functools.cache
def _probes() -> tuple[Callable[[], Any], ...]:
    """Return what is true under a dispatch mode, a function mode, a functorch transform.

    PyTorch has no public names for these: looked up when first needed, and where one is missing nothing is fast.
    """
    try:
        return (
            torch._C._len_torch_dispatch_stack,
            torch._C._len_torch_function_stack,
            torch._C._functorch.peek_interpreter_stack,
        )
    except AttributeError:
        return (lambda: True,) * 3


def is_watched() -> bool:
    """Return whether something else follows PyTorch's operations: a compiler, a tracer, a mode, a transform."""
    # The compiler first: it must not meet what follows, which it cannot read.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    dispatch, function, functorch = _probes()
    return bool(dispatch() or function() or functorch()) or getattr(forward_ad, "_current_level", 0) >= 0


def must_run_eagerly() -> bool:
    """Return whether the operations must be PyTorch's own: gradients, autocast, or `is_watched`."""
    return torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or is_watched()


def _plain(*tensors: torch.Tensor) -> bool:
    """Return whether these are fp32 or bf16 numbers in this machine's memory, all of one dtype."""
    dtype = tensors[0].dtype
    return dtype in cpu_kernel.FLOATS and all(
        type(tensor) in (torch.Tensor, nn.Parameter) and tensor.is_cpu and tensor.dtype == dtype for tensor in tensors
    )


def _few_tokens(x: Any) -> bool:
    if type(x) is not torch.Tensor or not x.is_cpu or x.dim() != 3:
        return False
    return 0 < x.shape[0] * x.shape[1] <= cpu_kernel.most_tokens()


def few_tokens_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Return `F.linear` of (batch, seq, columns); None where the plain way is to be taken."""
    return None if must_run_eagerly() or not _few_tokens(input) else _matmul(input, weight, bias)


def _matmul(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    if not _plain(input, weight, *(() if bias is None else (bias,))) or not weight.is_contiguous():
        return None
    return cpu_kernel.linear(input, weight, bias) if cpu_kernel.available() else None


LINEAR_CALL, LINEAR_FORWARD = nn.Linear.__call__, nn.Linear.forward


def _only_multiplies(module: nn.Linear) -> bool:
    """Return whether calling the module is `F.linear` and nothing else: no hook, no other `forward` or call."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or nn_module._has_any_global_hook()
        or "forward" in module.__dict__
        or "_compiled_call_impl" in module.__dict__
        or nn.Linear.__call__ is not LINEAR_CALL
        or nn.Linear.forward is not LINEAR_FORWARD
    )


class _FastMatmuls(TorchFunctionMode):
    """While a layer runs that wraps an `nn.Linear`, an adapter's, its calls of `F.linear` take the fast path."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = few_tokens_linear(*args, **(kwargs or {})) if func is F.linear else None
        return func(*args, **(kwargs or {})) if output is None else output


def linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """Return `module(x)` of an `nn.Linear`, or of a layer around one; None where the plain way is to be taken."""
    if must_run_eagerly() or not _few_tokens(x):
        return None
    if type(module) is nn.Linear:
        weights: dict[str, Any] = module._parameters
        return _matmul(x, weights["weight"], weights["bias"]) if _only_multiplies(module) else None
    if cpu_kernel.available() and any(type(child) is nn.Linear for child in module._modules.values()):
        with _FastMatmuls():
            return module(x)
    return None


def attention(
    module: nn.Module,
    query: torch.Tensor,  # (batch, heads, seq, head_dim)
    key: torch.Tensor,  # (batch, kv_heads, total, head_dim)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: what `sdpa` computes, (batch, seq, heads, head_dim)."""
    output = None
    if scaling is not None and not dropout and not must_run_eagerly() and _plain(query, key, value):
        output = _fast_attention(module, query, key, value, attention_mask, scaling, kwargs)
    if output is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return output, None


def _fast_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    kwargs: dict[str, Any],
) -> torch.Tensor | None:
    """(batch, seq, heads, head_dim), or None where SDPA is to be taken."""
    if _packs_requests(query, kwargs):
        return _each_request(module, query, key, value, scaling, kwargs)
    looks_ahead = mask is None and query.shape[2] > 1 and not module.is_causal
    if looks_ahead or kwargs.keys() & SDPA_OPTIONS:
        return None
    way = _one_query if query.shape[2] == 1 else _many_queries
    return way(query, key, value, mask, scaling)


SDPA_OPTIONS = {"position_bias", "cache", "softcap", "is_causal"}
"""What callers may pass on to transformers' SDPA that the two ways below do not know."""


def _one_query(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor | None:
    """Query heads that share K and V are the rows of one product: SDPA takes each by itself."""
    batch, kv_heads, _, head_dim = key.shape
    if mask is not None and mask.shape[1] != 1:  # a mask for each head
        return None
    rows = query.reshape(batch, kv_heads, -1, head_dim)
    output = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(batch, 1, -1, head_dim)


def _many_queries(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor | None:
    """In compiled code, which takes a third to a half of the time of SDPA."""
    known = query.shape[2] == key.shape[2] if mask is None else mask.dtype == torch.bool  # without a mask: causal
    if not known or query.shape[-1] % 2 or not cpu_kernel.available():
        return None
    return cpu_kernel.attention(query, key, value, mask, scaling)


def _packs_requests(query: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether this is `generate_batch` (continuous batching): the tokens of all requests, in one row."""
    if kwargs.get("read_index") is None or kwargs.get("block_table") is not None:
        return False
    ends = kwargs.get("cu_seq_lens_q")
    return ends is not None and int(ends[-1]) == query.shape[2] and cpu_kernel.available()


def _each_request(
    module: nn.Module,
    query: torch.Tensor,  # (1, heads, new tokens of all requests, head_dim)
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Each request's queries with its own keys; SDPA multiplies all queries with all keys, and masks the others'."""
    if kwargs.get("cache") is not None:  # before transformers 5.24 the attention function appends to it
        key, value = kwargs["cache"].update(key, value, module.layer_idx, kwargs=kwargs)
    queries, keys = (kwargs[f"cu_seq_lens_{name}"].tolist() for name in "qk")
    outputs: list[Any] = []
    for request in range(len(queries) - 1):
        new, total = slice(*queries[request : request + 2]), slice(*keys[request : request + 2])
        seq, past = new.stop - new.start, total.stop - total.start - (new.stop - new.start)
        own = query[:, :, new], key[:, :, total], value[:, :, total]
        if seq == 1:
            outputs.append(_one_query(*own, None, scaling))
        elif seq:
            mask = query.new_ones(1, 1, seq, past + seq, dtype=torch.bool).tril(past) if past else None
            outputs.append(cpu_kernel.attention(*own, mask, scaling))
    return torch.cat(outputs, dim=1)


class KVBuffer:
    """Memory for keys and values of cache layers of one length, (batch, kv_heads, capacity, head_dim) each.

    The layers hold views of what is filled. What was handed out is never written to again: after a crop or a reorder,
    or in a copy of a layer, its tensors are not those that were handed out last, and the next token finds no room.
    """

    def __init__(self, layers: Sequence[Any], past: int, shape: Sequence[int], like: torch.Tensor):
        batch, kv_heads, seq, head_dim = shape
        # An eighth more: of the memory, and of the copying that a token costs, little either way.
        self.capacity = past + seq + min(max((past + seq) // 8, 16), 256)
        self.length = past
        self.layers = [*map(weakref.ref, layers)]
        self.tensors: list[torch.Tensor] = []  # keys and values in turn
        for layer in layers:
            if not layer.is_initialized:
                layer.lazy_initialization(like, like)
            for old in (layer.keys, layer.values):
                self.tensors.append(like.new_empty(batch, kv_heads, self.capacity, head_dim))
                if past:
                    self.tensors[-1][:, :, :past] = old
            self._hand_out([layer], self.tensors[-2:])  # the old ones are released one by one
        # Tensors made in inference mode may not be written to outside of it.
        self.kind = (batch, kv_heads, head_dim, like.dtype, self.tensors[0].is_inference())
        self.handed_out = _tensors_of(layers)
        self.pointers = [*map(torch.Tensor.data_ptr, self.tensors)]

    def continues(self, layers: Sequence[Any], seq: int, kind: tuple) -> bool:
        """Return whether these layers have room for so many tokens in here."""
        tensors = _tensors_of(layers)
        return (
            self.length + seq <= self.capacity
            and self.kind == kind
            and [layer() for layer in self.layers] == [*layers]
            and all(map(is_, tensors, self.handed_out))
            and [*map(torch.Tensor.data_ptr, tensors)] == self.pointers
        )

    def extend(self, layers: Sequence[Any], seq: int) -> None:
        """Lengthen the layers' keys and values by so many tokens, to be filled in by the caller."""
        self.length += seq
        self.handed_out = self._hand_out(layers, self.tensors)

    def _hand_out(self, layers: Sequence[Any], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        batch, kv_heads, _, head_dim = tensors[0].shape
        shape, strides = (batch, kv_heads, self.length, head_dim), tensors[0].stride()
        views = [tensor.as_strided(shape, strides) for tensor in tensors]  # half of what a slice costs
        for layer, keys, values in zip(layers, views[::2], views[1::2], strict=True):
            layer.keys, layer.values = keys, values
        return views


def _tensors_of(layers: Sequence[Any]) -> list[torch.Tensor]:
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


_BUFFERS: "weakref.WeakKeyDictionary[DynamicLayer, KVBuffer]" = weakref.WeakKeyDictionary()
"""Of the first of its layers. Beside them and not in them: a cache is the user's, who may copy it and save it."""


def buffer_of(layers: Sequence[Any], past: int, shape: Sequence[int], like: torch.Tensor) -> KVBuffer | None:
    """Return memory in which layers of `past` tokens have room for (batch, kv_heads, seq, head_dim) more.

    `like` has the dtype and the device. None where the layers hold something else.
    """
    batch, kv_heads, seq, head_dim = shape
    kind = (batch, kv_heads, head_dim, like.dtype, torch.is_inference_mode_enabled())
    buffer = _BUFFERS.get(layers[0])
    if buffer is None or buffer.length != past or not buffer.continues(layers, seq, kind):
        if any(layer.get_seq_length() != past for layer in layers):
            return None
        if past and {(*layer.keys.shape[:2], layer.keys.dtype) for layer in layers} != {(batch, kv_heads, like.dtype)}:
            return None
        buffer = None
        _BUFFERS.pop(layers[0], None)  # released before more is asked for
        buffer = _BUFFERS[layers[0]] = KVBuffer(layers, past, shape, like)
    return buffer


CACHE_UPDATE, LAYER_UPDATE = DynamicCache.update, DynamicLayer.update


def layers_of(cache: Any, count: int, first: int = 0) -> list[Any] | None:
    """Return the layers `first` to `count` of transformers' own `DynamicCache`, all as they were made; else None."""
    if (
        type(cache) is not DynamicCache
        or cache.offloading
        or "update" in cache.__dict__
        or DynamicCache.update is not CACHE_UPDATE
        or DynamicLayer.update is not LAYER_UPDATE
    ):
        return None
    if len(cache.layers) < count and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.extend(DynamicLayer() for _ in range(count - len(cache.layers)))
    layers = cache.layers[first:count]
    own = [type(layer) is DynamicLayer and "update" not in layer.__dict__ for layer in layers]
    return layers if len(layers) == count - first and all(own) else None


def append(
    cache: Any, key: torch.Tensor, value: torch.Tensor, layer_idx: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return what `cache.update` returns, (batch, kv_heads, total, head_dim) each, without a copy for each token.

    None where the cache is to do it. On CUDA the room costs more memory than copies cost time.
    """
    # What autograd has saved may not change.
    if torch.is_grad_enabled() or is_watched() or not _plain(key, value):
        return None
    layers = layers_of(cache, layer_idx + 1, first=layer_idx)
    if layers is None:
        return None
    (layer,) = layers
    past = layer.get_seq_length()
    if not past:  # a prompt, after which no token may follow
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value
        return key, value
    buffer = buffer_of(layers, past, key.shape, key)
    if buffer is None:
        return None
    buffer.extend(layers, key.shape[2])
    keys, values = layer.keys, layer.values
    keys[:, :, past:], values[:, :, past:] = key, value
    return keys, values


FAST_PATHS: dict[str | Callable, Callable] = {"linear": linear, "append": append, sdpa_attention_forward: attention}

"""Faster ways of what the model does, in inference: products of few tokens, attention, a cache that does not copy.

The model file asks for them by name (`FAST_PATHS`); each gives the plain way's result, to rounding, or leaves the work
to it. A compiler and a tracer see the plain ways only.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from . import cpu_kernel


def observed() -> bool:
    """Whether something watches or changes what PyTorch does: gradients, autocast, a compiler, a tracer."""
    return (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
    )


def _plain(*tensors: torch.Tensor) -> bool:
    """Whether these are fp32 or bf16 numbers in this machine's memory, all of one dtype."""
    return all(
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype in cpu_kernel.FLOATS
        and tensor.dtype == tensors[0].dtype
        for tensor in tensors
    )


def few_tokens_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """`F.linear` of (batch, seq, columns); None where the plain way is to be taken."""
    if x.dim() != 3 or observed() or not 0 < x.shape[0] * x.shape[1] <= cpu_kernel.most_tokens():
        return None
    if not _plain(x, weight, *(() if bias is None else (bias,))) or not weight.is_contiguous():
        return None
    return cpu_kernel.linear(x, weight, bias)


class FewTokensLinear(nn.Linear):
    """nn.Linear with the fast path. A layer becomes one in the first pass: quantizers look for nn.Linear itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = few_tokens_linear(x, self.weight, self.bias)
        return super().forward(x) if output is None else output


def begin(model: nn.Module, cache: Cache | None) -> None:
    """What a pass begins with, in inference on a CPU: the cache gets room, and the linear layers their fast path.

    On CUDA room costs more memory than copies cost time, and a look at each layer's tensors costs launches.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or next(model.parameters()).device.type != "cpu":
        return
    give_room(cache)
    if "_has_fast_linears" not in model.__dict__:
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = FewTokensLinear
        model.__dict__["_has_fast_linears"] = True


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
    if scaling is not None and not dropout and not observed() and _plain(query, key, value):
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


class Room:
    """Memory for keys and values, (batch, kv_heads, capacity, head_dim) each, and how many tokens are in it."""

    def __init__(self, shape: Sequence[int], like: torch.Tensor):
        batch, kv_heads, seq, head_dim = shape
        # An eighth more: of the memory, and of the copying that a token costs, little either way.
        self.capacity, self.filled = seq + min(max(seq // 8, 16), 256), 0
        self.keys, self.values = (like.new_empty(batch, kv_heads, self.capacity, head_dim) for _ in range(2))
        self.kind = (batch, kv_heads, head_dim, like.dtype, self.keys.is_inference())

    def takes(self, shape: Sequence[int], like: torch.Tensor, length: int) -> bool:
        """Whether a cache of `length` tokens that is in here can go on in here."""
        batch, kv_heads, seq, head_dim = shape
        # Tensors made in inference mode may not be written to outside of it.
        kind = (batch, kv_heads, head_dim, like.dtype, torch.is_inference_mode_enabled())
        return self.filled == length and length + seq <= self.capacity and self.kind == kind


class CacheLayerWithRoom(DynamicLayer):
    """Keys and values of one layer (batch, kv_heads, total, head_dim), with room for the tokens that follow.

    transformers' layer copies all of itself for every token; this one when its room is full. What was handed out is
    never written to again: after a crop, or in a second cache that shares the memory, the next token finds no room.
    """

    def __init__(self, *args, **kwargs):
        self._room: Room | None = None
        self._length = 0  # tokens, while they are in the room
        self._given: list[torch.Tensor | None] = [None, None]  # keys and values, while they are not
        super().__init__(*args, **kwargs)

    @property
    def keys(self) -> torch.Tensor | None:
        return self._given[0] if self._room is None else self._room.keys[..., : self._length, :]

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        self._given, self._room = [tensor, self.values], None

    @property
    def values(self) -> torch.Tensor | None:
        return self._given[1] if self._room is None else self._room.values[..., : self._length, :]

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        self._given, self._room = [self.keys, tensor], None

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self._room is None else self._length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends (batch, kv_heads, seq, head_dim) to each, and returns all of both."""
        # Autograd must not see a tensor change, and a compiler makes a cache of its own.
        if key_states.requires_grad or value_states.requires_grad or torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        past = self.get_seq_length()
        if not past:  # a prompt, after which no token may follow
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        room = self.extend(key_states.shape, key_states)
        keys, values = room.keys[..., : self._length, :], room.values[..., : self._length, :]
        keys[..., past:, :], values[..., past:, :] = key_states, value_states
        return keys, values

    def extend(self, shape: Sequence[int], like: torch.Tensor) -> Room:
        """Lengthens keys and values by (batch, kv_heads, seq, head_dim), to be filled in by the caller in the room.

        `like` has the dtype and the device.
        """
        if not self.is_initialized:
            self.lazy_initialization(like, like)
        past, room = self.get_seq_length(), self._room
        if room is None or not room.takes(shape, like, past):
            batch, kv_heads, seq, head_dim = shape
            room = Room((batch, kv_heads, past + seq, head_dim), like)
            keys, values = self.keys, self.values
            if past and keys is not None and values is not None:
                room.keys[..., :past, :], room.values[..., :past, :] = keys, values
            self._room = room
        room.filled = self._length = past + shape[-2]
        return room


def give_room(cache: Cache | None) -> None:
    """Makes layers with room of those of a `DynamicCache` that nothing is in yet."""
    if type(cache) is not DynamicCache or cache.offloading:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = CacheLayerWithRoom
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[number] = CacheLayerWithRoom()


FAST_PATHS: dict[str, Callable] = {"begin": begin, "sdpa": attention}

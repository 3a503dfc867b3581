"""What a hostile or odd checkpoint may hold in a tensor's place: name of the change -> function of the tensor."""

from collections import OrderedDict

import torch
from hypothesis import strategies as st
from torch import nn

DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float64, torch.float32, torch.bool),
        *(torch.int8, torch.uint8, torch.int64, torch.uint16, torch.complex64, torch.complex32),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    )
}


def with_attributes(tensor, **attributes):
    tensor = tensor.clone()
    for name, value in attributes.items():
        setattr(tensor, name, value)
    return tensor


def overlapping(tensor):
    """Rows that begin one value after another."""
    return torch.randn(tensor.numel()).as_strided(tensor.shape, (1,) * tensor.ndim)


def transposed(tensor):
    return tensor.t().contiguous().t() if tensor.ndim == 2 else tensor


TENSORS = {
    "expanded": lambda tensor: tensor.reshape(-1)[:1].clone().expand(tensor.shape),
    "endless": lambda tensor: torch.zeros(1).expand(10**12, *tensor.shape[1:]),
    "endless rows and columns": lambda tensor: torch.zeros(1).expand(10**9, 10**9),
    "overlapping": overlapping,
    "transposed in memory": transposed,
    "every second value": lambda tensor: tensor.repeat_interleave(2, dim=-1)[..., ::2],
    "part of a larger one": lambda tensor: torch.cat([tensor, tensor])[: len(tensor)],
    "parameter": lambda tensor: nn.Parameter(tensor),
    "buffer": lambda tensor: nn.Buffer(tensor),
    "requires grad": lambda tensor: tensor.clone().requires_grad_(),
    "negated lazily": lambda tensor: torch._neg_view(tensor),
    "not a number": lambda tensor: torch.full_like(tensor, torch.nan),
    "zero": torch.zeros_like,
    "without rows": lambda tensor: tensor[:0],
    "without columns": lambda tensor: tensor[..., :0],
    "without dimensions": lambda tensor: tensor.reshape(-1)[0],
    "flat": lambda tensor: tensor.reshape(-1),
    "one dimension more": lambda tensor: tensor[None],
    "nine dimensions": lambda tensor: tensor[(None,) * 7],
    "one row more": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "sparse": lambda tensor: tensor.to_sparse(),
    "sparse by rows": lambda tensor: tensor.to_sparse_csr() if tensor.ndim == 2 else tensor,
    "nested": lambda tensor: torch.nested.nested_tensor([tensor, tensor[:1]]),
    "nested, jagged": lambda tensor: torch.nested.nested_tensor([tensor, tensor[:1]], layout=torch.jagged),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
    "on the meta device": lambda tensor: tensor.to("meta"),
    "endless on the meta device": lambda tensor: torch.empty(10**12, 10**4, device="meta"),
    "with methods of its own": lambda tensor: with_attributes(tensor, detach=1, view=2, read=3),
    "list": lambda tensor: tensor.tolist(),
    "none": lambda tensor: None,
    "text": lambda tensor: "tensor",
    "dictionary": lambda tensor: OrderedDict(weight=tensor),
    **{name: lambda tensor, dtype=dtype: tensor.to(dtype) for name, dtype in DTYPES.items()},
}
# What torch raises where one change is not possible after another, or the result cannot be saved.
IMPOSSIBLE = (RuntimeError, NotImplementedError, ValueError, IndexError)
NAMES = st.one_of(
    st.sampled_from(["", "norm", "norm.weight", "rope.freqs", "layers.1.ffn_norm.weight", "layers.-1.ffn_norm.weight"]),
    st.sampled_from(["layers.00.ffn_norm.weight", "layers.０.ffn_norm.weight", "../norm.weight", "a" * 100_000]),
    st.text(max_size=8),
    st.integers(),
    st.none(),
)


def changes(names):
    """Lists of (what to do, name of the tensor that it is done to, name that it gets)."""
    kinds = st.sampled_from([*TENSORS, "missing", "renamed", "twice"])
    return st.lists(st.tuples(kinds, st.sampled_from(names), NAMES), min_size=1, max_size=3)


def changed(tensors, edits):
    """The dictionary of tensors after these changes."""
    tensors = dict(tensors)
    for kind, name, other in edits:
        if name not in tensors:
            continue
        if kind in TENSORS:
            if isinstance(tensors[name], torch.Tensor) and not tensors[name].is_nested:
                tensors[name] = TENSORS[kind](tensors[name])
        elif kind == "twice":
            tensors[other] = tensors[name]
        else:
            tensor = tensors.pop(name)
            if kind == "renamed":
                tensors[other] = tensor
    return tensors

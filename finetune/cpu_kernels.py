"""What a CPU computes faster in training than by PyTorch's own kernels: attention of short sequences, and dropout.

In bf16 SDPA's kernel takes up to three times as long as two batched products and a softmax. `nn.Dropout` draws a double
for every value, on one core.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "short_causal"
# Tokens. Above, SDPA is the faster one: it leaves out the half of the scores that is masked.
LONGEST = 512
BITS = 1 << 16  # values of the 16 random bits that drop a value or keep it


class ShortCausalAttention(torch.autograd.Function):
    """softmax(QK^T * scaling) V over a position and those before it.

    Query (batch, heads, seq, head_dim), key and value (batch, kv_heads, seq, head_dim); the result has the query's
    shape. The query heads that share a key are one matrix to it. The backward pass computes the weights again.
    """

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        batch, kv_heads, seq, head_dim = key.shape
        q = query.reshape(batch * kv_heads, -1, head_dim)  # (batch * kv_heads, groups * seq, head_dim)
        k, v = (tensor.reshape(batch * kv_heads, seq, head_dim) for tensor in (key, value))
        ctx.scaling, ctx.shapes = scaling, (query.shape, key.shape)
        ctx.save_for_backward(q, k, v)
        return (_weights(q, k, scaling) @ v).view(query.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        q, k, v = ctx.saved_tensors
        query_shape, key_shape = ctx.shapes
        grad, weights = grad.reshape(q.shape), _weights(q, k, ctx.scaling)
        grad_v = weights.transpose(1, 2) @ grad
        grad_weights = grad @ v.transpose(1, 2)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(ctx.scaling)
        grad_q, grad_k = grad_scores @ k, grad_scores.transpose(1, 2) @ q
        return grad_q.view(query_shape), grad_k.view(key_shape), grad_v.view(key_shape), None


def _weights(q: torch.Tensor, k: torch.Tensor, scaling: float) -> torch.Tensor:
    """The attention weights, (batch * kv_heads, groups * seq, seq)."""
    seq = k.shape[1]
    later = torch.full((seq, seq), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    scores = torch.baddbmm(later.repeat(q.shape[1] // seq, 1), q, k.transpose(1, 2), alpha=scaling)
    return scores.softmax(dim=-1)


def short_causal_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `ShortCausalAttention` where it applies and is faster, else SDPA."""
    seq = query.shape[2]
    plain = attention_mask is None and not dropout and key.shape[2] == seq
    if plain and query.dtype == value.dtype == torch.bfloat16 and seq <= LONGEST:
        return ShortCausalAttention.apply(query, key, value, scaling).transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


AttentionInterface.register(ATTENTION, short_causal_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class DropoutByBits(torch.autograd.Function):
    """0 where the 16 random bits of a value are among the `dropped` smallest, elsewhere x over the share kept."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, dropped: int) -> torch.Tensor:
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        bits = words.random_(-(1 << 63), None).view(torch.int16)[: x.numel()].view(x.shape)
        kept = bits >= dropped - BITS // 2
        ctx.scale = BITS / (BITS - dropped)
        ctx.save_for_backward(kept)
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (grad * kept).mul_(ctx.scale), None


class BitsDropout(nn.Dropout):
    """`nn.Dropout` whose p is met within 1 / 131072."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropped = min(round(self.p * BITS), BITS - 1)
        return DropoutByBits.apply(x, dropped) if self.training and dropped else x


def use_cpu_kernels(model: Any) -> None:
    """Puts them into a model, with its adapter or without one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation(ATTENTION)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, BitsDropout(child.p))

"""LLaMA as its papers write it, on weights named and laid out as Meta's: nothing here is shared with our model.

arXiv 2302.13971, section 2.2 (pre-norm RMSNorm, SwiGLU, RoPE) and 2307.09288 (grouped-query attention).
RoPE turns neighbouring channels (2i, 2i + 1) of a head, as one complex number, by position * theta^(-2i / head_dim).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def meta_logits(weights: dict[str, Tensor], tokens: Tensor, **hyperparameters) -> Tensor:
    """Logits (batch, seq, vocab) of `tokens` (batch, seq); the hyperparameters are those of `meta_hidden_states`."""
    return meta_hidden_states(weights, tokens, **hyperparameters)[-1] @ weights["output.weight"].T


def meta_hidden_states(
    weights: dict[str, Tensor],
    tokens: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    norm_eps: float,
    rope_theta: float,
) -> list[Tensor]:
    """The residual stream (batch, seq, dim) before each layer, and last what the final norm makes of its end."""
    n_layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    head_dim = weights["layers.0.attention.wq.weight"].shape[0] // n_heads
    rotation = rotations(tokens.shape[1], head_dim, rope_theta)
    residual = weights["tok_embeddings.weight"][tokens]
    states = []
    for number in range(n_layers):
        states.append(residual)
        layer = {
            name.removeprefix(f"layers.{number}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"layers.{number}.")
        }
        normed = rms_norm(residual, layer["attention_norm.weight"], norm_eps)
        residual = residual + attention(layer, normed, rotation, n_heads, n_kv_heads)
        residual = residual + feed_forward(layer, rms_norm(residual, layer["ffn_norm.weight"], norm_eps))
    return [*states, rms_norm(residual, weights["norm.weight"], norm_eps)]


def rotations(seq: int, head_dim: int, theta: float) -> Tensor:
    """exp(i * position * frequency) (seq, head_dim / 2)."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(seq).float(), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x (batch, seq, heads, head_dim), each pair of neighbouring channels turned."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation[None, :, None]).flatten(-2).type_as(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    mean_square = x.float().pow(2).mean(dim=-1, keepdim=True)
    return (x.float() * torch.rsqrt(mean_square + eps)).type_as(x) * weight


def repeat_kv(x: Tensor, times: int) -> Tensor:
    """(batch, seq, kv_heads, head_dim) -> (batch, seq, kv_heads * times, head_dim), each head `times` in a row."""
    batch, seq, kv_heads, head_dim = x.shape
    return x[:, :, :, None].expand(batch, seq, kv_heads, times, head_dim).reshape(batch, seq, -1, head_dim)


def attention(layer: dict[str, Tensor], x: Tensor, rotation: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    query = (x @ layer["attention.wq.weight"].T).unflatten(-1, (n_heads, -1))
    key = (x @ layer["attention.wk.weight"].T).unflatten(-1, (n_kv_heads, -1))
    value = (x @ layer["attention.wv.weight"].T).unflatten(-1, (n_kv_heads, -1))
    key = repeat_kv(rotate(key, rotation), n_heads // n_kv_heads)
    value = repeat_kv(value, n_heads // n_kv_heads)
    scores = torch.einsum("bqhd,bkhd->bhqk", rotate(query, rotation), key) / query.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, float("-inf")).float().softmax(dim=-1).type_as(value)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(-2) @ layer["attention.wo.weight"].T


def feed_forward(layer: dict[str, Tensor], x: Tensor) -> Tensor:
    gate = F.silu(x @ layer["feed_forward.w1.weight"].T)
    return (gate * (x @ layer["feed_forward.w3.weight"].T)) @ layer["feed_forward.w2.weight"].T

"""LLaMA by Meta's mathematics, out of Meta's files, one matrix in memory at a time.

Shares nothing with the model and the mapping of names that it is there to check: joins of shards, rotary embedding on
neighbouring channels (arXiv 2104.09864, section 3.4.2) and attention are written here a second time, in float32.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from .meta import load_shards, shard_paths
from .params import read_params

# The side by which model-parallel ranks cut a matrix (out, in); norms are not cut.
_CUT_BY_OUTPUT = ("wq", "wk", "wv", "w1", "w3", "output")


class MetaReference:
    """The model of a Meta folder. `cast`: the dtype to which the weights are rounded before they are used."""

    def __init__(self, folder: Path, cast: torch.dtype | None = None):
        params = read_params(folder / "params.json")
        self.files = shard_paths(folder)
        self._shards = load_shards(self.files)
        self._cast = cast
        self.num_layers, self.num_heads = params["n_layers"], params["n_heads"]
        self.num_kv_heads = params.get("n_kv_heads") or self.num_heads
        self.eps, self.theta = float(params["norm_eps"]), float(params.get("rope_theta") or 10000.0)
        self.vocab_size = self._shards[0]["tok_embeddings.weight"].shape[0]

    def pieces(self, name: str) -> list[torch.Tensor]:
        """What the ranks hold of a tensor, as it lies in the files."""
        return [shard[f"{name}.weight"] for shard in self._shards]

    def embedding(self, tokens: torch.Tensor) -> torch.Tensor:
        """(seq, dim) of tokens (seq,)."""
        return self._rounded(torch.cat([piece[tokens] for piece in self.pieces("tok_embeddings")], dim=-1))

    def layer(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """What a layer makes of the residual stream (seq, dim)."""
        name = f"layers.{number}"
        x = x + self._attention(f"{name}.attention", self._norm(f"{name}.attention_norm", x))
        return x + self._feed_forward(f"{name}.feed_forward", self._norm(f"{name}.ffn_norm", x))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(seq, vocabulary) of the last residual stream."""
        return self._product("output", self._norm("norm", x))

    def _rounded(self, weight: torch.Tensor) -> torch.Tensor:
        return (weight if self._cast is None else weight.to(self._cast)).float()

    def _product(self, name: str, x: torch.Tensor) -> torch.Tensor:
        pieces = self.pieces(name)
        if name.rpartition(".")[2] in _CUT_BY_OUTPUT:
            return torch.cat([x @ self._rounded(piece).T for piece in pieces], dim=-1)
        parts = x.chunk(len(pieces), dim=-1)
        total = torch.zeros(len(x), pieces[0].shape[0])
        for part, piece in zip(parts, pieces, strict=True):
            total += part @ self._rounded(piece).T
        return total

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(dim=-1, keepdim=True) + self.eps).sqrt() * self._rounded(self.pieces(name)[0])

    def _attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        seq = len(x)
        query = self._turned(self._product(f"{name}.wq", x).view(seq, self.num_heads, -1))
        key = self._turned(self._product(f"{name}.wk", x).view(seq, self.num_kv_heads, -1))
        value = self._product(f"{name}.wv", x).view(seq, self.num_kv_heads, -1)
        earlier = torch.ones(seq, seq, dtype=torch.bool).tril()
        heads = []
        for head in range(self.num_heads):
            shared = head * self.num_kv_heads // self.num_heads
            scores = query[:, head] @ key[:, shared].T / query.shape[-1] ** 0.5
            heads.append(scores.where(earlier, torch.tensor(-torch.inf)).softmax(dim=-1) @ value[:, shared])
        return self._product(f"{name}.wo", torch.cat(heads, dim=-1))

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        """Neighbouring channels of (seq, heads, head_dim), as one complex number, turned by position * frequency."""
        channels = torch.arange(0, x.shape[-1], 2)
        angles = torch.outer(torch.arange(len(x)), self.theta ** (-channels / x.shape[-1]))
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    def _feed_forward(self, name: str, x: torch.Tensor) -> torch.Tensor:
        gate = F.silu(self._product(f"{name}.w1", x))
        return self._product(f"{name}.w2", gate * self._product(f"{name}.w3", x))

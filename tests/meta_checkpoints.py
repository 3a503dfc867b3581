"""Small Meta folders with random weights: params.json, consolidated.NN.pth, tokenizer.model.

Shares no code with the converter: the cuts over model-parallel ranks are written out here a second time.
"""

import functools
import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor

# Heads as Q/KV with a width that they divide.
HEADS = {
    "4/4": {"dim": 96, "n_heads": 4, "n_kv_heads": None},
    "9/3": {"dim": 144, "n_heads": 9, "n_kv_heads": 3},
    "32/4": {"dim": 128, "n_heads": 32, "n_kv_heads": 4},
    "8/1": {"dim": 96, "n_heads": 8, "n_kv_heads": 1},
}
# params.json as Meta ships it.
METAS = {
    "llama-7b": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1},
    "llama-13b": {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-06, "vocab_size": -1},
    "llama-33b": {"dim": 6656, "multiple_of": 256, "n_heads": 52, "n_layers": 60, "norm_eps": 1e-06, "vocab_size": -1},
    "llama-65b": {"dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1},
    "llama-2-7b": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1},
    "llama-2-13b": {
        "dim": 5120,
        "multiple_of": 256,
        "n_heads": 40,
        "n_layers": 40,
        "norm_eps": 1e-05,
        "vocab_size": -1,
    },
    "llama-2-70b": {
        "dim": 8192,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
        "n_heads": 64,
        "n_kv_heads": 8,
        "n_layers": 80,
        "norm_eps": 1e-05,
        "vocab_size": -1,
    },
}
# Divisible by 16 and by 9, and enough for 256 bytes, 3 control pieces and some letters.
VOCAB = 288
ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
COLUMNS = ("wo", "w2", "tok_embeddings")


def meta_params(**fields: Any) -> dict[str, Any]:
    """The content of a params.json as Meta writes it, tiny; a field given as None is left out."""
    params = {
        "dim": 96,
        "multiple_of": 48,
        "n_heads": 4,
        "n_kv_heads": 2,
        "n_layers": 2,
        "norm_eps": 1e-5,
        "vocab_size": -1,
        **fields,
    }
    return {name: value for name, value in params.items() if value is not None}


def meta_weights(
    params: dict[str, Any], *, dtype: torch.dtype = torch.float32, tied: bool = False, seed: int = 0, vocab: int = VOCAB
) -> dict[str, Tensor]:
    """Whole tensors under Meta's names: matrices randn / sqrt(fan_in), twice that for Q and K, norms 1 + 0.3 randn."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return (scale * columns**-0.5 * torch.randn(rows, columns, generator=generator)).to(dtype)

    def norm() -> Tensor:
        return (1 + 0.3 * torch.randn(dim, generator=generator)).to(dtype)

    dim = params["dim"]
    kv = dim // params["n_heads"] * params.get("n_kv_heads", params["n_heads"])
    # Meta's rule: two thirds of 4 dim, scaled, and rounded up.
    unit = params["multiple_of"]
    ffn = -(-int(params.get("ffn_dim_multiplier", 1) * int(8 * dim / 3)) // unit) * unit
    weights = {"tok_embeddings.weight": matrix(vocab, dim)}
    for layer in range(params["n_layers"]):
        tensors = {
            "attention.wq": matrix(dim, dim, 2),
            "attention.wk": matrix(kv, dim, 2),
            "attention.wv": matrix(kv, dim),
            "attention.wo": matrix(dim, dim),
            "feed_forward.w1": matrix(ffn, dim),
            "feed_forward.w2": matrix(dim, ffn),
            "feed_forward.w3": matrix(ffn, dim),
            "attention_norm": norm(),
            "ffn_norm": norm(),
        }
        weights |= {f"layers.{layer}.{name}.weight": tensor for name, tensor in tensors.items()}
    weights["norm.weight"] = norm()
    weights["output.weight"] = weights["tok_embeddings.weight"].clone() if tied else matrix(vocab, dim)
    return weights


def cut(name: str, tensor: Tensor, rank: int, shards: int) -> Tensor:
    """What rank `rank` of `shards` holds of a tensor."""
    kind = name.split(".")[-2]
    if kind not in ROWS + COLUMNS:
        return tensor.clone()
    dim = 0 if kind in ROWS else 1
    assert tensor.shape[dim] % shards == 0, (name, tensor.shape, shards)
    size = tensor.shape[dim] // shards
    return tensor.narrow(dim, rank * size, size).clone()


def meta_shard(weights: dict[str, Tensor], rank: int = 0, shards: int = 1) -> dict[str, Tensor]:
    return {name: cut(name, tensor, rank, shards) for name, tensor in weights.items()}


def write_meta(
    folder: Path,
    params: dict[str, Any],
    weights: dict[str, Tensor],
    *,
    shards: int = 1,
    frequencies: str | None = None,
    tokenizer: Path | None = None,
    shared_norms: bool = False,
) -> Path:
    """Writes the folder. `frequencies`: "per layer" as in LLaMA 1, "beside" as in LLaMA 2, or none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    half = params["dim"] // params["n_heads"] // 2
    names = {
        None: [],
        "beside": ["rope.freqs"],
        "per layer": [f"layers.{i}.attention.inner_attention.rope.freqs" for i in range(params["n_layers"])],
    }[frequencies]
    for rank in range(shards):
        shard = meta_shard(weights, rank, shards)
        if shared_norms:
            shard = with_shared_norms(shard)
        torch.save({**shard, **{name: torch.ones(half) for name in names}}, folder / f"consolidated.{rank:02d}.pth")
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
    return folder


def with_shared_norms(shard: dict[str, Tensor], spare: int = 300_000) -> dict[str, Tensor]:
    """The same values, all norms being views of one storage with `spare` further elements."""
    norms = {name: tensor for name, tensor in shard.items() if tensor.ndim == 1}
    storage = torch.cat([*norms.values(), torch.zeros(spare, dtype=shard["norm.weight"].dtype)])
    start, views = 0, {}
    for name, tensor in norms.items():
        views[name] = storage[start : start + len(tensor)]
        start += len(tensor)
    return shard | views


def meta_folder(folder: Path, *, shards: int = 1, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A plain folder of seed 0; without further fields it is recognised as LLaMA 2 by its grouped K/V heads."""
    params = meta_params(**fields)
    return write_meta(folder, params, meta_weights(params, dtype=dtype), shards=shards)


def read_meta(folder: Path) -> list[dict[str, Tensor]]:
    """The shards of a folder as dictionaries."""
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("consolidated.*.pth"))]


@functools.cache
def _sentencepiece_model(vocab: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    return model.getvalue()


def write_sentencepiece(path: Path, vocab: int = VOCAB) -> Path:
    """A tokenizer.model of LLaMA's kind with `vocab` pieces."""
    path.write_bytes(_sentencepiece_model(vocab))
    return path


def fingerprint(path: Path) -> dict[str, str]:
    """Every file below `path` (or `path` itself) with a hash of its bytes."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

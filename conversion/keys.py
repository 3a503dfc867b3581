"""The one table between Meta's tensors and ours: names, cut over shards, order of rows. Read in both directions.

Source: the attribute names and parallel layers of Meta's reference implementation (ColumnParallelLinear cuts rows,
RowParallelLinear columns, the embedding is cut along the hidden dimension, norms stand whole in every shard).
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from hf_llama_repro import LlamaReproConfig
from hf_llama_repro.errors import CheckpointError


class Tensor(NamedTuple):
    meta: str
    ours: str
    cut: int | None
    """Dimension cut over the shards; None: the same tensor in each shard."""
    shape: tuple[str, ...]
    """Sizes of the whole tensor, as names that `sizes` knows."""
    heads: str | None = None
    """Configuration field with the number of heads whose rows are reordered for the rotary embedding."""


# fmt: off
# The names of Meta and ours, without ".weight", which all of them end in.
_ROWS = (
    ("tok_embeddings",            "model.embed_tokens",                       1,    "vocab hidden"),
    ("layers.{}.attention.wq",    "model.layers.{}.self_attn.q_proj",         0,    "q hidden", "num_attention_heads"),
    ("layers.{}.attention.wk",    "model.layers.{}.self_attn.k_proj",         0,    "kv hidden", "num_key_value_heads"),
    ("layers.{}.attention.wv",    "model.layers.{}.self_attn.v_proj",         0,    "kv hidden"),
    ("layers.{}.attention.wo",    "model.layers.{}.self_attn.o_proj",         1,    "hidden q"),
    ("layers.{}.feed_forward.w1", "model.layers.{}.mlp.gate_proj",            0,    "ffn hidden"),
    ("layers.{}.feed_forward.w2", "model.layers.{}.mlp.down_proj",            1,    "hidden ffn"),
    ("layers.{}.feed_forward.w3", "model.layers.{}.mlp.up_proj",              0,    "ffn hidden"),
    ("layers.{}.attention_norm",  "model.layers.{}.input_layernorm",          None, "hidden"),
    ("layers.{}.ffn_norm",        "model.layers.{}.post_attention_layernorm", None, "hidden"),
    ("norm",                      "model.norm",                               None, "hidden"),
    ("output",                    "lm_head",                                  0,    "vocab hidden"),
)
# fmt: on
TENSORS = tuple(
    Tensor(f"{meta}.weight", f"{ours}.weight", cut, tuple(shape.split()), *heads)
    for meta, ours, cut, shape, *heads in _ROWS
)

# Rotary frequencies, which follow from rope_theta: dropped on purpose. Where they stand tells LLaMA 1 from 2.
META_FREQUENCIES_PER_LAYER = re.compile(r"layers\.\d+\.attention\.inner_attention\.rope\.freqs")
META_FREQUENCIES = re.compile(r"rope\.freqs")
OUR_FREQUENCIES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

# Optional biases, which only Hugging Face checkpoints have: configuration field -> projections.
BIASES = {
    "attention_bias": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "mlp_bias": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}

# Parts of names that wrappers of modules leave: DistributedDataParallel, torch.compile, FSDP, checkpointing.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# What a weight may be; anything else is quantized or damaged.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OUTPUT, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def sizes(config: LlamaReproConfig) -> dict[str, int]:
    """The named sizes of TENSORS."""
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "ffn": config.intermediate_size,
        "q": config.num_attention_heads * config.head_dim,
        "kv": config.num_key_value_heads * config.head_dim,
    }


def expand(config: LlamaReproConfig) -> list[tuple[Tensor, str, str]]:
    """Every tensor of a model: its row of the table, Meta's full name and ours, layer by layer as forward runs."""
    before, per_layer, after = TENSORS[:1], [row for row in TENSORS if "{}" in row.meta], TENSORS[-2:]
    return [
        *((row, row.meta, row.ours) for row in before),
        *(
            (row, row.meta.format(layer), row.ours.format(layer))
            for layer in range(config.num_hidden_layers)
            for row in per_layer
        ),
        *((row, row.meta, row.ours) for row in after),
    ]


def our_shapes(config: LlamaReproConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this configuration holds; no output matrix when it is tied."""
    named = sizes(config)
    shapes = {ours: tuple(named[size] for size in row.shape) for row, _, ours in expand(config)}
    if config.tie_word_embeddings:
        del shapes[OUTPUT]
    for field, projections in BIASES.items():
        if getattr(config, field):
            for layer in range(config.num_hidden_layers):
                for projection in projections:
                    weight = f"model.layers.{layer}.{projection}.weight"
                    shapes[weight.replace(".weight", ".bias")] = shapes[weight][:1]
    return shapes


def to_half_split(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Meta's order of Q and K rows to ours: within a head, channels 0 1 2 3 4 5 become 0 2 4 1 3 5.

    Meta turns neighbouring channels together, we the two halves of a head (arXiv 2104.09864, section 3.4.2).
    """
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def to_interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `to_half_split`."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def plain_names(names: Iterable[str], embedding: str) -> dict[str, str]:
    """Name in a file -> the model's, without what wrappers around it and its layers have added.

    What stands before the name of the embedding is taken off where it stands before all names.
    """
    plain = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names}
    prefixes = {name.removesuffix(embedding) for name in plain.values() if name.endswith(f".{embedding}")}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    if all(name.startswith(prefix) for name in plain.values()):
        plain = {name: short.removeprefix(prefix) for name, short in plain.items()}
    return plain if len(set(plain.values())) == len(plain) else {name: name for name in plain}


def check_layers(names: Iterable[str], config: LlamaReproConfig, where: Path, told_by: str) -> None:
    """Before anything is laid out for a number of layers that only a damaged configuration has."""
    found = len({match[1] for name in names if (match := re.search(r"\b(?:layers|blk)\.(\d+)\.", name))})
    if found != config.num_hidden_layers:
        raise CheckpointError(
            f"{where} holds {found} layers, but {told_by} asks for {config.num_hidden_layers}: "
            "they are not of one checkpoint, or not all of it is there"
        )


def check_names(found: set[str], expected: set[str], where: str) -> None:
    """One error that lists what is missing and what is unknown."""
    missing, unknown = sorted(expected - found), sorted(found - expected)
    if missing or unknown:
        raise CheckpointError(
            f"{where} does not hold a LLaMA model: "
            + "; ".join(
                f"{len(names)} {what} ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"
                for what, names in (("missing tensors", missing), ("unknown tensors", unknown))
                if names
            )
        )

"""Writes Meta's layout back: params.json, consolidated.NN.pth, tokenizer.model.

python -m conversion.export MODEL TARGET --shards 2
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llama_repro.command import add_version, run
from hf_llama_repro.errors import CheckpointError

# torch and transformers are imported where they are used, so that --help answers at once.
if TYPE_CHECKING:
    import torch

    from hf_llama_repro import LlamaReproConfig

    from .source import Source

# (multiple_of, ffn_dim_multiplier) of Meta's own files; the first that gives the width is written.
_FFN_RULES = ((256, None), (4096, 1.3), (1024, 1.3), (1024, 1.5))


def export(
    model: Path,
    target: Path,
    *,
    shards: int = 1,
    with_tokenizer: bool = True,
    context_length: int | None = None,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> str:
    """Writes `target` from whatever `open_source` opens, whole or not at all; returns a line that says what.

    The dtype is kept; in memory are two tensors at a time. `tell` is given a line on the space needed, before anything
    is written. Raises `CheckpointError` when Meta's layout cannot hold the model, or not in so many shards.
    """
    from .keys import EMBEDDING, OUTPUT
    from .manifest import Manifest
    from .source import open_source, promoted
    from .sums import summed
    from .target import check_target, num_target_bytes, whole_or_nothing, write_json

    check_target(target, model, overwrite=overwrite)
    source = open_source(model, context_length=context_length)
    config = source.config
    _check_exportable(config, shards)
    # config.json may name another; what reads params.json sees only the weights.
    config.dtype = promoted(source.tensors.values())
    # Meta's layout has no tied weights: the embedding is written as the output matrix too.
    tensors = source.tensors if OUTPUT in source.tensors else {**source.tensors, OUTPUT: source.tensors[EMBEDDING]}
    num_bytes = num_target_bytes(tensors, None)
    with (
        whole_or_nothing(target, model, overwrite=overwrite, num_bytes=num_bytes, tell=tell) as folder,
        summed(source.files) as sums,
    ):
        tokenizer_line = _write_tokenizer(source, folder) if with_tokenizer else "none"
        write_json(folder / "params.json", params(config, has_tokenizer_model=(folder / "tokenizer.model").is_file()))
        _write_shards(folder, tensors, source, shards, sums.advance)
        Manifest(folder, None).complete(sums.result())
    return f"written    {target}: {shards} shard(s), {num_bytes / 1e9:.2f} GB; tokenizer: {tokenizer_line}"


def _write_shards(
    folder: Path, tensors: dict[str, Any], source: "Source", shards: int, advance: Callable[[float], None]
) -> None:
    """Writes all shards side by side, so that each tensor is read once. `advance` is told what share is done."""
    from tqdm import tqdm

    from hf_llama_repro.mapped_pages import release_mapped_pages

    from .keys import expand
    from .pth_file import PthWriter

    layout = expand(source.config)
    shapes = {meta: (_cut(tensors[ours].shape, row.cut, shards), tensors[ours].dtype) for row, meta, ours in layout}
    total, done = sum(tensors[ours].num_bytes for _, _, ours in layout), 0
    with (
        contextlib.ExitStack() as stack,
        tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=None) as progress,
    ):
        paths = [folder / f"consolidated.{rank:02d}.pth" for rank in range(shards)]
        writers = [stack.enter_context(PthWriter(path, shapes)) for path in paths]
        for row, meta, ours in layout:
            for writer, piece in zip(writers, _pieces(tensors[ours].read(), row, source.config, shards), strict=True):
                writer.add(meta, piece)
            release_mapped_pages(source.files)
            done += tensors[ours].num_bytes
            progress.update(tensors[ours].num_bytes)
            advance(done / total)
        for writer in writers:
            writer.finish()


def _pieces(whole: "torch.Tensor", row: Any, config: "LlamaReproConfig", shards: int) -> "tuple[torch.Tensor, ...]":
    from .keys import to_interleaved

    if row.heads is not None:
        whole = to_interleaved(whole, getattr(config, row.heads))
    return (whole,) * shards if row.cut is None else whole.chunk(shards, dim=row.cut)


def _cut(shape: tuple[int, ...], dim: int | None, shards: int) -> tuple[int, ...]:
    return tuple(size // shards if axis == dim else size for axis, size in enumerate(shape))


def _check_exportable(config: "LlamaReproConfig", shards: int) -> None:
    from .keys import TENSORS, sizes

    for name, allowed in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if (value := getattr(config, name)) != allowed:
            raise CheckpointError(f"Meta's layout cannot hold {name} = {value}, only {allowed}")
    if config.rope_parameters["rope_type"] != "default":
        raise CheckpointError(f"Meta's layout cannot hold {config.rope_parameters}, only the default rotary embedding")
    named = sizes(config)
    for row in TENSORS:
        if row.cut is not None and (shards < 1 or named[row.shape[row.cut]] % shards):
            size = named[row.shape[row.cut]]
            raise CheckpointError(f"{shards} shards do not divide the {size} of {row.meta}: choose a divisor of it")


def params(config: "LlamaReproConfig", *, has_tokenizer_model: bool) -> dict[str, Any]:
    """The content of params.json, as Meta writes it: what has its usual value is left out."""
    from .meta import tells_context_length

    multiple_of, multiplier = _ffn_rule(config.hidden_size, config.intermediate_size)
    content: dict[str, Any] = {
        "dim": config.hidden_size,
        "multiple_of": multiple_of,
        "n_heads": config.num_attention_heads,
        "n_layers": config.num_hidden_layers,
        "norm_eps": config.rms_norm_eps,
        # Meta's loader takes the number from tokenizer.model.
        "vocab_size": -1 if has_tokenizer_model else config.vocab_size,
    }
    if multiplier is not None:
        content["ffn_dim_multiplier"] = multiplier
    if config.num_key_value_heads != config.num_attention_heads:
        content["n_kv_heads"] = config.num_key_value_heads
    if config.rope_theta != 10000.0:
        content["rope_theta"] = config.rope_theta
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        content["head_dim"] = config.head_dim
    if not tells_context_length(content, config.dtype, config.max_position_embeddings):
        content["max_seq_len"] = config.max_position_embeddings
    return content


def _ffn_rule(dim: int, width: int) -> tuple[int, float | None]:
    from .meta import ffn_size

    for multiple_of, multiplier in _FFN_RULES:
        if ffn_size(dim, multiple_of, multiplier) == width:
            return multiple_of, multiplier
    # Half a unit more, so that the rule's rounding down ends on the width.
    return 1, (width + 0.5) / ffn_size(dim, 1)


def _write_tokenizer(source: "Source", folder: Path) -> str:
    import shutil

    from .tokenizer import convert_tokenizer

    if source.tokenizer is None:
        return "none found"
    model_file = source.tokenizer if source.tokenizer.is_file() else source.tokenizer / "tokenizer.model"
    if model_file.name == "tokenizer.model" and model_file.is_file():
        shutil.copyfile(model_file, folder / "tokenizer.model")
        return "tokenizer.model"
    config = source.config
    return convert_tokenizer(
        source.tokenizer, folder, vocab_size=config.vocab_size, context_length=config.max_position_embeddings
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-llama-export", description="Write Meta's layout (params.json, consolidated.NN.pth) from a LLaMA model."
    )
    parser.add_argument("model", type=Path, help="Hugging Face Llama or LlamaRepro folder, Meta folder, or .gguf file")
    parser.add_argument("target", type=Path, help="folder to make")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="number of consolidated.NN.pth (default: 1)")
    parser.add_argument("--no-tokenizer", dest="with_tokenizer", action="store_false", help="write none")
    parser.add_argument("--context-length", type=int, metavar="TOKENS", help="where a Meta folder does not tell it")
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET if it is a checkpoint")
    add_version(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run(lambda: print(export(**vars(arguments), tell=print)))


if __name__ == "__main__":
    sys.exit(main())

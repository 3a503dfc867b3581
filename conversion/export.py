"""Writes Meta's layout back: params.json, consolidated.NN.pth, tokenizer.model.

python -m conversion.export MODEL TARGET --shards 2
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hf_llama_repro.command import Parser, add_version, run
from hf_llama_repro.errors import CheckpointError
from hf_llama_repro.local_path import input_path

# torch and transformers are imported where they are used, so that --help answers at once.
if TYPE_CHECKING:
    import torch

    from hf_llama_repro import LlamaReproConfig

    from .source import Source

# (multiple_of, ffn_dim_multiplier) of Meta's own files; the first that gives the width is written.
_FFN_RULES = ((256, None), (4096, 1.3), (1024, 1.3), (1024, 1.5))
# Key of params.json -> whose loaders know it, the newest first: each refuses keys that it does not know, and
# max_seq_len, which it passes itself.
_LOADERS = {
    "rope_theta": "Code Llama's loader",
    "n_kv_heads": "LLaMA 2's and Code Llama's loaders",
    "ffn_dim_multiplier": "LLaMA 2's and Code Llama's loaders",
    "": "LLaMA 1's, LLaMA 2's and Code Llama's loaders",
}


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
    """Writes `target` from whatever `open_source` opens, whole or not at all; returns lines on what was done.

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
        tokenizer_line, notes = _write_tokenizer(source, folder) if with_tokenizer else ("none", [])
        content = params(config)
        write_json(folder / "params.json", content)
        _write_shards(folder, tensors, source, shards, sums.advance)
        Manifest(folder, None).complete(sums.result())
    return "\n".join(
        [
            *(f"decided    {note}" for note in (*source.notes, *notes)),
            f"params     {_params_line(content, config)}",
            f"written    {target}: {shards} shard(s), {num_bytes / 1e9:.2f} GB; tokenizer: {tokenizer_line}",
        ]
    )


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
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise CheckpointError(
            f"Meta's layout cannot hold head_dim = {config.head_dim}, only hidden_size / num_attention_heads = "
            f"{config.hidden_size / config.num_attention_heads:g}"
        )
    if config.rope_parameters["rope_type"] != "default":
        raise CheckpointError(f"Meta's layout cannot hold {config.rope_parameters}, only the default rotary embedding")
    named = sizes(config)
    for row in TENSORS:
        if row.cut is not None and (shards < 1 or named[row.shape[row.cut]] % shards):
            size = named[row.shape[row.cut]]
            raise CheckpointError(f"{shards} shards do not divide the {size} of {row.meta}: choose a divisor of it")


def params(config: "LlamaReproConfig") -> dict[str, Any]:
    """The content of params.json, in the keys of the oldest of Meta's loaders that can hold it."""
    multiple_of, multiplier = _ffn_rule(config.hidden_size, config.intermediate_size)
    content: dict[str, Any] = {
        "dim": config.hidden_size,
        "multiple_of": multiple_of,
        "n_heads": config.num_attention_heads,
        "n_layers": config.num_hidden_layers,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }
    if multiplier is not None:
        content["ffn_dim_multiplier"] = multiplier
    if config.num_key_value_heads != config.num_attention_heads:
        content["n_kv_heads"] = config.num_key_value_heads
    if config.rope_theta != 10000.0:
        content["rope_theta"] = config.rope_theta
    return content


def _params_line(content: dict[str, Any], config: "LlamaReproConfig") -> str:
    """For whose loader params.json is, and what it cannot say: the context, which the loaders' callers pass."""
    from .params import tells_context_length

    loaders = next(loaders for key, loaders in _LOADERS.items() if not key or key in content)
    length = config.max_position_embeddings
    told = tells_context_length(content, cast("torch.dtype", config.dtype), config.vocab_size, length)
    return f"for {loaders}; context of {length} tokens, which it does not name" + (
        "" if told else f": to convert this back, say --context-length {length}"
    )


def _ffn_rule(dim: int, width: int) -> tuple[int, float | None]:
    from .params import ffn_size

    for multiple_of, multiplier in _FFN_RULES:
        if ffn_size(dim, multiple_of, multiplier) == width:
            return multiple_of, multiplier
    if width >= ffn_size(dim, 1):
        return width, None  # rounded up to one time itself
    # Half a unit more, so that the rule's rounding down ends on the width.
    return 1, (width + 0.5) / ffn_size(dim, 1)


def _write_tokenizer(source: "Source", folder: Path) -> tuple[str, list[str]]:
    """Write tokenizer.model, and the Hugging Face files where the model has more than that; return lines on them."""
    import shutil

    from .tokenizer import convert_tokenizer, load_tokenizer

    tokenizer, config = source.tokenizer, source.config
    if tokenizer is None:
        return "none found", []
    if tokenizer.name == "tokenizer.model":
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
        return "tokenizer.model", []
    notes: list[str] = []
    line = convert_tokenizer(
        tokenizer,
        folder,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        decide=notes.append,
    )
    model_file = folder / "tokenizer.model"
    if not model_file.is_file():
        return f"{line}; there is no tokenizer.model, which Meta's loaders need", notes
    if extra := _beyond(load_tokenizer(folder, tokenizer), model_file):
        return f"tokenizer.model, which cannot hold {extra}: Hugging Face's files beside it do", notes
    for path in folder.iterdir():
        if path != model_file:
            path.unlink()
    return "tokenizer.model", notes


def _beyond(tokenizer: Any, model_file: Path) -> str:
    """Describe what a tokenizer has that its SentencePiece model does not."""
    from .tokenizer import read_sentencepiece

    pieces, _, _ = read_sentencepiece(model_file)
    added = [
        token.content
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
        if pieces.ids.get(token.content) != index
    ]
    found = []
    if added:
        named = ", ".join([*added[:4], *(["…"] if len(added) > 4 else [])])
        found.append(f"{len(added)} added token{'s' if len(added) > 1 else ''} ({named})")
    found += [
        f"{name.upper()} {getattr(tokenizer, f'{name}_token')}"
        for name in ("bos", "eos", "pad")
        if getattr(tokenizer, f"{name}_token_id") not in (None, getattr(pieces, f"{name}_id"))
    ]
    found += ["the chat template"] if tokenizer.chat_template else []
    return ", ".join(found)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hf-llama-export", description="Write Meta's layout (params.json, consolidated.NN.pth) from a LLaMA model."
    )
    parser.add_argument(
        "model", type=input_path, help="Hugging Face Llama or LlamaRepro folder, Meta folder, or .gguf file"
    )
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

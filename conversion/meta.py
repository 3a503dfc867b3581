"""Meta's layout: params.json, consolidated.NN.pth for each model-parallel rank, tokenizer.model."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_llama_repro import LlamaReproConfig
from hf_llama_repro.errors import CheckpointError

from .keys import (
    DTYPES,
    META_FREQUENCIES,
    META_FREQUENCIES_PER_LAYER,
    OUTPUT,
    TENSORS,
    Tensor,
    check_layers,
    check_names,
    expand,
    plain_names,
    sizes,
    to_half_split,
)
from .params import CONTEXT_LENGTH, DEFAULT_THETA, check_rows, ffn_size, foreign_signs, read_params
from .params import context_length as told_context_length
from .pth_file import load_tensors
from .source import CONFIG_ERRORS, Source, StoredTensor, is_file

CHECKLIST = "checklist.chk"
"""Meta's list of md5 sums, one for each file of the folder."""
SHARD_NAME = re.compile(r"consolidated\.(\d{2})\.pth")
WHOLE_NAME = "consolidated.pth"
"""A model of one shard, as some tools call it."""
_OTHER_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
Shard = dict[str, torch.Tensor]
_ROWS_COMPARED = 1024
"""Rows of two matrices that are compared together."""


def open_meta(folder: Path, *, context_length: int | None = None, chat: bool | None = None) -> Source:
    """Opens a Meta folder; tensors are joined over the shards and reordered when they are read.

    Raises `CheckpointError` for missing, extra, truncated or foreign shards, and shapes that contradict params.json.
    """
    params = read_params(folder / "params.json")
    paths = shard_paths(folder)
    notes: list[str] = []
    shards = load_shards(paths, notes.append)
    config_fields = _config_fields(params, shards, paths)
    vocab_size = config_fields["vocab_size"]
    check_rows(folder / "params.json", params, vocab_size)
    context, reason = context_length, "as asked for"
    if params.get("max_seq_len", context) != context:
        reason += f", though params.json says max_seq_len {params['max_seq_len']}"
    if context is None:
        context, reason = told_context_length(params, shards[0], config_fields["dtype"], vocab_size)
    try:
        config = LlamaReproConfig(**config_fields, max_position_embeddings=context)
    except CONFIG_ERRORS as error:
        raise CheckpointError(f"{folder / 'params.json'}: {' '.join(str(error).split())}") from None
    check_layers(shards[0], config, paths[0], "params.json")
    rows = expand(config)
    _check_shards(shards, paths, rows, config)
    drifted = _check_copies(shards, paths, rows)

    tensors = {ours: _joined([shard[meta] for shard in shards], row, config) for row, meta, ours in rows}
    embedding, output = (rows[i][1] for i in (0, -1))
    if _is_tied([shard[embedding] for shard in shards], [shard[output] for shard in shards]):
        config.tie_word_embeddings = True
        del tensors[OUTPUT]

    notes.append(f"context of {context} tokens: {reason}")
    if paths[0].name == WHOLE_NAME:
        notes.append(f"{WHOLE_NAME} read as the only shard, consolidated.00.pth")
    if "max_batch_size" in params:
        notes.append(f"max_batch_size {params['max_batch_size']} left out: it sizes the cache of Meta's loader")
    listed = _read_checklist(folder)
    if listed:
        notes.append(f"md5 of {len(listed)} file{'s' if len(listed) > 1 else ''} as in {CHECKLIST}")
    if drifted:
        notes.append(f"{drifted} norms differ in their last bit between the shards: those of {paths[0].name} are taken")
    if config.tie_word_embeddings:
        notes.append("output matrix equal to the embedding: tied")
    tokenizer = _tokenizer(folder)
    if chat is None:
        chat, note = _told_chat(folder, params, context, vocab_size)
        if tokenizer is not None and (tokenizer.is_file() or (tokenizer / "tokenizer.model").is_file()):
            notes.append(note)
    return Source(
        description=f"Meta folder, {len(paths)} shard{'s' if len(paths) > 1 else ''}",
        config=config,
        tensors=tensors,
        tokenizer=tokenizer,
        files={**dict.fromkeys([folder / "params.json", *paths]), **listed},
        chat=chat,
        token_ids_from_tokenizer=True,
        notes=tuple(notes),
    )


def _told_chat(folder: Path, params: dict[str, Any], context: int, vocab_size: int) -> tuple[bool, str]:
    """Whether it is a LLaMA 2 chat model, and why. The folder's name is no proof where the files say something else."""
    if not re.search(r"(^|[-_. ])chat($|[-_. ])", folder.resolve().name.lower()):
        return False, "base model, going by the folder's name (--chat or --no-chat says otherwise)"
    contrary = [sign for sign, _ in foreign_signs(params, vocab_size)]
    if context == CONTEXT_LENGTH["LLaMA 1"]:
        contrary.append(f"a context of {context} tokens")
    if contrary:
        return False, (
            f"base model: the folder's name says chat, but {' and '.join(contrary)} "
            f"{'are' if len(contrary) > 1 else 'is'} not LLaMA 2's (--chat writes its template all the same)"
        )
    return True, "chat model, going by the folder's name (--chat or --no-chat says otherwise)"


def shard_paths(folder: Path) -> list[Path]:
    """consolidated.NN.pth by rank. Raises `CheckpointError` where one is missing."""
    paths = sorted(path for path in folder.glob("consolidated.*.pth") if SHARD_NAME.fullmatch(path.name))
    expected = [f"consolidated.{rank:02d}.pth" for rank in range(len(paths))]
    if not paths and (folder / WHOLE_NAME).is_file():
        return [folder / WHOLE_NAME]
    if not paths:
        others = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHER_SUFFIXES)
        raise CheckpointError(
            f"{folder} has params.json but no consolidated.00.pth: "
            + (
                f"there is {', '.join(others[:5])}; if that is Meta's file under another name, rename it to "
                "consolidated.00.pth, and further shards to consolidated.01.pth and so on"
                if others
                else "the weights are missing"
            )
        )
    if [path.name for path in paths] != expected:
        missing = sorted(
            {f"consolidated.{rank:02d}.pth" for rank in range(_rank(paths[-1]) + 1)} - {p.name for p in paths}
        )
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}, but has {paths[-1].name}: download what is missing"
        )
    return paths


def _rank(path: Path) -> int:
    match = SHARD_NAME.fullmatch(path.name)
    assert match
    return int(match[1])


def load_shards(paths: list[Path], tell: Callable[[str], None] = lambda note: None) -> list[Shard]:
    """The tensors of every shard under Meta's names; `tell` is given a line on names that were others."""
    shards = []
    for path in paths:
        shard = load_tensors(path, tell)
        names = plain_names(shard, TENSORS[0].meta)
        if renamed := [name for name, plain in names.items() if name != plain]:
            tell(f"{path.name}: {renamed[0]} and {len(renamed) - 1} more are read as {names[renamed[0]]} and so on")
        shards.append({names[name]: tensor for name, tensor in shard.items()})
    return shards


def _config_fields(params: dict[str, Any], shards: list[Shard], paths: list[Path]) -> dict[str, Any]:
    """Fields of the configuration, from params.json and, where it does not tell, from the shapes."""
    embedding, gate = (
        _first(shards[0], name, paths[0]) for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight")
    )
    dim, heads = params["dim"], params["n_heads"]
    intermediate_size = gate.shape[0] * len(shards)
    if "multiple_of" in params:
        by_rule = ffn_size(dim, params["multiple_of"], params.get("ffn_dim_multiplier"))
        if by_rule != intermediate_size:
            fitting = by_rule / gate.shape[0]
            raise CheckpointError(
                f"{paths[0].parent}: params.json says a feed-forward width of {by_rule}, but {len(shards)} shard(s) of "
                f"{gate.shape[0]} rows make {intermediate_size}"
                + (f"; {fitting:.0f} shards would fit: missing or extra files?" if fitting.is_integer() else "")
            )
    if len(shards) > 1 and embedding.shape[1] == dim:
        raise CheckpointError(
            f"{paths[0].parent}: the embedding is cut along the vocabulary, as Llama 3's shards are: "
            "convert that release's Hugging Face folder"
        )
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": dim,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": params.get("n_kv_heads") or heads,
        "head_dim": params.get("head_dim") or dim // heads,
        "rms_norm_eps": float(params["norm_eps"]),
        "rope_theta": float(params.get("rope_theta") or DEFAULT_THETA),
        "dtype": _dtype(shards, paths),
    }


def _first(shard: Shard, name: str, path: Path) -> torch.Tensor:
    if name not in shard or shard[name].ndim != 2 or not shard[name].numel():
        raise CheckpointError(f"{path} has no matrix {name} with values: it is not a shard of a LLaMA model")
    return shard[name]


def _dtype(shards: list[Shard], paths: list[Path]) -> torch.dtype:
    """The dtype that holds every weight without loss."""
    dtype = None
    for shard, path in zip(shards, paths, strict=True):
        for name, tensor in shard.items():
            if _is_frequencies(name):
                continue
            if tensor.dtype not in DTYPES:
                raise CheckpointError(f"{path}: {name} is {tensor.dtype}, but a LLaMA weight is a 16- or 32-bit float")
            dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
    assert dtype is not None
    return dtype


def _is_frequencies(name: str) -> bool:
    return bool(META_FREQUENCIES.fullmatch(name) or META_FREQUENCIES_PER_LAYER.fullmatch(name))


def _check_shards(
    shards: list[Shard], paths: list[Path], rows: list[tuple[Tensor, str, str]], config: LlamaReproConfig
) -> None:
    """Every shard holds every tensor in its cut shape and in the dtype of the first."""
    named = sizes(config)
    for shard, path in zip(shards, paths, strict=True):
        found, expected_names = {name for name in shard if not _is_frequencies(name)}, {meta for _, meta, _ in rows}
        if found == expected_names - {TENSORS[-1].meta}:
            raise CheckpointError(
                f"{path} has no {TENSORS[-1].meta}, which Meta's files hold even where it is the embedding: "
                "save it too, and for a tied model the embedding under both names"
            )
        check_names(found, expected_names, str(path))
        for row, meta, _ in rows:
            whole = [named[size] for size in row.shape]
            expected = [size // len(shards) if dim == row.cut else size for dim, size in enumerate(whole)]
            if row.cut is not None and whole[row.cut] % len(shards):
                raise CheckpointError(f"{path}: {meta} of {whole} cannot be cut into {len(shards)} equal shards")
            if list(shard[meta].shape) != expected:
                raise CheckpointError(
                    f"{path}: {meta} has shape {list(shard[meta].shape)}, but params.json and {len(shards)} shard(s) "
                    f"ask for {expected}"
                )
            if shard[meta].dtype != shards[0][meta].dtype:
                raise CheckpointError(
                    f"{path}: {meta} is {shard[meta].dtype}, but {shards[0][meta].dtype} in {paths[0].name}: "
                    "the shards are not of one checkpoint"
                )


def _check_copies(shards: list[Shard], paths: list[Path], rows: list[tuple[Tensor, str, str]]) -> int:
    """Raises `CheckpointError` unless the shards are of one checkpoint; the number of norms that are only nearly equal.

    Every shard holds the same norms. Ranks that update their copies each for itself may round one differently, but
    another model's, or the same model's after more training, differ by more.
    """
    drifted = set()
    for shard, path in zip(shards[1:], paths[1:], strict=True):
        for meta in (meta for row, meta, _ in rows if row.cut is None):
            first, copy = shards[0][meta], shard[meta]
            if torch.equal(_bits(first), _bits(copy)):  # as bytes: NaN is unequal to itself
                continue
            if not torch.allclose(first.float(), copy.float(), rtol=torch.finfo(first.dtype).eps, atol=0):
                raise CheckpointError(
                    f"{path}: {meta} differs from {paths[0].name}, though every shard holds the same one: "
                    "the shards are not of one checkpoint"
                )
            drifted.add(meta)
    first_gate = "layers.0.feed_forward.w1.weight"
    seen: dict[bytes, Path] = {}
    for shard, path in zip(shards, paths, strict=True):
        content = hashlib.md5(_bits(shard[first_gate]).numpy().data, usedforsecurity=False).digest()
        if (earlier := seen.setdefault(content, path)) is not path and shard[first_gate].any():
            raise CheckpointError(f"{path} repeats {earlier.name}: the same shard under two names")
    return len(drifted)


def _read_checklist(folder: Path) -> dict[Path, str | None]:
    """File -> the md5 that Meta's list gives it. Raises `CheckpointError` where one is missing."""
    listing = folder / CHECKLIST
    text = listing.read_text(encoding="utf-8", errors="replace") if listing.is_file() else ""
    listed: dict[Path, str | None] = {}
    for md5, name in re.findall(r"^([0-9a-f]{32})[ \t]+\*?(\S+)\s*$", text, re.MULTILINE):
        if Path(name).name != name:
            raise CheckpointError(f"{listing} names {name}, which is not in the same folder: remove that line")
        if not is_file(folder / name):
            raise CheckpointError(f"{listing} names {name}, which is not there: download it")
        listed[folder / name] = md5
    return listed


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _joined(pieces: list[torch.Tensor], row: Tensor, config: LlamaReproConfig) -> StoredTensor:
    shape = list(pieces[0].shape)
    if row.cut is not None:
        shape[row.cut] *= len(pieces)

    def read() -> torch.Tensor:
        # A single piece as it lies in the file.
        whole = pieces[0] if row.cut is None or len(pieces) == 1 else torch.cat(pieces, dim=row.cut)
        # Heads are reordered after joining: a cut may go through the middle of one.
        return whole if row.heads is None else to_half_split(whole, getattr(config, row.heads))

    return StoredTensor(tuple(shape), pieces[0].dtype, read)


def _is_tied(embedding: list[torch.Tensor], output: list[torch.Tensor]) -> bool:
    """Whether the output matrix is the embedding, bit for bit. Meta always stores both."""
    if embedding[0].dtype != output[0].dtype:
        return False
    start = 0
    for piece in output:  # rows of the output matrix, against the same rows of the embedding
        for rows in piece.split(_ROWS_COMPARED):
            same = torch.cat([columns[start : start + len(rows)] for columns in embedding], dim=1)
            if not torch.equal(_bits(same), _bits(rows)):
                return False
            start += len(rows)
    return True


def _tokenizer(folder: Path) -> Path | None:
    """tokenizer.model in the folder or one level up; the folder where it holds a Hugging Face tokenizer."""
    from .tokenizer_settings import settings_files

    folder = folder.resolve()
    own = (folder / "tokenizer.model").is_file()
    if (folder / "tokenizer.json").is_file() or (own and settings_files(folder)):
        return folder
    return next(
        (path for path in (folder / "tokenizer.model", folder.parent / "tokenizer.model") if path.is_file()), None
    )

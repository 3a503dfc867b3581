"""Meta's layout: params.json, consolidated.NN.pth for each model-parallel rank, tokenizer.model."""

import hashlib
import json
import re
import warnings
import zipfile
from collections.abc import Iterable
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
    Tensor,
    check_layers,
    check_names,
    expand,
    sizes,
    to_half_split,
)
from .pth_file import check_storages, record_sizes
from .source import CONFIG_ERRORS, Source, StoredTensor, is_file

CHECKLIST = "checklist.chk"
"""Meta's list of md5 sums, one for each file of the folder."""
SHARD_NAME = re.compile(r"consolidated\.(\d{2})\.pth")
# Context in tokens that each generation was trained with; the files do not name it.
CONTEXT_LENGTH = {"LLaMA 1": 2048, "LLaMA 2": 4096}
Shard = dict[str, torch.Tensor]
_OPTIONAL_NUMBERS = ("n_kv_heads", "multiple_of", "ffn_dim_multiplier", "rope_theta", "head_dim", "max_seq_len")
_FRACTIONS = ("norm_eps", "ffn_dim_multiplier", "rope_theta")
_MAX_NUMBER = 10**12
_ROWS_COMPARED = 1024
"""Rows of two matrices that are compared together."""


def open_meta(folder: Path, *, context_length: int | None = None, chat: bool | None = None) -> Source:
    """Opens a Meta folder; tensors are joined over the shards and reordered when they are read.

    Raises `CheckpointError` for missing, extra, truncated or foreign shards, and shapes that contradict params.json.
    """
    params = read_params(folder / "params.json")
    paths = shard_paths(folder)
    shards = [load_shard(path) for path in paths]
    config_fields = _config_fields(params, shards, paths)
    context, reason = _context_length(params, shards, context_length, config_fields)
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

    notes = [f"context of {context} tokens: {reason}"]
    listed = _read_checklist(folder)
    if listed:
        notes.append(f"md5 of {len(listed)} file{'s' if len(listed) > 1 else ''} as in {CHECKLIST}")
    if drifted:
        notes.append(f"{drifted} norms differ in their last bit between the shards: those of {paths[0].name} are taken")
    if config.tie_word_embeddings:
        notes.append("output matrix equal to the embedding: tied")
    tokenizer = _tokenizer(folder)
    if chat is None:
        chat = bool(re.search(r"(^|[-_. ])chat($|[-_. ])", folder.resolve().name.lower()))
        if tokenizer is not None and (tokenizer.is_file() or (tokenizer / "tokenizer.model").is_file()):
            kind = "chat" if chat else "base"
            notes.append(f"{kind} model, going by the folder's name (--chat or --no-chat says otherwise)")
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


def read_params(path: Path) -> dict[str, Any]:
    """params.json as a dictionary; `CheckpointError` for a file that is missing, empty, or not JSON."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: it comes with the consolidated.NN.pth files")
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 ({error}): download it again") from None
    if not text:
        raise CheckpointError(f"{path} is empty: download it again")
    if text.startswith("<"):
        raise CheckpointError(f"{path} is a web page, not JSON (an error of the download?): download it again")
    try:
        params = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again") from None
    if not isinstance(params, dict):
        raise CheckpointError(f"{path} holds a {type(params).__name__}, not a JSON object: download it again")
    # A field with null counts as left out.
    params = {name: value for name, value in params.items() if value is not None}
    needed = {"dim", "n_layers", "n_heads", "norm_eps"}
    if missing := needed - set(params):
        raise CheckpointError(
            f"{path} lacks {', '.join(sorted(missing))}: it is not the params.json of a LLaMA checkpoint"
        )
    for name in (*sorted(needed), *_OPTIONAL_NUMBERS):
        value = params.get(name, 1)
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _MAX_NUMBER
        if not number or not (isinstance(value, int) or name in _FRACTIONS):
            kind = "number" if name in _FRACTIONS else "whole number"
            raise CheckpointError(f"{path}: {name} = {str(value)[:40]!r} is not a positive {kind} of a sensible size")
    if params["dim"] % params["n_heads"] and "head_dim" not in params:
        raise CheckpointError(f"{path}: dim = {params['dim']} is not a multiple of n_heads = {params['n_heads']}")
    if params["n_heads"] % (params.get("n_kv_heads") or params["n_heads"]):
        raise CheckpointError(
            f"{path}: n_heads = {params['n_heads']} is not a multiple of n_kv_heads = {params['n_kv_heads']}"
        )
    if params.get("use_scaled_rope"):
        raise CheckpointError(f"{path}: use_scaled_rope is of Llama 3.1, which this converter does not know")
    return params


def ffn_size(dim: int, multiple_of: int, ffn_dim_multiplier: float | None = None) -> int:
    """Width of the SwiGLU by Meta's rule: two thirds of 4 dim, scaled, rounded up to a multiple."""
    size = int(2 * 4 * dim / 3)
    if ffn_dim_multiplier is not None:
        size = int(ffn_dim_multiplier * size)
    return multiple_of * ((size + multiple_of - 1) // multiple_of)


def shard_paths(folder: Path) -> list[Path]:
    """consolidated.NN.pth by rank. Raises `CheckpointError` where one is missing."""
    paths = sorted(path for path in folder.glob("consolidated.*.pth") if SHARD_NAME.fullmatch(path.name))
    expected = [f"consolidated.{rank:02d}.pth" for rank in range(len(paths))]
    if not paths:
        raise CheckpointError(f"{folder} has params.json but no consolidated.00.pth: the weights are missing")
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


def load_shard(path: Path) -> Shard:
    """The tensors of one shard, memory-mapped: read when they are used, by a loader that runs no code."""
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file: download it again")
    records = None
    try:
        if zipfile.is_zipfile(path):
            records = record_sizes(path)
        else:
            with path.open("rb") as file:
                start = file.read(2)
            # Files of torch < 1.6 are bare pickles, which begin with their protocol.
            if start[:1] != b"\x80":
                raise CheckpointError(
                    f"{path} is truncated or not a PyTorch file ({path.stat().st_size:,} bytes): download it again"
                )
        with warnings.catch_warnings():
            # The one error says what there is to say.
            warnings.simplefilter("ignore")
            shard = torch.load(path, map_location="cpu", weights_only=True, mmap=records is not None)
    except (CheckpointError, PermissionError):
        raise
    except Exception as error:  # the loader raises whatever the damage leads to
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path} holds code that loading would execute ({code[1]}); "
                "it was refused and nothing was run. A checkpoint of Meta's holds tensors only"
            ) from None
        raise CheckpointError(f"{path} is truncated or damaged ({_reason(error)}): download it again") from None
    if not isinstance(shard, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and _is_plain(tensor)
        for name, tensor in dict.items(shard)
    ):
        raise CheckpointError(f"{path} holds no dictionary of tensors: it is not a shard of a Meta checkpoint")
    # Not shard.items() nor tensor.detach(): a file may give both of them attributes of any name.
    tensors = {name: torch.Tensor.detach(tensor).resolve_neg() for name, tensor in dict.items(shard)}
    check_storages(path, tensors, records)
    return tensors


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether its values are in memory, one for each place."""
    return tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_nested


def _reason(error: Exception) -> str:
    """torch's message without its page of advice on how to load it all the same."""
    lines = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


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
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": dim,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": params.get("n_kv_heads") or heads,
        "head_dim": params.get("head_dim") or dim // heads,
        "rms_norm_eps": float(params["norm_eps"]),
        "rope_theta": float(params.get("rope_theta") or 10000.0),
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


def _context_length(
    params: dict[str, Any], shards: list[Shard], asked: int | None, fields: dict[str, Any]
) -> tuple[int, str]:
    """Context in tokens and why. The files name it nowhere, but LLaMA 1 and 2 differ in what they say around it."""
    if asked is not None:
        return asked, "as asked for"
    if "max_seq_len" in params:
        return params["max_seq_len"], "params.json says so"
    evidence = _evidence(params, shards[0], fields["dtype"])
    versions = {version for version, _ in evidence}
    if len(versions) == 1:
        version = versions.pop()
        return CONTEXT_LENGTH[version], f"{version} ({', '.join(sign for _, sign in evidence)})"
    said = "; ".join(f"{sign} speaks for {version}" for version, sign in evidence) or "nothing in them differs"
    raise CheckpointError(
        f"the files do not tell LLaMA 1 from LLaMA 2 ({said}): say --context-length 2048 (LLaMA 1) or 4096 (LLaMA 2)"
    )


def tells_context_length(params: dict[str, Any], dtype: torch.dtype | str, context_length: int) -> bool:
    """Whether the context of an exported checkpoint is recognised without being written."""
    versions = {version for version, _ in _evidence(params, (), dtype)}
    return {CONTEXT_LENGTH[version] for version in versions} == {context_length}


def _evidence(params: dict[str, Any], names: Iterable[str], dtype: torch.dtype | str) -> list[tuple[str, str]]:
    """(version, sign) for every sign; one that is certain stands alone."""
    if params.get("n_kv_heads") or params.get("ffn_dim_multiplier"):
        return [("LLaMA 2", "grouped-query attention or a feed-forward multiplier in params.json")]
    if any(META_FREQUENCIES_PER_LAYER.fullmatch(name) for name in names):
        return [("LLaMA 1", "rotary frequencies in every layer")]
    if any(META_FREQUENCIES.fullmatch(name) for name in names):
        return [("LLaMA 2", "rotary frequencies beside the layers")]
    evidence = []
    if dtype is torch.float16:
        evidence.append(("LLaMA 1", "float16 weights"))
    if dtype is torch.bfloat16:
        evidence.append(("LLaMA 2", "bfloat16 weights"))
    if params["norm_eps"] == 1e-6:
        evidence.append(("LLaMA 1", "norm_eps 1e-06"))
    # LLaMA 65B has been seen with 1e-5 as well, and LLaMA 2 has no model of its size.
    if params["norm_eps"] == 1e-5 and params["dim"] != 8192:
        evidence.append(("LLaMA 2", "norm_eps 1e-05"))
    return evidence


def _check_shards(
    shards: list[Shard], paths: list[Path], rows: list[tuple[Tensor, str, str]], config: LlamaReproConfig
) -> None:
    """Every shard holds every tensor in its cut shape and in the dtype of the first."""
    named = sizes(config)
    for shard, path in zip(shards, paths, strict=True):
        check_names({name for name in shard if not _is_frequencies(name)}, {meta for _, meta, _ in rows}, str(path))
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

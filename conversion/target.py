"""What a conversion writes: a folder that appears under its name only when whole, and weights in safetensors shards."""

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from hf_llama_repro.errors import CheckpointError, failed_write

from .source import StoredTensor

# Files by which a folder is known for a checkpoint, which --overwrite may replace.
_CHECKPOINT_MARKS = ("config.json", "params.json")
_DECIMAL = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_FINITE_BLOCK = 1 << 24
"""Values looked at together, so that the mask of a large tensor stays small."""


@contextlib.contextmanager
def whole_or_nothing(target: Path, *sources: Path, overwrite: bool, num_bytes: int) -> Iterator[Path]:
    """Yields an empty folder beside `target`, which takes its name when the block ends, and is removed when it fails.

    `num_bytes`: what is going to be written, to be told before it begins that the disk is too small.
    Raises `CheckpointError` when `target` exists (with `overwrite`: when it is not a checkpoint), or is in a source.
    """
    target = target.absolute()
    _check_target(target, sources, overwrite=overwrite)
    partial = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
    replaced = partial.with_name(f"{partial.name}-replaced")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < num_bytes:
            raise CheckpointError(f"{target} needs {num_bytes / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free there")
        partial.mkdir()
        yield partial
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
    except CheckpointError:
        raise
    except Exception as error:
        if (reason := failed_write(error)) is None:
            raise
        raise CheckpointError(f"{target} could not be written ({reason}); nothing is left of it") from error
    finally:
        # Stopped between the two renames: the old folder comes back.
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        for folder in (partial, replaced):
            shutil.rmtree(folder, ignore_errors=True)


def _check_target(target: Path, sources: Iterable[Path], *, overwrite: bool) -> None:
    for source in sources:
        resolved, origin = target.resolve(), source.resolve()
        if resolved == origin or resolved in origin.parents or origin in resolved.parents:
            raise CheckpointError(
                f"{target} and the source {source.absolute()} are inside of one another: choose another target"
            )
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} exists: choose another target, or replace it with --overwrite")
    if target.exists() and not any((target / mark).is_file() for mark in _CHECKPOINT_MARKS):
        raise CheckpointError(f"{target} exists and is no checkpoint: --overwrite replaces only a checkpoint's folder")


def parse_size(text: str) -> int:
    """Bytes of "5GB" or "200MB" (decimal units, as Hugging Face counts)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)", text.strip().upper())
    if not match or not (size := int(float(match[1]) * _DECIMAL[match[2]])):
        raise CheckpointError(f"{text!r} is not a size: write it like 5GB or 200MB")
    return size


@dataclass
class Written:
    """What `write_weights` did."""

    num_parameters: int = 0
    num_bytes: int = 0
    files: list[str] = field(default_factory=list)
    num_cast: int = 0
    """Values that were cast to another dtype."""
    num_changed: int = 0
    """Values that the cast did not keep exactly."""
    nonfinite: dict[str, int] = field(default_factory=dict)
    """Tensor -> number of NaN and infinite values."""


def write_weights(
    folder: Path,
    tensors: dict[str, StoredTensor],
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    allow_nonfinite: bool,
) -> Written:
    """Writes model.safetensors, or numbered shards and their index; holds one shard in memory.

    `dtype` None keeps each tensor's own. Raises `CheckpointError` at the first NaN or infinite value, unless allowed.
    """
    shards = _plan({name: _target_bytes(tensor, dtype) for name, tensor in tensors.items()}, max_shard_bytes)
    written = Written()
    weight_map: dict[str, str] = {}
    total = sum(tensor.num_bytes for tensor in tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=None) as progress:
        for number, names in enumerate(shards, start=1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            content = {}
            for name in names:
                tensor = tensors[name]
                content[name] = _checked(
                    name, tensor.read(), dtype or tensor.dtype, written, allow_nonfinite=allow_nonfinite
                )
                progress.update(tensor.num_bytes)
            save_file(content, folder / file, metadata={"format": "pt"})
            # safetensors makes it readable by the owner only; as every other file, like the folder.
            (folder / file).chmod(folder.stat().st_mode & 0o666)
            written.files.append(file)
            written.num_parameters += sum(tensor.numel() for tensor in content.values())
            written.num_bytes += sum(tensor.nbytes for tensor in content.values())
            weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        metadata = {"total_parameters": written.num_parameters, "total_size": written.num_bytes}
        write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})
    return written


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + os.linesep, encoding="utf-8")


def num_target_bytes(tensors: dict[str, StoredTensor], dtype: torch.dtype | None) -> int:
    return sum(_target_bytes(tensor, dtype) for tensor in tensors.values())


def _target_bytes(tensor: StoredTensor, dtype: torch.dtype | None) -> int:
    return torch.Size(tensor.shape).numel() * (dtype or tensor.dtype).itemsize


def _plan(num_bytes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Tensors in their order, a new shard whenever the next one would not fit."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in num_bytes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _checked(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, written: Written, *, allow_nonfinite: bool
) -> torch.Tensor:
    """The tensor in its target dtype; counts what is not finite and what the cast changed."""
    nonfinite = sum(int((~block.isfinite()).sum()) for block in tensor.view(-1).split(_FINITE_BLOCK))
    if nonfinite:
        written.nonfinite[name] = nonfinite
        if not allow_nonfinite:
            raise CheckpointError(
                f"{name} holds {nonfinite} NaN or infinite values of {tensor.numel()}: the checkpoint is damaged; "
                "hf-llama-convert --allow-nonfinite converts it all the same"
            )
    if dtype == tensor.dtype:
        return tensor
    cast = tensor.to(dtype)
    if overflown := int((~cast.isfinite()).sum()) - nonfinite:
        raise CheckpointError(
            f"{name} holds {overflown} values beyond the range of {dtype}: choose --dtype bfloat16 or float32"
        )
    written.num_cast += tensor.numel()
    written.num_changed += int((cast.to(tensor.dtype) != tensor).sum()) - int(tensor.isnan().sum())
    return cast

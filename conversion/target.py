"""What a conversion writes: a folder that appears under its name only when whole, and weights in safetensors shards."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hf_llama_repro.errors import CheckpointError, failed_write
from hf_llama_repro.mapped_pages import release_mapped_pages
from hf_llama_repro.outputs import obstacle

from .manifest import MANIFEST, Manifest, unfinished
from .safetensors_file import SafetensorsWriter
from .source import Source, StoredTensor

# Files by which a folder is known for a checkpoint, which --overwrite may replace.
_CHECKPOINT_MARKS = ("config.json", "params.json")
_DECIMAL = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BLOCK = 1 << 22
"""Values looked at together, so that their copies stay in a core's cache or near it."""
_RELEASED = 1 << 25
"""Bytes that are read before mapped pages are let go of."""


@contextlib.contextmanager
def whole_or_nothing(
    target: Path,
    *sources: Path,
    overwrite: bool,
    num_bytes: int,
    request: dict[str, Any] | None = None,
    resume: bool | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[Path]:
    """Yields a folder beside `target`, which takes its name when the block ends; it is empty, or is gone on with.

    Where the block fails the folder is removed. Where it is stopped, or the disk fills up, it stays if its manifest
    names finished files; then `resume` True hands it over for the same `request` (what `Manifest` is given), False
    begins anew, None refuses. `num_bytes`: what is going to be written, to be told before it begins that the disk is
    too small. Raises `CheckpointError` when `target` exists (with `overwrite`: when it is not a checkpoint), or is in
    a source, or is just being made by another process.
    """
    target = target.absolute()
    partial, replaced = (target.parent / f".{target.name}.{state}" for state in ("partial", "replaced"))
    _bring_back(replaced, target)
    check_target(target, *sources, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(partial):
            finished = _begin(partial, request, resume)
            free = _check_space(partial, target, num_bytes - finished)
            tell(f"space      {(num_bytes - finished) / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free")
            try:
                yield partial
                _publish(partial, target, replaced)
            except BaseException as error:
                stopped = isinstance(error, KeyboardInterrupt) or failed_write(error) is not None
                if not (stopped and unfinished(partial)):
                    shutil.rmtree(partial, ignore_errors=True)
                raise
    except CheckpointError:
        raise
    except Exception as error:
        if (reason := failed_write(error)) is None:
            raise
        left = (
            f"what is finished is kept in {partial}: mend that, and go on with --resume"
            if unfinished(partial)
            else "nothing is left of it"
        )
        raise CheckpointError(f"{target} could not be written ({reason}); {left}") from error


@contextlib.contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Makes the folder, and holds it against other processes as long as the block runs."""
    try:
        import fcntl
    except ImportError:  # Windows
        partial.mkdir(exist_ok=True)
        yield
        return
    partial.mkdir(exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = partial.exists() and os.path.samestat(os.fstat(handle), partial.stat())
        except BlockingIOError:
            mine = False
        if not mine:
            raise CheckpointError(f"{partial} is being written by another process: wait for it, or stop it")
        yield
    finally:
        os.close(handle)


def _begin(partial: Path, request: dict[str, Any] | None, resume: bool | None) -> int:
    """Bytes that are finished in the folder, from which all else is removed."""
    left = unfinished(partial)
    kept: dict[str, int] = {}
    if left is not None and request is None:
        raise CheckpointError(
            f"{partial} holds {len(left['finished'])} finished files of an interrupted hf-llama-convert: "
            "let that go on with --resume, or remove the folder"
        )
    if left is not None and resume is None:
        raise CheckpointError(
            f"{partial} holds {len(left['finished'])} finished files of an interrupted run: "
            "go on with --resume, or begin anew with --no-resume"
        )
    if left is not None and request is not None and resume:
        before = left["request"]
        if differing := sorted(name for name in {*before, *request} if before.get(name) != request.get(name)):
            raise CheckpointError(
                f"{partial} was begun with another {', '.join(differing)}: go on with the same, "
                "or begin anew with --no-resume"
            )
        kept = {MANIFEST: 0, **{name: entry["bytes"] for name, entry in left["finished"].items()}}
    for path in partial.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return sum(kept.values())


def _check_space(partial: Path, target: Path, num_bytes: int) -> int:
    """Bytes that are free for it."""
    free = shutil.disk_usage(partial).free
    if free < num_bytes:
        with contextlib.suppress(OSError):  # it stays if something finished is in it
            partial.rmdir()
        raise CheckpointError(f"{target} needs {num_bytes / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free there")
    return free


def _publish(partial: Path, target: Path, replaced: Path) -> None:
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    try:
        partial.rename(target)
    finally:
        _bring_back(replaced, target)
        shutil.rmtree(replaced, ignore_errors=True)


def _bring_back(replaced: Path, target: Path) -> None:
    """After a stop between the two renames the folder that was to be replaced gets its name again."""
    if replaced.exists() and not target.exists():
        replaced.rename(target)


def check_target(target: Path, *sources: Path, overwrite: bool) -> None:
    """Raises `CheckpointError` where the folder cannot be made under this name; for before a source is opened, too."""
    if (reason := obstacle(target.parent)) is not None:
        raise CheckpointError(f"{target} could not be written ({reason})")
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
    """Of the values, without the files' headers."""
    num_cast: int = 0
    """Values that were cast to another dtype."""
    num_changed: int = 0
    """Values that the cast did not keep exactly."""
    nonfinite: dict[str, int] = field(default_factory=dict)
    """Tensor -> number of NaN and infinite values."""
    files: list[str] = field(default_factory=list)

    def add(self, shard: "Written") -> None:
        for name, value in vars(shard).items():
            mine = getattr(self, name)
            setattr(self, name, {**mine, **value} if isinstance(value, dict) else mine + value)


def write_weights(
    source: Source,
    manifest: Manifest,
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    allow_nonfinite: bool,
    advance: Callable[[float], None] = lambda share: None,
) -> Written:
    """Writes model.safetensors, or numbered shards and their index, into the manifest's folder, tensor by tensor.

    `dtype` None keeps each tensor's own. Shards that the manifest has are left as they are. `advance` is told after
    each tensor what share is done, and may raise. Raises `CheckpointError` at the first NaN or infinite value, unless
    allowed.
    """
    folder, tensors = manifest.path.parent, source.tensors
    shards = _plan({name: _target_bytes(tensor, dtype) for name, tensor in tensors.items()}, max_shard_bytes)
    written = Written()
    weight_map: dict[str, str] = {}
    total, done = sum(tensor.num_bytes for tensor in tensors.values()), 0

    def step(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress.update(num_bytes)
        advance(done / total)

    with _one_thread(), tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=None) as progress:
        for number, names in enumerate(shards, start=1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map.update(dict.fromkeys(names, file))
            content = {name: tensors[name] for name in names}
            if file in manifest.finished:
                step(sum(tensor.num_bytes for tensor in content.values()))
            else:
                entry = _write_shard(folder / file, content, source.files, dtype, allow_nonfinite, step)
                manifest.finish(file, entry)
            written.add(Written(**manifest.finished[file]["written"]))
    if len(shards) > 1:
        metadata = {"total_parameters": written.num_parameters, "total_size": written.num_bytes}
        write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})
    return written


def _write_shard(
    path: Path,
    content: dict[str, StoredTensor],
    sources: Iterable[Path],
    dtype: torch.dtype | None,
    allow_nonfinite: bool,
    step: Callable[[int], None],
) -> dict[str, Any]:
    """Writes a file of weights; its entry in the manifest. `step` is told the bytes of each tensor."""
    shard = Written(files=[path.name])
    layout = {name: (tensor.shape, dtype or tensor.dtype) for name, tensor in content.items()}
    with SafetensorsWriter(path, layout) as writer:
        for name, tensor in _read_one_by_one(content, sources):
            writer.add(name, _checked(name, tensor, layout[name][1], shard, allow_nonfinite=allow_nonfinite))
            step(content[name].num_bytes)
        sha256 = writer.finish()
    return {"bytes": writer.num_bytes, "sha256": sha256, "written": asdict(shard)}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """torch computes in one thread: sums and writing keep the other cores busy, and its own threads wait spinning."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read_one_by_one(tensors: dict[str, StoredTensor], files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Reads in order, and lets go of what was read before."""
    resident = 0
    for name, tensor in tensors.items():
        yield name, tensor.read()
        resident += tensor.num_bytes
        if resident > _RELEASED:
            release_mapped_pages(files)
            resident = 0
    release_mapped_pages(files)


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
    blocks = tensor.reshape(-1).split(_BLOCK)
    nonfinite = sum(_num_nonfinite(block) for block in blocks)
    if nonfinite:
        written.nonfinite[name] = nonfinite
        if not allow_nonfinite:
            raise CheckpointError(
                f"{name} holds {nonfinite} NaN or infinite values of {tensor.numel()}: the checkpoint is damaged; "
                "hf-llama-convert --allow-nonfinite converts it all the same"
            )
    written.num_parameters += tensor.numel()
    written.num_bytes += tensor.numel() * dtype.itemsize
    if dtype == tensor.dtype:
        return tensor
    cast = torch.empty(tensor.shape, dtype=dtype)
    for block, target in zip(blocks, cast.view(-1).split(_BLOCK), strict=True):
        target.copy_(block)
        written.num_changed += int((target.to(block.dtype) != block).sum()) - int(block.isnan().sum())
    if overflown := sum(_num_nonfinite(block) for block in cast.view(-1).split(_BLOCK)) - nonfinite:
        raise CheckpointError(
            f"{name} holds {overflown} values beyond the range of {dtype}: choose --dtype bfloat16 or float32"
        )
    written.num_cast += tensor.numel()
    return cast


def _num_nonfinite(block: torch.Tensor) -> int:
    """NaN and infinite values. Their extremes are one pass at the speed of memory, and NaN where one value is."""
    return 0 if torch.stack(block.aminmax()).isfinite().all() else int((~block.isfinite()).sum())

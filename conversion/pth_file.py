"""Writes a file that `torch.load` opens, tensor by tensor: `torch.save` needs all of them in memory at once.
Loads one after looking through it, for `torch.load` believes much of what a memory-mapped file says.

The format is a zip archive without compression: data.pkl, a pickle that names storages, and data/0, data/1, …, their
bytes, which begin at multiples of 64 so that they can be mapped.
"""

import pickle
import re
import struct
import sys
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_llama_repro.errors import CheckpointError

from .page_cache import StreamedFile
from .source import check_downloaded

_ALIGNMENT = 64
_PADDING_FIELD = b"FB"  # the name that PyTorch gives the field of a zip header that holds nothing
_LOCAL_HEADER, _ZIP64_FIELD, _FIELD_HEAD = 30, 20, 4  # bytes
_ENCRYPTED = 1  # bit of a zip entry's flags
_BLOCK = 1 << 24
_AGAIN = "download it again"
_WEIGHT_ENTRIES = ("model", "state_dict", "model_state_dict", "module")
"""Names by which training programs save the weights beside the rest."""
_MAX_REPEATED = 1 << 30
"""Values of a tensor that stores fewer than it has, as expand() makes them; LLaMA 2's largest has 0.26e9."""
_STORAGES: dict[torch.dtype, Any] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    shape: tuple[int, ...]


class PthWriter:
    """An open .pth file that holds one dictionary of known shapes; tensors are added in the order of `layout`."""

    def __init__(self, path: Path, layout: dict[str, tuple[tuple[int, ...], torch.dtype]]):
        self._prefix = path.stem
        self._file = StreamedFile(path)
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        self._expected = [(str(key), name, *spec) for key, (name, spec) in enumerate(layout.items())]
        self._record("data.pkl", _pickled(self._expected))
        self._record(".format_version", b"1")
        self._record(".storage_alignment", str(_ALIGNMENT).encode())
        self._record("byteorder", sys.byteorder.encode())

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Writes the next tensor of the layout."""
        key, expected, shape, dtype = self._expected.pop(0)
        assert (name, tuple(tensor.shape), tensor.dtype) == (expected, shape, dtype), (name, tensor.shape, tensor.dtype)
        self._record(f"data/{key}", tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def _record(self, name: str, content: bytes | memoryview) -> None:
        entry = zipfile.ZipInfo(f"{self._prefix}/{name}")
        entry.file_size = len(content)
        assert self._zip.fp is not None
        start = self._zip.fp.tell() + _LOCAL_HEADER + len(entry.filename) + _ZIP64_FIELD + _FIELD_HEAD
        padding = -start % _ALIGNMENT
        entry.extra = _PADDING_FIELD + struct.pack("<H", padding) + b"Z" * padding
        with self._zip.open(entry, "w", force_zip64=True) as record:
            for offset in range(0, len(content), _BLOCK):
                record.write(content[offset : offset + _BLOCK])

    def finish(self) -> None:
        """Closes the file, all of whose tensors must have been added."""
        assert not self._expected, self._expected[0]
        self._record("version", b"3\n")
        self._zip.close()
        self._file.close()

    def __enter__(self) -> "PthWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()
        self._file.close()


def _pickled(entries: list[tuple[str, str, tuple[int, ...], torch.dtype]]) -> bytes:
    """The dictionary, with each tensor as a reference to its storage."""
    tensors = {
        name: _Tensor(_Storage(key, dtype, torch.Size(shape).numel()), shape) for key, name, shape, dtype in entries
    }
    buffer = BytesIO()
    _TensorPickler(buffer, protocol=2).dump(tensors)
    return buffer.getvalue()


class _TensorPickler(pickle.Pickler):
    """Writes `_Tensor` and `_Storage` as PyTorch writes tensors and their storages."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return "storage", _STORAGES[obj.dtype], obj.key, "cpu", obj.numel
        return None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Tensor):
            return NotImplemented
        strides = torch.empty(obj.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (obj.storage, 0, obj.shape, strides, False, OrderedDict())


def record_sizes(path: Path) -> Counter[int]:
    """How many records of how many bytes a zip file of torch's has.

    Raises `CheckpointError` unless each lies in the file as it is, once, and where torch is going to look for it:
    behind its own header, whose lengths nothing else is compared with.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = archive.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
                raise CheckpointError(
                    f"{path}: {entry.filename} is compressed or encrypted, which torch.save never does: "
                    "take the file as it was before it was packed"
                )
            file.seek(entry.header_offset)
            header = file.read(_LOCAL_HEADER)
            name_length, extra_length = struct.unpack("<26x2H", header)
            name = file.read(name_length)
            file.seek(extra_length + entry.file_size, 1)
            is_there = header.startswith(b"PK\3\4") and name == entry.orig_filename.encode("utf-8")
            # Whatever follows, be it a header, a descriptor or the directory, begins with PK.
            if not is_there or entry.compress_size != entry.file_size or file.read(2) != b"PK":
                raise CheckpointError(f"{path} is damaged ({entry.filename} is not where it should be): {_AGAIN}")
    if len({entry.filename for entry in entries}) < len(entries):
        raise CheckpointError(f"{path} is damaged (two of its records have one name): {_AGAIN}")
    return Counter(entry.file_size for entry in entries)


def check_storages(path: Path, tensors: dict[str, torch.Tensor], records: Counter[int] | None) -> None:
    """Raises `CheckpointError` where a tensor stands for endlessly more than the file holds, or for other bytes.

    `records` are the sizes of a zip file's records; None: a file of torch before 1.6, which is no zip file.
    """
    storages: dict[int, int] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if tensor.numel() > _MAX_REPEATED and tensor.numel() * tensor.itemsize > storage.nbytes():
            raise CheckpointError(
                f"{path}: {name} has {tensor.numel():,} values, but the file holds only {storage.nbytes():,} bytes of "
                f"them (a view that repeats values?): save it with tensor.contiguous()"
            )
        storages[storage.data_ptr()] = storage.nbytes()
    sizes = Counter(size for size in storages.values() if size)
    # Those of a zip file are compared one by one, for a storage that is too large goes on in the next one's bytes.
    too_large = sum(sizes.elements()) > path.stat().st_size if records is None else sizes - records
    if too_large:
        raise CheckpointError(f"{path} is damaged (its tensors are of another size than its data): {_AGAIN}")


def load_tensors(path: Path, tell: Callable[[str], None] = lambda note: None) -> dict[str, torch.Tensor]:
    """The tensors of a file, memory-mapped: read when they are used, by a loader that runs no code.

    `tell` is given a line where they are only a part of what the file holds.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file: {_AGAIN}")
    check_downloaded(path)
    records = None
    try:
        if zipfile.is_zipfile(path):
            records = record_sizes(path)
        _check_protocol(path, is_zip=records is not None)
        with warnings.catch_warnings():
            # The one error says what there is to say.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=records is not None)
    except (CheckpointError, PermissionError):
        raise
    except Exception as error:  # the loader raises whatever the damage leads to
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path} holds code that loading would execute ({code[1]}); "
                "it was refused and nothing was run. A checkpoint of Meta's holds tensors only"
            ) from None
        raise CheckpointError(f"{path} is truncated or damaged ({_reason(error)}): {_AGAIN}") from None
    content = _entry_of_weights(path, content, tell)
    if not _is_tensors(content):
        raise CheckpointError(f"{path} holds no dictionary of tensors: it is not a shard of a Meta checkpoint")
    # Not content.items() nor tensor.detach(): a file may give both of them attributes of any name.
    tensors = {name: torch.Tensor.detach(tensor).resolve_neg() for name, tensor in dict.items(content)}
    check_storages(path, tensors, records)
    return tensors


def _check_protocol(path: Path, *, is_zip: bool) -> None:
    """The pickle is one that the loader without code can read; files of torch < 1.6 are bare pickles."""
    with path.open("rb") as file:
        if is_zip:
            with zipfile.ZipFile(file) as archive:
                entries = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
            # Not by the archive, which compares a checksum that torch does not.
            file.seek(entries[0].header_offset if entries else 0)
            name_length, extra_length = struct.unpack("<26x2H", file.read(_LOCAL_HEADER))
            file.seek(name_length + extra_length, 1)
        start = file.read(2)
        if not is_zip and start[:1] != b"\x80":
            raise CheckpointError(
                f"{path} is truncated or not a PyTorch file ({path.stat().st_size:,} bytes): {_AGAIN}"
            )
    if start[:1] == b"\x80" and start[1:] in (b"\4", b"\5"):
        raise CheckpointError(
            f"{path} was saved with pickle protocol {start[1]}, and torch reads only protocols 2 and 3 without running "
            "code: where it was made, save it again with torch.save's own protocol (without pickle_protocol=), "
            "or as safetensors"
        )


def _entry_of_weights(path: Path, content: Any, tell: Callable[[str], None]) -> Any:
    """What a training program saved as one entry beside others, as its optimizer's; else the content as it is."""
    if not isinstance(content, dict):
        return content
    found = [name for name in _WEIGHT_ENTRIES if _is_tensors(dict.get(content, name))]
    if len(found) != 1:
        return content
    others = ", ".join(str(name)[:40] for name in dict.keys(content) if name != found[0])
    tell(f"{path.name}: the weights are its entry {found[0]!r}" + (f"; left out: {others}" if others else ""))
    return dict.get(content, found[0])


def _is_tensors(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and _is_plain(tensor)
        for name, tensor in dict.items(content)
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether its values are in memory, one for each place."""
    return tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_nested


def _reason(error: Exception) -> str:
    """torch's message without its page of advice on how to load it all the same."""
    lines = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines() or [type(error).__name__]
    return lines[0][:200]

"""Writes a safetensors file tensor by tensor, so that it is never in memory as a whole."""

import hashlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .page_cache import StreamedFile

# The format's names (github.com/huggingface/safetensors, README).
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGNMENT = 8
"""Bytes that the header is padded to a multiple of."""


class SafetensorsWriter:
    """An open safetensors file of known content; tensors are added in the order of `layout`.

    While one tensor is hashed and written, the next may be made: two are in memory.
    """

    def __init__(self, path: Path, layout: dict[str, tuple[tuple[int, ...], torch.dtype]]):
        self._expected = list(layout.items())
        self._sha256 = hashlib.sha256()
        self._file = StreamedFile(path)
        self._workers = ThreadPoolExecutor(max_workers=2)
        self._pending: list[Future[Any]] = []
        self.num_bytes = 0
        self._write(_header(layout))

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Writes the next tensor of the layout."""
        expected, (shape, dtype) = self._expected.pop(0)
        assert (name, tuple(tensor.shape), tensor.dtype) == (expected, shape, dtype), (name, tensor.shape, tensor.dtype)
        self._write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def _write(self, content: bytes | memoryview) -> None:
        self._wait()
        self._pending = [self._workers.submit(take, content) for take in (self._sha256.update, self._file.write)]
        self.num_bytes += len(content)

    def _wait(self) -> None:
        for taken in self._pending:
            taken.result()

    def finish(self) -> str:
        """Closes the file, all of whose tensors must have been added; its sha256."""
        assert not self._expected, self._expected[0]
        self._wait()
        self._file.close()
        return self._sha256.hexdigest()

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._workers.shutdown(wait=True, cancel_futures=True)
        self._file.close()


def _header(layout: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> bytes:
    """The length of a JSON object in 8 bytes, and the object: where each tensor lies behind it."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (shape, dtype) in layout.items():
        end = start + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text

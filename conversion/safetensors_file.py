"""Writes a safetensors file tensor by tensor, so that it is never in memory as a whole."""

import hashlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch

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
        self._file = path.open("wb")
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None
        self.num_bytes = 0
        self._write(_header(layout))

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Writes the next tensor of the layout."""
        expected, (shape, dtype) = self._expected.pop(0)
        assert (name, tuple(tensor.shape), tensor.dtype) == (expected, shape, dtype), (name, tensor.shape, tensor.dtype)
        self._wait()
        content = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        self._pending = self._worker.submit(self._write, content)

    def _write(self, content: bytes | memoryview) -> None:
        self._sha256.update(content)
        self._file.write(content)
        self.num_bytes += len(content)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

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
        self._worker.shutdown(wait=True, cancel_futures=True)
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

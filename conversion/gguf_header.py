"""Looks through the header of a GGUF file before the gguf package reads it, which believes every number in it.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#file-structure
"""

import struct
from pathlib import Path
from typing import BinaryIO

from hf_llama_repro.errors import CheckpointError

# Kinds of values: bytes of those that are one number, and the two that are not.
_NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MAX_ELEMENTS = 1 << 22
"""Of all lists together; the package makes an object of each. Llama 3's vocabulary and merges have 0.7 million."""
_MAX_DEPTH = 4
"""Arrays inside of arrays."""
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_VERSIONS = (2, 3)
_OLDEST_IMPOSSIBLE = 100
"""A version from here on is a damaged byte."""


class DamagedError(ValueError):
    """What a header says cannot be."""


class ForeignError(ValueError):
    """A file that is whole, but of a kind that is not read."""


def check_header(path: Path) -> None:
    """Raises `CheckpointError` unless all that the header counts is in the file, and of a size that can be read."""
    with path.open("rb") as file:
        try:
            _Header(file, path.stat().st_size).check()
        except DamagedError as error:
            raise CheckpointError(f"{path} is truncated or damaged ({error}): download it again") from None
        except ForeignError as error:
            raise CheckpointError(f"{path} is {error}") from None


class _Header:
    def __init__(self, file: BinaryIO, num_bytes: int):
        self._file, self._num_bytes = file, num_bytes
        self._elements = 0

    def check(self) -> None:
        if self._file.read(4) != b"GGUF":
            raise DamagedError("it does not begin with GGUF")
        self._check_version(self._number("I"))
        num_tensors, num_values = self._number("Q"), self._number("Q")
        for _ in range(self._possible(num_values, 8 + 4 + 1, "values")):
            self._skip(self._number("Q"))
            self._value(self._number("I"), 0)
        for _ in range(self._possible(num_tensors, 8 + 4 + 8 + 4 + 8, "tensors")):
            self._skip(self._number("Q"))
            dimensions = self._number("I")
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                raise DamagedError(f"a tensor of {dimensions} dimensions")
            numel = 1
            for _ in range(dimensions):
                numel *= self._number("Q")
            # No quantization needs less than a bit for a value.
            if not 0 < numel <= 8 * self._num_bytes:
                raise DamagedError(f"a tensor of {numel} values")
            self._skip(4 + 8)

    def _check_version(self, version: int) -> None:
        if version and version & 0xFFFF == 0:
            raise ForeignError(
                "a big-endian GGUF file, for machines such as IBM Z: take the little-endian one, "
                "or turn it with gguf-convert-endian FILE little, a command of the package gguf"
            )
        if version == 1 or _VERSIONS[-1] < version < _OLDEST_IMPOSSIBLE:
            read = " and ".join(map(str, _VERSIONS))
            raise ForeignError(
                f"of version {version} of GGUF; read are {read}: make it again with a llama.cpp of today"
            )
        if version not in _VERSIONS:
            raise DamagedError(f"version {version}")

    def _value(self, kind: int, depth: int) -> None:
        if kind in _NUMBERS:
            self._skip(_NUMBERS[kind])
        elif kind == _STRING:
            self._skip(self._number("Q"))
        elif kind == _ARRAY and depth < _MAX_DEPTH:
            self._array(depth)
        else:
            raise DamagedError(f"a value of the unknown kind {kind}")

    def _array(self, depth: int) -> None:
        kind, length = self._number("I"), self._number("Q")
        self._elements += length
        if self._elements > _MAX_ELEMENTS:
            raise DamagedError(f"lists of {self._elements} elements")
        if kind in _NUMBERS:
            self._skip(length * _NUMBERS[kind])
        else:
            for _ in range(length):
                self._value(kind, depth + 1)

    def _possible(self, count: int, least: int, what: str) -> int:
        """The count, if so many of at least so many bytes are in the file."""
        if count * least > self._num_bytes:
            raise DamagedError(f"{count} {what} in {self._num_bytes} bytes")
        return count

    def _number(self, kind: str) -> int:
        start = self._file.tell()
        self._skip(struct.calcsize(kind))
        self._file.seek(start)
        return struct.unpack("<" + kind, self._file.read(struct.calcsize(kind)))[0]

    def _skip(self, count: int) -> None:
        if (end := self._file.tell() + count) > self._num_bytes:
            raise DamagedError(f"it ends at byte {self._num_bytes}, but should go on to {end}")
        self._file.seek(end)

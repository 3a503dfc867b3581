"""Reads and writes files larger than memory without pushing what other programs read out of the page cache.

What has passed is let go of at once. The system then uses the same memory for what follows, which is also faster than
taking new memory until none is left and collecting it again.
"""

import io
import os
from pathlib import Path

_WRITTEN = 1 << 24
"""Bytes that are brought to the disk together."""
_POSSIBLE = hasattr(os, "posix_fadvise")  # Linux


def forget(descriptor: int, start: int, num_bytes: int) -> None:
    """Lets go of a part of a file that is on the disk; `num_bytes` 0: to its end."""
    if _POSSIBLE:
        os.posix_fadvise(descriptor, start, num_bytes, os.POSIX_FADV_DONTNEED)


class StreamedFile(io.BufferedWriter):
    """A file that is written from beginning to end; small parts of it may be written again."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "w"))
        self._pending = 0

    def write(self, content: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        """As that of a file, in parts."""
        view = memoryview(content)
        for start in range(0, len(view), _WRITTEN):
            part = view[start : start + _WRITTEN]
            super().write(part)
            self._pending += len(part)
            if self._pending >= _WRITTEN and _POSSIBLE:
                self.flush()
                os.fdatasync(self.fileno())
                forget(self.fileno(), 0, 0)
                self._pending = 0
        return len(view)

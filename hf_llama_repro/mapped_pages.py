"""Loads a large checkpoint without its files counting as memory of the process."""

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_MADV_DONTNEED = 4  # <sys/mman.h> of Linux
_SECONDS = 0.2
"""Between two rounds: at a few GB/s of reading, less than 1 GB is resident."""


@contextlib.contextmanager
def mapped_pages_released(folder: Path) -> Iterator[None]:
    """While the block runs, pages of the folder's mapped safetensors files are let go of soon after they were read.

    safetensors maps its files, and every page read stays resident: a model that is quantized while it is loaded would
    take its own size besides. What is still needed is read again from the file. Linux only; elsewhere nothing happens.
    Not for a block that writes to tensors which lie in the mapped files.
    """
    done = threading.Event()

    def work() -> None:
        while not done.wait(_SECONDS):
            _release(folder)

    thread = threading.Thread(target=work, daemon=True)
    if _MAPS.is_file():
        thread.start()
    try:
        yield
    finally:
        done.set()
        if thread.ident is not None:
            thread.join()
            _release(folder)


def _release(folder: Path) -> None:
    libc = ctypes.CDLL(None)
    prefix = str(folder.resolve())
    for line in _MAPS.read_text().splitlines():
        addresses, _, rest = line.partition(" ")
        path = rest.partition("/")[2]
        if f"/{path}".startswith(prefix) and path.endswith(".safetensors"):
            start, end = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)

"""Reads large checkpoints without their mapped files counting as memory of the process."""

import contextlib
import ctypes
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_MADV_DONTNEED = 4  # <sys/mman.h> of Linux
_SECONDS = 0.2
"""Between two rounds: at a few GB/s of reading, less than 1 GB is resident."""


def release_mapped_pages(files: Iterable[Path]) -> None:
    """Lets go of the pages of mapped files; what is still needed is read again. Does nothing but on Linux.

    torch and safetensors map files of weights, and every page read stays resident. Not while anything writes to
    tensors that lie in the mapped files.
    """
    if not _MAPS.is_file():
        return
    libc = ctypes.CDLL(None)
    named = {str(file.resolve()) for file in files}
    for line in _MAPS.read_text().splitlines():
        addresses, *_, path = line.split(maxsplit=5)
        if path in named:
            start, end = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


@contextlib.contextmanager
def mapped_pages_released(folder: Path) -> Iterator[None]:
    """While the block runs, pages of the folder's safetensors files are let go of soon after they were read.

    A model that is quantized while it is loaded would take its own size besides.
    """
    done = threading.Event()
    files = list(folder.glob("*.safetensors"))

    def work() -> None:
        while not done.wait(_SECONDS):
            release_mapped_pages(files)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        release_mapped_pages(files)

"""Sums of files: sha256 for the manifest, md5 where the source has a list of them, taken while the weights are read."""

import contextlib
import hashlib
import math
import mmap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_llama_repro.errors import CheckpointError

from .page_cache import forget

BLOCK = 1 << 24
_AHEAD = 1 << 28
"""Bytes that sums are ahead of the reading of weights at most, so that both find them in memory after one read."""


class StoppedError(Exception):
    """The sums are no longer wanted."""


class FileSums:
    """Sums of one file, taken block by block. `md5` is what it must have, if that is known."""

    def __init__(self, path: Path, md5: str | None = None):
        self.path, self.num_bytes, self.position = path, path.stat().st_size, 0
        self._sha256, self._md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        self._expected = md5
        self._file = path.open("rb", buffering=0)

    def update(self) -> int:
        """Takes in the next block; its bytes. What is far behind leaves the page cache."""
        length = min(BLOCK, self.num_bytes - self.position)
        # Mapped: reading would copy it.
        with mmap.mmap(self._file.fileno(), length, access=mmap.ACCESS_READ, offset=self.position) as block:
            self._sha256.update(block)
            if self._expected is not None:
                self._md5.update(block)
        self.position += length
        if (passed := self.position - 2 * _AHEAD) > 0:
            forget(self._file.fileno(), 0, passed)
        return length

    def close(self) -> None:
        self._file.close()

    def result(self) -> dict[str, Any]:
        """`bytes` and `sha256`. Raises `CheckpointError` where it has not the md5 that it must have."""
        if self._expected is not None and self._md5.hexdigest() != self._expected:
            raise CheckpointError(
                f"{self.path} has the md5 {self._md5.hexdigest()}, but checklist.chk says {self._expected}: "
                "download it again (or remove checklist.chk, if you have changed the file yourself)"
            )
        return {"bytes": self.num_bytes, "sha256": self._sha256.hexdigest()}


def file_sums(path: Path) -> dict[str, Any]:
    """`bytes` and `sha256` of a file, with a progress bar if it is large."""
    with contextlib.closing(FileSums(path)) as sums, _bar(path.name, sums.num_bytes) as progress:
        while sums.position < sums.num_bytes:
            progress.update(sums.update())
        return sums.result()


def _bar(name: str, num_bytes: int) -> tqdm:
    """Silent for what takes no time, and where nobody looks."""
    disable = None if num_bytes > _AHEAD else True
    return tqdm(total=num_bytes, unit="B", unit_scale=True, desc=f"sums of {name}", leave=False, disable=disable)


class Sums:
    """What a thread finds out about files, side by side, in step with what is read of them."""

    def __init__(self, files: dict[Path, str | None], worker: ThreadPoolExecutor):
        self._files = [FileSums(path, md5) for path, md5 in files.items()]
        self._total = sum(file.num_bytes for file in self._files)
        self._step = threading.Condition()
        self._allowed: float = _AHEAD
        self._stopped = False
        self._future = worker.submit(self._work)

    def _work(self) -> dict[str, dict[str, Any]]:
        try:
            found = {file.path.name: file.result() for file in self._files if not file.num_bytes}
            while left := [file for file in self._files if file.position < file.num_bytes]:
                with self._step:
                    self._step.wait_for(lambda: self._stopped or self.position < self._allowed)
                if self._stopped:
                    raise StoppedError
                file = min(left, key=lambda file: file.position / file.num_bytes)
                file.update()
                if file.position == file.num_bytes:
                    found[file.path.name] = file.result()
            return found
        finally:
            for file in self._files:
                file.close()

    @property
    def position(self) -> int:
        """Bytes that were read."""
        return sum(file.position for file in self._files)

    def advance(self, share: float) -> None:
        """Tells that this share of the weights has been read. Raises what was found to be wrong so far."""
        self._allow(share * self._total + _AHEAD)
        if self._future.done():
            self._future.result()

    def result(self) -> dict[str, dict[str, Any]]:
        """File name -> `bytes` and `sha256`, once all are read. Raises `CheckpointError` for a wrong md5."""
        self._allow(math.inf)
        with _bar("the source", self._total) as progress:
            while wait([self._future], timeout=0.2).not_done:
                progress.update(self.position - progress.n)
        return self._future.result()

    def stop(self) -> None:
        """Ends it, whatever is left."""
        self._stopped = True
        self._allow(math.inf)

    def _allow(self, num_bytes: float) -> None:
        with self._step:
            self._allowed = num_bytes
            self._step.notify_all()


@contextlib.contextmanager
def summed(files: dict[Path, str | None]) -> Iterator[Sums]:
    """Sums of `files` (path -> md5 that it must have, if one is known), read beside what the block does."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        sums = Sums(files, worker)
        try:
            yield sums
        finally:
            sums.stop()

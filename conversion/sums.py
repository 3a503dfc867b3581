"""Sums of files: sha256 for the manifest, md5 where the source has a list of them, taken while the weights are read."""

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hf_llama_repro.errors import CheckpointError

BLOCK = 1 << 24


class StoppedError(Exception):
    """The sums are no longer wanted."""


def file_sums(path: Path, *, md5: str | None = None, go_on: Callable[[], bool] = lambda: True) -> dict[str, Any]:
    """`bytes` and `sha256` of a file. Raises `CheckpointError` where it has not the `md5` that is given."""
    found = hashlib.sha256()
    listed = hashlib.md5(usedforsecurity=False)
    num_bytes = 0
    buffer = memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if not go_on():
                raise StoppedError
            found.update(buffer[:count])
            if md5 is not None:
                listed.update(buffer[:count])
            num_bytes += count
    if md5 is not None and listed.hexdigest() != md5:
        raise CheckpointError(
            f"{path} has the md5 {listed.hexdigest()}, but checklist.chk says {md5}: download it again "
            "(or remove checklist.chk, if you have changed the file yourself)"
        )
    return {"bytes": num_bytes, "sha256": found.hexdigest()}


class Sums:
    """What a thread finds out about files, one after the other."""

    def __init__(self, files: dict[Path, str | None], worker: ThreadPoolExecutor, done: threading.Event):
        def work() -> dict[str, dict[str, Any]]:
            return {path.name: file_sums(path, md5=md5, go_on=lambda: not done.is_set()) for path, md5 in files.items()}

        self._future = worker.submit(work)

    def check(self) -> None:
        """Raises what was found to be wrong so far."""
        if self._future.done():
            self._future.result()

    def result(self) -> dict[str, dict[str, Any]]:
        """File name -> `bytes` and `sha256`, once all are read. Raises `CheckpointError` for a wrong md5."""
        return self._future.result()


@contextlib.contextmanager
def summed(files: dict[Path, str | None]) -> Iterator[Sums]:
    """Sums of `files` (path -> md5 that it must have, if one is known), read beside what the block does."""
    done = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as worker:
        try:
            yield Sums(files, worker, done)
        finally:
            done.set()

"""Checkpoints that are whole or not there: written aside, renamed at the end, and checked before they are used."""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from .durable import rename
from .errors import TrainingStoppedError, failed_write, is_full_disk

MANIFEST = "manifest.json"
_REPLACED = ".replaced"
_NAME = re.compile(r"checkpoint-(\d+)")


def seal(folder: Path) -> None:
    """Writes the sha256 sums of the folder's files into it."""
    sums = {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / MANIFEST).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, if anything."""
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if sha256_of(folder / name) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None


def publish(partial: Path, target: Path) -> None:
    """Seals `partial` and gives it the name `target`, in place of what bore it."""
    seal(partial)
    bring_back(target)
    replaced = _replaced(target)
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    try:
        rename(partial, target)
    finally:
        bring_back(target)
    shutil.rmtree(replaced, ignore_errors=True)


def bring_back(target: Path) -> None:
    """Give the replaced folder its name again, where `publish` was killed between its two renames."""
    if (replaced := _replaced(target)).exists() and not target.exists():
        replaced.rename(target)


def bring_back_all(output_dir: Path) -> None:
    """Call `bring_back` for everything in the folder of a run."""
    for replaced in output_dir.glob(f".*{_REPLACED}"):
        bring_back(output_dir / replaced.name[1 : -len(_REPLACED)])


def _replaced(target: Path) -> Path:
    # Not beside `partial`: that folder is removed at the beginning of every save.
    return target.with_name(f".{target.name}{_REPLACED}")


@contextlib.contextmanager
def failed_writes_reported(target: Path, output_dir: Path, *, only_full_disk: bool = False) -> Iterator[None]:
    """Turn a failed write of `target` into one message, which names the last good checkpoint of `output_dir`.

    `only_full_disk`: around code that does more than write. Raises `TrainingStoppedError`.
    """
    try:
        yield
    except Exception as error:
        reason = failed_write(error)
        if reason is None or (only_full_disk and not is_full_disk(error)):
            raise
        last = next(reversed(checkpoints(output_dir)), None)
        raise TrainingStoppedError(
            f"{target} could not be written ({reason}); the last good checkpoint is {last or 'none'}: "
            "free some space, and resume with --resume"
        ) from error


def checkpoints(output_dir: Path) -> list[Path]:
    """The run's checkpoints, the oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done when it was saved."""
    return int(checkpoint.name.partition("-")[2])


def newest_whole(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is as it was written, and what is wrong with the newer ones."""
    warnings: list[str] = []
    for checkpoint in reversed(checkpoints(output_dir)):
        if (reason := damage(checkpoint)) is None:
            return checkpoint, warnings
        warnings.append(f"{checkpoint} is damaged ({reason}) and is passed over")
    return None, warnings


def keep_newest(output_dir: Path, limit: int) -> None:
    """Removes all but the `limit` newest checkpoints."""
    for checkpoint in checkpoints(output_dir)[:-limit]:
        shutil.rmtree(checkpoint)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

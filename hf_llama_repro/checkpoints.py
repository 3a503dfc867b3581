"""Checkpoints that are whole or not there: written aside, renamed at the end, and checked before they are used."""

import hashlib
import json
import re
import shutil
from pathlib import Path

from .durable import rename

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def seal(folder: Path) -> None:
    """Writes the sha256 sums of the folder's files into it."""
    sums = {str(path.relative_to(folder)): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / MANIFEST).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, if anything."""
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if _sha256(folder / name) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None


def publish(partial: Path, target: Path) -> None:
    """Seals `partial` and gives it the name `target`, in place of what bore it."""
    seal(partial)
    replaced = partial.with_name(partial.name + "-replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    rename(partial, target)
    shutil.rmtree(replaced, ignore_errors=True)


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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""What a folder was made of and what is in it, by sums; while it is being made, what of it is finished."""

import json
import os
from pathlib import Path
from typing import Any

from .sums import file_sums

MANIFEST = "manifest.json"


class Manifest:
    """manifest.json of a folder in the making.

    `request` identifies the work: what it is made of and how (JSON); None for what cannot be gone on with. `finished`
    are files that are whole: name -> `bytes`, `sha256` and whatever else belongs to it. Those of an interrupted run
    are taken over, if they have the sums that it noted.
    """

    def __init__(self, folder: Path, request: dict[str, Any] | None):
        self.path, self.request = folder / MANIFEST, request
        before = unfinished(folder)
        self.finished = {
            name: entry
            for name, entry in (before["finished"] if before else {}).items()
            if _is_whole(folder / name, entry)
        }

    def finish(self, name: str, entry: dict[str, Any]) -> None:
        """Notes that a file is whole."""
        self.finished[name] = entry
        if self.request is not None:
            self._write({"unfinished": {"request": self.request, "finished": self.finished}})

    def complete(self, source: dict[str, Any], options: dict[str, Any] | None = None) -> None:
        """The final manifest: sums of every file of the folder and of the source's, and how it was converted."""
        files = {}
        for path in sorted(self.path.parent.iterdir()):
            if path != self.path:
                known = self.finished.get(path.name) or file_sums(path)
                files[path.name] = {key: known[key] for key in ("bytes", "sha256")}
        self._write({"source": source, "options": options or {}, "files": files})

    def _write(self, content: dict[str, Any]) -> None:
        # In one go: a kill leaves the one or the other.
        aside = self.path.with_name(f".{MANIFEST}")
        aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, self.path)


def _is_whole(path: Path, entry: dict[str, Any]) -> bool:
    return path.is_file() and file_sums(path) == {key: entry[key] for key in ("bytes", "sha256")}


def unfinished(folder: Path) -> dict[str, Any] | None:
    """`request` and `finished` of an interrupted run that left something to go on from."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["unfinished"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def recorded_options(folder: Path) -> dict[str, Any]:
    """How a folder was converted, as far as its source does not tell; nothing where no manifest says it."""
    kinds = {"context_length": int, "chat": bool, "tokenizer": bool}
    options = _recorded(folder, "options")
    return {name: options[name] for name, kind in kinds.items() if type(options.get(name)) is kind}


def recorded_sha256(folder: Path, name: str) -> str | None:
    """The checksum that a file of the folder had when it was written; None where no manifest says it."""
    entry = _recorded(folder, "files").get(name)
    return entry.get("sha256") if isinstance(entry, dict) else None


def _recorded(folder: Path, key: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return content if isinstance(content, dict) else {}

"""What a training run measured, one JSON object a line, in a file that a kill does not spoil."""

import json
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was cut off by a kill is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def begin_metrics(path: Path, step: int) -> None:
    """Makes the file, or drops from it the lines of steps after `step`, which are done again on resuming."""
    kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
    path.write_text("".join(kept), encoding="utf-8")


def add_metrics(path: Path, line: dict[str, Any]) -> None:
    """Adds one line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")

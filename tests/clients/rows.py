"""What a check of a client reports, and the table of all."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One comparison, made with a real client."""

    client: str
    version: str
    compared: str
    result: str
    passed: bool


HEADER = ("client", "version", "compared", "result")


def table(rows: Sequence[Row]) -> str:
    """As docs/clients.md has it."""
    cells = [HEADER, ("---",) * len(HEADER)]
    for row in rows:
        cells.append((row.client, row.version, row.compared, row.result if row.passed else f"**FAILED**: {row.result}"))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells)


def count(found: Sequence[object], expected: Sequence[object], what: str) -> tuple[str, bool]:
    """How many are equal, in words, and whether all are."""
    equal = sum(one == other for one, other in zip(found, expected, strict=True))
    return f"{equal} of {len(expected)} {what} equal", equal == len(expected)

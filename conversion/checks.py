"""What a proof found, one thing after the other, and how it ends."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_llama_repro.command import ANSWER_IS_NO, DONE, PARTIAL

Outcome = Literal["ok", "FAILED", "not compared"]
_SHOWN = 5
"""Differences that are named of one thing."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, or could not be."""

    name: str
    outcome: Outcome
    found: str
    """For people: what was compared and where it parts, or why it was not compared."""
    figures: dict[str, Any] = field(default_factory=dict)


def compared(
    name: str, differences: Sequence[str], right: str, figures: dict[str, Any] | None = None, *, heading: str = ""
) -> Check:
    """The check of something that was compared; `right` says so where there are no `differences`."""
    more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    told = heading + "; ".join(differences[:_SHOWN]) + more if differences else ""
    return Check(name, "FAILED" if differences else "ok", told or right, figures or {})


def failed(checks: Sequence[Check]) -> list[Check]:
    return [check for check in checks if check.outcome == "FAILED"]


def not_compared(checks: Sequence[Check]) -> list[Check]:
    return [check for check in checks if check.outcome == "not compared"]


def table(checks: Sequence[Check]) -> str:
    return "\n".join(f"{check.outcome:12} {check.name:14} {check.found}" for check in checks)


def ending(checks: Sequence[Check]) -> tuple[str, int]:
    """The last line, and the exit code."""
    for chosen, words, code in (
        (failed(checks), "not the source: other", ANSWER_IS_NO),
        (not_compared(checks), "partial: all that was compared is the source's; not compared:", PARTIAL),
    ):
        if chosen:
            return f"{words} {', '.join(check.name for check in chosen)}", code
    return "proved: the folder is its source", DONE

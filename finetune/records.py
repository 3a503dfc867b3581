"""Reads instruction data (Alpaca, ShareGPT, messages; JSON or JSON Lines), and says what is wrong with it."""

import collections
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hf_llama_repro.errors import InputError

from .json_records import read_items
from .record_forms import Finding, Record, Report, WrongRecordError, is_record, make_record

# Is handed what is gone through, and gives it back.
Watch = Callable[[Iterable[Any]], Iterable[Any]]
UNREAD = "keys that are not read"
# Of other kinds the first few places are enough; of keys each is another one.
_MOST_KEYS = 20

# A second task inside of a record: what Alpaca's generator left when it split its text wrongly.
# Blanks are not \s, which would go over the same empty lines again for each of them.
_MERGED = re.compile(
    r"^[^\S\n]*(#+[^\S\n]*)?(\d+\.[^\S\n]*)?(instruction|input|output|response)[^\S\n]*:",
    re.IGNORECASE | re.MULTILINE,
)
# A carriage return is the first half of Windows' newline, or it overwrites the line.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\u2028\u2029]|\r(?!\n)")
# Half of a character, which JSON can write and no tokenizer takes.
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def read_records(path: Path, *, watch: Watch = lambda items: items) -> tuple[list[Record], list[Finding]]:
    """The records that can be trained on, and everything that the linter found.

    `watch` is handed what is read and gives it back, to show how far it is. Raises `InputError` where the file is
    missing, is not JSON, or nothing in it can be used.
    """
    records: list[Record] = []
    report = Report()
    count = 0
    for line, item in watch(read_items(path, is_record=is_record, unread=report.add_unread)):
        count += 1
        where = f"{path}:{line}"
        try:
            record = make_record(item, where, report)
            _check_encodable(record)
        except WrongRecordError as error:
            report.findings.append(Finding(where, error.args[0], error.args[1], True))
            continue
        report.findings += _lint(record)
        records.append(record)
    findings = [*report.findings, *_duplicates(records)]
    findings += [
        Finding(where, UNREAD, f"{name} in {number:,} record{'s' * (number > 1)}", False)
        for name, (where, number) in report.unread.items()
    ]
    if not records:
        first = f"; the first: {findings[0].where}: {findings[0].kind}, {findings[0].detail}" if findings else ""
        raise InputError(f"{path} holds {count} records, and none can be trained on{first}")
    return records, findings


def summary(findings: list[Finding], *, examples: int = 3) -> list[str]:
    """A line for each kind of finding, with the first places."""
    by_kind = collections.defaultdict(list)
    for finding in findings:
        by_kind[finding.kind].append(finding)
    lines = []
    for kind, found in sorted(by_kind.items()):
        left_out = sum(finding.left_out for finding in found)
        fate = "left out" if left_out == len(found) else f"{left_out} left out" if left_out else "kept"
        most = _MOST_KEYS if kind == UNREAD else examples
        places = "; ".join(f"{finding.where} {finding.detail}" for finding in found[:most])
        lines.append(f"{kind}: {len(found)} ({fate}), {places}{' ...' if len(found) > most else ''}")
    return lines


def _texts(record: Record) -> list[str]:
    return [record.system, *(text for turn in record.turns for text in turn)]


def _check_encodable(record: Record) -> None:
    for text in _texts(record):
        if (match := _SURROGATE.search(text)) is not None:
            raise WrongRecordError("lone surrogate", repr(match[0]))


def _lint(record: Record) -> list[Finding]:
    """What is odd about a record that can be trained on."""
    checks: tuple[tuple[str, Callable[[str], re.Match | None]], ...] = (
        ("merged instructions", _MERGED.search),
        ("control characters", _CONTROL.search),
    )
    findings = []
    for kind, search in checks:
        for text in _texts(record):
            if (match := search(text)) is not None:
                findings.append(Finding(record.where, kind, repr(match[0].strip("\n ") or match[0]), False))
                break
    return findings


def _duplicates(records: list[Record]) -> list[Finding]:
    seen: dict[Any, str] = {}
    findings = []
    for record in records:
        # Another answer to the same question is no duplicate.
        first = seen.setdefault((record.system, record.turns, record.unsupervised), record.where)
        if first != record.where:
            findings.append(Finding(record.where, "duplicate", f"of {first}", False))
    return findings

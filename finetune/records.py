"""Reads instruction data (Alpaca, ShareGPT, messages; JSON or JSON Lines), and says what is wrong with it."""

import collections
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hf_llama_repro.errors import InputError

from .template import Turn

# Keys of the Alpaca form and of its relatives (Orca's), by what they hold.
_ALPACA_KEYS = {
    "instruction": ("instruction", "question"),
    "input": ("input",),
    "output": ("output", "response"),
    "system": ("system", "system_prompt"),
}
# Key of the list -> (key of the speaker, key of the text).
_CONVERSATIONS = {"conversations": ("from", "value"), "messages": ("role", "content")}
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

# "Na" is not among them: it is sodium.
_NO_INPUT = re.compile(r"\s+|\W*(?:(?i:no[\s_-]?input|none|n/a)|NA)\W*")
# A second task inside of a record: what Alpaca's generator left when it split its text wrongly.
# Blanks are not \s, which would go over the same empty lines again for each of them.
_MERGED = re.compile(
    r"^[^\S\n]*(#+[^\S\n]*)?(\d+\.[^\S\n]*)?(instruction|input|output|response)[^\S\n]*:",
    re.IGNORECASE | re.MULTILINE,
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd\u2028\u2029]")
# Half of a character, which JSON can write and no tokenizer takes.
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Record:
    """One conversation."""

    where: str
    """file:line"""
    turns: tuple[Turn, ...]
    system: str = ""


class Finding(NamedTuple):
    """Something that the linter saw."""

    where: str
    kind: str
    detail: str
    left_out: bool
    """Whether the record cannot be trained on."""


def read_records(path: Path) -> tuple[list[Record], list[Finding]]:
    """The records that can be trained on, and everything that the linter found.

    Raises `InputError` where the file is missing, is not JSON, or nothing in it can be used.
    """
    records: list[Record] = []
    findings: list[Finding] = []
    count = 0
    for line, item in _items(path):
        count += 1
        where = f"{path}:{line}"
        try:
            record = _record(item, where, findings)
            _check_encodable(record)
        except _WrongError as error:
            findings.append(Finding(where, error.args[0], error.args[1], True))
            continue
        findings += _lint(record)
        records.append(record)
    findings += _duplicates(records)
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
        places = "; ".join(f"{finding.where} {finding.detail}" for finding in found[:examples])
        lines.append(f"{kind}: {len(found)} ({fate}), {places}{' ...' if len(found) > examples else ''}")
    return lines


class _WrongError(Exception):
    """(kind, detail) of why a record cannot be used."""


def _items(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of every element of a JSON list, or of every line of JSON Lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): data is a JSON or JSON Lines file in UTF-8") from None
    try:
        yield from _list_items(text) if text.lstrip().startswith("[") else _line_items(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno} is not JSON ({error.msg}, column {error.colno}): "
            "data is one JSON list of records, or JSON Lines with a record on each line"
        ) from None


def _list_items(text: str) -> Iterator[tuple[int, Any]]:
    space = re.compile(r"[ \t\n\r]*")
    position, line, counted = text.index("[") + 1, 1, 0

    def skip(at: int) -> int:
        return space.match(text, at).end()  # type: ignore[union-attr]

    position = skip(position)
    more = text[position : position + 1] != "]"
    while more:
        line += text.count("\n", counted, position)
        counted = position
        value, position = _decoded(text, position)
        yield line, value
        position = skip(position)
        more = text[position : position + 1] == ","
        if more:
            position = skip(position + 1)
        elif text[position : position + 1] != "]":
            raise json.JSONDecodeError("expected , or ] after a record", text, position)
    if text[position + 1 :].strip():
        raise json.JSONDecodeError("something follows the list", text, position + 1)


def _line_items(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            indent = len(line) - len(line.lstrip())
            try:
                value, end = _decoded(line, indent)
                if line[end:].strip():
                    raise json.JSONDecodeError("something follows the record", line, end)
            except json.JSONDecodeError as error:
                raise json.JSONDecodeError(error.msg, "\n" * (number - 1) + line, number - 1 + error.pos) from None
            yield number, value


def _decoded(text: str, position: int) -> tuple[Any, int]:
    """The JSON value that begins there, and where it ends."""
    try:
        return json.JSONDecoder().raw_decode(text, position)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, position) from None
    except ValueError as error:  # Python reads whole numbers of up to 4300 digits
        raise json.JSONDecodeError(str(error), text, position) from None


def _record(item: Any, where: str, findings: list[Finding]) -> Record:
    if not isinstance(item, dict):
        raise _WrongError("wrong type", f"a record is a JSON object, not a {type(item).__name__}")
    for key, (speaker_key, text_key) in _CONVERSATIONS.items():
        if key in item:
            return _conversation(item, key, speaker_key, text_key, where, findings)
    return _alpaca(item, where, findings)


def _alpaca(item: dict[str, Any], where: str, findings: list[Finding]) -> Record:
    values = {}
    for name, keys in _ALPACA_KEYS.items():
        value = next((item[key] for key in keys if item.get(key) is not None), None)
        if value is None and name in ("instruction", "output"):
            raise _WrongError(
                "wrong type", f"no {name}; a record has instruction and output, conversations or messages"
            )
        if not isinstance(value, str | None):
            raise _WrongError("wrong type", f"{name} is a {type(value).__name__}, not text")
        values[name] = value or ""
    if _NO_INPUT.fullmatch(values["input"]):
        findings.append(Finding(where, "input that says there is none", repr(values["input"]), False))
        values["input"] = ""
    for name in ("instruction", "output"):
        if not values[name].strip():
            raise _WrongError(f"empty {name}", "")
    return Record(where, (Turn(values["instruction"], values["input"], values["output"]),), values["system"])


def _conversation(
    item: dict[str, Any], key: str, speaker_key: str, text_key: str, where: str, findings: list[Finding]
) -> Record:
    said = []
    for message in item[key] if isinstance(item[key], list) else [item[key]]:
        speaker, text = (message.get(k) if isinstance(message, dict) else None for k in (speaker_key, text_key))
        if not isinstance(speaker, str) or not isinstance(text, str):
            raise _WrongError("wrong type", f"{key} must be a list of objects with {speaker_key} and {text_key}")
        if speaker not in _SPEAKERS:
            raise _WrongError("unknown speaker", f"{speaker!r}, not one of {', '.join(_SPEAKERS)}")
        said.append((_SPEAKERS[speaker], text))
    system = item.get("system")
    if not isinstance(system, str | None):
        raise _WrongError("wrong type", f"system is a {type(system).__name__}, not text")
    if said and said[0][0] == "system":
        system = said.pop(0)[1]
    for at, speaker, side in ((0, "assistant", "begins"), (-1, "user", "ends")):
        if said and said[at][0] == speaker:
            findings.append(Finding(where, f"{side} with the {speaker}", "that message is left out", False))
            said.pop(at)
    if [speaker for speaker, _ in said] != ["user", "assistant"] * (len(said) // 2) or not said:
        raise _WrongError("turns out of order", "user and assistant must take turns")
    if not all(text.strip() for _, text in said):
        raise _WrongError("empty message", "")
    texts = [text for _, text in said]
    return Record(where, tuple(map(Turn, texts[::2], [""] * len(texts), texts[1::2])), system or "")


def _texts(record: Record) -> list[str]:
    return [record.system, *(text for turn in record.turns for text in turn)]


def _check_encodable(record: Record) -> None:
    for text in _texts(record):
        if (match := _SURROGATE.search(text)) is not None:
            raise _WrongError("lone surrogate", repr(match[0]))


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
        first = seen.setdefault((record.system, record.turns), record.where)
        if first != record.where:
            findings.append(Finding(record.where, "duplicate", f"of {first}", False))
    return findings

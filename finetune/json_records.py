"""Reads the objects of a JSON or JSON Lines file one after the other, each with the line at which it begins."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_llama_repro.errors import InputError

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODE = json.JSONDecoder().raw_decode


def read_items(
    path: Path, *, is_record: Callable[[Any], bool], unread: Callable[[str, str], None]
) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of every element of a JSON list, or of every line of JSON Lines.

    A file of one object that is no record is read as the one list of objects that it holds; its other keys are handed
    to `unread(where, name)`. Raises `InputError` naming the line of what is not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): data is a JSON or JSON Lines file in UTF-8") from None
    try:
        start = _skip(text, 0)
        if text.startswith("[", start):
            yield from _list_items(text, start)
        elif (values := _single_object(text, start)) is not None:
            yield from _object_items(path, text, start, values, is_record, unread)
        else:
            yield from _line_items(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno} is not JSON ({error.msg}, column {error.colno}): "
            "data is one JSON list of records, an object that holds one, or JSON Lines with a record on each line"
        ) from None


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _list_items(text: str, start: int, *, is_whole: bool = True) -> Iterator[tuple[int, Any]]:
    """The elements of the list that begins there; `is_whole`: nothing may follow it."""
    line, counted = 1, 0
    position = _skip(text, start + 1)
    more = text[position : position + 1] != "]"
    while more:
        line += text.count("\n", counted, position)
        counted = position
        value, position = _decoded(text, position)
        yield line, value
        position = _skip(text, position)
        more = text[position : position + 1] == ","
        if more:
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise json.JSONDecodeError("expected , or ] after a record", text, position)
    if is_whole and text[position + 1 :].strip():
        raise json.JSONDecodeError("something follows the list", text, position + 1)


def _single_object(text: str, start: int) -> dict[str, tuple[int, Any]] | None:
    """Key -> (position, value) of the one object that the text is; None where it is lines of objects, or other."""
    if not text.startswith("{", start):
        return None
    end = text.find("\n", start)
    if end >= 0 and text[end:].strip():  # several lines: of JSON Lines the first is complete
        try:
            _, after = _decoded(text[:end], start)
            return None
        except json.JSONDecodeError:
            pass
    try:
        values, after = _keys(text, start)
        return None if text[after:].strip() else values
    except json.JSONDecodeError as error:
        if error.lineno > text.count("\n", 0, start) + 1:
            raise
        return None


def _keys(text: str, start: int) -> tuple[dict[str, tuple[int, Any]], int]:
    """Key -> (position, value) of the object that begins there, and where it ends."""
    values: dict[str, tuple[int, Any]] = {}
    position = _skip(text, start + 1)
    while text[position : position + 1] != "}":
        if text[position : position + 1] != '"':
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, position)
        key, position = _decoded(text, position)
        position = _skip(text, position)
        if text[position : position + 1] != ":":
            raise json.JSONDecodeError("Expecting ':' delimiter", text, position)
        at = _skip(text, position + 1)
        value, position = _decoded(text, at)
        values[key] = at, value
        position = _skip(text, position)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
            if text[position : position + 1] == "}":
                raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, position)
        elif text[position : position + 1] != "}":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
    return values, position + 1


def _object_items(
    path: Path,
    text: str,
    start: int,
    values: dict[str, tuple[int, Any]],
    is_record: Callable[[Any], bool],
    unread: Callable[[str, str], None],
) -> Iterator[tuple[int, Any]]:
    line = text.count("\n", 0, start) + 1
    content = {key: value for key, (_, value) in values.items()}
    lists = [
        key
        for key, value in content.items()
        if isinstance(value, list) and value and all(isinstance(element, dict) for element in value)
    ]
    if is_record(content) or not lists:
        yield line, content
        return
    if len(lists) > 1:
        raise InputError(
            f"{path} holds several lists of objects ({', '.join(map(repr, lists))}): which one to train on is not "
            "clear; keep one, or write each into a file of its own"
        )
    for key in values:
        if key != lists[0]:
            unread(f"{path}:{line}", f"{key!r} beside {lists[0]!r}")
    yield from _list_items(text, values[lists[0]][0], is_whole=False)


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
        return _DECODE(text, position)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, position) from None
    except ValueError as error:  # Python reads whole numbers of up to 4300 digits
        raise json.JSONDecodeError(str(error), text, position) from None

"""Turns an object of instruction data into a conversation: Alpaca and its like, ShareGPT, messages, preference pairs.

Every key is used, makes the record unusable, or is counted as not read.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .template import Turn

# "Na" is not among them: it is sodium.
_NO_INPUT = re.compile(r"\s+|\W*(?:(?i:no[\s_-]?input|none|n/a)|NA)\W*")
# Names in use for the same thing. The passage that Alpaca calls input is Dolly's context.
_NAMES = {
    "instruction": ("instruction", "question", "prompt", "query"),
    "input": ("input", "context", "passage", "document", "article", "paragraph"),
    "output": ("output", "response", "answer", "completion"),
    "system": ("system", "system_prompt"),
}
_CONVERSATIONS = ("conversations", "messages")
_REJECTED = ("rejected", "rejected_response")
_SPEAKER_KEYS, _TEXT_KEYS = ("role", "from"), ("content", "value")
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Whether an answer counts in the loss: OpenAI's weight, Axolotl's train and training.
_WEIGHTS = ("weight", "train", "training")
# KTO's mark of an example; false says that it is a bad one.
_LABELS = ("label", "kto_tag")
# No template can express these; without them the answer would teach to make things up.
_NOT_TEXT = (
    *("tools", "functions", "tool_calls", "function_call"),
    *("image", "images", "video", "videos", "audio", "audios"),
)
_LONGEST_NAME = 80
_EMPTY: tuple[Any, ...] = (None, "", [], {}, "[]")


@dataclass(frozen=True)
class Record:
    """One conversation."""

    where: str
    """file:line"""
    turns: tuple[Turn, ...]
    system: str = ""
    unsupervised: frozenset[int] = frozenset()
    """Numbers of the turns whose response is context and not learned."""


class Finding(NamedTuple):
    """Something that the linter saw."""

    where: str
    kind: str
    detail: str
    left_out: bool
    """Whether the record cannot be trained on."""


class WrongRecordError(Exception):
    """(kind, detail) of why a record cannot be used."""


@dataclass
class Report:
    """Collects findings while records are read."""

    findings: list[Finding] = field(default_factory=list)
    unread: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Key that is not read -> where it occurs first, number of records with it."""

    def keep(self, where: str, kind: str, detail: str) -> None:
        """Note something odd about a record that is trained on."""
        self.findings.append(Finding(where, kind, detail, False))

    def add_unread(self, where: str, name: str) -> None:
        """Count a record that holds a key that is not read."""
        name = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
        first, count = self.unread.get(name, (where, 0))
        self.unread[name] = first, count + 1


class _Said(NamedTuple):
    """A message."""

    speaker: str
    text: str
    is_supervised: bool = True


def is_record(item: Any) -> bool:
    """Whether an object has a key by which records are known."""
    known = {*_CONVERSATIONS, "chosen", *_NAMES["instruction"], *_NAMES["output"]}
    return isinstance(item, dict) and not known.isdisjoint(item)


def make_record(item: Any, where: str, report: Report) -> Record:
    """The conversation that an object holds. Raises `WrongRecordError` where it cannot be trained on as it is meant."""
    if not isinstance(item, dict):
        raise WrongRecordError("wrong type", f"a record is a JSON object, not a {type(item).__name__}")
    reader = _Reader(item, where, report)
    reader.check_usable()
    key = next((key for key in _CONVERSATIONS if key in item), None)
    in_messages = any(_is_messages(item.get(name)) for name in ("prompt", "completion", "chosen"))
    record = reader.conversation(key) if key or in_messages else reader.alpaca()
    unread = [repr(name) for name in item if name not in reader.read and item[name] not in _EMPTY]
    for name in (*unread, *reader.unread_inside):
        report.add_unread(where, name)
    return record


class _Reader:
    """Reads one object, and remembers which of its keys it has read."""

    def __init__(self, item: dict[str, Any], where: str, report: Report):
        self.item, self.where, self.report = item, where, report
        self.read: set[str] = set()
        self.unread_inside: dict[str, None] = {}

    def check_usable(self) -> None:
        """Raise `WrongRecordError` for keys that reverse the meaning, or that no template can express."""
        for name in _LABELS:
            if self.item.get(name) is False:
                raise WrongRecordError("bad example", f"{name} is false: it shows what not to answer")
            if self.item.get(name) is True:
                self.read.add(name)
        weight = self.item.get("weight")
        if isinstance(weight, int | float):
            self.read.add("weight")
            if not _is_supervised(weight, "weight"):
                raise WrongRecordError("weight of 0", "the record is not to be trained on")
        _check_is_text(self.item)

    def alpaca(self) -> Record:
        """An instruction with its answer, and the turns before it."""
        values = {name: self._text_of(name) for name in _NAMES}
        chosen = self._text(self._chosen(), "chosen")
        if chosen is not None and values["output"] not in (None, chosen):
            raise WrongRecordError("two keys for one thing", "chosen and another answer differ: remove one")
        values["output"] = chosen if chosen is not None else values["output"]
        if _NO_INPUT.fullmatch(values["input"] or ""):
            self.report.keep(self.where, "input that says there is none", repr(values["input"]))
            values["input"] = ""
        missing = next((name for name in ("instruction", "output") if values[name] is None), None)
        if missing is not None:
            raise WrongRecordError(
                "wrong type", f"no {missing}; a record has instruction and output, conversations or messages"
            )
        texts = {name: value or "" for name, value in values.items()}
        for name in ("instruction", "output"):
            if not texts[name].strip():
                raise WrongRecordError(f"empty {name}", "")
        last = Turn(texts["instruction"], texts["input"], texts["output"])
        return Record(self.where, (*self._history(), last), texts["system"])

    def conversation(self, key: str | None) -> Record:
        """Messages under `key`; None: a prompt and what answers it, one of them or both as messages."""
        if key is not None:
            self.read.add(key)
            said = self._messages(self.item[key], key)
        elif _is_messages(self.item.get("prompt")):
            self.read.add("prompt")
            said = self._messages(self.item["prompt"], "prompt")
        else:
            prompt, passage = self._text_of("instruction"), self._text_of("input")
            said = [_Said("user", f"{prompt}\n{passage}" if passage else prompt)] if prompt else []
        answers = [("chosen", self._chosen()), *([self._value_of("output")] if key is None else [])]
        for name, answer in answers:
            if answer is not None:
                more = self._messages(answer, name) if _is_messages(answer) else [self._answer(answer, name)]
                # A chosen answer may come with all that was said before it.
                said = more if more[: len(said)] == said else [*said, *more]
        return self._turns(said)

    def _answer(self, value: Any, name: str) -> _Said:
        return _Said("assistant", self._text(value, name) or "")

    def _turns(self, said: list[_Said]) -> Record:
        system = self._text_of("system") or ""
        if said and said[0].speaker == "system":
            first = said.pop(0).text
            if system.strip() and system != first:
                raise WrongRecordError("two system prompts", "one as a key and another as the first message")
            system = first
        for at, speaker, side in ((0, "assistant", "begins"), (-1, "user", "ends")):
            if said and said[at].speaker == speaker:
                self.report.keep(self.where, f"{side} with the {speaker}", "that message is left out")
                said.pop(at)
        if [message.speaker for message in said] != ["user", "assistant"] * (len(said) // 2) or not said:
            raise WrongRecordError("turns out of order", "user and assistant must take turns")
        if not all(message.text.strip() for message in said):
            raise WrongRecordError("empty message", "")
        unsupervised = frozenset(number for number, answer in enumerate(said[1::2]) if not answer.is_supervised)
        if len(unsupervised) == len(said) // 2:
            raise WrongRecordError("nothing to learn", "every answer has a weight of 0")
        turns = (Turn(asked.text, "", answer.text) for asked, answer in zip(said[::2], said[1::2], strict=True))
        return Record(self.where, tuple(turns), system, unsupervised)

    def _messages(self, value: Any, key: str) -> list[_Said]:
        return [self._message(message, key) for message in (value if isinstance(value, list) else [value])]

    def _message(self, message: Any, key: str) -> _Said:
        found = message if isinstance(message, dict) else {}
        speaker_key = next((name for name in _SPEAKER_KEYS if name in found), "")
        text_key = next((name for name in _TEXT_KEYS if name in found), "")
        _check_is_text(found)
        speaker = found.get(speaker_key)
        text = self._text(found.get(text_key), f"{key}[].{text_key}")
        if not isinstance(speaker, str) or text is None:
            raise WrongRecordError(
                "wrong type", f"{key} must be a list of objects with from and value, or role and content"
            )
        if speaker not in _SPEAKERS:
            raise WrongRecordError("unknown speaker", f"{speaker!r}, not one of {', '.join(_SPEAKERS)}")
        said = _Said(_SPEAKERS[speaker], text)
        read = {speaker_key, text_key}
        for name in _WEIGHTS:
            if found.get(name) is not None:
                is_supervised = _is_supervised(found[name], name)
                # Whether prompts are learned is set for the whole run, by train_on_prompt.
                if said.speaker == "assistant" or not is_supervised:
                    said = said._replace(is_supervised=said.is_supervised and is_supervised)
                    read.add(name)
        for name in found:
            if name not in read and found[name] not in _EMPTY:
                self.unread_inside[f"{f'{key}[].{name}'!r}"] = None
        return said if said.speaker == "assistant" else said._replace(is_supervised=True)

    def _history(self) -> Iterator[Turn]:
        """The turns before the instruction: pairs of texts, or messages."""
        history = self.item.get("history")
        self.read.add("history")
        if history in _EMPTY:
            return
        if not isinstance(history, list):
            raise WrongRecordError("wrong type", f"history is a {type(history).__name__}, not a list of turns")
        if all(isinstance(element, dict) for element in history):
            texts = [message.text for message in self._alternating(history)]
            history = list(zip(texts[::2], texts[1::2], strict=True))
        for pair in history:
            if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise WrongRecordError("wrong type", "history must be a list of pairs: what was asked and the answer")
            if not all(text.strip() for text in pair):
                raise WrongRecordError("empty message", "in history")
            yield Turn(pair[0], "", pair[1])

    def _alternating(self, history: list[Any]) -> list[_Said]:
        said = self._messages(history, "history")
        if [message.speaker for message in said] != ["user", "assistant"] * (len(said) // 2):
            raise WrongRecordError("turns out of order", "in history user and assistant must take turns")
        if not all(message.is_supervised for message in said):
            raise WrongRecordError("weight in history", "write the record as messages, whose weights are read")
        return said

    def _chosen(self) -> Any:
        """The preferred answer of a pair; the other one is not trained on, and that is said."""
        for name in _REJECTED:
            if self.item.get(name) not in _EMPTY:
                self.read.add(name)
                self.report.keep(self.where, "rejected answer", f"{name} is not trained on")
        self.read.add("chosen")
        return self.item.get("chosen")

    def _value_of(self, name: str) -> tuple[str, Any]:
        """(key, value) of what is known by several names. Raises `WrongRecordError` where two of them differ."""
        given = [key for key in _NAMES[name] if self.item.get(key) is not None]
        filled = [key for key in given if self.item[key] != ""] or given
        self.read.update(given)
        if any(self.item[key] != self.item[filled[0]] for key in filled[1:]):
            raise WrongRecordError(
                "two keys for one thing",
                f"{' and '.join(filled)} both give the {name}, and differ: remove or join them",
            )
        return (filled[0], self.item[filled[0]]) if filled else (name, None)

    def _text_of(self, name: str) -> str | None:
        return self._text(self._value_of(name)[1], name)

    def _text(self, value: Any, name: str) -> str | None:
        """A text, or the text of a content in parts. Raises `WrongRecordError` for what is neither."""
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list) or not value or not all(isinstance(part, dict) for part in value):
            raise WrongRecordError("wrong type", f"{name} is a {type(value).__name__}, not text")
        for part in value:
            if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
                raise WrongRecordError("content that is not text", f"{name} has a part of type {part.get('type')!r}")
            for key in part:
                if key not in ("type", "text") and part[key] not in _EMPTY:
                    self.unread_inside[f"{f'{name}[].{key}'!r}"] = None
        return "".join(part["text"] for part in value)


def _is_messages(value: Any) -> bool:
    """Whether a value is a message, or a list of some."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and not first.keys().isdisjoint(_SPEAKER_KEYS)


def _is_supervised(weight: Any, name: str) -> bool:
    """Whether a weight is 1 or 0. Raises `WrongRecordError` for any other."""
    if weight not in (0, 1):  # True and False are 1 and 0
        raise WrongRecordError("weight between", f"{name}={weight!r}: an answer is learned (1) or not (0)")
    return bool(weight)


def _check_is_text(found: dict[str, Any]) -> None:
    for name in _NOT_TEXT:
        if found.get(name) not in _EMPTY:
            raise WrongRecordError("more than text", f"no template can express {name}: remove the key or the record")

"""Prompt templates: files that say how a conversation becomes text, and where in it the model speaks.

Sources: Stanford Alpaca, alpaca-lora, LLaMA 2's reference code, FastChat (Vicuna 1.1); the files are in `templates/`.
"""

import dataclasses
import json
import os
import re
import string
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hf_llama_repro.errors import InputError

TEMPLATES = Path(__file__).parent / "templates"
# Beside an adapter and a merged model, so that both are asked as they were trained.
FILE_NAME = "prompt_template.json"

# Other words in braces are text.
_SLOT = re.compile(r"\{(system|instruction|input|response)\}")
# What each key must hold; the two kinds of first prompt also {system}, where there is the key system.
_SLOTS_OF = {
    "prompt": ["instruction"],
    "prompt_input": ["instruction", "input"],
    "next_prompt": ["instruction"],
    "response": ["response"],
    "system": ["system"],
}
_REQUIRED = ("prompt", "response")
# Keys of alpaca-lora's own template files, which a template of ours does not have.
_ALPACA_LORA = {"prompt_no_input", "response_split"}


class Turn(NamedTuple):
    """One exchange: what the user says and what the model answers."""

    instruction: str
    input: str
    response: str


class Segment(NamedTuple):
    """A stretch of a conversation's text."""

    text: str
    is_response: bool
    """Whether the model says it; EOS follows then."""
    is_start: bool
    """Whether it is encoded as the start of a text: with BOS, and with the tokenizer's leading space if it has one."""


@dataclass(frozen=True)
class Template:
    """How turns become text. Slots: {system}, {instruction}, {input} in prompts, {response} in `response`."""

    prompt: str
    """Of the first turn."""
    response: str
    """What stands around the answer; the answer and EOS are what a model learns."""
    description: str = ""
    prompt_input: str = ""
    """Of a first turn that has an input; empty: the input follows the instruction on a new line."""
    next_prompt: str = ""
    """Of later turns; empty: conversations of several turns are refused."""
    system: str = ""
    """What stands around a system prompt; empty: system prompts are refused."""
    default_system: str = ""
    """System prompt of conversations without one."""
    bos_each_turn: bool = False
    """Whether every turn is encoded as a text of its own."""
    strip: bool = False
    """Whether white space around what a speaker says goes."""
    forbidden: tuple[str, ...] = ()
    """Tags that a content must not spell: it could pretend to be somebody else's turn."""

    def segments(self, turns: tuple[Turn, ...], system: str = "") -> Iterator[Segment]:
        """The conversation piece by piece; the last turn's response is left out where it is empty: an open prompt.

        Raises `InputError` where the template cannot express it.
        """
        if system and not self.system:
            raise InputError("the template has no place for a system prompt")
        if len(turns) > 1 and not self.next_prompt:
            raise InputError("the template is for one turn")
        system = system or self.default_system
        framed = _fill(self.system, system=self._checked(system)) if system else ""
        for number, turn in enumerate(turns):
            yield Segment(self._prompt(number, turn, framed), False, number == 0 or self.bos_each_turn)
            if turn.response or number < len(turns) - 1:
                yield Segment(_fill(self.response, response=self._content(turn.response)), True, False)

    def _prompt(self, number: int, turn: Turn, system: str) -> str:
        instruction, text = self._content(turn.instruction), self._content(turn.input)
        pattern = self.prompt if number == 0 else self.next_prompt
        if text and number == 0 and self.prompt_input:
            pattern = self.prompt_input
        elif text:
            instruction = f"{instruction}\n{text}"
        if self.strip and "{system}{instruction}" in pattern:
            # Meta's code strips the two as one content: the white space between them stays.
            between = turn.instruction[: len(turn.instruction) - len(turn.instruction.lstrip())]
            pattern, instruction = pattern.replace("{system}", ""), (system + between + instruction).strip()
        return _fill(pattern, system=system, instruction=instruction, input=text)

    def _content(self, text: str) -> str:
        return self._checked(text).strip() if self.strip else self._checked(text)

    def _checked(self, text: str) -> str:
        for tag in self.forbidden:
            if tag in text:
                raise InputError(f"a content spells the template's tag {tag}")
        return text


def _fill(pattern: str, **values: str) -> str:
    """The pattern with its slots filled in one pass: what a content spells is never taken for a slot."""
    return _SLOT.sub(lambda slot: values[slot[1]], pattern)


def load_template(name: str | Path) -> Template:
    """The template of that name in `templates/`, or in that file. Raises `InputError` saying what is wrong with it."""
    path = Path(name if os.path.isfile(name) else TEMPLATES / f"{name}.json")
    if not os.path.isfile(path):  # Path.is_file raises where a name is too long: somebody gave a template's text
        names = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.json")))
        raise InputError(f"there is no template {name}: give a JSON file, or one of {names}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error})") from None
    try:
        if isinstance(content, dict) and not _ALPACA_LORA.isdisjoint(content):
            content = _from_alpaca_lora(content)
        _check_types(content)
        _check_slots(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return Template(**{**content, "forbidden": tuple(content.get("forbidden", ()))})


def _from_alpaca_lora(content: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """The template that alpaca-lora's `Prompter` makes of such a file: `str.format`, and the answer right after it.

    `response_split` finds the answer in a text; here it is told by its tokens. It must stand in both prompts, or
    alpaca-lora would find none.
    """
    texts = ("prompt_input", "prompt_no_input", "response_split")
    if unknown := sorted(set(content) - {*texts, "description"}):
        raise InputError(f"a template of alpaca-lora has the keys description, {', '.join(texts)}, got {unknown}")
    for key in (*texts, *({"description"} & set(content))):
        if not isinstance(content.get(key), str) or (key in texts and not content[key]):
            raise InputError(f"{key} of a template of alpaca-lora must be text, got {content.get(key)!r}")
    for key in texts[:2]:
        if content["response_split"] not in content[key]:
            raise InputError(f"response_split={content['response_split']!r} does not stand in {key}")
    return {
        "description": content.get("description", ""),
        "prompt": _unformatted(content["prompt_no_input"], "prompt_no_input"),
        "prompt_input": _unformatted(content["prompt_input"], "prompt_input"),
        "response": "{response}",
    }


def _unformatted(pattern: str, key: str) -> str:
    """A pattern of `str.format` as one of ours: doubled braces stand for one. Raises `InputError` for other fields."""
    allowed = ("instruction", "input") if key == "prompt_input" else ("instruction",)
    try:
        fields = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise InputError(f"{key} is no pattern of str.format ({error}): double a brace that is text") from None
    named = [(name, form, conversion) for _, name, form, conversion in fields if name is not None]
    if others := [name for name, form, conversion in named if name not in allowed or form or conversion]:
        raise InputError(f"{key} must hold no fields but {' and '.join(allowed)}, in braces: got {others[0]!r}")
    ours = "".join(text + (f"{{{name}}}" if name is not None else "") for text, name, _, _ in fields)
    if _SLOT.findall(ours) != [name for name, _, _ in named]:
        raise InputError(f"{key} spells a slot of a template in doubled braces: write it another way")
    return ours


def _check_types(content: typing.Any) -> None:
    types = typing.get_type_hints(Template)
    unknown = ", ".join(sorted(set(content) - set(types))) if isinstance(content, dict) else type(content).__name__
    if unknown:
        raise InputError(f"a template is a JSON object with the keys {', '.join(types)}, got {unknown}")
    for key, value in content.items():
        if types[key] in (str, bool):
            if not isinstance(value, types[key]):
                wanted = "text" if types[key] is str else "true or false"
                raise InputError(f"{key} must be {wanted}, got {value!r}")
        elif not isinstance(value, list) or not all(isinstance(tag, str) and tag for tag in value):
            raise InputError(f"{key} must be a list of texts, none of them empty, got {value!r}")


def _check_slots(content: dict[str, typing.Any]) -> None:
    """A slot that is missing would lose its content, and one in the wrong place would say it twice or not at all."""
    for key, slots in _SLOTS_OF.items():
        wanted = ["system", *slots] if content.get("system") and key in ("prompt", "prompt_input") else slots
        if sorted(_SLOT.findall(content.get(key, ""))) != sorted(wanted) and (content.get(key) or key in _REQUIRED):
            named = " and ".join(f"{{{slot}}}" for slot in wanted)
            raise InputError(f"{key} must hold {named} once and no other slot, got {content.get(key)!r}")
    if content.get("default_system") and not content.get("system"):
        raise InputError("default_system needs the key system, which says where in the prompt it stands")


def save_template(template: Template, folder: Path) -> None:
    """Writes `prompt_template.json`, which `load_template` reads."""
    content = {
        field.name: value
        for field in dataclasses.fields(template)
        if (value := getattr(template, field.name)) != field.default
    }
    (folder / FILE_NAME).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

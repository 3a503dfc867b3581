"""Prompt templates: files that say how a conversation becomes text, and where in it the model speaks.

Sources: Stanford Alpaca, alpaca-lora, LLaMA 2's reference code, FastChat (Vicuna 1.1); the files are in `templates/`.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hf_llama_repro.errors import InputError

TEMPLATES = Path(__file__).parent / "templates"
# Beside an adapter and a merged model, so that both are asked as they were trained.
FILE_NAME = "prompt_template.json"


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
    """Whether white space around contents goes."""
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
        framed = _fill(self.system, system=self._content(system)) if system else ""
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
        return _fill(pattern, system=system, instruction=instruction, input=text)

    def _content(self, text: str) -> str:
        for tag in self.forbidden:
            if tag in text:
                raise InputError(f"a content spells the template's tag {tag}")
        return text.strip() if self.strip else text


def _fill(pattern: str, **values: str) -> str:
    """The pattern with its slots filled in one pass: what a content spells is never taken for a slot."""
    return re.sub(r"\{(\w+)\}", lambda slot: values.get(slot[1], slot[0]), pattern)


def load_template(name: str | Path) -> Template:
    """The template of that name in `templates/`, or in that file. Raises `InputError` saying what is wrong with it."""
    path = Path(name)
    if not path.is_file():
        path = TEMPLATES / f"{name}.json"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.json")))
        raise InputError(f"there is no template {name}: give a JSON file, or one of {names}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error})") from None
    known = [field.name for field in dataclasses.fields(Template)]
    if not isinstance(content, dict) or set(content) - set(known):
        raise InputError(f"{path}: a template is a JSON object with the keys {', '.join(known)}")
    for key, slot in (("prompt", "instruction"), ("response", "response")):
        if str(content.get(key, "")).count(f"{{{slot}}}") != 1:
            raise InputError(f"{path}: {key} must hold {{{slot}}} once, got {content.get(key)!r}")
    if content.get("system") and "{system}" not in content["prompt"]:
        raise InputError(f"{path}: prompt must hold {{system}}, because the key system frames one")
    return Template(**{**content, "forbidden": tuple(content.get("forbidden", ()))})


def save_template(template: Template, folder: Path) -> None:
    """Writes `prompt_template.json`, which `load_template` reads."""
    content = {
        field.name: value
        for field in dataclasses.fields(template)
        if (value := getattr(template, field.name)) != field.default
    }
    (folder / FILE_NAME).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

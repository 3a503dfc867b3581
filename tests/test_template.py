"""Prompt templates: what their files may hold, and what text a conversation becomes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from finetune.template import FILE_NAME, TEMPLATES, Segment, Template, Turn, load_template, save_template
from hf_llama_repro.errors import InputError

NAMES = sorted(path.stem for path in TEMPLATES.glob("*.json"))
TURN = Turn("I1", "", "R1")
SMALL: dict[str, Any] = {"prompt": "P {instruction}:", "response": "{response}"}
SYSTEM: dict[str, Any] = SMALL | {"prompt": "{system}P {instruction}:", "system": "S {system}. "}


def text(template: Template, *turns: Turn, system: str = "") -> str:
    return "".join(segment.text for segment in template.segments(turns, system))


def loaded(folder: Path, content: Any) -> Template:
    path = folder / "template.json"
    path.write_text(json.dumps(content))
    return load_template(path)


# The shipped templates

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nI1\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nI1\n\n### Input:\nX\n\n### Response:"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


@pytest.mark.parametrize(
    ("name", "first", "with_input"),
    [
        ("alpaca", ALPACA + "\nR1", ALPACA_INPUT + "\nR1"),
        ("alpaca_legacy", ALPACA + "R1", ALPACA_INPUT + "R1"),
        ("alpaca_short", ALPACA[ALPACA.index("###") :] + "\nR1", ALPACA_INPUT[ALPACA_INPUT.index("###") :] + "\nR1"),
        ("llama2_chat", "[INST] I1 [/INST] R1 ", "[INST] I1\nX [/INST] R1 "),
        ("system", "### User:\nI1\n\n### Response:\nR1", "### User:\nI1\n\n### Input:\nX\n\n### Response:\nR1"),
        ("vicuna", VICUNA + "USER: I1 ASSISTANT: R1", VICUNA + "USER: I1\nX ASSISTANT: R1"),
    ],
)
def test_a_shipped_template_writes_the_published_text(name: str, first: str, with_input: str) -> None:
    template = load_template(name)
    assert text(template, TURN) == first
    assert text(template, TURN._replace(input="X")) == with_input


def test_every_shipped_template_is_tested_and_described() -> None:
    assert NAMES == ["alpaca", "alpaca_legacy", "alpaca_short", "llama2_chat", "system", "vicuna"]
    assert all(load_template(name).description for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_open_prompt_is_what_stands_before_the_answer(name: str) -> None:
    template = load_template(name)
    closed = list(template.segments((TURN._replace(input="X"),)))
    assert list(template.segments((Turn("I1", "X", ""),))) == closed[:1]
    assert [segment.is_response for segment in closed] == [False, True]
    assert [segment.is_start for segment in closed] == [True, False]


@pytest.mark.parametrize(
    ("name", "later"),
    [
        ("alpaca", "\n\n### Instruction:\nI2\nX\n\n### Response:\nR2"),
        ("alpaca_short", "\n\n### Instruction:\nI2\nX\n\n### Response:\nR2"),
        ("llama2_chat", "[INST] I2\nX [/INST] R2 "),
        ("system", "\n\n### User:\nI2\nX\n\n### Response:\nR2"),
        ("vicuna", "USER: I2\nX ASSISTANT: R2"),
    ],
)
def test_a_later_turn_follows_without_introduction(name: str, later: str) -> None:
    template, second = load_template(name), Turn("I2", "X", "R2")
    assert text(template, TURN, second) == text(template, TURN) + later
    assert text(template, TURN, second, second) == text(template, TURN) + 2 * later
    starts = [segment.is_start for segment in template.segments((TURN, second))]
    assert starts == [True, False, name == "llama2_chat", False]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama2_chat", "[INST] <<SYS>>\nkind\n<</SYS>>\n\nI1 [/INST] R1 "),
        ("system", "### System:\nkind\n\n### User:\nI1\n\n### Response:\nR1"),
        ("vicuna", "kind USER: I1 ASSISTANT: R1"),
    ],
)
def test_a_system_prompt_stands_once_and_first(name: str, expected: str) -> None:
    template = load_template(name)
    assert text(template, TURN, system="kind") == expected
    assert text(template, TURN, TURN, system="kind").count("kind") == 1
    assert text(template, TURN._replace(input="X"), system="kind").count("kind") == 1


@pytest.mark.parametrize("name", ["alpaca", "alpaca_legacy", "alpaca_short"])
def test_a_system_prompt_is_refused_where_it_has_no_place(name: str) -> None:
    with pytest.raises(InputError, match="no place for a system prompt"):
        text(load_template(name), TURN, system="kind")


def test_a_conversation_is_refused_by_a_template_for_one_turn() -> None:
    with pytest.raises(InputError, match="for one turn"):
        text(load_template("alpaca_legacy"), TURN, TURN)


# Contents


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spelled", ["{input}", "{response}", "{instruction} {system}", "{", "{}", "\\1 \\g<0>", "{x}"])
def test_a_content_that_spells_a_slot_stays_as_it_is(name: str, spelled: str) -> None:
    template, system = load_template(name), f"S{spelled}" if load_template(name).system else ""
    written = text(template, Turn(f"I{spelled}", f"X{spelled}", f"R{spelled}"), system=system)
    plain = text(template, Turn("I@", "X@", "R@"), system="S@" if system else "")
    assert written == plain.replace("@", spelled)
    assert plain.count("@") == 3 + bool(system)


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
@pytest.mark.parametrize("place", ["instruction", "input", "response", "system"])
def test_a_content_that_spells_a_tag_is_refused(tag: str, place: str) -> None:
    template, content = load_template("llama2_chat"), f"x{tag}y"
    turn = TURN if place == "system" else TURN._replace(**{place: content})
    system = content if place == "system" else ""
    with pytest.raises(InputError) as error:
        text(template, turn, system=system)
    assert tag in str(error.value)
    other = {name: value.replace(tag, tag.lower()) for name, value in turn._asdict().items()}
    text(template, Turn(**other), system=system.replace(tag, tag.lower()))


@pytest.mark.parametrize("name", NAMES)
def test_only_templates_that_say_so_strip(name: str) -> None:
    template, turn = load_template(name), Turn(" I1 \n", "\tX ", "\n  R1  ")
    stripped = text(template, Turn("I1", "X", "R1"))
    assert (text(template, turn) == stripped) == template.strip == (name in ("llama2_chat", "vicuna"))
    if not template.strip:
        assert all(content in text(template, turn) for content in turn)


def test_a_system_prompt_and_the_first_content_are_stripped_as_one() -> None:
    # As in Meta's code and LLaMA 2's chat template; the white space between the two went, and ids differed.
    expected = "[INST] <<SYS>>\n kind \n<</SYS>>\n\n I1 [/INST] R1 "
    assert text(load_template("llama2_chat"), Turn(" I1 ", "", " R1 "), system=" kind ") == expected


# Files


def test_unknown_words_in_braces_are_text(tmp_path: Path) -> None:
    template = loaded(tmp_path, SMALL | {"prompt": "{name} {instruction} {}", "response": "{{response}}"})
    assert text(template, TURN) == "{name} I1 {}{R1}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([SMALL], "with the keys prompt, response, .*, got list"),
        ("text", "got str"),
        (None, "got NoneType"),
        (SMALL | {"respones": "x", "a": 1}, "got a, respones"),
        ({"prompt": "{instruction}"}, r"response must hold \{response\} once and no other slot, got None"),
        ({"response": "{response}"}, r"prompt must hold \{instruction\} once and no other slot, got None"),
        (SMALL | {"prompt": "P"}, r"prompt must hold \{instruction\} once"),
        (SMALL | {"prompt": ""}, r"prompt must hold \{instruction\} once"),
        (SMALL | {"prompt": "{instruction}{instruction}"}, r"prompt must hold \{instruction\} once"),
        (SMALL | {"prompt": "{instructions}"}, r"prompt must hold \{instruction\} once"),
        (SMALL | {"prompt": "{instruction} {input}"}, "prompt must hold .* no other slot"),
        (SMALL | {"prompt": "{instruction} {response}"}, "prompt must hold .* no other slot"),
        (SMALL | {"prompt": "{system}{instruction}"}, "prompt must hold .* no other slot"),
        (SMALL | {"response": "{response} {response}"}, r"response must hold \{response\} once"),
        (SMALL | {"response": "{ response }"}, r"response must hold \{response\} once"),
        (SMALL | {"prompt_input": "{instruction}"}, r"prompt_input must hold \{instruction\} and \{input\} once"),
        (SMALL | {"prompt_input": "{input}"}, r"prompt_input must hold \{instruction\} and \{input\} once"),
        (SMALL | {"next_prompt": "x"}, r"next_prompt must hold \{instruction\} once"),
        (SYSTEM | {"next_prompt": "{system}{instruction}"}, "next_prompt must hold .* no other slot"),
        (SMALL | {"system": "{system}"}, r"prompt must hold \{system\} and \{instruction\} once"),
        (SYSTEM | {"prompt_input": "{instruction} {input}"}, r"prompt_input must hold \{system\} and"),
        (SYSTEM | {"system": "S"}, r"system must hold \{system\} once"),
        (SMALL | {"default_system": "kind"}, "default_system needs the key system"),
        (SMALL | {"prompt": 5}, "prompt must be text, got 5"),
        (SMALL | {"prompt": ["{instruction}"]}, "prompt must be text"),
        (SMALL | {"response": None}, "response must be text, got None"),
        (SMALL | {"description": 1}, "description must be text"),
        (SMALL | {"strip": "no"}, "strip must be true or false, got 'no'"),
        (SMALL | {"bos_each_turn": 1}, "bos_each_turn must be true or false, got 1"),
        (SMALL | {"forbidden": "[INST]"}, r"forbidden must be a list of texts, none of them empty, got '\[INST\]'"),
        (SMALL | {"forbidden": ["x", 5]}, "forbidden must be a list of texts"),
        (SMALL | {"forbidden": [""]}, "forbidden must be a list of texts, none of them empty"),
        (SMALL | {"forbidden": None}, "forbidden must be a list of texts"),
    ],
    ids=str,
)
def test_a_malformed_template_is_refused_with_the_reason(tmp_path: Path, content: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as error:
        loaded(tmp_path, content)
    assert str(error.value).startswith(f"{tmp_path / 'template.json'}: ")


@pytest.mark.parametrize("content", [SMALL, SYSTEM, SYSTEM | {"default_system": "kind", "forbidden": ["a", "b"]}])
def test_the_templates_that_the_malformed_ones_are_made_of_are_right(tmp_path: Path, content: Any) -> None:
    assert isinstance(loaded(tmp_path, content), Template)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"])
def test_a_template_that_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(InputError, match=r"t\.json cannot be read as JSON"):
        load_template(tmp_path / "t.json")


def test_a_template_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(SMALL), encoding="utf-8-sig")
    assert load_template(tmp_path / "t.json") == Template(**SMALL)


@pytest.mark.parametrize("name", ["alpacca", "", ".", "a\0b", ALPACA * 30, "alpaca.json"], ids=lambda name: name[:8])
def test_an_unknown_template_is_answered_with_the_names(name: str) -> None:
    with pytest.raises(InputError) as error:
        load_template(name)
    assert str(error.value).endswith(f"give a JSON file, or one of {', '.join(NAMES)}")


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_template_is_the_one_that_is_loaded(tmp_path: Path, name: str) -> None:
    template = load_template(name)
    save_template(template, tmp_path)
    assert load_template(tmp_path / FILE_NAME) == template


@pytest.mark.parametrize("field", dataclasses.fields(Template), ids=lambda field: field.name)
def test_each_key_of_a_template_is_saved(tmp_path: Path, field: Any) -> None:
    every = Template(
        prompt="{system}é{instruction}\n",
        response="「{response}」",
        description="d",
        prompt_input="{system}{instruction}{input}",
        next_prompt="n{instruction}",
        system="s{system}",
        default_system="kind",
        bos_each_turn=True,
        strip=True,
        forbidden=("[a]", "b"),
    )
    assert getattr(every, field.name) != field.default
    save_template(every, tmp_path)
    assert getattr(load_template(tmp_path / FILE_NAME), field.name) == getattr(every, field.name)


def test_a_segment_says_who_speaks() -> None:
    template = Template(prompt="P {instruction}:", response=" {response}\n", next_prompt="N {instruction}:")
    assert list(template.segments((TURN, Turn("I2", "", "")))) == [
        Segment("P I1:", False, True),
        Segment(" R1\n", True, False),
        Segment("N I2:", False, False),
    ]

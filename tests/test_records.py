"""Reading and linting of instruction data: what is trained on, and at which line of the file something is wrong."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.records import Finding, Record, read_records, summary
from finetune.template import Turn
from hf_llama_repro.errors import InputError

GOOD: dict[str, Any] = {"instruction": "Add.", "input": "1 2", "output": "3"}


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "data.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(folder: Path, *items: Any) -> tuple[list[Record], list[Finding]]:
    return read_records(write(folder, "\n".join(map(json.dumps, items))))


def found(folder: Path, item: Any) -> list[Finding]:
    """What is found in one record; a good one before it lets a file pass whose only other record is left out."""
    path = write(folder, json.dumps([GOOD, item]))
    findings = read_records(path)[1]
    assert all(finding.where == f"{path}:1" for finding in findings)
    return findings


def lines(values: list[Any]) -> list[int]:
    return [int(value.where.rpartition(":")[2]) for value in values]


def refused(folder: Path, content: str | bytes) -> str:
    path = write(folder, content)
    with pytest.raises(InputError) as error:
        read_records(path)
    assert str(error.value).startswith(str(path))
    return str(error.value)[len(str(path)) :]


# Where things stand

OVER_LINES = """
[
  {"instruction": "a", "output": "b"},
  {"instruction": "c",
 "output": ""},

 {"instruction":
"d","output":"\\u0007"}
]
"""
JSON_LINES = """

{"instruction": "a", "output": "b"}
{"instruction": "c", "output": ""}

	
 {"instruction": "d", "output": "\\u0007"} 
"""


@pytest.mark.parametrize(
    ("content", "records", "findings"),
    [
        (OVER_LINES, [3, 7], [4, 7]),
        (JSON_LINES, [3, 7], [4, 7]),
        (OVER_LINES.replace("\n", ""), [1, 1], [1, 1]),
        (OVER_LINES.replace("\n", "\n\n"), [5, 13], [7, 13]),
    ],
    ids=["list", "lines", "list in one line", "list with empty lines"],
)
@pytest.mark.parametrize("change", [("", ""), ("\n", "\r\n"), ("", "\ufeff")], ids=["plain", "CRLF", "BOM"])
def test_records_and_findings_name_the_line_at_which_the_record_begins(
    tmp_path: Path, content: str, records: list[int], findings: list[int], change: tuple[str, str]
) -> None:
    content = change[1] + content if change[0] == "" else content.replace(*change)
    read, seen = read_records(write(tmp_path, content))
    assert lines(read) == records
    assert [record.turns[0].instruction for record in read] == ["a", "d"]
    assert lines(seen) == findings
    assert [finding.kind for finding in seen] == ["empty output", "control characters"]
    assert [finding.left_out for finding in seen] == [True, False]


def test_a_line_separator_of_unicode_ends_no_line_of_json_lines(tmp_path: Path) -> None:
    content = "\n".join(json.dumps(GOOD | {"output": "a\u2028b\x85c"}, ensure_ascii=False) for _ in range(2))
    records, _ = read_records(write(tmp_path, content))
    assert lines(records) == [1, 2]
    assert records[0].turns[0].response == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ('[\n{"instruction": "a", "output": "b"},\n{"instruction": "c", "out', 3, "Unterminated string"),
        ('[\n{"instruction": "a", "output": "b"},\n', 3, "Expecting value"),
        ('[\n{"instruction": "a", "output": "b"}\n', 3, "expected , or ]"),
        ('[\n{"instruction": "a", "output": "b"},\n]', 3, "Expecting value"),
        ('[\n{"instruction": "a", "output": "b"}\n{}]', 3, "expected , or ]"),
        ('[\n{"instruction": "a", "output": "b"}]\n{}', 2, "something follows the list"),
        ("[", 1, "Expecting value"),
        ('{"instruction": "a", "output": "b"}\n{"instruction": ', 2, "Expecting value"),
        ('{"instruction": "a", "output": "b"}\n\n{} {}', 3, "something follows the record"),
        ('{\n"instruction": "a", "output": "b"}\n{}', 1, "Expecting property name"),
        ('{\n"instruction": "a", "output": "b",\n}', 3, "Expecting property name"),
        ('{"data": [\n{"instruction": "a", "output": "b"},\n{"instruction" 3}]}', 3, "Expecting ':'"),
        ("instruction,output\na,b", 1, "Expecting value"),
        ('[\n{"instruction": "a", "output": "b\n"}]', 2, "Invalid control character"),
        ("[\n" + "[" * 100_000, 2, "nested too deeply"),
        ("[\n{},\n" + '{"a":' * 100_000, 3, "nested too deeply"),
        ("{}\n" + "[" * 100_000, 2, "nested too deeply"),
        ('{}\n{"instruction": ' + "1" * 5000 + "}", 2, "4300 digits"),
        ("[\n{}, \n" + "1" * 5000 + "]", 3, "4300 digits"),
    ],
)
def test_what_is_not_json_is_refused_with_its_line(tmp_path: Path, content: str, line: int, reason: str) -> None:
    message = refused(tmp_path, content)
    assert message.startswith(f":{line} is not JSON (")
    assert reason in message
    assert "JSON Lines" in message


@pytest.mark.parametrize("content", ["", "\n \n", "[]", " [ ]\n", "\ufeff"])
def test_a_file_without_records_is_refused(tmp_path: Path, content: str) -> None:
    assert refused(tmp_path, content) == " holds 0 records, and none can be trained on"


def test_where_no_record_can_be_used_the_first_reason_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path, json.dumps([GOOD | {"output": ""}, 3]))
    assert "holds 2 records" in message
    assert f"the first: {tmp_path / 'data.json'}:1: empty output" in message


@pytest.mark.parametrize("content", [b"\xff\xfe[\x00]\x00", b'{"instruction": "\xe9", "output": "b"}'])
def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path, content: bytes) -> None:
    assert "data is a JSON or JSON Lines file in UTF-8" in refused(tmp_path, content)


@pytest.mark.parametrize("name", ["", "missing.json", "a\0b"], ids=["a folder", "missing", "NUL"])
def test_a_path_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_records(tmp_path / name)


# What a record is


@pytest.mark.parametrize(
    ("item", "record"),
    [
        (GOOD, ("Add.", "1 2", "3", "")),
        ({"instruction": "a", "output": "b"}, ("a", "", "b", "")),
        ({"instruction": "a", "input": None, "output": "b", "other": []}, ("a", "", "b", "")),
        ({"system_prompt": "s", "question": "q", "response": "r"}, ("q", "", "r", "s")),
        ({"instruction": " a\n", "system": "s", "input": "\ti ", "output": "    b "}, (" a\n", "\ti ", "    b ", "s")),
    ],
)
def test_keys_of_alpaca_and_orca_are_known(tmp_path: Path, item: Any, record: tuple[str, ...]) -> None:
    records, findings = read(tmp_path, item)
    instruction, text, output, system = record
    assert records == [Record(records[0].where, (Turn(instruction, text, output),), system)]
    assert findings == []


def say(*contents: tuple[str, str], sharegpt: bool, **others: Any) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt"} if sharegpt else {}
    key, speaker, text = ("conversations", "from", "value") if sharegpt else ("messages", "role", "content")
    return {key: [{speaker: names.get(who, who), text: what} for who, what in contents], **others}


U1, A1, U2, A2, S = ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b"), ("system", "s")
ONE, TWO = (Turn("u", "", "a"),), (Turn("u", "", "a"), Turn("v", "", "b"))


@pytest.mark.parametrize("sharegpt", [True, False], ids=["sharegpt", "messages"])
@pytest.mark.parametrize(
    ("said", "turns", "system", "kinds"),
    [
        ([U1, A1], ONE, "", []),
        ([U1, A1, U2, A2], TWO, "", []),
        ([S, U1, A1], ONE, "s", []),
        ([A2, U1, A1], ONE, "", ["begins with the assistant"]),
        ([S, A2, U1, A1], ONE, "s", ["begins with the assistant"]),
        ([U1, A1, U2], ONE, "", ["ends with the user"]),
        ([A2, U1, A1, U2], ONE, "", ["begins with the assistant", "ends with the user"]),
        ([U1, U2, A1], None, "", ["turns out of order"]),
        ([U1, A1, A2], None, "", ["turns out of order"]),
        ([U1, A1, S, U2, A2], None, "", ["turns out of order"]),
        ([S], None, "", ["turns out of order"]),
        ([A1], None, "", ["begins with the assistant", "turns out of order"]),
        ([U1], None, "", ["ends with the user", "turns out of order"]),
        ([], None, "", ["turns out of order"]),
        ([U1, ("assistant", " \n")], None, "", ["empty message"]),
        ([("user", ""), A1], None, "", ["empty message"]),
        ([U1, ("bing", "a")], None, "", ["unknown speaker"]),
    ],
)
def test_a_conversation_becomes_turns(
    tmp_path: Path, said: list[Any], turns: Any, system: str, kinds: list[str], sharegpt: bool
) -> None:
    records, findings = read(tmp_path, GOOD, say(*said, sharegpt=sharegpt))
    assert [(record.turns, record.system) for record in records[1:]] == ([] if turns is None else [(turns, system)])
    assert [finding.kind for finding in findings] == kinds
    assert lines(findings) == [2] * len(kinds)
    assert any(finding.left_out for finding in findings) == (turns is None)


def test_a_system_prompt_beside_the_conversation_counts_too(tmp_path: Path) -> None:
    records, _ = read(tmp_path, say(U1, A1, sharegpt=True, system="kind"))
    assert records[0].system == "kind"


@pytest.mark.parametrize("wrong", [5, 1.5, True, ["a"], {"a": "b"}, float("nan")], ids=repr)
@pytest.mark.parametrize("key", ["instruction", "input", "output", "system"])
def test_a_value_that_is_not_text_is_left_out_and_named(tmp_path: Path, key: str, wrong: Any) -> None:
    (finding,) = found(tmp_path, GOOD | {key: wrong})
    assert (finding.kind, finding.left_out) == ("wrong type", True)
    assert finding.detail == f"{key} is a {type(wrong).__name__}, not text"


@pytest.mark.parametrize(
    "item",
    [
        None,
        5,
        "text",
        [GOOD],
        {},
        {"instruction": "a"},
        {"output": "b"},
        {"instruction": None, "output": "b"},
        {"conversations": None},
        {"conversations": "text"},
        {"conversations": {"from": "human"}},
        {"conversations": [["human", "u"]]},
        {"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "a"}]},
        {"messages": [{"role": ["user"], "content": "u"}]},
        {"messages": [{"role": "user", "content": ["u"]}]},
        say(U1, A1, sharegpt=False, system=5),
    ],
    ids=repr,
)
def test_a_record_of_another_shape_is_left_out_and_named(tmp_path: Path, item: Any) -> None:
    (finding,) = found(tmp_path, item)
    assert (finding.kind, finding.left_out) == ("wrong type", True)


# What the linter sees


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
@pytest.mark.parametrize("key", ["instruction", "output"])
def test_an_empty_instruction_or_output_is_left_out(tmp_path: Path, key: str, text: str) -> None:
    (finding,) = found(tmp_path, GOOD | {key: text})
    assert (finding.kind, finding.left_out) == (f"empty {key}", True)


NO_INPUTS = (
    "<noinput>|No input|noinput|no-input|no_input|N/A|n/a|NA|None|none.|<No Input>.| \n|(No Input)|No input.\n|[None]"
)


@pytest.mark.parametrize("text", NO_INPUTS.split("|"))
def test_an_input_that_says_there_is_none_becomes_none(tmp_path: Path, text: str) -> None:
    records, (finding,) = read(tmp_path, GOOD | {"input": text})
    assert records[0].turns[0].input == ""
    assert (finding.kind, finding.detail, finding.left_out) == ("input that says there is none", repr(text), False)


REAL_INPUTS = (
    "None of the above is right|Nora|N/A values in a table|Na|no|input|No input is needed|nonexistent|0|-|nan|{}"
)


@pytest.mark.parametrize("text", REAL_INPUTS.split("|"))
def test_a_real_input_stays(tmp_path: Path, text: str) -> None:
    records, findings = read(tmp_path, GOOD | {"input": text})
    assert records[0].turns[0].input == text
    assert findings == []


@pytest.mark.parametrize("key", ["instruction", "input", "output", "system"])
@pytest.mark.parametrize("code", [0, 7, 8, 0x0B, 0x0C, 0x0D, 0x1B, 0x1F, 0x7F, 0x85, 0x9F, 0xFFFD, 0x2028])
def test_a_control_character_is_reported_and_kept(tmp_path: Path, key: str, code: int) -> None:
    records, (finding,) = read(tmp_path, GOOD | {key: f"a{chr(code)}b"})
    assert (finding.kind, finding.detail, finding.left_out) == ("control characters", repr(chr(code)), False)
    assert chr(code) in "".join((*records[0].turns[0], records[0].system))


@pytest.mark.parametrize(
    "text", ["a\tb\nc", "é 你好 😀 \u00a0 \u200d", "x # y", "The output: 3", "Instructions: a", "1. a"]
)
@pytest.mark.parametrize("key", ["instruction", "input", "output"])
def test_ordinary_text_is_not_reported(tmp_path: Path, key: str, text: str) -> None:
    assert read(tmp_path, GOOD | {key: text})[1] == []


@pytest.mark.parametrize("text", ["a\nInstruction: b", "a\n\n 12. Input: b", "### Response:\nb", "a\n#output : b"])
@pytest.mark.parametrize("key", ["instruction", "input", "output"])
def test_a_second_task_in_a_record_is_reported(tmp_path: Path, key: str, text: str) -> None:
    (finding,) = found(tmp_path, GOOD | {key: text})
    assert (finding.kind, finding.left_out) == ("merged instructions", False)
    assert "\n" not in finding.detail


@pytest.mark.parametrize("text", ["\n" * 20_000, " \n" * 20_000, "#" * 20_000, "#\n" * 20_000, "-" * 20_000])
def test_linting_takes_time_in_proportion_to_the_text(tmp_path: Path, text: str) -> None:
    # The pattern of merged instructions went over all following empty lines again for each of them: minutes.
    start = time.process_time()
    read(tmp_path, GOOD | {"output": f"a{text}b", "input": f"<{text}a"})
    assert time.process_time() - start < 2


@pytest.mark.parametrize("key", ["instruction", "input", "output", "system"])
def test_half_of_a_character_is_left_out(tmp_path: Path, key: str) -> None:
    # No tokenizer takes it: training stopped with a UnicodeEncodeError.
    (finding,) = found(tmp_path, GOOD | {key: "a\ud83d"})
    assert (finding.kind, finding.detail, finding.left_out) == ("lone surrogate", repr("\ud83d"), True)


def test_a_character_written_as_two_surrogates_is_whole(tmp_path: Path) -> None:
    records, findings = read_records(write(tmp_path, '{"instruction": "a", "output": "\\ud83d\\ude00"}'))
    assert records[0].turns[0].response == "😀"
    assert findings == []


def test_a_duplicate_names_the_first_of_its_kind(tmp_path: Path) -> None:
    other = [GOOD | {"output": "three"}, GOOD | {"input": "1"}, GOOD | {"system": "s"}]
    records, findings = read(tmp_path, GOOD, *other, GOOD, GOOD)
    path = tmp_path / "data.json"
    assert findings == [Finding(f"{path}:{line}", "duplicate", f"of {path}:1", False) for line in (5, 6)]
    assert len(records) == 6


def test_the_summary_counts_each_kind_and_says_what_became_of_it() -> None:
    findings = [Finding(f"f:{line}", "b", f"d{line}", left_out) for line, left_out in enumerate([True, False, True])]
    findings += [Finding("f:9", "a", "x", False), Finding("f:8", "c", "y", True)]
    assert summary(findings, examples=2) == [
        "a: 1 (kept), f:9 x",
        "b: 3 (2 left out), f:0 d0; f:1 d1 ...",
        "c: 1 (left out), f:8 y",
    ]


# Whatever the file holds

KEYS = st.sampled_from(["instruction", "input", "output", "system", "conversations", "messages"])
MESSAGE_KEYS = st.sampled_from(["from", "value", "role", "content", "question", "response", "system_prompt"])
all_text = st.text(st.characters(), max_size=8)  # with lone surrogates
SPEAKERS = st.sampled_from(["human", "gpt", "user", "assistant", "system"])
any_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | all_text | SPEAKERS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | MESSAGE_KEYS | all_text, inner, max_size=5),
    max_leaves=25,
)
anything = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))


def ends_in_records_or_input_error(path: Path, count: int | None = None) -> None:
    try:
        records, findings = read_records(path)
    except InputError:
        return
    assert records
    assert count in (None, len(records) + sum(finding.left_out for finding in findings))
    for record in records:
        assert all(turn.instruction.strip() and turn.response.strip() for turn in record.turns)
        "".join((record.system, *(text for turn in record.turns for text in turn))).encode()
    "\n".join(summary(findings)).encode()


@anything
@given(items=st.lists(any_value, max_size=4), as_list=st.booleans(), ascii_only=st.booleans())
def test_any_json_ends_in_records_or_an_input_error(
    tmp_path: Path, items: list[Any], as_list: bool, ascii_only: bool
) -> None:
    text = json.dumps(items, ensure_ascii=ascii_only) if as_list else "\n".join(map(json.dumps, items))
    ends_in_records_or_input_error(write(tmp_path, text.encode("utf-8", "surrogatepass")), len(items))


@anything
@given(content=st.binary(max_size=60) | st.text('[]{}",:\\ \n\r1au\ufeff', max_size=40).map(str.encode))
def test_any_bytes_end_in_records_or_an_input_error(tmp_path: Path, content: bytes) -> None:
    ends_in_records_or_input_error(write(tmp_path, content))


@anything
@given(at=st.integers(0, 200), byte=st.binary(max_size=2))
def test_a_damaged_file_ends_in_records_or_an_input_error(tmp_path: Path, at: int, byte: bytes) -> None:
    content = json.dumps([GOOD, say(S, U1, A1, sharegpt=True), GOOD]).encode()
    ends_in_records_or_input_error(write(tmp_path, content[:at] + byte + content[at + 1 :]))

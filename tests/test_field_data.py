"""Data as users have it: every key is used, refuses its record or is reported; containers, templates and sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from finetune.alpaca import main, prepare_data
from finetune.encoding import Encoder
from finetune.recipe import Recipe
from finetune.record_forms import Finding, Record
from finetune.records import UNREAD, read_records, summary
from finetune.template import Turn, load_template
from finetune.word_ids import WordIds, encodes_by_words
from hf_llama_repro.errors import InputError

GOOD: dict[str, Any] = {"instruction": "Add.", "output": "3"}
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}

HISTORY = {
    "instruction": "And its capital?",
    "input": "",
    "output": "Quito.",
    "history": [["Name a country on the equator.", "Ecuador."]],
}
CHOSEN = {
    "conversations": [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
        {"from": "human", "value": "Name a colour."},
    ],
    "chosen": {"from": "gpt", "value": "Red."},
    "rejected": {"from": "gpt", "value": "No."},
}
WEIGHT = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Bad answer", "weight": 0},
        {"role": "user", "content": "Again"},
        {"role": "assistant", "content": "Good answer", "weight": 1},
    ]
}


def read(folder: Path, *items: Any) -> tuple[list[Record], list[Finding]]:
    path = folder / "data.json"
    path.write_text(json.dumps(list(items)))
    return read_records(path)


def left_out(folder: Path, item: Any) -> tuple[str, str]:
    """(kind, detail) of why a record is left out; a good one beside it lets the file pass."""
    _, (finding,) = read(folder, GOOD, item)
    assert finding.left_out
    return finding.kind, finding.detail


@pytest.fixture(scope="module")
def encoder(tiny_base: Path) -> Encoder:
    return Encoder(AutoTokenizer.from_pretrained(tiny_base), load_template("alpaca"))


# Keys that say something


def test_history_becomes_the_turns_before_the_instruction(tmp_path: Path) -> None:
    (record,), findings = read(tmp_path, HISTORY)
    assert record.turns == (
        Turn("Name a country on the equator.", "", "Ecuador."),
        Turn("And its capital?", "", "Quito."),
    )
    assert findings == []


def test_history_of_messages_becomes_turns_too(tmp_path: Path) -> None:
    (record,), _ = read(tmp_path, HISTORY | {"history": [USER, ASSISTANT]})
    assert record.turns[0] == Turn("Hi", "", "Hello")


@pytest.mark.parametrize("history", ["before", [["a"]], [["a", 3]], [USER, USER], [["a", " "]]])
def test_a_history_that_cannot_be_read_leaves_the_record_out(tmp_path: Path, history: Any) -> None:
    left_out(tmp_path, HISTORY | {"history": history})


def test_the_chosen_answer_ends_the_conversation_and_the_rejected_one_is_reported(tmp_path: Path) -> None:
    (record,), (finding,) = read(tmp_path, CHOSEN)
    assert record.turns == (Turn("Hi", "", "Hello"), Turn("Name a colour.", "", "Red."))
    assert (finding.kind, finding.detail, finding.left_out) == (
        "rejected answer",
        "rejected is not trained on",
        False,
    )


@pytest.mark.parametrize(
    "item",
    [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "No."},
        {"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "No."},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
        {"prompt": "Hi", "chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
        {"messages": [USER, ASSISTANT], "chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
    ],
    ids=str,
)
def test_a_preference_pair_of_any_form_gives_the_chosen_answer(tmp_path: Path, item: dict[str, Any]) -> None:
    (record,), findings = read(tmp_path, item)
    assert record.turns == (Turn("Hi", "", "Hello"),)
    assert [finding.kind for finding in findings] == ["rejected answer"]


def test_an_answer_of_weight_0_is_read_and_not_learned(tmp_path: Path, encoder: Encoder) -> None:
    (record,), findings = read(tmp_path, WEIGHT)
    assert (record.unsupervised, findings) == (frozenset({0}), [])
    for train_on_prompt in (False, True):
        example = encoder.encode(record, train_on_prompt=train_on_prompt)
        marked = encoder.marked(example)
        assert "⟦Good answer</s>⟧" in marked if not train_on_prompt else marked.endswith("Good answer</s>⟧")
        assert "Bad answer" in marked
        learned = "".join(part.partition("⟧")[0] for part in marked.split("⟦")[1:])
        assert "Bad answer" not in learned


@pytest.mark.parametrize("weight", [{"weight": 0}, {"train": False}, {"training": False}])
def test_a_conversation_of_which_nothing_is_learned_is_left_out(tmp_path: Path, weight: dict[str, Any]) -> None:
    assert left_out(tmp_path, {"messages": [USER, ASSISTANT | weight]})[0] == "nothing to learn"


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        (GOOD | {"label": False}, "bad example"),
        ({"prompt": "a", "completion": "b", "label": False}, "bad example"),
        ({"messages": [USER, ASSISTANT], "kto_tag": False}, "bad example"),
        (GOOD | {"weight": 0}, "weight of 0"),
        (GOOD | {"weight": 0.5}, "weight between"),
        ({"messages": [USER, ASSISTANT | {"weight": 0.5}]}, "weight between"),
        (GOOD | {"tools": [{"name": "f"}]}, "more than text"),
        (GOOD | {"images": ["a.png"]}, "more than text"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": [{}]}]}, "more than text"),
        ({"messages": [USER | {"content": [{"type": "image_url"}]}, ASSISTANT]}, "content that is not text"),
        (GOOD | {"question": "Other?"}, "two keys for one thing"),
        (GOOD | {"chosen": "4"}, "two keys for one thing"),
        ({"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT], "system": "t"}, "two system prompts"),
    ],
    ids=str,
)
def test_a_key_that_reverses_the_meaning_or_cannot_be_honoured_leaves_the_record_out(
    tmp_path: Path, item: dict[str, Any], kind: str
) -> None:
    assert left_out(tmp_path, item)[0] == kind


@pytest.mark.parametrize(
    "item",
    [
        GOOD | {"label": True, "weight": 1, "tools": [], "images": None, "history": []},
        {"messages": [USER, ASSISTANT | {"weight": 1, "train": True}], "tools": "[]", "system": ""},
        GOOD | {"question": "Add.", "response": "3"},
    ],
    ids=str,
)
def test_keys_that_change_nothing_are_not_reported(tmp_path: Path, item: dict[str, Any]) -> None:
    records, findings = read(tmp_path, item)
    assert (len(records), findings) == (1, [])


@pytest.mark.parametrize("name", ["input", "context", "passage", "document", "article", "paragraph"])
@pytest.mark.parametrize("keys", [("question", "answer"), ("instruction", "response"), ("prompt", "completion")])
def test_the_passage_and_the_answer_are_read_under_their_other_names(
    tmp_path: Path, name: str, keys: tuple[str, str]
) -> None:
    (record,), findings = read(tmp_path, {keys[0]: "How high?", name: "It is 5 m high.", keys[1]: "5 m"})
    assert (record.turns, findings) == ((Turn("How high?", "It is 5 m high.", "5 m"),), [])


def test_contents_in_parts_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a colour."}]
    (first, second), findings = read(
        tmp_path, {"messages": [USER | {"content": parts}, ASSISTANT]}, GOOD | {"instruction": parts}
    )
    assert first.turns[0].instruction == second.turns[0].instruction == "Name a colour."
    assert findings == []


def test_keys_that_are_not_read_are_listed_once_with_their_number_of_records(tmp_path: Path) -> None:
    records, findings = read(
        tmp_path,
        *(GOOD | {"id": number, "input": str(number)} for number in range(1200)),
        {"messages": [USER | {"name": "Ann", "weight": 1}, ASSISTANT], "source": "x"},
    )
    path = tmp_path / "data.json"
    assert len(records) == 1201
    assert summary(findings) == [
        f"{UNREAD}: 4 (kept), {path}:1 'id' in 1,200 records; {path}:1 'source' in 1 record; "
        f"{path}:1 'messages[].name' in 1 record; {path}:1 'messages[].weight' in 1 record"
    ]


def test_many_and_long_unknown_keys_do_not_flood_the_report(tmp_path: Path) -> None:
    _, findings = read(tmp_path, GOOD | {f"{number}{'x' * 200}": 1 for number in range(60)})
    (line,) = summary(findings)
    assert line.startswith(f"{UNREAD}: ")
    assert line.endswith(" ...")
    assert len(line) < 20 * (len(str(tmp_path)) + 150)


def test_strict_refuses_keys_that_are_not_read(tiny_base: Path, tmp_path: Path) -> None:
    read(tmp_path, GOOD | {"source": "x"})
    recipe = Recipe(base_model=str(tiny_base), data=str(tmp_path / "data.json"), max_length=256)
    assert any("'source' in 1 record" in line for line in prepare_data(recipe).lines)
    with pytest.raises(InputError, match=r"strict=true.*\n.*'source' in 1 record"):
        prepare_data(Recipe(**{**vars(recipe), "strict": True}))


# Containers


OBJECT = """{
  "version": "1.0",
  "data": [
    {"instruction": "a", "output": "b"},

    {"instruction": "c", "output": ""}
  ]
}
"""


def test_an_object_that_holds_one_list_of_records_is_read(tmp_path: Path) -> None:
    path = tmp_path / "object.json"
    path.write_text(OBJECT)
    (record,), (empty, unread) = read_records(path)
    assert record == Record(f"{path}:4", (Turn("a", "", "b"),))
    assert (empty.where, empty.kind) == (f"{path}:6", "empty output")
    assert unread == Finding(f"{path}:1", UNREAD, "'version' beside 'data' in 1 record", False)


@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_of_one_record_is_read(tmp_path: Path, indent: int | None) -> None:
    (tmp_path / "one.json").write_text(json.dumps(WEIGHT, indent=indent) + "\n")
    assert len(read_records(tmp_path / "one.json")[0]) == 1


def test_an_object_that_holds_several_lists_of_records_is_refused(tmp_path: Path) -> None:
    (tmp_path / "two.json").write_text(json.dumps({"train": [GOOD], "test": [GOOD]}))
    with pytest.raises(InputError, match=r"several lists of objects \('train', 'test'\).*keep one"):
        read_records(tmp_path / "two.json")


def test_a_newline_of_windows_is_no_control_character(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD | {"output": "a\r\nb\r\n"})[1] == []
    assert [finding.kind for finding in read(tmp_path, GOOD | {"output": "a\rb"})[1]] == ["control characters"]


# alpaca-lora's template files

ALPACA_LORA = {
    "description": "mine",
    "prompt_input": "Task: {instruction}\nText: {input}\nAnswer:\n",
    "prompt_no_input": "Task: {instruction}\nAnswer:\n",
    "response_split": "Answer:",
}


def alpaca_loras_prompt(template: dict[str, str], turn: Turn) -> str:
    """`Prompter.generate_prompt` of tloen/alpaca-lora (utils/prompter.py), without its label."""
    if turn.input:
        return template["prompt_input"].format(instruction=turn.instruction, input=turn.input)
    return template["prompt_no_input"].format(instruction=turn.instruction)


@pytest.mark.parametrize("braces", ["", "{{x}} {{", "}}{{"])
@pytest.mark.parametrize("text", ["", "5 {input} {{"])
def test_a_template_of_alpaca_lora_writes_what_alpaca_lora_writes(tmp_path: Path, braces: str, text: str) -> None:
    content = {key: braces * key.startswith("prompt") + value for key, value in ALPACA_LORA.items()}
    (tmp_path / "t.json").write_text(json.dumps(content))
    template, turn = load_template(tmp_path / "t.json"), Turn("Say {instruction}", text, "Yes.")
    prompt, response = template.segments((turn,))
    assert prompt.text == alpaca_loras_prompt(content, turn)
    assert (response.text, response.is_response) == ("Yes.", True)
    assert template.description == "mine"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": "{instruction}"}, r"got \['prompt'\]"),
        ({"response_split": "Reply:"}, "does not stand in prompt_input"),
        ({"prompt_no_input": "Answer:"}, "must hold {instruction} once"),
        ({"prompt_no_input": "{instruction} {input} Answer:"}, "no fields but instruction"),
        ({"prompt_no_input": "{instruction!r} Answer:"}, "no fields but instruction"),
        ({"prompt_no_input": "{instruction} {{system}} Answer:"}, "spells a slot"),
        ({"prompt_no_input": "{instruction} { Answer:"}, "no pattern of str.format"),
        ({"prompt_input": None}, "must be text, got None"),
    ],
    ids=str,
)
def test_a_template_of_alpaca_lora_that_loses_something_is_refused(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    (tmp_path / "t.json").write_text(json.dumps(ALPACA_LORA | change))
    with pytest.raises(InputError, match=reason):
        load_template(tmp_path / "t.json")


# Length and speed


def test_a_record_whose_prompt_alone_exceeds_the_limit_is_reported_as_such(encoder: Encoder) -> None:
    long = Record("data.json:7", (Turn("word " * 99, "", "Yes"),))
    records = [
        long,
        Record("data.json:8", (Turn("Hi", "", "Hello " * 99),)),
        Record("data.json:9", (Turn("a", "", "b"),)),
    ]
    prompt = len(encoder.prompt(long))
    for truncation, train_on_prompt in (("input", False), ("response", True), ("drop", False)):
        _, cuts = encoder.encode_all(records, max_length=prompt, truncation=truncation, train_on_prompt=train_on_prompt)
        assert cuts.lines(prompt)[1:] == [
            f"prompt alone of {prompt} tokens or more: 1 records, of whose response nothing is left (the first: "
            f"data.json:7, {prompt} tokens)"
        ]
    with pytest.raises(InputError, match=f"the prompt alone of data.json:7, {prompt} tokens"):
        encoder.encode_all([long], max_length=prompt, truncation="input")


AWKWARD = [
    *("", " ", "   ", "a", " a", "a ", "  a  b   ", "a\n b\n\n  c", "\n", "\t x", "a \u2581 b", "\u2581", "x\u2581 y"),
    *("</s>", "a </s> <s>b", "<unk>", "<0x41> <0x0A>", "é 你好 😀 \u00a0 x", "1 < 2:\n    return  3", '"Yes" (no)'),
]


def test_texts_encoded_by_words_have_the_tokenizers_ids(encoder: Encoder) -> None:
    assert encoder._words is not None
    for text in AWKWARD * 2:  # again: by the words that are kept
        assert encoder._words.encode(text) == encoder._continued.encode(text, add_special_tokens=False).ids
        for is_start, backend in ((True, encoder._start), (False, encoder._continued)):
            segment = next(encoder.template.segments((Turn("x", "", ""),)))._replace(text=text, is_start=is_start)
            expected = encoder._bos * is_start + backend.encode(text, add_special_tokens=False).ids
            assert encoder.ids(segment) == expected


def test_a_tokenizer_whose_pieces_go_on_beyond_a_word_is_not_encoded_by_words(encoder: Encoder) -> None:
    backend = json.loads(encoder._continued.to_str())
    assert encodes_by_words(backend)
    first, second = "a", "\u2581"
    backend["model"]["vocab"][first + second] = len(backend["model"]["vocab"])
    backend["model"]["merges"].insert(0, [first, second])
    assert not encodes_by_words(backend)
    # And rightly so: by words it has other ids.
    tokenizer = Tokenizer.from_str(json.dumps(backend))
    assert WordIds(tokenizer).encode("a b") != tokenizer.encode("a b", add_special_tokens=False).ids


@pytest.mark.parametrize(
    "change",
    [
        {"added_tokens": [{"id": 0, "content": "a b", "special": False}]},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"normalizer": {"type": "NFKC"}},
        {"model": {"byte_fallback": False}},
        {"model": {"dropout": 0.1}},
        {"model": {"type": "Unigram"}},
    ],
    ids=str,
)
def test_a_tokenizer_of_another_kind_is_not_encoded_by_words(encoder: Encoder, change: dict[str, Any]) -> None:
    backend = json.loads(encoder._continued.to_str())
    for key, value in change.items():
        backend[key] = {**backend[key], **value} if key == "model" else value
    assert not encodes_by_words(backend)


def test_a_word_is_encoded_once_in_whatever_number_of_records(encoder: Encoder, monkeypatch: Any) -> None:
    # One by one, 52,000 records took 21 s; by their words 5 s.
    words = WordIds(encoder._continued)
    asked: list[str] = []
    count = words.__missing__
    monkeypatch.setattr(WordIds, "__missing__", lambda self, word: (asked.append(word), count(word))[1])
    monkeypatch.setattr(encoder, "_words", words)
    monkeypatch.setattr(encoder, "_start", None)  # is not asked at all
    records = [Record(f"{n}", (Turn("Say it again.", "", f"{n % 10} one two"),)) for n in range(1000)]
    assert len(encoder.encode_all(records, max_length=512, truncation="input")[0]) == 1000
    assert len(asked) == len(set(asked)) < 60


def test_reading_is_said_before_it_begins(tiny_base: Path, tmp_path: Path) -> None:
    read(tmp_path, GOOD)
    said: list[str] = []
    recipe = Recipe(base_model=str(tiny_base), data=str(tmp_path / "data.json"), max_length=256)
    prepare_data(recipe, say=lambda line, **_: said.append(line))
    assert said == [f"reading     {tmp_path / 'data.json'}, 0.0 MB"]


def test_held_out_records_that_are_cut_are_reported(tiny_base: Path, tmp_path: Path) -> None:
    read(tmp_path, *({"instruction": str(n), "output": "word " * 200} for n in range(4)))
    recipe = Recipe(base_model=str(tiny_base), data=str(tmp_path / "data.json"), max_length=256, held_out=2)
    lines = prepare_data(recipe).lines
    assert any(line.startswith("length      held out: limit of 256 tokens: 2 records cut") for line in lines)


def test_the_command_lists_what_it_does_not_read(tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    read(tmp_path, CHOSEN | {"id": 1}, HISTORY)
    (tmp_path / "recipe.yaml").write_text("max_length: 512\ntemplate: alpaca\n")
    flags = ["--base-model", str(tiny_base), "--data", str(tmp_path / "data.json"), "--inspect", "2"]
    assert main([str(tmp_path / "recipe.yaml"), *flags]) == 0
    printed = capsys.readouterr().out
    shown = ("'id' in 1 record", "rejected is not trained on", "⟦Red.</s>⟧", "⟦Ecuador.</s>⟧", "⟦Quito.</s>⟧")
    assert [text for text in shown if text not in printed] == []

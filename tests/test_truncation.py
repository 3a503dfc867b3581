"""The limit on a record's length: what yields to it, and what is said about it."""

from typing import Any

import pytest
from encoding_fixtures import encoder_for, record, response_text, supervised, supervised_texts, untagged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece_fixtures import llama_like_text

from finetune.encoding import IGNORED, SHORTEST_INPUT, Cuts, Encoder, Example
from finetune.records import Record
from finetune.template import Turn
from hf_llama_repro.errors import InputError

pytest_plugins = ["encoding_fixtures"]

WORDS = " ".join(["one two three four five six"] * 20)
RULES = ["input", "response", "drop"]


def cut(encoder: Encoder, of: Record, max_length: int, truncation: str, **options: Any) -> tuple[Example, Cuts]:
    """The example of one record under a limit, and what that took; a second record sees to it that one is left."""
    short = Record("short", (Turn("y", "", "x"),))
    (*examples, last), cuts = encoder.encode_all([of, short], max_length=max_length, truncation=truncation, **options)
    assert last == encoder.encode(short, **options)
    return (examples[0] if examples else Example([], [])), cuts


# The rules


@pytest.mark.parametrize("truncation", RULES)
def test_a_record_of_exactly_the_limit_is_kept_whole(either: Any, truncation: str) -> None:
    encoder = encoder_for(either, "alpaca")
    whole = encoder.encode(record("Yes"))
    examples, cuts = encoder.encode_all([record("Yes")], max_length=len(whole.input_ids), truncation=truncation)
    assert examples == [whole]
    assert cuts == Cuts()
    assert cuts.lines(512) == ["limit of 512 tokens: nothing was cut"]


@pytest.mark.parametrize("excess", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("name", ["alpaca", "alpaca_legacy", "llama2_chat", "vicuna", "system"])
def test_the_input_yields_first_and_no_more_of_it_than_must(either: Any, name: str, excess: int) -> None:
    encoder, of = encoder_for(either, name), record('"Yes"', "Sum up.", WORDS)
    whole = encoder.encode(of)
    limit = len(whole.input_ids) - excess
    example, cuts = cut(encoder, of, limit, "input")
    assert len(example.input_ids) == limit
    ((start, end),) = supervised(example)
    assert (example.input_ids[start:], end) == (whole.input_ids[supervised(whole)[0][0] :], limit)
    assert example == encoder.encode(record('"Yes"', "Sum up.", " ".join(WORDS.split()[:-excess])))  # a token each
    assert cuts == Cuts(records=1, tokens=excess, inputs=1)


@pytest.mark.parametrize("tail", ["\n" * 30, " " * 30, " \n" * 20, "\n\n\t" * 9])
@pytest.mark.parametrize("name", ["alpaca", "llama2_chat", "vicuna"])
@pytest.mark.parametrize("excess", [1, 4])
def test_an_input_that_ends_in_white_space_is_shortened_enough(either: Any, name: str, tail: str, excess: int) -> None:
    # Of a template that strips contents, only white space was cut that does not count, and then the response's end.
    encoder, of = encoder_for(either, name), record("Yes, indeed", "Sum up.", WORDS + tail)
    limit = len(encoder.encode(of).input_ids) - excess
    example, cuts = cut(encoder, of, limit, "input")
    assert len(example.input_ids) <= limit
    assert list(supervised_texts(either, example)) == [response_text(encoder, "Yes, indeed") + either.eos_token]
    assert (cuts.inputs, cuts.eos) == (1, 0)


def test_an_input_is_shortened_to_the_shortest_and_then_the_response_yields(either: Any) -> None:
    encoder, of = encoder_for(either, "alpaca"), record(WORDS, "Sum up.", WORDS)
    shortest = encoder.encode(record(WORDS, "Sum up.", " ".join(WORDS.split()[:SHORTEST_INPUT])))
    limit = len(shortest.input_ids) - 10
    example, cuts = cut(encoder, of, limit, "input")
    assert (example.input_ids, example.labels) == (shortest.input_ids[:limit], shortest.labels[:limit])
    whole = len(encoder.encode(of).input_ids)
    assert cuts == Cuts(records=1, tokens=whole - limit, inputs=1, eos=1)
    assert cuts.lines(9) == [
        f"limit of 9 tokens: 1 records cut by {whole - limit} tokens; 1 inputs shortened, "
        "1 responses cut (they lose EOS), 0 records left out"
    ]


@pytest.mark.parametrize("text", ["", "a b c", " ".join(WORDS.split()[:SHORTEST_INPUT])])
def test_a_short_input_stays_and_the_response_yields(either: Any, text: str) -> None:
    encoder, of = encoder_for(either, "alpaca"), record(WORDS, "Sum up.", text)
    whole = encoder.encode(of)
    limit = len(whole.input_ids) - 7
    example, cuts = cut(encoder, of, limit, "input")
    assert example == Example(whole.input_ids[:limit], whole.labels[:limit])
    assert cuts == Cuts(records=1, tokens=7, inputs=0, eos=1)


def test_the_response_yields_alone_where_the_rule_says_so(either: Any) -> None:
    encoder, of = encoder_for(either, "alpaca"), record("Yes, one two", "Sum up.", WORDS)
    whole = encoder.encode(of)
    for excess in (1, 2, 3):
        example, cuts = cut(encoder, of, len(whole.input_ids) - excess, "response")
        assert example == Example(whole.input_ids[:-excess], whole.labels[:-excess])
        assert encoder.eos not in example.input_ids
        assert cuts == Cuts(records=1, tokens=excess, eos=1)


def test_the_whole_record_yields_where_the_rule_says_so(either: Any) -> None:
    encoder, of = encoder_for(either, "alpaca"), record("Yes", "Sum up.", WORDS)
    whole = len(encoder.encode(of).input_ids)
    example, cuts = cut(encoder, of, whole - 1, "drop")
    assert example == Example([], [])
    assert cuts == Cuts(records=1, tokens=whole, left_out=["data.json:1"])


@pytest.mark.parametrize("truncation", ["input", "response"])
@pytest.mark.parametrize("spare", [0, 1])
def test_a_record_of_which_no_response_is_left_is_left_out_and_named(either: Any, truncation: str, spare: int) -> None:
    encoder, of = encoder_for(either, "alpaca"), record("Yes, indeed", WORDS, "")
    prompt = len(encoder.prompt(of))
    example, cuts = cut(encoder, of, prompt + spare, truncation)
    assert len(example.input_ids) == (prompt + 1 if spare else 0)
    assert cuts.left_out == ([] if spare else ["data.json:1"])
    assert (cuts.inputs, cuts.eos) == (0, spare)
    named = "" if spare else " (the first: data.json:1)"
    assert cuts.lines(9)[0].endswith(f"{1 - spare} records left out{named}")


def test_an_input_that_is_shortened_in_vain_is_not_counted(either: Any) -> None:
    encoder = encoder_for(either, "alpaca")
    _, cuts = cut(encoder, record("Yes", WORDS, WORDS), 60, "input")
    assert (cuts.left_out, cuts.inputs, cuts.eos) == (["data.json:1"], 0, 0)


@pytest.mark.parametrize("truncation", RULES)
def test_where_nothing_is_left_the_limit_is_named(either: Any, truncation: str) -> None:
    with pytest.raises(InputError, match="no record is left within max_length=5"):
        encoder_for(either, "alpaca").encode_all([record("Yes")], max_length=5, truncation=truncation)


@pytest.mark.parametrize("truncation", ["input", "response"])
@pytest.mark.parametrize("name", ["alpaca", "llama2_chat", "vicuna"])
def test_a_conversation_is_cut_at_its_end_and_ends_in_an_answer(either: Any, name: str, truncation: str) -> None:
    encoder, of = encoder_for(either, name), Record("data.json:1", (Turn("Who are you?", "", "It is me."),) * 3)
    whole = encoder.encode(of)
    stretches = supervised(whole)
    for limit in range(stretches[0][0] + 1, len(whole.input_ids)):
        example, cuts = cut(encoder, of, max(limit, len(whole.input_ids) // 3), truncation)
        length = len(example.input_ids)
        assert example == Example(whole.input_ids[:length], whole.labels[:length])
        assert example.labels[-1] != IGNORED
        inside = [start for start, end in stretches if start < limit < end]
        assert cuts.eos == (example.input_ids[-1] != encoder.eos)
        if inside and limit >= len(whole.input_ids) // 3:
            assert (length, cuts.eos) == (limit, 1)


def test_a_record_that_the_template_cannot_express_is_named(either: Any) -> None:
    of = Record("data.json:7", (Turn("a", "", "b"),), "Be kind.")
    with pytest.raises(InputError, match=r"^data\.json:7: .*system prompt; choose another template, or fix the record"):
        encoder_for(either, "alpaca").encode_all([of], max_length=99, truncation="input")


def test_with_the_prompt_in_the_loss_a_cut_record_is_kept(either: Any) -> None:
    encoder, of = encoder_for(either, "alpaca"), record("Yes", WORDS, "")
    whole = encoder.encode(of)
    example, cuts = cut(encoder, of, 60, "response", train_on_prompt=True)
    assert example.labels == example.input_ids == whole.input_ids[:60]
    assert cuts == Cuts(
        records=1, tokens=len(whole.input_ids) - 60, eos=1, prompts=[f"data.json:1, {len(encoder.prompt(of))} tokens"]
    )


# Whatever the texts and the limit are

turns = st.builds(Turn, llama_like_text, llama_like_text, llama_like_text.map("{}.".format))
conversations = st.lists(turns, min_size=1, max_size=3).map(tuple)


@pytest.mark.parametrize("name", ["alpaca", "llama2_chat", "vicuna"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    all_turns=st.lists(conversations, min_size=1, max_size=4),
    limit=st.integers(1, 220),
    truncation=st.sampled_from(RULES),
    train_on_prompt=st.booleans(),
)
def test_no_example_is_longer_than_the_limit_and_the_cuts_add_up(
    either: Any, name: str, all_turns: list[tuple[Turn, ...]], limit: int, truncation: str, train_on_prompt: bool
) -> None:
    encoder = encoder_for(either, name)
    cleaned = [tuple(Turn(*(untagged(text) for text in turn)) for turn in turns) for turns in all_turns]
    records = [Record(f"data.json:{number}", turns) for number, turns in enumerate(cleaned)]
    wholes = [encoder.encode(of, train_on_prompt=train_on_prompt) for of in records]
    try:
        examples, cuts = encoder.encode_all(
            records, max_length=limit, truncation=truncation, train_on_prompt=train_on_prompt
        )
    except InputError:
        assert train_on_prompt is False or truncation == "drop"
        assert all(len(whole.input_ids) > limit for whole in wholes)
        return
    kept = [whole for of, whole in zip(records, wholes, strict=True) if of.where not in cuts.left_out]
    assert len(examples) == len(kept) == len(records) - len(cuts.left_out)
    assert cuts.records == sum(len(whole.input_ids) > limit for whole in wholes)
    assert cuts.tokens == sum(len(one.input_ids) for one in wholes) - sum(len(one.input_ids) for one in examples)
    assert cuts.eos == sum(one.input_ids[-1] != encoder.eos for one in examples)
    for example, whole in zip(examples, kept, strict=True):
        assert 0 < len(example.input_ids) == len(example.labels) <= limit
        assert example == whole or len(whole.input_ids) > limit
        assert all(label in (IGNORED, token) for label, token in zip(example.labels, example.input_ids, strict=True))
        assert any(label != IGNORED for label in example.labels)
        if truncation != "input":
            length = len(example.input_ids)
            assert example == Example(whole.input_ids[:length], whole.labels[:length])


awkward_input = st.lists(llama_like_text, min_size=8, max_size=20).map(lambda parts: " x".join(parts))


@pytest.mark.parametrize("name", ["alpaca", "alpaca_legacy", "llama2_chat", "vicuna"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=awkward_input, response=llama_like_text, excess=st.integers(1, 15))
def test_the_response_and_eos_are_whole_where_the_input_is_long_enough(
    either: Any, name: str, text: str, response: str, excess: int
) -> None:
    encoder = encoder_for(either, name)
    text, response = untagged(text), untagged(response) + "."
    text = ("one two three " * SHORTEST_INPUT) + text
    of = record(response, "Sum up.", text)
    whole = encoder.encode(of)
    limit = len(whole.input_ids) - excess
    (example,), cuts = encoder.encode_all([of], max_length=limit, truncation="input")
    ((start, _),) = supervised(whole)
    answer = whole.input_ids[start:]
    assert example.input_ids[-len(answer) :] == example.labels[-len(answer) :] == answer
    assert set(example.labels[: -len(answer)]) == {IGNORED}
    assert (cuts.inputs, cuts.eos, cuts.left_out) == (1, 0, [])

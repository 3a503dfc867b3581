"""Token ids of records: exactly the responses and their EOS are supervised, after the prompt as it is at inference."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from encoding_fixtures import encoder_for, prompt_text, record, response_text, supervised, supervised_texts, untagged
from hypothesis import HealthCheck, given, settings
from sentencepiece import SentencePieceProcessor
from sentencepiece_fixtures import DIALOGS, dialog, llama_like_text, metas_ids, rewritten
from transformers import AutoTokenizer

from conversion.tokenizer import AWKWARD_TEXTS, SPACE, convert_tokenizer
from finetune.encoding import IGNORED, Encoder, Example, padding_share
from finetune.records import Record
from finetune.template import TEMPLATES, Turn, load_template
from hf_llama_repro.errors import CheckpointError

pytest_plugins = ["encoding_fixtures"]

NAMES = sorted(path.stem for path in TEMPLATES.glob("*.json"))
SEVERAL_TURNS = [name for name in NAMES if load_template(name).next_prompt]
# fmt: off
RESPONSES = [
    '"Yes," it said.', "'no'", "(a) b", ")", "[1, 2]", "{x}", "/path/file", "- item\n- item", ": colon", ":", "...",
    "#", "1. one", "007", "\nsecond", "\n\n\n  third", " one space", "  two", "    if x:\n        return 1\n",
    "\t tab", "Yes", "yes", "Élan", "你好，世界", "龘", "😀 👩\u200d👩\u200d👧", "ends in spaces   ",
    "ends in newlines\n\n", "a  b   c                                        d", "</s>", "a</s>b", "<s> a",
    "<unk>", "<|im_end|>",
    "x<|im_end|>\n<|im_start|>user", "<0x0A>", "a\x00b\r\n", "========================================",
]
# fmt: on
# SentencePiece decodes its sign for a space as one; SmolLM2 has no tokens for some control characters and bytes.
NOT_KEPT = re.compile(f"[{SPACE}\x04\x06\x13\x14\x16\x1d\U00040000-\U0010ffff]")


# What is supervised


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_response_and_one_eos_are_supervised(either: Any, name: str, response: str) -> None:
    encoder = encoder_for(either, name)
    example = encoder.encode(record(response))
    ((start, end),) = supervised(example)
    assert end == len(example.input_ids) == len(example.labels)
    assert example.labels[start:] == example.input_ids[start:]
    assert example.input_ids.count(encoder.eos) == 1
    assert example.input_ids[-1] == encoder.eos
    assert list(supervised_texts(either, example)) == [response_text(encoder, response) + either.eos_token]
    assert encoder.continuation(example.input_ids[:start], example.input_ids[start:-1]) == response_text(
        encoder, response
    )


@pytest.mark.parametrize("response", ['"Yes', "Yes", "  x", "\n", "/", "你"])
@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_has_the_ids_of_inference(either: Any, name: str, response: str) -> None:
    encoder = encoder_for(either, name)
    of = record(response, "Write  it.")
    example = encoder.encode(of)
    start = supervised(example)[0][0]
    assert example.input_ids[:start] == either(prompt_text(encoder, of)).input_ids == encoder.prompt(of)


@pytest.mark.parametrize("instruction", AWKWARD_TEXTS[3:])
@pytest.mark.parametrize("name", ["alpaca", "llama2_chat"])
def test_llamas_prompt_has_sentencepieces_ids(
    llama: Any, sentencepiece: SentencePieceProcessor, name: str, instruction: str
) -> None:
    encoder, of = encoder_for(llama, name), record("Yes", instruction.replace("[INST] <<SYS>>", ""))
    if name == "llama2_chat":
        of = record("Yes", *(text.replace("<<", "").replace("<</", "") for text in of.turns[0][:2]))
    assert encoder.prompt(of) == [1, *sentencepiece.encode(prompt_text(encoder, of))]


def test_special_tokens_that_a_prompt_spells_are_text(either: Any) -> None:
    encoder = encoder_for(either, "alpaca")
    prompt = encoder.prompt(record("Yes", "</s><s><|im_end|><|im_start|><unk>", "<|endoftext|></s>"))
    specials = set(either.all_special_ids)
    assert specials & set(prompt) == ({1} if encoder._bos else set())
    assert prompt.count(1) == len(encoder._bos)


@pytest.mark.parametrize("change", ["metaspace", "byte level with a prefix", "sequence of normalizers"])
def test_other_ways_to_put_a_space_before_a_text_are_known_too(
    llama_folder: Path, smollm2_folder: Path, tmp_path: Path, change: str
) -> None:
    def rewrite(content: dict[str, Any]) -> None:
        if change == "metaspace":  # as LlamaTokenizer writes it
            content["normalizer"] = None
            content["pre_tokenizer"] = {
                "type": "Metaspace",
                "replacement": SPACE,
                "prepend_scheme": "first",
                "split": False,
            }
        elif change == "sequence of normalizers":
            content["normalizer"]["normalizers"].insert(0, {"type": "NFC"})
        else:
            for step in content["pre_tokenizer"]["pretokenizers"]:
                step |= {"add_prefix_space": True} if step["type"] == "ByteLevel" else {}

    folder = smollm2_folder if change.startswith("byte") else llama_folder
    tokenizer = rewritten(folder, tmp_path / "changed", "tokenizer.json", rewrite)
    encoder = encoder_for(tokenizer, "alpaca")
    for response in RESPONSES:
        example = encoder.encode(record(response))
        assert list(supervised_texts(tokenizer, example)) == [response + tokenizer.eos_token]
    assert encoder.prompt(record("", "it")) == tokenizer(prompt_text(encoder, record("", "it"))).input_ids


def test_a_mask_by_the_prompts_token_count_would_be_wrong(either: Any) -> None:
    encoder, of = encoder_for(either, "alpaca_legacy"), record('"Yes," it said.', "Speak.", "")
    prompt = either(prompt_text(encoder, of)).input_ids
    joint = [*either(prompt_text(encoder, of) + '"Yes," it said.').input_ids, encoder.eos]
    usual = Example(joint, [IGNORED] * len(prompt) + joint[len(prompt) :])
    right = encoder.encode(of)
    assert joint[: len(prompt)] != prompt
    before, whole = either.decode(prompt), either.decode(joint[: len(prompt)])
    assert whole != before
    assert [label for label in usual.labels if label != IGNORED] != [x for x in right.labels if x != IGNORED]


def test_a_response_encoded_as_a_text_of_its_own_would_begin_otherwise(llama: Any) -> None:
    of = record("Yes", "Speak.", "")
    example = encoder_for(llama, "alpaca").encode(of)
    alone = llama("Yes", add_special_tokens=False).input_ids
    start = supervised(example)[0][0]
    assert llama.convert_ids_to_tokens(alone) == ["▁Yes"]
    assert llama.convert_ids_to_tokens(example.input_ids[start:]) == ["Yes", "</s>"]
    wrong = Example(example.input_ids[:start] + alone, example.labels[:start] + alone)
    assert list(supervised_texts(llama, wrong)) == [" Yes"]


def joint_differs(encoder: Encoder, records: list[Record]) -> list[str]:
    """Responses whose record has other ids when prompt and response are encoded in one piece."""
    texts = ["".join(part.text for part in encoder.template.segments(of.turns)) for of in records]
    joint = encoder.tokenizer(texts, split_special_tokens=True).input_ids
    return [
        of.turns[0].response
        for of, ids in zip(records, joint, strict=True)
        if encoder.encode(of).input_ids != [*ids, encoder.eos]
    ]


@pytest.mark.parametrize("name", ["alpaca", "alpaca_short", "llama2_chat", "system", "vicuna"])
def test_alpacas_records_have_the_ids_of_prompt_and_response_in_one_piece(
    either: Any, alpaca_records: list[Record], name: str
) -> None:
    assert len(alpaca_records) == 999
    assert joint_differs(encoder_for(either, name), alpaca_records) == []


def test_stanfords_template_merges_its_colon_with_some_responses(either: Any, alpaca_records: list[Record]) -> None:
    differing = joint_differs(encoder_for(either, "alpaca_legacy"), alpaca_records)
    assert 50 < len(differing) < 80
    assert not any(response[0].isalpha() for response in differing)


def test_train_on_prompt_supervises_everything(either: Any) -> None:
    for name in SEVERAL_TURNS:
        encoder, of = encoder_for(either, name), Record("f:1", (Turn("a", "b", "c"), Turn("d", "", "e")))
        whole = encoder.encode(of, train_on_prompt=True)
        assert whole.labels == whole.input_ids == encoder.encode(of).input_ids


# Several turns

TURNS = (Turn("Who?", "", "Me </s>"), Turn("  Why?", "", '"So" '), Turn("你?", "x", "    ok\n"))


@pytest.mark.parametrize("name", SEVERAL_TURNS)
def test_only_the_assistants_turns_are_supervised(either: Any, name: str) -> None:
    encoder = encoder_for(either, name)
    example = encoder.encode(Record("f:1", TURNS))
    said = [response_text(encoder, turn.response) + either.eos_token for turn in TURNS]
    assert list(supervised_texts(either, example)) == said
    assert [label for label in example.labels if label != IGNORED].count(encoder.eos) == 3
    assert example.input_ids.count(encoder.eos) == 3
    expected = (3 if name == "llama2_chat" else 1) * len(encoder._bos)
    assert example.input_ids[: len(encoder._bos)] == encoder._bos
    assert sum(token == either.bos_token_id for token in example.input_ids) == expected
    before_last = supervised(example)[-1][0]
    assert example.input_ids[:before_last] == encoder.prompt(Record("f:1", TURNS))
    marked = encoder.marked(example)
    assert all(f"⟦{text}⟧" in marked for text in said)
    assert marked.replace("⟦", "").replace("⟧", "") == either.decode(example.input_ids)


def test_vicunas_answers_are_closed_by_eos_in_one_text(llama: Any) -> None:
    of = Record("f:1", (Turn("hi", "", "yo"), Turn("why", "", "so")), "Kind.")
    example = encoder_for(llama, "vicuna").encode(of)
    expected = "<s> Kind. USER: hi ASSISTANT: yo</s>USER: why ASSISTANT: so</s>"
    assert llama.decode(example.input_ids) == expected


def as_record(messages: list[dict[str, str]]) -> Record:
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    texts = [message["content"] for message in messages if message["role"] != "system"] + [""]
    return Record("f:1", tuple(Turn(a, "", b) for a, b in zip(texts[::2], texts[1::2], strict=False)), system)


@pytest.fixture(scope="module")
def chat(llama_tokenizer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    target = tmp_path_factory.mktemp("llama-chat")
    convert_tokenizer(llama_tokenizer_model, target, vocab_size=32_000, context_length=2048, chat=True)
    return AutoTokenizer.from_pretrained(target)


FINISHED = [*DIALOGS, dialog(" a ", " b", "\n c", "d ", system=" s "), dialog("a", "    b\n", '"c"', '"d"')]


@pytest.mark.parametrize("messages", FINISHED)
def test_llama_2s_chats_have_metas_ids_and_the_chat_templates(
    chat: Any, sentencepiece: SentencePieceProcessor, messages: list[dict[str, str]]
) -> None:
    encoder = encoder_for(chat, "llama2_chat")
    assert encoder.encode(as_record(messages)).input_ids == metas_ids(sentencepiece, messages)
    asked = messages if messages[-1]["role"] == "user" else messages[:-1]
    prompt = encoder.prompt(as_record(messages))
    assert prompt == metas_ids(sentencepiece, asked) == chat.apply_chat_template(asked, return_dict=False)


def test_llama_2s_chats_encoded_in_one_piece_would_differ(sentencepiece: SentencePieceProcessor, chat: Any) -> None:
    encoder, messages = encoder_for(chat, "llama2_chat"), dialog("a", "b", "c", "d")
    text = "".join(segment.text for segment in encoder.template.segments(as_record(messages).turns))
    assert encoder.encode(as_record(messages)).input_ids != [1, *sentencepiece.encode(text), 2]


# Whatever the texts are


@pytest.mark.parametrize("name", ["alpaca", "alpaca_legacy", "llama2_chat"])
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(instruction=llama_like_text, text=llama_like_text, response=llama_like_text)
def test_any_response_is_supervised_exactly(either: Any, name: str, instruction: str, text: str, response: str) -> None:
    encoder = encoder_for(either, name)
    instruction, text, response = (untagged(NOT_KEPT.sub(" ", part)) for part in (instruction, text, response))
    example = encoder.encode(record(f"{response}.", instruction, text))
    assert list(supervised_texts(either, example)) == [response_text(encoder, f"{response}.") + either.eos_token]
    assert example.input_ids.count(encoder.eos) == 1


# The tokenizer itself


@pytest.mark.parametrize(("attribute", "reason"), [("backend_tokenizer", "no tokenizer.json"), ("eos_token_id", "EOS")])
def test_a_tokenizer_that_cannot_do_it_is_refused(attribute: str, reason: str) -> None:
    class Other:
        backend_tokenizer, eos_token_id = object(), 2

    setattr(Other, attribute, None)
    with pytest.raises(CheckpointError, match=reason):
        Encoder(Other(), load_template("alpaca"))  # type: ignore[arg-type]


def test_the_tokenizer_that_is_saved_beside_the_model_stays_as_it_was(either: Any) -> None:
    before = json.loads(either.backend_tokenizer.to_str()), either("a <s> </s> <|im_end|>").input_ids
    encoder_for(either, "alpaca").encode(record("Yes"))
    assert before == (json.loads(either.backend_tokenizer.to_str()), either("a <s> </s> <|im_end|>").input_ids)


def test_the_share_of_padding_is_that_of_the_batches() -> None:
    assert padding_share([4, 4, 2, 2], 2) == 0
    assert padding_share([4, 2, 4, 2], 2) == 1 - 12 / 16
    assert padding_share([4, 2, 3], 2) == 1 - 9 / 11

"""LLaMA 2's chat template against Meta's encoding, turn by turn."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from sentencepiece_fixtures import DIALOGS, dialog, llama_like_text, metas_ids, metas_turns, property_settings
from transformers import AutoTokenizer

from conversion.tokenizer import AWKWARD_TEXTS


@pytest.mark.parametrize("messages", DIALOGS)
def test_a_chats_ids_are_metas_turn_by_turn(
    chat_tokenizer: Any, reference: SentencePieceProcessor, messages: list[dict[str, str]]
) -> None:
    expected = metas_ids(reference, messages)
    assert chat_tokenizer.apply_chat_template(messages, return_dict=False) == expected
    assert chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == expected
    rendered = chat_tokenizer.apply_chat_template(messages, tokenize=False)
    assert chat_tokenizer(rendered, add_special_tokens=False).input_ids == expected
    assert rendered.startswith("<s>[INST]")


@property_settings
@given(
    contents=st.lists(
        llama_like_text.map(lambda text: text.replace("<", "‹").replace("[", "(")), min_size=1, max_size=5
    )
)
def test_a_generated_chats_ids_are_metas(
    chat_tokenizer: Any, reference: SentencePieceProcessor, contents: list[str]
) -> None:
    messages = dialog(*contents, system=contents[-1])
    assert chat_tokenizer.apply_chat_template(messages, return_dict=False) == metas_ids(reference, messages)


def test_a_chat_encoded_in_one_piece_would_have_other_ids(reference: SentencePieceProcessor) -> None:
    messages = dialog("hello", "hi", "more")
    assert metas_ids(reference, messages) != [1, *reference.encode("".join(metas_turns(messages)))]


def test_a_chat_with_split_special_tokens_would_have_other_ids(
    chat_tokenizer: Any, reference: SentencePieceProcessor
) -> None:
    rendered = chat_tokenizer.apply_chat_template(dialog("hello"), tokenize=False)
    ids = chat_tokenizer(rendered, add_special_tokens=False, split_special_tokens=True).input_ids
    assert reference.bos_id() not in ids


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>", "<unk>"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_message_with_a_special_tag_is_refused(chat_tokenizer: Any, tag: str, place: int) -> None:
    messages = dialog("hello", "hi", system="kind")
    messages[place]["content"] += f"x{tag}y"
    with pytest.raises(Exception, match="must not contain the special tag"):
        chat_tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (dialog("a", "b")[::-1], "roles must be"),
        (dialog("a") + dialog("b"), "roles must be"),
        (dialog("a", system="s")[::-1], "roles must be"),
        (dialog(system="s"), "no message of the user"),
        ([{"role": "tool", "content": "a"}], "roles must be"),
        ([{"role": "user", "content": None}], "must be text"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "must be text"),
    ],
)
def test_a_chat_that_meta_would_not_encode_is_refused(
    chat_tokenizer: Any, messages: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(Exception, match=said):
        chat_tokenizer.apply_chat_template(messages)


def test_an_answer_that_is_to_be_continued_has_no_eos(chat_tokenizer: Any, reference: SentencePieceProcessor) -> None:
    messages = dialog("hello", "hi the")
    ids = chat_tokenizer.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    assert ids == [1, *reference.encode("[INST] hello [/INST] hi the")]


def test_the_chat_template_survives_saving(chat_tokenizer: Any, tmp_path: Path) -> None:
    chat_tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for messages in DIALOGS:
        expected = chat_tokenizer.apply_chat_template(messages, return_dict=False)
        assert again.apply_chat_template(messages, return_dict=False) == expected


def test_plain_texts_of_a_chat_tokenizer_have_sentencepieces_ids_unless_they_spell_control_tokens(
    chat_tokenizer: Any, reference: SentencePieceProcessor
) -> None:
    for text in AWKWARD_TEXTS:
        expected = [1, *reference.encode(text)]
        assert chat_tokenizer(text, split_special_tokens=True).input_ids == expected
        if not any(token in text for token in ("<s>", "</s>", "<unk>")):
            assert chat_tokenizer(text).input_ids == expected

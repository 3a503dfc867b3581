"""Answers of several users on one model are those that each would get alone; limits, bad input, the terminal."""

import random
import threading
from pathlib import Path

import pytest
import torch
from chat_models import CONTEXT, asked, copied, made, options
from random_models import random_tokens, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed

from finetune import answering
from finetune.answering import InstructionPrompts, load_answering
from finetune.assistant import make_assistant, make_prompts
from finetune.chat_prompt import ChatPrompts, end_tokens
from finetune.decoding import PROMPT_STEP, Answer, Sampling
from finetune.shared_model import SharedModel
from finetune.template import Turn
from hf_llama_repro.errors import CheckpointError, InputError

ROOT = Path(__file__).parent.parent


class Bare:
    """Prompts that are token ids already."""

    ends = frozenset({2})
    byte_tokens = frozenset()
    takes_system = takes_turns = False

    def text(self, prompt, tokens):
        return " ".join(map(str, tokens))


SAMPLINGS = [
    Sampling(max_new_tokens=48),
    Sampling(max_new_tokens=48, temperature=1.3, seed=5),
    Sampling(max_new_tokens=48, temperature=0.8, top_k=20, top_p=0.9, seed=6),
    Sampling(max_new_tokens=48, repetition_penalty=1.4),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("length", [5, 2 * PROMPT_STEP + 44])
def test_an_answer_is_that_of_generate(instructed, sampling, length):
    model = AutoModelForCausalLM.from_pretrained(instructed)
    prompt = random_tokens(tiny_config(vocab_size=512), batch=1, seq=length)
    answer = Answer(Bare(), prompt[0].tolist(), sampling)
    while answer.end is None:
        answer.step(model)
    settings = {"do_sample": False}
    if sampling.temperature:
        # transformers' own default of top_k is 50
        chosen = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k")}
        settings = {"do_sample": True, **chosen}
    set_seed(sampling.seed)
    penalty = sampling.repetition_penalty
    expected = model.generate(
        prompt,
        generation_config=GenerationConfig(
            max_new_tokens=48, eos_token_id=2, pad_token_id=2, repetition_penalty=penalty, **settings
        ),
    )
    assert answer.tokens == expected[0, length:].tolist()
    assert answer.end == "length"


def test_another_seed_gives_another_answer(instructed, assistants):
    """Negative control of the comparison above; without a seed every answer is another."""
    assistant = assistants(instructed)
    samplings = [Sampling(max_new_tokens=40, temperature=1.0, seed=seed) for seed in (1, 2, None, None, 1)]
    one, two, three, four, again = made(assistant, *(asked(assistant, "hello", each) for each in samplings))
    assert one == again
    assert len({tuple(tokens) for tokens in (one, two, three, four)}) == 4


def questions(assistant):
    """Of three users: different lengths, sampling, and sides of the adapter."""
    return [
        asked(assistant, "hello " * 60, Sampling(max_new_tokens=60), with_adapter=True),
        asked(assistant, "stop", Sampling(max_new_tokens=45, temperature=1.0, seed=3), with_adapter=False),
        asked(assistant, "the been don't", Sampling(max_new_tokens=30), with_adapter=False),
    ]


@pytest.mark.parametrize("users", [2, 3])
def test_users_at_the_same_time_get_the_answers_that_each_gets_alone(instructed, adapter, assistants, users):
    assistant = assistants(instructed, "--adapter", adapter)
    alone = [made(assistant, answer)[0] for answer in questions(assistant)[:users]]
    answers = questions(assistant)[:users]
    most_open = []

    def use(answer):
        for _ in assistant.stream(answer):
            most_open.append(assistant.model.num_open)

    threads = [threading.Thread(target=use, args=(answer,)) for answer in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.tokens for answer in answers] == alone
    assert max(most_open) == users  # they were made at the same time


def test_each_side_is_what_it_would_be_in_a_process_of_its_own(instructed, adapter, assistants):
    both = assistants(instructed, "--adapter", adapter)
    question = "hello been"
    with_adapter, base = made(both, asked(both, question), asked(both, question, with_adapter=False))
    only_base = assistants(instructed)
    assert made(only_base, asked(only_base, question)) == [base]
    assert with_adapter != base
    unshared = load_answering(instructed, adapter, dtype="float32")
    answer = asked(both, question)
    while answer.end is None:
        answer.step(unshared)
    assert answer.tokens == with_adapter


def test_an_adapter_that_stays_on_would_be_seen(instructed, adapter, assistants, monkeypatch):
    """Negative control of the two tests above."""
    assistant = assistants(instructed, "--adapter", adapter)
    monkeypatch.setattr(SharedModel, "_turn_adapter", lambda *_, **__: None)
    one, other = made(assistant, asked(assistant, "hello"), asked(assistant, "hello", with_adapter=False))
    assert one == other


def test_a_short_answer_is_there_while_long_ones_are_made(instructed, assistants):
    assistant = assistants(instructed)
    long = [asked(assistant, "hello " * 900, Sampling(max_new_tokens=20000)) for _ in range(2)]
    assert len(long[0].prompt) > 4 * PROMPT_STEP
    streams = [assistant.stream(answer) for answer in long]
    threads = [threading.Thread(target=next, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    short = asked(assistant, "hello", Sampling(max_new_tokens=5))
    made(assistant, short)
    assert short.end == "length"
    assert all(answer.end is None and len(answer.tokens) < 100 for answer in long)
    for thread, stream in zip(threads, streams, strict=True):
        thread.join()
        stream.close()
    assert [answer.end for answer in long] == ["stopped", "stopped"]
    assert assistant.model.num_open == 0


def test_more_answers_than_places_wait_and_can_be_stopped(instructed, assistants):
    assistant = assistants(instructed, "--at-once", 2)
    answers = [asked(assistant, "hello", Sampling(max_new_tokens=20000)) for _ in range(3)]
    stream = assistant.stream(*answers)
    while not (answers[0].tokens and answers[1].tokens):
        next(stream)
    assert answers[2].tokens == []
    assistant.model.stop(answers[2])
    assistant.model.stop(answers[0])
    next_one = asked(assistant, "hello", Sampling(max_new_tokens=3))
    made(assistant, next_one)
    assert len(next_one.tokens) == 3
    assert answers[1].end is None
    stream.close()
    assert [answer.end for answer in answers] == ["stopped"] * 3
    assert answers[0].text


def test_what_goes_wrong_in_one_answer_is_said_there_and_the_others_go_on(instructed, assistants):
    assistant = assistants(instructed)
    broken, whole = asked(assistant, "hello"), asked(assistant, "hello")
    broken.prompt = [10**6]
    errors = []

    def use():
        try:
            made(assistant, broken)
        except IndexError as error:
            errors.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    made(assistant, whole)
    thread.join()
    assert len(errors) == 1
    assert broken.end == "failed"
    assert len(whole.tokens) == 40


def test_memory_that_runs_out_is_one_message(instructed, assistants, monkeypatch):
    assistant = assistants(instructed)
    answer = asked(assistant, "hello")

    def exhausted(_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr(answer, "step", exhausted)
    with pytest.raises(InputError, match="not enough memory for this answer"):
        made(assistant, answer)


def test_nan_is_one_message(instructed):
    model = AutoModelForCausalLM.from_pretrained(instructed)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(CheckpointError, match="computes NaN or infinity"):
        Answer(Bare(), [1, 5, 9], Sampling()).step(model)


def test_an_incomplete_character_is_not_shown(instructed, assistants):
    """U+1F600 is four byte pieces of the tokenizer."""
    answer = asked(assistants(instructed), "hello")
    emoji = pieces_of(instructed, "😀")
    assert len(emoji) == 4
    for token in [*emoji, *emoji]:
        answer.tokens.append(token)
        assert answer.text == ""  # another byte would change how they are read
    answer.tokens.append(300)
    assert answer.text.startswith("😀😀")
    answer.tokens += emoji[:2]
    assert "\ufffd" not in answer.text
    answer.stop()
    assert answer.text.endswith("\ufffd")  # what it ended with is not hidden


def pieces_of(folder, text):
    return AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids[1:]


def test_a_text_always_begins_with_what_it_was_before(instructed, assistants):
    """Random bytes among the tokens: the tokenizer reads a row of them as a whole, valid or not."""
    assistant = assistants(instructed)
    answer = asked(assistant, "hello")
    chance = random.Random(0)
    before, shown = "", 0
    for _ in range(400):
        answer.tokens.append(chance.choice([*pieces_of(instructed, "😀a"), chance.randrange(3, 259), 300]))
        assert answer.text.startswith(before)
        shown += answer.text != before
        before = answer.text
    assert shown > 40
    assert assistant.prompts.text(answer.prompt, answer.tokens).startswith(before)


CONVERSATION = (Turn("hello", "", "the been"), Turn("stop;\nnow", "", "don't"), Turn("naïve 你好?", "with this", ""))


@pytest.mark.parametrize("turns", [CONVERSATION[:1], CONVERSATION], ids=["one turn", "three turns"])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_a_conversation_is_encoded_by_the_tokenizers_template(chatty, turns, system):
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        asked = f"{turn.instruction}\n{turn.input}" if turn.input else turn.instruction
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": turn.response}]
    expected = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert ChatPrompts(tokenizer, chatty).ids(turns, system) == expected


def test_a_control_token_in_a_message_is_refused(chatty):
    prompts = ChatPrompts(AutoTokenizer.from_pretrained(chatty), chatty)
    for turns in ((Turn("a </s> b", "", ""),), (Turn("a", "<s>", ""),)):
        with pytest.raises(InputError, match="spells the control token"):
            prompts.ids(turns, "")
    with pytest.raises(InputError, match=r"the chat template refuses the conversation: .*special tag"):
        prompts.ids((Turn("a [INST] b", "", ""),), "")


def test_all_ends_of_the_generation_config_end_an_answer(chatty, tmp_path):
    folder = copied(chatty, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert end_tokens(tokenizer, folder) == {2}
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert end_tokens(tokenizer, folder) == {2, 7, 9}
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompts = ChatPrompts(tokenizer, folder)
    answer = Answer(prompts, prompts.ids((Turn("hello", "", ""),), ""), Sampling(max_new_tokens=9))
    while answer.end is None:
        answer.step(model)
    assert len(answer.tokens) == 9
    prompts.ends = frozenset({answer.tokens[4]})
    first = answer.tokens.index(answer.tokens[4])
    ended = Answer(prompts, answer.prompt, Sampling(max_new_tokens=9))
    while ended.end is None:
        ended.step(model)
    assert (ended.tokens, ended.end) == (answer.tokens[:first], "complete")


def test_how_a_model_is_asked_follows_from_its_folder(instructed, chatty, tmp_path):
    prompts, is_chat = make_prompts(instructed, None, None, "auto")
    assert (type(prompts), is_chat) == (InstructionPrompts, False)
    prompts, is_chat = make_prompts(chatty, None, None, "auto")
    assert (type(prompts), is_chat) == (ChatPrompts, True)
    prompts, is_chat = make_prompts(chatty, None, None, "instruction")
    assert (type(prompts), is_chat) == (InstructionPrompts, False)
    prompts, is_chat = make_prompts(chatty, None, "vicuna", "chat")
    assert (type(prompts), is_chat, prompts.takes_system) == (InstructionPrompts, True, True)
    # An adapter that was trained with a template is asked by it, also over a chat model.
    (tmp_path / "prompt_template.json").write_text((ROOT / "finetune" / "templates" / "alpaca_short.json").read_text())
    prompts, is_chat = make_prompts(chatty, tmp_path, None, "auto")
    assert (type(prompts), is_chat) == (InstructionPrompts, False)
    assert "Below" not in prompts.encoder.template.prompt


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 is out of range: 1 or more"),
        ({"max_new_tokens": None}, "max_new_tokens must be a whole number, got None"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number"),
        ({"temperature": -1}, "temperature=-1 is out of range"),
        ({"temperature": float("nan")}, "temperature must be a number, got nan"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"top_p": 0}, "top_p=0 is out of range"),
        ({"top_k": -1}, "top_k=-1 is out of range"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 is out of range"),
        ({"seed": -1}, "seed=-1 is out of range"),
    ],
)
def test_sampling_out_of_range_is_one_message(fields, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        Sampling(**fields)


@pytest.mark.parametrize(
    ("turns", "system", "said"),
    [
        ((Turn("", "", ""),), "", "the message is empty: write one"),
        ((Turn(" \n", "", ""),), "", "the message is empty"),
        ((Turn("a" * (8 * CONTEXT + 1), "", ""),), "", "the question has 262,145 characters, at most 262,144"),
        ((Turn("a", "b" * 8 * CONTEXT, ""),), "", "characters, at most"),
        ((Turn("a", "", ""),), "b" * 8 * CONTEXT, "characters, at most"),
        ((Turn("a", "", "b" * 8 * CONTEXT), Turn("a", "", "")), "", "the conversation has .* clear the conversation"),
        ((Turn("hello " * 40000, "", ""),), "", f"tokens of a context of {CONTEXT}: shorten it"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_question_out_of_bounds_is_one_message(chatty, assistants, turns, system, said):
    with pytest.raises(InputError, match=said):
        assistants(chatty).ask(turns, system=system)


def test_the_models_own_sampling_is_the_default(chatty, tmp_path):
    folder = copied(chatty, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6, "top_p": 0.9}')
    assistant = make_assistant(options(folder, "--top-p", 0.5))
    assistant.close()
    assert assistant.sampling == Sampling(temperature=0.6, top_p=0.5, seed=None)
    (folder / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    assistant = make_assistant(options(folder))
    assistant.close()
    assert assistant.sampling == Sampling(seed=None)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_the_weights_take_what_is_said(instructed, quantization):
    model = load_answering(instructed, None, quantization=quantization, dtype="float32")
    counted = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert answering.weight_bytes(model.config, torch.float32, quantization) == counted

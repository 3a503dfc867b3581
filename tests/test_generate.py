"""hf-llama-generate: asks as the model was trained to be asked, and says what does not fit."""

import json
import shutil
from pathlib import Path

import pytest
from finetune_runs import records, tiny_recipe
from random_models import random_model, tiny_config

from conversion.merge import main as merge
from finetune.alpaca import finetune
from finetune.generate import main

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def learnt(tiny_base, tmp_path_factory):
    """An adapter that knows four answers by heart, and their records."""
    folder = tmp_path_factory.mktemp("learnt")
    known = records(4, seed=3)
    (folder / "data.json").write_text(json.dumps(known))
    fields = {"lora_dropout": 0.0, "lora_r": 16, "lora_targets": ALL_LINEAR, "learning_rate": 2e-2, "held_out": 0}
    recipe = tiny_recipe(
        tiny_base, folder / "data.json", folder / "run", max_steps=60, batch_size=4, save_steps=60, **fields
    )
    return finetune(recipe), known


def ask(model, record, *arguments):
    instruction = ["--instruction", record["instruction"], "--input", record["input"]]
    return main([str(model), *map(str, arguments), *instruction, "--dtype", "float32", "--max-new-tokens", "150"])


def test_the_adapters_own_template_is_used_and_the_answer_stops(tiny_base, learnt, capsys):
    adapter, known = learnt
    for record in known:
        assert ask(tiny_base, record, "--adapter", adapter) == 0
        assert capsys.readouterr().out == record["output"] + "\n"


def test_another_template_gives_another_answer(tiny_base, learnt, capsys):
    """Negative control: the template is not a detail."""
    adapter, known = learnt
    assert ask(tiny_base, known[0], "--adapter", adapter, "--template", "vicuna") == 0
    assert capsys.readouterr().out != known[0]["output"] + "\n"


@pytest.mark.parametrize("model_type", ["llama_repro", "llama"])
def test_the_merged_model_answers_as_base_and_adapter(learnt, tmp_path, capsys, model_type):
    adapter, known = learnt
    assert merge([str(adapter), str(tmp_path / "merged"), "--as", model_type]) == 0
    capsys.readouterr()
    for record in known:
        assert ask(tmp_path / "merged", record) == 0
        assert capsys.readouterr().out == record["output"] + "\n"


def test_sampling_is_seeded(tiny_base, learnt, capsys):
    answers = []
    for seed in (1, 1, 2):
        assert ask(tiny_base, learnt[1][0], "--temperature", 5.0, "--seed", seed) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def another_base(tmp_path, tiny_base, **fields):
    folder = tmp_path / "another"
    shutil.copytree(tiny_base, folder)
    random_model(tiny_config(vocab_size=512, max_position_embeddings=512, **fields)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "fields", [{"hidden_size": 96, "head_dim": 16}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}]
)
def test_an_adapter_for_another_base_is_one_message(tiny_base, learnt, tmp_path, capsys, fields):
    base = another_base(tmp_path, tiny_base, **fields)
    assert ask(base, learnt[1][0], "--adapter", learnt[0]) == 2
    assert "is no adapter for this base" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--adapter", "nowhere"), "nowhere is no adapter: it has no adapter_config.json"),
        (("--template", "nowhere"), "there is no template nowhere"),
        (("--temperature", "-1"), "temperature=-1.0 is out of range"),
        (("--top-p", "0"), "top_p=0.0 is out of range"),
        (("--max-new-tokens", "0"), "max_new_tokens=0 is out of range"),
        (("--system", "You are."), "no place for a system prompt"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(tiny_base, capsys, arguments, message):
    assert main([str(tiny_base), "--instruction", "a", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_question_longer_than_the_context_is_refused(tiny_base, capsys):
    assert main([str(tiny_base), "--instruction", "hello " * 600]) == 2
    assert "of a context of 512: shorten it" in capsys.readouterr().err


def test_no_model_is_one_message(capsys):
    assert main(["nowhere", "--instruction", "a"]) == 2
    assert "there is no folder nowhere" in capsys.readouterr().err
    assert not Path("nowhere").exists()

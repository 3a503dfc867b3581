"""Whole fine-tuning runs of a tiny model: what they write, that they learn, and that they resume bit for bit."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from finetune_runs import (
    ROOT,
    adapter,
    kill_after,
    losses,
    metrics,
    records,
    run_command,
    same_bits,
    tiny_recipe,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from finetune.alpaca import finetune, main, prepare_data
from finetune.answering import InstructionPrompts, ask, load_answering
from finetune.decoding import Sampling
from finetune.encoding import Encoder, Example
from finetune.generate import pieces
from finetune.model import load_tokenizer
from finetune.records import read_records
from finetune.template import load_template
from finetune.training import LENGTH_MULTIPLE, collate
from hf_llama_repro.errors import InputError

QUANTIZATIONS = ("none", "int8")


@pytest.fixture(scope="module", params=QUANTIZATIONS)
def finished(request, tiny_base, tiny_data, tmp_path_factory):
    """An uninterrupted run, in a process of its own as the interrupted ones are."""
    output = tmp_path_factory.mktemp("finished") / "run"
    recipe = tiny_recipe(tiny_base, tiny_data, output, quantization=request.param, report_to=("tensorboard",))
    result = run_command(recipe)
    assert result.returncode == 0, result.stderr
    return recipe, result


def test_a_run_says_what_it_does(finished):
    _, result = finished
    for word in ("data ", "tokens ", "padding ", "base ", "trained ", "check ", "time ", "held out ", "written "):
        assert f"\n{word}" in "\n" + result.stdout
    assert "step        12 of 12" in result.stdout
    # Rank 8: 8 x (64 + 64) on q and 8 x (64 + 32) on v, in 2 layers.
    assert "trained     3,584 " in result.stdout


def test_libraries_noise_stays_off_the_screen(finished):
    _, result = finished
    for noise in ("MatMul8bitLt", "kernels-community", "deprecated", "Loading weights"):
        assert noise not in result.stderr + result.stdout
    assert result.stderr == ""


def test_a_run_writes_adapter_metrics_curve_and_tensorboard(finished):
    recipe, _ = finished
    output = Path(recipe.output_dir)
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8", "checkpoint-12"}
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((output / "tensorboard").glob("events.out.tfevents.*"))
    assert not (ROOT / "runs").exists()
    assert set(losses(recipe)) == set(range(1, 13))
    assert [line["step"] for line in metrics(recipe) if "eval_loss" in line] == [0, 12]
    assert not (output / ".partial").exists()
    assert same_bits(adapter(output / "adapter"), adapter(output / "checkpoint-12"))


def test_the_adapter_opens_in_stock_peft_on_stock_llama(finished, tiny_base, tmp_path, plain_paths):
    recipe, _ = finished
    stock = tmp_path / "stock"
    shutil.copytree(tiny_base, stock)
    config = json.loads((stock / "config.json").read_text())
    (stock / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    tokens = torch.arange(64)[None] + 5
    ours = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base), Path(recipe.output_dir) / "adapter"
    )
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(stock), Path(recipe.output_dir) / "adapter")
    base = LlamaForCausalLM.from_pretrained(stock)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
        assert not torch.allclose(ours(tokens).logits, base(tokens).logits, atol=1e-3)


def test_a_run_learns(finished):
    recipe, _ = finished
    before, after = [line["eval_loss"] for line in metrics(recipe) if "eval_loss" in line]
    assert after < before - 0.002  # over seeds 0.004 to 0.022: invented words teach little but their letters
    steps = [loss for loss, _ in losses(recipe).values()]
    assert sum(steps[-4:]) < sum(steps[:4]) - 0.1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_resumed_losses_and_adapter_are_bit_identical(finished, tmp_path, how):
    recipe, _ = finished
    interrupted = tiny_recipe(
        recipe.base_model, recipe.data, tmp_path / "run", quantization=recipe.quantization, report_to=("tensorboard",)
    )
    printed = kill_after(interrupted, 6, how)
    assert not (Path(interrupted.output_dir) / "adapter").exists()
    if how == signal.SIGINT:
        assert "interrupted: the checkpoints are whole" in printed
        assert "Traceback" not in printed
    result = run_command(interrupted, "--resume")
    assert result.returncode == 0, result.stderr
    assert f"resume      {interrupted.output_dir}/checkpoint-" in result.stdout
    assert losses(interrupted) == losses(recipe)
    for folder in ("adapter", "checkpoint-12"):
        assert same_bits(adapter(tmp_path / "run" / folder), adapter(Path(recipe.output_dir) / folder))


def test_another_seed_gives_another_adapter(finished, tmp_path):
    """Negative control of the comparison above."""
    recipe, _ = finished
    other = tiny_recipe(recipe.base_model, recipe.data, tmp_path / "run", quantization=recipe.quantization, seed=1)
    finetune(other)
    assert not same_bits(adapter(tmp_path / "run" / "adapter"), adapter(Path(recipe.output_dir) / "adapter"))


def test_a_damaged_newest_checkpoint_is_passed_over(finished, tmp_path, capsys):
    recipe, _ = finished
    output = tmp_path / "run"
    shutil.copytree(recipe.output_dir, output)
    shutil.rmtree(output / "adapter")
    content = bytearray((output / "checkpoint-12" / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (output / "checkpoint-12" / "optimizer.pt").write_bytes(content)
    resumed = tiny_recipe(recipe.base_model, recipe.data, output, quantization=recipe.quantization)
    finetune(resumed, resume=True)
    printed = capsys.readouterr().out
    assert "checkpoint-12 is damaged (optimizer.pt is not what was written) and is passed over" in printed
    assert f"resume      {output}/checkpoint-8" in printed
    assert same_bits(adapter(output / "adapter"), adapter(Path(recipe.output_dir) / "adapter"))
    assert losses(resumed) == losses(recipe)


def test_a_run_of_several_epochs_resumes_in_the_middle_of_one(tiny_base, tiny_data, tmp_path):
    fields = {"max_steps": 0, "epochs": 3.0, "save_steps": 5}
    whole, cut = (tiny_recipe(tiny_base, tiny_data, tmp_path / name, **fields) for name in ("whole", "cut"))
    finetune(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("adapter", "checkpoint-10"):
        shutil.rmtree(tmp_path / "cut" / name)
    finetune(cut, resume=True)
    assert len(losses(whole)) == 12
    assert losses(cut) == losses(whole)
    assert same_bits(adapter(tmp_path / "cut" / "adapter"), adapter(tmp_path / "whole" / "adapter"))


def test_resume_with_nothing_to_resume_starts(tiny_base, tiny_data, tmp_path):
    finetune(tiny_recipe(tiny_base, tiny_data, tmp_path / "run", max_steps=2), resume=True)
    assert (tmp_path / "run" / "adapter").is_dir()


def test_resume_by_another_recipe_is_refused(finished):
    recipe, _ = finished
    other = tiny_recipe(recipe.base_model, recipe.data, Path(recipe.output_dir), learning_rate=0.5)
    with pytest.raises(InputError, match=r"begun by another recipe .*learning_rate was 0.01 and is 0.5"):
        finetune(other, resume=True)


def test_a_second_run_does_not_overwrite_the_first(finished):
    recipe, _ = finished
    with pytest.raises(InputError, match="holds a run: go on with it by --resume"):
        finetune(recipe)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_model_that_learnt_its_answers_gives_them_and_stops(tiny_base, tmp_path, method):
    """EOS is learnt: cut, masked as padding or not trained, it would never come."""
    data = tmp_path / "few.json"
    data.write_text(json.dumps(records(4)))
    recipe = tiny_recipe(
        tiny_base,
        data,
        tmp_path / "run",
        method=method,
        held_out=0,
        max_steps=60,
        batch_size=4,
        lora_r=16,
        lora_dropout=0.0,
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        learning_rate=2e-3 if method == "full" else 2e-2,
        save_steps=60,
    )
    target = finetune(recipe)
    prompts = InstructionPrompts(Encoder(load_tokenizer(target), load_template(target / "prompt_template.json")))
    model = load_answering(*((target, None) if method == "full" else (tiny_base, target)), dtype="float32")
    for record in read_records(data)[0]:
        answer = ask(prompts, record.turns, "", Sampling(max_new_tokens=200), context=512)
        assert "".join(pieces(model, answer)) == record.turns[0].response


def test_the_same_steps_are_taken_whatever_the_micro_batch(tiny_base, tiny_data, tmp_path):
    """The loss of a step is the mean over its tokens, however they are accumulated."""
    runs = []
    for rows in (1, 2, 8):
        recipe = tiny_recipe(tiny_base, tiny_data, tmp_path / f"{rows}", micro_batch_size=rows, lora_dropout=0.0)
        finetune(recipe)
        runs.append([loss for loss, _ in losses(recipe).values()])
    torch.testing.assert_close(torch.tensor(runs[0]), torch.tensor(runs[1]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(runs[0]), torch.tensor(runs[2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_gradient_checkpointing_changes_no_loss(tiny_base, tiny_data, tmp_path, quantization):
    runs = []
    for checkpointing in (False, True):
        recipe = tiny_recipe(
            tiny_base,
            tiny_data,
            tmp_path / str(checkpointing),
            gradient_checkpointing=checkpointing,
            quantization=quantization,
            lora_dropout=0.0,
        )
        finetune(recipe)
        runs.append(torch.tensor(list(losses(recipe).values())))
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-4)


def test_without_held_out_records_nothing_is_evaluated(tiny_base, tiny_data, tmp_path):
    recipe = tiny_recipe(tiny_base, tiny_data, tmp_path / "run", held_out=0, eval_steps=2, max_steps=4)
    finetune(recipe)
    assert [line for line in metrics(recipe) if "eval_loss" in line] == []


def test_inspect_marks_exactly_what_is_supervised(tiny_base, tiny_data, tmp_path, capsys):
    recipe = tiny_recipe(tiny_base, tiny_data, tmp_path / "run")
    path = tmp_path / "recipe.yaml"
    from finetune.recipe import as_yaml

    path.write_text(as_yaml(recipe))
    assert main([str(path), "--inspect", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("⟦") - 2 * printed.count("between ⟦ and ⟧") // 2 >= 2
    data = prepare_data(recipe)
    response = data.encoder.tokenizer.decode([i for i in data.train[0].labels if i != -100][:-1])
    assert f"### Response:\n⟦{response}</s>⟧" in printed
    assert not (tmp_path / "run").exists()


def test_batches_have_few_shapes():
    """Memory grew with every new length: libraries keep kernels and buffers for each."""
    shapes = {collate([Example([1] * length, [1] * length)])["input_ids"].shape for length in range(1, 257)}
    assert len(shapes) == 256 / LENGTH_MULTIPLE == 16

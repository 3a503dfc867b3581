"""Fine-tuning by two real processes (gloo), started by `accelerate launch` with the files of finetune/accelerate/.

The first test is part of `make test`; the others take minutes: make test-scale.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from finetune_runs import (
    ON_CPU,
    ROOT,
    adapter,
    changed,
    kill_after,
    launch,
    losses,
    metrics,
    run_command,
    same_bits,
    tiny_recipe,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM

from conversion.convert import convert
from finetune.alpaca import finetune
from finetune.encoding import IGNORED
from finetune.guards import TrainingStoppedError, check_saved_part
from finetune.processes import CONFIGURATIONS, check_engine
from finetune.recipe import Recipe, load_recipe
from finetune.training import NOTHING, BatchesOfOneLength, collate
from hf_llama_repro.errors import InputError

LOSS_TOLERANCE = 1e-4
ENGINES = ("ddp", "fsdp2")


def close(one: Recipe, other: Recipe) -> None:
    """Raises where the losses of two runs differ by more than the tolerance."""
    ours, theirs = (torch.tensor([loss for loss, _ in losses(recipe).values()]) for recipe in (one, other))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=LOSS_TOLERANCE)
    held_out = [[line["eval_loss"] for line in metrics(recipe) if "eval_loss" in line] for recipe in (one, other)]
    torch.testing.assert_close(torch.tensor(held_out[0]), torch.tensor(held_out[1]), rtol=0, atol=LOSS_TOLERANCE)


def close_adapters(one: Recipe, other: Recipe) -> None:
    """Raises where the adapters are not those of the same steps: AdamW turns the rounding of a small gradient into one
    of a step of full size, so that single values may differ."""
    ours, theirs = (adapter(Path(recipe.output_dir) / "adapter") for recipe in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        difference = (tensor - theirs[name]).norm() / theirs[name].norm()
        assert difference < 0.01, f"{name} differs by {difference:.2e} of its norm"


def two_processes_wrote(recipe: Recipe) -> bool:
    """Each process of several keeps its random state."""
    folder = max(Path(recipe.output_dir).glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    return {path.name for path in folder.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}


@pytest.fixture(scope="module")
def alone(tiny_base, tiny_data, tmp_path_factory) -> Recipe:
    """One process's run: two epochs of 31 records, whose last step has 7, an odd number."""
    output = tmp_path_factory.mktemp("alone") / "run"
    fields = {"held_out": 9, "micro_batch_size": 2, "lora_dropout": 0.0, "max_steps": 0, "epochs": 2.0, "save_steps": 3}
    recipe = tiny_recipe(tiny_base, tiny_data, output, **fields)
    finetune(recipe)
    return recipe


def test_two_processes_take_the_steps_of_one(alone, tmp_path):
    recipe = changed(alone, output_dir=str(tmp_path / "run"))
    result = launch(recipe, "ddp")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("written     ") == 1
    assert two_processes_wrote(recipe)
    assert not two_processes_wrote(alone)
    close(recipe, alone)
    close_adapters(recipe, alone)


def test_a_run_of_two_processes_always_ends(tmp_path):
    times = 300  # of which one in some dozens waited for ever, where gloo's thread was the last to drop a barrier
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests" / "ending_worker.py"), str(tmp_path), str(times)]
    environment = {**os.environ, **ON_CPU, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            output, _ = process.communicate(timeout=150)
        finally:
            # Workers are in sessions of their own, and one that waits does not answer to the launcher's end.
            for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
                child.kill()
            process.kill()
    assert output.count(f"ended {times} times") == 2


@pytest.mark.slow
def test_fsdp_takes_the_steps_of_one_process_and_saves_an_ordinary_adapter(alone, tmp_path):
    recipe = changed(alone, output_dir=str(tmp_path / "run"))
    result = launch(recipe, "fsdp2")
    assert result.returncode == 0, result.stderr
    assert "no process holds the whole model" in result.stdout
    assert two_processes_wrote(recipe)
    assert list((tmp_path / "run").glob("checkpoint-*/pytorch_model_fsdp.bin"))  # which DDP does not write
    close(recipe, alone)
    close_adapters(recipe, alone)
    base = AutoModelForCausalLM.from_pretrained(recipe.base_model)
    tokens = torch.arange(64)[None] + 5
    with torch.no_grad():
        without = base(tokens).logits
        tuned = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")(tokens).logits
    assert not torch.allclose(tuned, without, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_killed_and_resumed_is_the_uninterrupted_run(alone, tmp_path, engine):
    whole, cut = (changed(alone, output_dir=str(tmp_path / name), lora_dropout=0.1) for name in ("whole", "cut"))
    assert launch(whole, engine).returncode == 0
    kill_after(cut, 4, signal.SIGKILL, engine)
    assert not (tmp_path / "cut" / "adapter").exists()
    result = launch(cut, engine, "--resume")
    assert result.returncode == 0, result.stderr
    assert f"resume      {cut.output_dir}/checkpoint-" in result.stdout
    assert losses(cut) == losses(whole)
    assert same_bits(adapter(tmp_path / "cut" / "adapter"), adapter(tmp_path / "whole" / "adapter"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_full_fine_tuning_takes_the_steps_of_one_process(tiny_base, tiny_data, tmp_path, engine):
    fields = {"method": "full", "learning_rate": 1e-3, "micro_batch_size": 2, "max_steps": 6, "save_steps": 6}
    one, two = (tiny_recipe(tiny_base, tiny_data, tmp_path / name, **fields) for name in ("one", "two"))
    assert run_command(one).returncode == 0
    result = launch(two, engine)
    assert result.returncode == 0, result.stderr
    close(two, one)
    tokens = torch.arange(64)[None] + 5
    with torch.no_grad():
        models = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("one", "two")]
        ours, theirs = (model(tokens).logits for model in models)
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


@pytest.fixture(scope="module")
def demo(smollm2_gguf, tmp_path_factory) -> Recipe:
    """The demo's recipe on real weights, in fp32 and without dropout so that runs can be compared; six steps."""
    base = tmp_path_factory.mktemp("demo") / "base"
    convert(smollm2_gguf, base)
    recipe = load_recipe("demo")
    kept = {"quantization": "none", "dtype": "float32", "lora_dropout": 0.0, "micro_batch_size": 4}
    short = {"max_steps": 6, "save_steps": 3, "eval_steps": 0, "held_out": 8}
    recipe = replace(recipe, base_model=str(base), output_dir=str(base.parent / "alone"), **kept, **short)
    result = run_command(recipe)
    assert result.returncode == 0, result.stderr
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_demo_recipe_killed_and_resumed_by_two_processes_is_that_of_one(demo, tmp_path, engine):
    """SmolLM2-135M's real weights: what `make demo` trains, on two processes, with a kill on the way."""
    recipe = changed(demo, output_dir=str(tmp_path / "run"))
    kill_after(recipe, 4, signal.SIGKILL, engine)
    result = launch(recipe, engine, "--resume")
    assert result.returncode == 0, result.stderr
    assert f"resume      {recipe.output_dir}/checkpoint-3" in result.stdout
    assert two_processes_wrote(recipe)
    close(recipe, demo)
    close_adapters(recipe, demo)
    before, after = [line["eval_loss"] for line in metrics(recipe) if "eval_loss" in line]
    assert after < before


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_deepspeed_takes_the_steps_of_one_process(alone, tmp_path, engine):
    pytest.importorskip("deepspeed", reason="pip install deepspeed")
    recipe = changed(alone, output_dir=str(tmp_path / "run"))
    result = launch(recipe, engine)
    assert result.returncode == 0, result.stderr
    # Its own files: accelerate leaves DeepSpeed aside without a word where it takes the machine for one of CPUs.
    parts = {path.name for path in (tmp_path / "run").glob("checkpoint-*/global_step*/*optim_states.pt")}
    assert len(parts) == 2
    close(recipe, alone)
    close_adapters(recipe, alone)


def test_an_epoch_that_does_not_divide_ends_in_nothing():
    """accelerate would begin the epoch anew, and those records would count twice."""
    sampler = BatchesOfOneLength(list(range(5, 36)), 8, seed=1, multiple=4)
    order = list(sampler)
    assert len(order) == len(sampler) == 32
    assert sorted(order[:31]) == list(range(31))
    assert order[31] == 31  # the record after all others
    assert list(BatchesOfOneLength(list(range(5, 36)), 8, seed=1)) == order[:31]
    assert (collate([NOTHING])["labels"] == IGNORED).all()


@pytest.mark.parametrize(
    ("environment", "fields", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "add --fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"quantization": "int8"}, "cannot be divided by FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "true"}, {}, "accelerate leaves it aside"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            {"quantization": "nf4"},
            "cannot be divided by ZeRO 3",
        ),
    ],
)
def test_what_an_engine_cannot_train_is_refused(recipe, monkeypatch, environment, fields, message):
    check_engine(changed(recipe, **fields))  # by one process it can be
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        check_engine(changed(recipe, **fields))


def test_another_adapter_than_the_gathered_one_is_seen(alone, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(Path(alone.output_dir) / "adapter", folder)
    base = AutoModelForCausalLM.from_pretrained(alone.base_model)
    model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    gathered = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    check_saved_part(model, gathered, folder)
    one = next(iter(gathered))
    with pytest.raises(TrainingStoppedError, match="1 of the 8 in memory are missing or differ"):
        check_saved_part(model, {**gathered, one: gathered[one] + 1}, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 32}))
    with pytest.raises(TrainingStoppedError, match="says lora_alpha 32, and not 16"):
        check_saved_part(model, gathered, folder)


@pytest.mark.parametrize(
    ("name", "engine"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")]
)
def test_accelerate_reads_the_configuration(name, engine):
    loaded = load_config_from_file(str(CONFIGURATIONS / f"{name}.yaml"))
    assert loaded.distributed_type == engine
    assert loaded.mixed_precision == "no"
    assert (loaded.fsdp_config or loaded.deepspeed_config or {}).get("zero_stage", 2) == (3 if name == "zero3" else 2)

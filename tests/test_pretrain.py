"""Pre-training for real, on a tiny model: it learns, it can be killed, spread over processes, and stopped by what is
wrong."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from pretrain_runs import CONTEXT, command, run_to_its_end, sources, steps, tiny_pretraining
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_llama_repro import PAPER_SIZES, LlamaReproConfig, LlamaReproForCausalLM, recipe_file
from hf_llama_repro.checkpoints import checkpoints
from hf_llama_repro.errors import TrainingStoppedError
from hf_llama_repro.metrics import read_metrics
from pretrain.plan import learning_rate_at, num_parameters, plan_lines
from pretrain.recipe import RECIPES, Recipe, load_recipe
from pretrain.train import main, pretrain
from pretrain.training import parameter_groups

ROOT = Path(__file__).parent.parent
# Two processes add up the same numbers in another order.
TWO_PROCESSES = 1e-4


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one state for a process, partly in its environment; each run here is a process's first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    before = dict(os.environ)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in {name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))} - before.keys():
        del os.environ[name]


@pytest.fixture(scope="module")
def finished(text_folder: Path, pretrain_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run that nothing disturbed; its recipe."""
    recipe = tiny_pretraining(
        text_folder, tmp_path_factory.mktemp("finished") / "run", data_dir=str(pretrain_data), eval_steps=6
    )
    pretrain(recipe)
    return recipe


def weights(output_dir: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(output_dir) / "model" / "model.safetensors")


def rates(output_dir: str | Path) -> list[float]:
    """The bits per byte that were measured."""
    lines = read_metrics(Path(output_dir) / "metrics.jsonl")
    return [line["bits_per_byte"] for line in lines if "bits_per_byte" in line]


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_learns_and_says_what_it_measured(finished):
    lines = read_metrics(Path(finished.output_dir) / "metrics.jsonl")
    losses = steps(finished.output_dir)
    assert list(losses) == list(range(1, 13))
    assert losses[1][0] == pytest.approx(math.log(400), abs=0.2)
    assert losses[12][0] < losses[1][0] - 0.5
    assert all(losses[step][2] == learning_rate_at(step, finished) for step in losses)
    assert all(line["tokens"] == line["step"] * 8 * CONTEXT for line in lines)
    assert all(line["tokens_per_second"] > 0 and line["mfu"] > 0 for line in lines if "loss" in line)
    measured = rates(finished.output_dir)
    assert len(measured) == 3
    assert measured[2] < measured[1] < measured[0] < 8
    assert [path.name for path in checkpoints(Path(finished.output_dir))] == [f"checkpoint-{n}" for n in (4, 8, 12)]
    assert list((Path(finished.output_dir) / "tensorboard").glob("events*"))
    assert (Path(finished.output_dir) / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_auto_model_opens_and_generates_what_was_trained(finished):
    folder = Path(finished.output_dir) / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, LlamaReproForCausalLM)
    ids = tokenizer("document 1", return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=5, do_sample=False)
    assert output.shape[1] == ids["input_ids"].shape[1] + 5
    assert tokenizer.decode(output[0], skip_special_tokens=True).startswith("document 1")


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(finished, tmp_path):
    copied = replace(finished, output_dir=str(tmp_path / "run"))
    shutil.copytree(finished.output_dir, copied.output_dir)
    for name in ("checkpoint-8", "checkpoint-12", "model"):
        shutil.rmtree(Path(copied.output_dir) / name)
    pretrain(copied, resume=True)
    assert steps(copied.output_dir) == steps(finished.output_dir)
    assert same_bits(weights(copied.output_dir), weights(finished.output_dir))


def test_a_run_is_not_continued_on_other_data(finished, text_folder, tmp_path, capfd):
    folder = tmp_path / "texts"
    shutil.copytree(text_folder, folder)
    recipe = replace(finished, output_dir=str(tmp_path / "run"), data_dir="", sources=sources(folder))
    path = command(replace(recipe, tokens=4 * 8 * CONTEXT))[3]
    assert main([path]) == 0
    (folder / "words" / "000.txt").write_text("another text")
    assert main([path, "--resume"]) == 2
    assert "was trained on other data: documents, tokens or bytes of words differ" in capfd.readouterr().err


def test_the_comparison_of_runs_sees_another_seed(finished, tmp_path):
    other = replace(finished, output_dir=str(tmp_path / "run"), seed=43, tokens=2 * 8 * CONTEXT)
    pretrain(other)
    assert steps(other.output_dir)[1] != steps(finished.output_dir)[1]
    assert not same_bits(weights(other.output_dir), weights(finished.output_dir))


def test_a_killed_run_goes_on_from_its_newest_whole_checkpoint(finished, tmp_path, capfd):
    recipe = replace(finished, output_dir=str(tmp_path / "run"))
    process = subprocess.Popen(command(recipe), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (Path(recipe.output_dir) / "checkpoint-8").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = checkpoints(Path(recipe.output_dir))[-1]
    with (newest / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    shutil.rmtree(Path(recipe.output_dir) / "model", ignore_errors=True)
    pretrain(recipe, resume=True)
    assert f"{newest} is damaged (model.safetensors is not what was written)" in capfd.readouterr().out
    assert steps(recipe.output_dir) == steps(finished.output_dir)
    assert same_bits(weights(recipe.output_dir), weights(finished.output_dir))


def test_a_compiled_run_on_two_threads_is_the_same_every_time(text_folder, pretrain_data, tmp_path):
    """Threads that add to one gradient meet where a token is frequent: a few tokens, many of each."""
    found = []
    for number in range(2):
        recipe = tiny_pretraining(
            text_folder,
            tmp_path / f"run-{number}",
            data_dir=str(pretrain_data),
            compile=True,
            micro_batch_size=64,
            batch_tokens=64 * CONTEXT,
            tokens=12 * 64 * CONTEXT,
        )
        found.append(run_to_its_end(recipe, OMP_NUM_THREADS="2"))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "changes", [{"micro_batch_size": 8}, {"micro_batch_size": 1}, {"gradient_checkpointing": True}]
)
def test_parts_of_a_step_and_checkpointing_change_nothing_but_rounding(changes, finished, tmp_path):
    recipe = replace(finished, output_dir=str(tmp_path / "run"), **changes)
    pretrain(recipe)
    for step, (loss, norm, rate) in steps(recipe.output_dir).items():
        expected = steps(finished.output_dir)[step]
        assert loss == pytest.approx(expected[0], rel=1e-5)
        assert norm == pytest.approx(expected[1], rel=1e-3)
        assert rate == expected[2]


def run_on_two(recipe: Recipe, *arguments: str) -> str:
    """The command on two real processes, gloo; what it printed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *command(recipe, *arguments)[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 process(es)" in done.stdout
    return done.stdout


@pytest.mark.parametrize("sharding", ["none", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_give_the_losses_of_one(sharding, finished, tmp_path):
    recipe = replace(finished, output_dir=str(tmp_path / "run"), sharding=sharding, micro_batch_size=2)
    run_on_two(recipe)
    found, expected = steps(recipe.output_dir), steps(finished.output_dir)
    assert found.keys() == expected.keys()
    for step in found:
        assert abs(found[step][0] - expected[step][0]) < TWO_PROCESSES
        assert found[step][1] == pytest.approx(expected[step][1], rel=1e-2)
    assert rates(recipe.output_dir) == pytest.approx(rates(finished.output_dir), abs=1e-3)
    one, two = weights(finished.output_dir), weights(recipe.output_dir)
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-2) for name in one)
    is_sharded = (Path(recipe.output_dir) / "checkpoint-4" / "pytorch_model_fsdp_0").is_dir()
    assert is_sharded == (sharding == "fsdp2")
    if is_sharded:  # and is resumed by as many
        for name in ("checkpoint-8", "checkpoint-12", "model"):
            shutil.rmtree(Path(recipe.output_dir) / name)
        assert "checkpoint-4" in run_on_two(recipe, "--resume")
        assert steps(recipe.output_dir) == found


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_its_batch(pretrain_recipe):
    recipe = replace(pretrain_recipe, learning_rate=1e30, warmup_steps=0, save_steps=1)
    with pytest.raises(TrainingStoppedError, match=r"its batch is in .*; the last good checkpoint"):
        pretrain(recipe)
    (path,) = Path(recipe.output_dir).glob("stopped-step-*-process-0.json")
    saved = json.loads(path.read_text())
    step = saved["step"]
    assert not (math.isfinite(float(saved["loss"])) and math.isfinite(float(saved["grad_norm"])))
    assert np.array(saved["rows"]).shape == (8, CONTEXT + 1)
    assert "document" in "".join(saved["texts"])
    assert [path.name for path in checkpoints(Path(recipe.output_dir))][-1] == f"checkpoint-{step - 1}"


def test_bfloat16_learns_as_well(finished, tmp_path):
    recipe = replace(finished, output_dir=str(tmp_path / "run"), dtype="bfloat16")
    pretrain(recipe)
    assert steps(recipe.output_dir)[12][0] == pytest.approx(steps(finished.output_dir)[12][0], abs=0.1)
    assert all(tensor.dtype == torch.float32 for tensor in weights(recipe.output_dir).values())


def test_only_matrices_decay():
    config = LlamaReproConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaReproForCausalLM(config)
    decayed, spared = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)].rpartition("norm")[1] for parameter in spared["params"]} == {"norm"}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    assert not [name for name in (names[id(parameter)] for parameter in decayed["params"]) if "norm" in name]


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_tenth():
    recipe = load_recipe("llama_65b")
    rates = {step: learning_rate_at(step, recipe) for step in (1, 1000, 2000, 2001, recipe.num_steps)}
    assert rates[1] == pytest.approx(1.5e-4 / 2000)
    assert rates[1000] == pytest.approx(0.75e-4)
    assert rates[2000] == 1.5e-4 > rates[2001]
    assert rates[recipe.num_steps] == pytest.approx(1.5e-5)
    middle = (2000 + recipe.num_steps) // 2
    assert learning_rate_at(middle, recipe) == pytest.approx((1.5e-4 + 1.5e-5) / 2, rel=1e-4)


PARAMETERS = {"7b": 6_738_415_616, "13b": 13_015_864_320, "33b": 32_528_943_616, "65b": 65_285_660_672}
GPU_HOURS = {"7b": 82_432, "13b": 135_168, "33b": 530_432, "65b": 1_022_362}


@pytest.mark.parametrize("size", PARAMETERS)
def test_the_papers_recipes_are_planned_with_its_cost(size):
    recipe = load_recipe(f"llama_{size}")
    lines = dict(line.split(maxsplit=1) for line in plan_lines(recipe))
    assert lines["model"].startswith(f"{PARAMETERS[size]:,} parameters")
    hours = int(lines["cost"].split()[0].replace(",", ""))
    assert hours == pytest.approx(GPU_HOURS[size], rel=2e-3)
    assert num_parameters(LlamaReproConfig(**PAPER_SIZES[f"llama-{size}"])) == PARAMETERS[size]
    recipe.accumulation(recipe.gpus)
    if size == "65b":  # "380 tokens/sec/GPU on 2048 A100", "approximately 21 days" (section 2.4)
        assert "380 tokens/s each" in lines["time"]
        assert lines["time"].startswith("20.8 days on 2,048 A100")


def test_every_recipe_is_read():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {"tiny", *(f"llama_{size}" for size in PARAMETERS)}
    parameters = plan_lines(load_recipe("tiny"))[0].split()[1]
    assert 1_000_000 <= int(parameters.replace(",", "")) <= 5_000_000


def as_content(recipe: Recipe) -> dict:
    import yaml

    return yaml.safe_load(recipe_file.as_yaml(recipe))


def changed_source(**changes):
    return lambda content: content["sources"][0].update(changes)


BAD_INPUT = {
    "shares": (changed_source(share=0.4), r"shares of the mixture sum to 1.1 and not to 1: 0.4 \(words\) \+ 0.7"),
    "share of none": (changed_source(share=0), "share=0.0 must be more than 0"),
    "share that is text": (changed_source(share="much"), "share='much' must be a number"),
    "empty source": (changed_source(files=["nowhere/*.txt"]), "source words is empty: nowhere/.* matches no file"),
    "no files": (changed_source(files=[]), "source words names no files"),
    "unknown format": (changed_source(format="csv"), "format='csv' must be one of text, jsonl"),
    "unknown key of a source": (changed_source(weight=1), "unknown key 'weight'"),
    "a name with a slash": (changed_source(name="a/b"), "name='a/b' must be a name that a folder can bear"),
    "names": (changed_source(name="more"), "sources bear the same name"),
    "files of a library": (changed_source(format="python_sources"), "takes no files"),
    "key of the text": (
        lambda content: content["sources"][1].update(text_key="body"),
        r"more.jsonl.gz, line 1: no text under the key 'body' \(there is: text\)",
    ),
    "not JSON": (lambda content: content["sources"][0].update(format="jsonl"), "000.txt, line 1 or the next: not JSON"),
    "not Parquet": (lambda content: content["sources"][0].update(format="parquet"), "source words cannot be read"),
    "sources": (lambda content: content.update(sources=[]), "names no sources"),
    "sources are no list": (lambda content: content.update(sources=3), "sources=3 must be a list of mappings"),
    "unknown key": (lambda content: content.update(learning_rat=1), "unknown key 'learning_rat'; do you mean"),
    "everything held out": (lambda content: content.update(held_out=0.9999999), "it holds no text to train on"),
    "context": (
        lambda content: content.update(context_length=4096, batch_tokens=16384),
        "context_length=4096 is longer than any document",
    ),
    "batch": (lambda content: content.update(batch_tokens=1000), "choose a multiple of 256, such as 1024"),
    "vocabulary": (lambda content: content.update(vocab_size=259), "vocab_size=259 must be more than 259"),
    "vocabulary too large": (lambda content: content.update(vocab_size=30000), "choose a smaller vocab_size"),
    "tokenizer": (lambda content: content.update(tokenizer="nowhere.model"), "tokenizer=nowhere.model is no file"),
    "model": (lambda content: content.update(model={"paper": "llama-30b"}), "no model named 'llama-30b'"),
    "model's key": (lambda content: content["model"].update(hidden=3), "model: unknown key 'hidden'"),
    "model's shape": (lambda content: content["model"].pop("hidden_size"), "nor hidden_size: add them"),
    "model's nesting": (lambda content: content["model"].update(hidden_size=[[1]]), "model: hidden_size must be one"),
    "model's heads": (lambda content: content["model"].update(num_attention_heads=5), "model: "),
    "sharding alone": (lambda content: content.update(sharding="fsdp2"), "needs several processes"),
}
KEEPS_DATA = (
    "context",
    "batch",
    "model",
    "model's key",
    "model's shape",
    "model's nesting",
    "model's heads",
    "sharding alone",
)


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_message(case, pretrain_recipe, tmp_path, capfd):
    change, message = BAD_INPUT[case]
    content = as_content(pretrain_recipe)
    if case not in KEEPS_DATA:
        content["data_dir"] = ""
    change(content)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(content))
    assert main([str(path)]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    import re

    assert re.search(message, error), error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no recipe nowhere: give a YAML file, or one of llama_13b, "),
        (["tiny", "--output-dir", ""], "names no output_dir"),
        (["llama_7b", "--plan", "--gpu", "GTX 970"], "gpu=GTX 970 is not known: name one of A100"),
        (["llama_7b", "--plan", "--tokens", "0"], "tokens=0 must be at least 1"),
    ],
)
def test_bad_arguments_are_one_message(arguments, message, capfd):
    assert main(arguments) == 2
    assert message in capfd.readouterr().err


def test_a_folder_with_a_run_is_not_written_over(finished, capfd):
    path = command(finished)[3]
    before = (Path(finished.output_dir) / "metrics.jsonl").read_bytes()
    assert main([path]) == 2
    assert "holds a run: go on with it by --resume" in capfd.readouterr().err
    assert main([path, "--resume", "--learning-rate", "0.5"]) == 2
    assert "was begun by another recipe (learning_rate was 0.01 and is 0.5)" in capfd.readouterr().err
    assert (Path(finished.output_dir) / "metrics.jsonl").read_bytes() == before

"""Fixtures and functions for fine-tuning a tiny model for real (a plugin of conftest.py)."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from random_models import random_model, tiny_config
from safetensors.torch import load_file
from sentencepiece_fixtures import convert, corpus

from finetune.alpaca import Data, prepare_data
from finetune.model import choose_compute, load_model
from finetune.processes import CONFIGURATIONS
from finetune.recipe import Recipe
from hf_llama_repro.metrics import read_metrics

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
# What makes the configurations for cards run on a machine that may have some; a core for each process.
ON_CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def tiny_base(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tiny model with every parameter random, and LLaMA's kind of tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    config = tiny_config(vocab_size=512, intermediate_size=128, max_position_embeddings=512)
    model = random_model(config)
    with torch.no_grad():
        model.lm_head.weight *= 0.2  # or its first loss is some dozens
    convert(small_model, folder)
    model.save_pretrained(folder)
    return folder


def records(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Alpaca records of invented words, of varied lengths, every third with an input."""
    chance = random.Random(seed)
    words = [word for line in corpus() for word in line.split()]

    def text(most: int) -> str:
        return " ".join(chance.choices(words, k=chance.randint(1, most)))

    return [
        {"instruction": text(6), "input": text(10) if index % 3 == 0 else "", "output": text(20)}
        for index in range(count)
    ]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "records.json"
    path.write_text(json.dumps(records(40)))
    return path


def tiny_recipe(base: Path, data: Path, output: Path, **fields: Any) -> Recipe:
    """Twelve optimizer steps of some milliseconds, with dropout, in fp32."""
    defaults: dict[str, Any] = {
        "base_model": str(base),
        "data": str(data),
        "output_dir": str(output),
        "template": "alpaca_short",
        "held_out": 8,
        "max_length": 256,
        "dtype": "float32",
        "lora_dropout": 0.1,
        "max_steps": 12,
        "batch_size": 8,
        "micro_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 4,
    }
    return Recipe(**{**defaults, **fields})


@pytest.fixture
def recipe(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> Recipe:
    return tiny_recipe(tiny_base, tiny_data, tmp_path / "run")


def changed(recipe: Recipe, **fields: Any) -> Recipe:
    return replace(recipe, **fields)


def loaded(recipe: Recipe) -> tuple[Any, Data]:
    """The recipe's model and data in this process."""
    torch.manual_seed(0)
    return load_model(recipe, choose_compute(recipe, CPU)), prepare_data(recipe)


def command_line(recipe: Recipe, *arguments: str) -> list[str]:
    """The finetune command for a recipe, which is written beside its output."""
    from finetune.recipe import as_yaml

    path = Path(recipe.output_dir).with_suffix(".yaml")
    path.write_text(as_yaml(recipe))
    return [sys.executable, "-m", "finetune.alpaca", str(path), *arguments]


def run_command(recipe: Recipe, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = command_line(recipe, *arguments)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})


def launch_line(recipe: Recipe, configuration: str, *arguments: str) -> list[str]:
    """The command under `accelerate launch`, which starts two processes by a file of finetune/accelerate/."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(CONFIGURATIONS / f"{configuration}.yaml"), "--num_processes", "2"]
    return [*launcher, *command_line(recipe, *arguments)[1:]]


def launch(recipe: Recipe, configuration: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The run of two real processes on a CPU, which talk by gloo."""
    command = launch_line(recipe, configuration, *arguments)
    environment = {**os.environ, **ON_CPU}
    if configuration.startswith("zero"):
        del environment["ACCELERATE_USE_CPU"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)


def kill_after(recipe: Recipe, step: int, how: signal.Signals, configuration: str | None = None) -> str:
    """Starts the run and ends it by a signal once `step` is in its metrics; what it printed.

    With a `configuration` of finetune/accelerate/ it is two processes and their launcher, and all get the signal.
    """
    process = subprocess.Popen(
        command_line(recipe) if configuration is None else launch_line(recipe, configuration),
        cwd=ROOT,
        env={**os.environ, **(ON_CPU if configuration else {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + (120 if configuration is None else 600)
    while not any("loss" in line and line["step"] >= step for line in metrics(recipe)):
        assert process.poll() is None, process.stdout.read()  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    # The launcher's processes are in sessions of their own, and would outlive it.
    for child in psutil.Process(process.pid).children(recursive=True) if configuration else ():
        child.send_signal(how)
    process.send_signal(how)
    output, _ = process.communicate(timeout=120)
    return output


def metrics(recipe: Recipe) -> list[dict[str, Any]]:
    return read_metrics(Path(recipe.output_dir) / "metrics.jsonl")


def losses(recipe: Recipe) -> dict[int, tuple[float, float]]:
    """Step -> loss and gradient norm."""
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in metrics(recipe) if "loss" in line}


def adapter(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

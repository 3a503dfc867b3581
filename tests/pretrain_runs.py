"""Fixtures and functions for pre-training a tiny model for real (a plugin of conftest.py)."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sentencepiece_fixtures import corpus

from hf_llama_repro import recipe_file
from hf_llama_repro.metrics import read_metrics
from pretrain.recipe import Recipe, Source

ROOT = Path(__file__).parent.parent
CONTEXT = 64


def invented(count: int, seed: int) -> list[str]:
    """Documents of invented words, of varied lengths, with indented lines; all different."""
    chance = random.Random(seed)
    lines = list(corpus())
    return [
        f"document {seed} {number}\n" + "\n".join(chance.choices(lines, k=chance.randint(1, 12)))
        for number in range(count)
    ]


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """words/*.txt, 40 documents, and more.jsonl.gz, 60 others."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "words").mkdir()
    for number, text in enumerate(invented(40, seed=1)):
        (folder / "words" / f"{number:03d}.txt").write_bytes(text.encode())
    with gzip.open(folder / "more.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in invented(60, seed=2))
    return folder


def sources(folder: Path, shares: tuple[float, float] = (0.3, 0.7)) -> tuple[Source, ...]:
    return (
        Source(name="words", format="text", files=(str(folder / "words" / "*.txt"),), share=shares[0]),
        Source(name="more", format="jsonl", files=(str(folder / "more.jsonl.gz"),), share=shares[1]),
    )


def tiny_pretraining(folder: Path, output: Path, **fields: Any) -> Recipe:
    """Twelve steps of some milliseconds, in fp32, of two parts each."""
    defaults: dict[str, Any] = {
        "output_dir": str(output),
        "sources": sources(folder),
        "held_out": 0.2,
        "vocab_size": 400,
        "model": {
            "hidden_size": 32,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        "context_length": CONTEXT,
        "tokens": 12 * 8 * CONTEXT,
        "batch_tokens": 8 * CONTEXT,
        "micro_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 3,
        "dtype": "float32",
        "eval_steps": 0,
        "save_steps": 4,
    }
    return Recipe(**{**defaults, **fields})


@pytest.fixture(scope="session")
def pretrain_data(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared tokenizer and tokens of `tiny_pretraining`, which its runs share."""
    from pretrain.prepared import prepare
    from pretrain.tokenizer import prepare_tokenizer

    recipe = tiny_pretraining(text_folder, tmp_path_factory.mktemp("prepared"))
    prepare_tokenizer(recipe)
    prepare(recipe)
    return recipe.data_path


@pytest.fixture
def pretrain_recipe(text_folder: Path, pretrain_data: Path, tmp_path: Path) -> Recipe:
    return tiny_pretraining(text_folder, tmp_path / "run", data_dir=str(pretrain_data))


def steps(output_dir: str | Path) -> dict[int, tuple[float, float, float]]:
    """Step -> loss, gradient norm and learning rate."""
    lines = read_metrics(Path(output_dir) / "metrics.jsonl")
    return {line["step"]: (line["loss"], line["grad_norm"], line["learning_rate"]) for line in lines if "loss" in line}


def command(recipe: Recipe, *arguments: str) -> list[str]:
    """The command that pre-trains by the recipe, which it is given as a file."""
    path = Path(recipe.output_dir).with_suffix(".yaml")
    path.write_text(recipe_file.as_yaml(recipe))
    return [sys.executable, "-m", "pretrain.train", str(path), *arguments]


def run_to_its_end(recipe: Recipe, *arguments: str, **environment: str) -> dict[int, tuple[float, float, float]]:
    """The steps of a run in a process of its own, which ends well."""
    done = subprocess.run(
        command(recipe, *arguments), cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return steps(recipe.output_dir)

"""`lm_eval --model hf`, our folder by `hf-llama-run`, against stock Llama: every figure and every log-likelihood."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.clients.material import ROOT, Material
from tests.clients.rows import Row

TASKS = ("repro_choices", "repro_perplexity", "repro_answers")
SECONDS = 900


def check(material: Material, version: str) -> list[Row]:
    model = material.smollm2
    stock = _evaluate(material, ["lm_eval"], model.stock, "stock")
    plain = _evaluate(material, ["hf-llama-run", "lm_eval"], model.ours, "plain", HF_LLAMA_REPRO_FAST="off")
    fast = _evaluate(material, ["hf-llama-run", "lm_eval"], model.ours, "fast")
    rounded = _evaluate(material, ["lm_eval"], model.stock, "bfloat16", dtype="bfloat16")
    figures = "; ".join(f"{name} {value:.6g}" for name, value in plain[0].items())
    pairs = zip(fast[1], stock[1], strict=True)
    differences = [abs(float(ours) - float(theirs)) for ours, theirs in pairs if _is_number(theirs)]
    difference = max(differences)
    worst = max(abs(fast[0][name] - value) for name, value in stock[0].items())
    return [
        Row(
            "lm-eval, HF_LLAMA_REPRO_FAST=off",
            version,
            f"{len(stock[0])} figures, {len(differences)} log-likelihoods and the answers, against stock Llama, "
            "to the last digit",
            f"equal ({figures})" if plain == stock else f"{plain[0]} is not {stock[0]}",
            plain == stock,
        ),
        Row(
            "lm-eval, fast paths on",
            version,
            "the same, which the fast paths compute in another order",
            f"largest difference of a log-likelihood {difference:.1e}, of a figure {worst:.1e}",
            difference < 1e-2 and worst < 1e-3,
        ),
        Row(
            "lm-eval",
            version,
            "stock Llama in bfloat16 (control: the comparison can fail)",
            "differs, as it must" if rounded != stock else "is the same",
            rounded != stock,
        ),
    ]


def _evaluate(
    material: Material, launcher: list[str], folder: Path, name: str, dtype: str = "float32", **environment: str
) -> tuple[dict[str, float], list[str]]:
    """The figures of each task, and what the model gave to all its requests in order: numbers and text."""
    output = material.scratch / f"lm-eval-{name}"
    program = material.python(".venv-eval").with_name(launcher[0])
    command = [program, *launcher[1:], "--model", "hf", "--model_args", f"pretrained={folder},dtype={dtype}"]
    command += ["--tasks", ",".join(TASKS), "--include_path", ROOT / "tests" / "clients" / "lm_eval_tasks"]
    command += ["--device", "cpu", "--batch_size", "4", "--log_samples", "--output_path", output]
    settings = {"HF_HOME": str(material.scratch / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,  # the tasks name their data from here
        env={**os.environ, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(f"lm_eval ended with {finished.returncode}: {finished.stderr.strip()[-600:]}")
    (results,) = output.rglob("results_*.json")
    figures = {
        f"{task} {metric.removesuffix(',none')}": value
        for task, metrics in json.loads(results.read_text())["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    }
    samples = [line for file in sorted(output.rglob("samples_*.jsonl")) for line in file.read_text().splitlines()]
    return figures, [value for line in samples for value in _leaves(json.loads(line)["resps"])]


def _leaves(responses: Any) -> list[str]:
    """Everything in nested lists; lm-eval writes log-likelihoods as text in its samples."""
    if isinstance(responses, list):
        return [leaf for response in responses for leaf in _leaves(response)]
    return [str(responses)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

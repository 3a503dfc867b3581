"""What a fine-tuning run is: one flat dataclass, from which the YAML keys, the flags and their help come.

Where a field's default is not alpaca-lora's, its help says so; the published settings stand in `recipes/`.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_llama_repro import recipe_file
from hf_llama_repro.errors import InputError
from hf_llama_repro.recipe_file import setting as _setting

from .published_flags import add_published_flags, script_of, translate

FOLDER = Path(__file__).parent
RECIPES = FOLDER / "recipes"


@dataclass(frozen=True)
class Recipe:
    """One fine-tuning run. Counts of steps are optimizer steps; lengths are tokens."""

    base_model: str = _setting("", "folder of the LLaMA to train: llama_repro or llama, in 16 or 32 bits")
    output_dir: str = _setting("", "folder for checkpoints, metrics and, at its top, the finished adapter or model")
    data: str = _setting("", "JSON or JSON Lines file: Alpaca, ShareGPT or messages records, told by their keys")
    held_out: int = _setting(0, "records that are kept from training, to measure the loss on")
    template: str = _setting("alpaca", "name of a file in templates/, or path of one")
    train_on_prompt: bool = _setting(False, "count the prompt's tokens in the loss as well (alpaca-lora: true)")
    max_length: int = _setting(512, "tokens of a record at most (alpaca-lora: 256)")
    truncation: Literal["input", "response", "drop"] = _setting(
        "input",
        "what yields where a record is too long: the input, then the response's end; the response's end (alpaca-lora); "
        "or the whole record",
    )
    strict: bool = _setting(False, "refuse data in which the linter finds anything")

    method: Literal["lora", "full"] = _setting("lora", "train an adapter, or every parameter")
    lora_r: int = _setting(8, "rank of the adapter")
    lora_alpha: int = _setting(16, "the adapter counts alpha / r")
    lora_dropout: float = _setting(0.05, "share of the adapter's inputs that is dropped")
    lora_targets: tuple[str, ...] = _setting(("q_proj", "v_proj"), "linear layers that get an adapter")
    quantization: Literal["none", "int8", "nf4"] = _setting("none", "of the frozen base (alpaca-lora: int8)")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "auto", "to compute in; auto: bfloat16 where the device has it, else float16 (CUDA) or float32"
    )
    gradient_checkpointing: bool = _setting(False, "compute activations again in the backward pass: less memory")

    epochs: float = _setting(3.0, "passes over the data")
    max_steps: int = _setting(0, "stop after so many optimizer steps; 0: after the epochs")
    batch_size: int = _setting(128, "records per optimizer step, over all processes")
    micro_batch_size: int = _setting(4, "records per forward pass of one process")
    learning_rate: float = _setting(3e-4, "its peak")
    lr_schedule: Literal["linear", "cosine", "constant"] = _setting("linear", "after the warm-up")
    warmup_steps: int = _setting(0, "steps in which the learning rate rises from 0 (alpaca-lora: 100)")
    warmup_ratio: float = _setting(0.0, "the same as a share of all steps; not both")
    weight_decay: float = _setting(0.0, "of AdamW")
    max_grad_norm: float = _setting(1.0, "gradients are scaled down to this norm")
    optimizer: str = _setting("adamw_torch", "any name that transformers' TrainingArguments take as optim")
    seed: int = _setting(42, "of the order, the adapter's start and the dropout")

    logging_steps: int = _setting(1, "steps between lines of metrics")
    eval_steps: int = _setting(0, "steps between losses on the held-out records; 0: before and after training only")
    save_steps: int = _setting(200, "steps between checkpoints")
    save_total_limit: int = _setting(3, "checkpoints to keep, at least 2: one to go back to if the newest is damaged")
    report_to: tuple[str, ...] = _setting((), "besides metrics.jsonl: tensorboard, wandb and others of transformers'")

    def __post_init__(self) -> None:
        for name in ("base_model", "output_dir", "data", "template"):
            # Written into a file, "./" would come to mean that file's folder.
            if getattr(self, name).startswith("./"):
                object.__setattr__(self, name, str(Path(getattr(self, name))))
        if self.report_to == ("none",):  # as TrainingArguments say it
            object.__setattr__(self, "report_to", ())
        for name in ("epochs", "learning_rate", "weight_decay"):
            self._check(name, math.isfinite(getattr(self, name)), "a finite number")
        for name in ("max_length", "lora_r", "lora_alpha", "batch_size", "micro_batch_size", "logging_steps"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("held_out", "max_steps", "warmup_steps", "weight_decay", "eval_steps", "seed"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("epochs", "learning_rate", "max_grad_norm", "save_steps"):
            self._check(name, getattr(self, name) > 0, "more than 0")
        for name in ("lora_dropout", "warmup_ratio"):
            self._check(name, 0 <= getattr(self, name) < 1, "at least 0 and less than 1")
        self._check("seed", self.seed < 2**32, "less than 2**32")
        self._check("save_total_limit", self.save_total_limit >= 2, "at least 2")
        self._check("lora_targets", len(self.lora_targets) > 0, "at least one layer's name")
        if self.warmup_steps and self.warmup_ratio:
            raise InputError(
                f"warmup_steps={self.warmup_steps} and warmup_ratio={self.warmup_ratio} say the same thing twice: "
                "give one of them"
            )
        if self.batch_size % self.micro_batch_size:
            raise InputError(
                f"batch_size={self.batch_size} is not a multiple of micro_batch_size={self.micro_batch_size}: "
                "choose a micro_batch_size that divides it"
            )
        if self.method == "full" and self.quantization != "none":
            raise InputError(
                f"method=full cannot train a base in {self.quantization}: set quantization to none, or method to lora"
            )

    def _check(self, name: str, right: bool, allowed: str) -> None:
        recipe_file.check(self, name, right, allowed)

    def accumulation(self, num_processes: int) -> int:
        """Forward passes per optimizer step of each of `num_processes`. Raises where they do not come out even."""
        rows = self.micro_batch_size * num_processes
        if self.batch_size % rows:
            raise InputError(
                f"batch_size={self.batch_size} does not divide into {num_processes} processes of "
                f"micro_batch_size={self.micro_batch_size}: the rest would be left out silently; "
                f"choose a batch_size that is a multiple of {rows}"
            )
        return self.batch_size // rows


FIELDS = recipe_file.fields(Recipe)


def nothing_to_train_on(held_out: int, num_records: int) -> str:
    """The message for held-out records that are all there are."""
    return (
        f"held_out={held_out} leaves nothing of {num_records} records to train on: set --held-out to less, such as "
        f"{num_records // 10} (0: no loss is measured)"
    )


def load_recipe(path: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """The recipe in a YAML file, or of that name in `recipes/`; `overrides` replace its keys.

    Paths in the file that begin with "./" are taken from the file's own folder.
    Raises `InputError` for what is missing, malformed or unknown.
    """
    return recipe_file.load(Recipe, path, RECIPES, overrides)


def make_recipe(content: dict[str, Any], *, where: str) -> Recipe:
    """A recipe of keys and values as YAML or JSON gives them. Raises `InputError` naming `where`."""
    return recipe_file.make(Recipe, content, where=where)


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """`--key value` for every field of the recipe, and the flags of published scripts; what is not given is absent."""
    recipe_file.add_flags(Recipe, parser)
    add_published_flags(Recipe, parser)


def overrides(arguments: argparse.Namespace, *, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """The fields of the recipe that were given as flags; `say` is told of those that are not used."""
    own = recipe_file.overrides(Recipe, arguments)
    translated = translate(arguments, own)
    for note in translated.notes:
        say(f"flag        {note}")
    return {**own, **translated.keys}


def recipe_for_flags(arguments: argparse.Namespace, *, say: Callable[[str], None] = lambda line: None) -> str:
    """The recipe with the defaults of the published script that the flags belong to. Raises `InputError`."""
    script = script_of(arguments, recipe_file.overrides(Recipe, arguments))
    if script is None:
        names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise InputError(f"name a recipe, which the flags change: a YAML file, or one of {names}")
    say(f"recipe      {script.recipe}: the flags are those of {script.title}, and what they leave open is said there")
    return script.recipe


def as_yaml(recipe: Recipe) -> str:
    """Every key with its value, as a file that `load_recipe` reads."""
    return recipe_file.as_yaml(recipe)

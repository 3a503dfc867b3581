"""Flags of alpaca-lora's finetune.py and of Stanford Alpaca's train.py, so that published command lines work.

Sources: tloen/alpaca-lora at 8bb8579, tatsu-lab/stanford_alpaca at 761dc5b with transformers' TrainingArguments. Each
flag sets keys of the recipe, is reported as without effect, or is refused with what to use in its place.
"""

import argparse
import os
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hf_llama_repro.errors import InputError
from hf_llama_repro.recipe_file import as_flag, flag_type

Meaning = dict[str, Any] | str
"""Keys that a value sets, or a note on why it sets none."""

ACCUMULATION = "gradient_accumulation_steps"
_LAUNCH = "accelerate launch --config_file FILE -m hf_llama_repro.finetune.alpaca, with a FILE that hf-llama-info names"


@dataclass(frozen=True)
class Flag:
    """One published flag: either `key` or `read` is set."""

    key: str = ""
    """Key of the recipe that takes the value."""
    read: Callable[[str], Meaning] | None = None
    """Reads a value. Raises `InputError` saying what to use instead."""
    boolean: bool = False
    """Whether it stands for true without a value."""
    environment: str = ""
    """Variable that takes the value, for the library that reads it."""


def _without_effect(reason: str, *, boolean: bool = False) -> Flag:
    return Flag(read=lambda _: f"without effect here: {reason}", boolean=boolean)


def _values(meanings: dict[str, Meaning], *, instead: str, boolean: bool = False) -> Flag:
    def read(text: str) -> Meaning:
        if text.lower() not in meanings:
            raise InputError(instead)
        return meanings[text.lower()]

    return Flag(read=read, boolean=boolean)


def _sharding(text: str) -> Meaning:
    from .processes import uses_fsdp

    if not text:
        return {}
    if uses_fsdp():
        return "without effect here: the configuration of accelerate says how the model is sharded"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"the model is sharded by {_LAUNCH}: fsdp2.yaml")
    return "without effect here: one process has nothing to shard"


_BY_DTYPE = "without effect here: --dtype says what to compute in"
_NOTHING: Meaning = {}
_RESUME = _values(
    {"": _NOTHING, "none": _NOTHING, "false": _NOTHING},
    instead="use --resume, which resumes from the newest complete checkpoint in --output-dir",
)
_STRATEGY = _values(
    {"no": {"eval_steps": 0}, "steps": "--eval-steps says how often (0: before and after training only)"},
    instead="use --eval-steps N (0: before and after training only)",
)

ALPACA_LORA = {
    "data_path": Flag("data"),
    "num_epochs": Flag("epochs"),
    "cutoff_len": Flag("max_length"),
    "val_set_size": Flag("held_out"),
    "lora_target_modules": Flag("lora_targets"),
    "train_on_inputs": Flag("train_on_prompt"),
    "prompt_template_name": Flag("template"),
    "add_eos_token": _without_effect("every complete response ends in EOS, which is learnt", boolean=True),
    "group_by_length": _without_effect("the records of a step are always sorted by length", boolean=True),
    "wandb_project": Flag(environment="WANDB_PROJECT", read=lambda text: {"report_to": ("wandb",)} if text else {}),
    "wandb_run_name": Flag(environment="WANDB_NAME", read=lambda _: {}),
    "wandb_watch": Flag(environment="WANDB_WATCH", read=lambda _: {}),
    "wandb_log_model": Flag(environment="WANDB_LOG_MODEL", read=lambda _: {}),
    "resume_from_checkpoint": _RESUME,
}
STANFORD = {
    "model_name_or_path": Flag("base_model"),
    "data_path": Flag("data"),
    "num_train_epochs": Flag("epochs"),
    "model_max_length": Flag("max_length"),
    "per_device_train_batch_size": Flag("micro_batch_size"),
    # Resolved in `translate`: the recipe's batch size is that of all processes.
    ACCUMULATION: Flag(read=lambda text: {ACCUMULATION: text}),
    "per_device_eval_batch_size": _without_effect("held-out records are measured micro_batch_size at a time"),
    "evaluation_strategy": _STRATEGY,
    "eval_strategy": _STRATEGY,
    "save_strategy": _values({"steps": _NOTHING}, instead="checkpoints are written every --save-steps: use that"),
    "lr_scheduler_type": Flag("lr_schedule"),
    "optim": Flag("optimizer"),
    "bf16": _values({"true": {"dtype": "bfloat16"}, "false": _BY_DTYPE}, instead="true or false", boolean=True),
    "fp16": _values({"true": {"dtype": "float16"}, "false": _BY_DTYPE}, instead="true or false", boolean=True),
    "tf32": _without_effect("matmuls run in --dtype, and those in float32 keep its precision", boolean=True),
    "fsdp": Flag(read=_sharding),
    "fsdp_transformer_layer_cls_to_wrap": _without_effect("the configuration of accelerate names the layers"),
    "deepspeed": _values({"": _NOTHING}, instead=f"DeepSpeed is set up by {_LAUNCH}: zero2.yaml or zero3.yaml"),
    "cache_dir": _without_effect("nothing is downloaded"),
    "run_name": Flag(environment="WANDB_NAME", read=lambda _: {}),
    "overwrite_output_dir": _values(
        {"false": _NOTHING},
        instead="a run is never overwritten: choose another --output-dir, or --resume",
        boolean=True,
    ),
    "resume_from_checkpoint": _RESUME,
}


@dataclass(frozen=True)
class Script:
    """A published script, and the recipe that holds its defaults."""

    title: str
    recipe: str
    flags: dict[str, Flag]
    same: tuple[str, ...]
    """Its flags that are keys of the recipe, under the same name."""


SCRIPTS = (
    Script(
        "alpaca-lora's finetune.py",
        "alpaca_lora",
        ALPACA_LORA,
        (
            "base_model",
            "output_dir",
            "batch_size",
            "micro_batch_size",
            "learning_rate",
            "lora_r",
            "lora_alpha",
            "lora_dropout",
        ),
    ),
    Script(
        "Stanford Alpaca's train.py",
        "stanford_7b",
        STANFORD,
        (
            "output_dir",
            "learning_rate",
            "weight_decay",
            "warmup_ratio",
            "warmup_steps",
            "max_steps",
            "max_grad_norm",
            "logging_steps",
            "eval_steps",
            "save_steps",
            "save_total_limit",
            "gradient_checkpointing",
            "seed",
            "report_to",
        ),
    ),
)
FLAGS = {name: flag for script in SCRIPTS for name, flag in script.flags.items()}


@dataclass
class Translation:
    """Published flags of a command line in terms of the recipe."""

    keys: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """A line for each flag that is not used as it stands."""


class _Remember(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.published = {**getattr(namespace, "published", {}), self.dest: values}


def add_published_flags(cls: Any, parser: argparse.ArgumentParser) -> None:
    """The flags of the scripts; those that are given stand in the namespace's `published`."""
    titles = " and ".join(script.title for script in SCRIPTS)
    group = parser.add_argument_group(f"flags of {titles}, which are understood as well", " ".join(sorted(FLAGS)))
    types = typing.get_type_hints(cls)
    for name, flag in FLAGS.items():
        if f"--{name}" in parser._option_string_actions:
            continue  # hf-llama-plan has its own --fsdp
        is_boolean = flag.boolean or types.get(flag.key) is bool
        group.add_argument(
            *dict.fromkeys([f"--{name}", as_flag(name)]),
            dest=name,
            action=_Remember,
            type=flag_type(types[flag.key]) if flag.key else str,
            nargs="?" if is_boolean else None,
            const=(True if flag.key else "true") if is_boolean else None,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def translate(arguments: argparse.Namespace, keys: dict[str, Any]) -> Translation:
    """The published flags beside `keys`, which were given by the recipe's own flags. Raises `InputError`."""
    published: dict[str, Any] = getattr(arguments, "published", {})
    result = Translation()
    said_by = {key: as_flag(key) for key in keys}
    for name, value in published.items():
        flag = FLAGS[name]
        try:
            meaning: Meaning = {flag.key: value} if flag.read is None else flag.read(value)
        except InputError as error:
            raise InputError(f"--{name} {value}: {error}") from None
        if isinstance(meaning, str):
            result.notes.append(f"--{name} {value}: {meaning}")
            continue
        for key, content in meaning.items():
            before = {**keys, **result.keys}.get(key, content)
            if before != content:
                raise InputError(f"{said_by[key]} and --{name} contradict each other: give one of them")
            said_by[key] = f"--{name}"
            result.keys[key] = content
    _resolve_batch(result.keys, keys)
    if keys.get("save_total_limit") == 1 and published.keys() & STANFORD.keys():
        result.keys["save_total_limit"] = 2
        result.notes.append("--save_total_limit 1: 2 are kept, one to go back to if the newest is damaged")
    if environment(arguments) and "wandb" not in (*keys.get("report_to", ()), *result.keys.get("report_to", ())):
        names = ", ".join(f"--{name}" for name in published if FLAGS[name].environment)
        result.notes.append(f"{names}: without effect unless wandb is in --report-to")
    return result


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    """Variables that published flags set for the library that reads them."""
    given = getattr(arguments, "published", {}).items()
    return {FLAGS[name].environment: value for name, value in given if FLAGS[name].environment and value}


def _resolve_batch(keys: dict[str, Any], own: dict[str, Any]) -> None:
    """Accumulated passes as records of an optimizer step of all processes."""
    text = keys.pop(ACCUMULATION, None)
    if text is None:
        return
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--{ACCUMULATION} {text} must be a whole number of at least 1")
    rows = {**own, **keys}.get("micro_batch_size")
    if rows is None or "batch_size" in own:
        raise InputError(
            f"--{ACCUMULATION} {text} says how often --per_device_train_batch_size is accumulated: "
            "give both, or --batch-size alone"
        )
    keys["batch_size"] = rows * int(text) * int(os.environ.get("WORLD_SIZE", "1"))


def script_of(arguments: argparse.Namespace, keys: dict[str, Any]) -> Script | None:
    """The script that a command line without a recipe was written for, if that is clear."""
    published = getattr(arguments, "published", {}).keys()
    if not published:
        return None
    shares = [len(published & script.flags.keys()) + len(keys.keys() & set(script.same)) for script in SCRIPTS]
    best = [script for script, share in zip(SCRIPTS, shares, strict=True) if share == max(shares)]
    return best[0] if len(best) == 1 else None

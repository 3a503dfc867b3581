"""Instruction tuning by a recipe: one command, which says what it does, watches itself, and can be stopped and resumed.

python -m finetune.alpaca RECIPE.yaml [--key value ...]
accelerate launch --config_file finetune/accelerate/ddp.yaml --num_processes 2 -m finetune.alpaca RECIPE.yaml
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llama_repro.command import add_version, run
from hf_llama_repro.errors import InputError
from hf_llama_repro.outputs import check_output_folder
from hf_llama_repro.run_folder import RECIPE_FILE, open_run

from .quiet import quiet
from .recipe import Recipe, add_recipe_flags, load_recipe, overrides

# torch and transformers are imported where they are used, so that --help answers at once.
if TYPE_CHECKING:
    from .encoding import Encoder, Example
    from .template import Template

# Fields that may differ between a run and its continuation: they change nothing of what is computed.
FREE_FIELDS = ("output_dir", "logging_steps", "eval_steps", "save_steps", "save_total_limit", "report_to", "strict")


@dataclass(frozen=True)
class Data:
    """A recipe's records, encoded."""

    encoder: "Encoder"
    template: "Template"
    train: list["Example"]
    held_out: list["Example"]
    lines: list[str]
    """For people: what was read, what is odd, what was cut, how much is padding."""


def prepare_data(recipe: Recipe) -> Data:
    """Reads, lints, splits and encodes the recipe's data.

    Raises `InputError` for data that cannot be used, with `strict` for data in which the linter finds anything.
    """
    import random

    from .encoding import IGNORED, Encoder, padding_share
    from .model import load_tokenizer, read_config
    from .records import read_records, summary
    from .template import load_template
    from .training import BatchesOfOneLength

    for name in ("base_model", "data"):
        if not getattr(recipe, name):
            raise InputError(f"the recipe names no {name}: add the key, or --{name.replace('_', '-')} PATH")
    path, folder = Path(recipe.data), Path(recipe.base_model)
    context = read_config(folder).max_position_embeddings
    if recipe.max_length > context:
        raise InputError(f"max_length={recipe.max_length} is more than the base's context of {context} tokens")
    records, findings = read_records(path)
    if recipe.strict and findings:
        raise InputError("strict=true, and the linter finds:\n" + "\n".join(f"  {line}" for line in summary(findings)))
    if recipe.held_out >= len(records):
        raise InputError(f"held_out={recipe.held_out} leaves nothing of {len(records)} records to train on")
    template = load_template(recipe.template)
    encoder = Encoder(load_tokenizer(folder), template)
    chosen = set(random.Random(recipe.seed).sample(range(len(records)), recipe.held_out))
    limits: dict[str, Any] = {"max_length": recipe.max_length, "truncation": recipe.truncation}
    train, cuts = encoder.encode_all(
        [record for index, record in enumerate(records) if index not in chosen],
        train_on_prompt=recipe.train_on_prompt,
        **limits,
    )
    held_out: list[Example] = []
    if chosen:
        held_out, _ = encoder.encode_all([records[index] for index in sorted(chosen)], **limits)
    sampler = BatchesOfOneLength([len(example.input_ids) for example in train], recipe.batch_size, recipe.seed)
    before, after = (
        padding_share([sampler.lengths[index] for index in order], recipe.micro_batch_size)
        for order in (sampler.shuffled(), sampler)
    )
    tokens = sum(sampler.lengths)
    supervised = sum(label != IGNORED for example in train for label in example.labels)
    lines = [
        f"data        {path}: {len(records)} records, {len(train)} to train on, {len(held_out)} held out",
        *(f"lint        {line}" for line in summary(findings)),
        *(f"length      {line}" for line in cuts.lines(recipe.max_length)),
        f"tokens      {tokens:,} an epoch, {supervised:,} of them supervised",
        f"padding     {after:.1%} of the tokens computed; {before:.1%} without sorting by length within a step",
    ]
    return Data(encoder, template, train, held_out, lines)


def finetune(recipe: Recipe, *, resume: bool = False) -> Path:
    """Trains by the recipe, printing what it does. The folder of the finished adapter or model.

    `resume` goes on from the newest checkpoint that is whole, or starts where there is none. Raises `InputError`.
    """
    from .guards import check_trained
    from .model import choose_compute, load_model
    from .processes import begin, check_engine, end
    from .training import METRICS

    if not recipe.output_dir:
        raise InputError("the recipe names no output_dir: add the key, or --output-dir PATH")
    check_output_folder("output_dir", Path(recipe.output_dir))
    state = begin()
    recipe.accumulation(state.num_processes)
    check_engine(recipe)
    _check_reporting(recipe)
    say: Callable[..., None] = print if state.is_main_process else (lambda *_, **__: None)
    data = prepare_data(recipe)
    say("\n".join(data.lines), flush=True)
    checkpoint = open_run(
        recipe, load=load_recipe, free_fields=FREE_FIELDS, resume=resume, say=say, is_main=state.is_main_process
    )
    state.wait_for_everyone()
    _check_shared(recipe)
    compute = choose_compute(recipe, state.device)
    _seed(recipe.seed)
    model = load_model(recipe, compute)
    trained = check_trained(model, recipe)
    say(f"base        {recipe.base_model}: {_quantized(recipe)}, computes in {_name(compute.dtype)} ({compute.reason})")
    trainer = _trainer(recipe, data, model, state, compute, begins=checkpoint is None)
    say(_trained_line(recipe, model, trained))
    if state.is_main_process:
        say(_memory_line(recipe, data, state.num_processes, compute), flush=True)
    say(*_check_and_time(recipe, data, model, trainer, state), sep="\n", flush=True)
    if checkpoint is None and state.is_main_process:
        (Path(recipe.output_dir) / METRICS).unlink(missing_ok=True)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    target = Path(recipe.output_dir) / ("adapter" if recipe.method == "lora" else "model")
    trainer.save_final(target)
    if data.held_out:
        after = trainer.evaluate()["eval_loss"]
        before, number = _held_out_before(recipe), len(data.held_out)
        say(f"held out    loss {before:.4f} before, {after:.4f} after, over {number} records")
    if state.is_main_process:
        say(_picture(Path(recipe.output_dir)))
    say(f"written     {target}")
    end(state)
    return target


def _check_reporting(recipe: Recipe) -> None:
    from transformers.integrations import get_available_reporting_integrations

    if missing := sorted(set(recipe.report_to) - set(get_available_reporting_integrations())):
        raise InputError(f"report_to names {', '.join(missing)}, which is not installed: pip install {missing[0]}")


def _check_shared(recipe: Recipe) -> None:
    """Raises `InputError` on a machine that does not see what the main process wrote."""
    if not (Path(recipe.output_dir) / RECIPE_FILE).is_file():
        raise InputError(
            f"output_dir={recipe.output_dir} is not the same folder on every machine: every process writes its part of "
            "a checkpoint there; choose one on a file system that all machines share"
        )


def _seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _quantized(recipe: Recipe) -> str:
    return "not quantized" if recipe.quantization == "none" else f"in {recipe.quantization}"


def _trainer(recipe: Recipe, data: Data, model: Any, state: Any, compute: Any, *, begins: bool) -> Any:
    from .guards import GradientWatch, check_saved_adapter, check_saved_part
    from .processes import divides_weights, gather_trained, uses_deepspeed
    from .progress import Progress
    from .template import save_template
    from .training import METRICS, TENSORBOARD, FinetuneTrainer, MetricsFile, tensorboard, training_arguments

    def save_beside(folder: Path) -> None:
        data.encoder.tokenizer.save_pretrained(folder)
        save_template(data.template, folder)

    def check_saved(folder: Path) -> None:
        if recipe.method != "lora":
            return
        if divides_weights():
            gathered = gather_trained(model)  # by all processes
            if state.is_main_process:
                check_saved_part(model, gathered, folder)
        elif state.is_main_process:
            check_saved_adapter(model, folder)

    output_dir = Path(recipe.output_dir)
    callbacks: list[Any] = [GradientWatch(), MetricsFile(output_dir / METRICS), Progress()]
    if TENSORBOARD in recipe.report_to and state.is_main_process:
        callbacks.append(tensorboard(output_dir))
    trainer = FinetuneTrainer(
        recipe=recipe,
        model=model,
        args=training_arguments(
            recipe,
            state.num_processes,
            compute.dtype,
            use_cpu=compute.device.type == "cpu" and not uses_deepspeed(),
            eval_on_start=begins and bool(data.held_out),
        ),
        train=data.train,
        eval_dataset=data.held_out or None,
        callbacks=callbacks,
        check_saved=check_saved,
        save_beside=save_beside,
    )
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def _trained_line(recipe: Recipe, model: Any, trained: int) -> str:
    # By shape and not by storage: quantized weights are packed.
    config = model.config
    total = sum(p.numel() for p in model.parameters()) if recipe.quantization == "none" else None
    share = f" of {total:,} parameters ({trained / total:.2%})" if total else " parameters"
    what = (
        f"rank {recipe.lora_r} on {', '.join(recipe.lora_targets)} of {config.num_hidden_layers} layers"
        if recipe.method == "lora"
        else "all"
    )
    return f"trained     {trained:,}{share}: {what}"


def _memory_line(recipe: Recipe, data: Data, num_processes: int, compute: Any) -> str:
    """The planned memory of one process, beside what the device has."""
    import dataclasses

    import torch

    from .model import read_config
    from .plan import plan, size
    from .processes import uses_fsdp

    longest = max(len(example.input_ids) for example in data.train)
    as_run: dict[str, Any] = {"max_length": longest, "dtype": _name(compute.dtype)}
    planned = plan(
        dataclasses.replace(recipe, **as_run),
        read_config(Path(recipe.base_model)),
        records=len(data.train),
        num_processes=num_processes,
        fsdp=uses_fsdp(),
        device="cpu" if compute.device.type == "cpu" else "cuda",  # others allocate as CUDA does
    )
    parts = ", ".join(f"{name} {size(count)}" for name, count in planned.memory.at_peak.items() if count)
    line = f"memory      {size(planned.peak)} planned: {parts}"
    if compute.device.type == "cuda":
        _, total = torch.cuda.mem_get_info(compute.device)
        line += f"; the card has {size(total)}"
        if planned.peak > total:
            line += (
                f"\nWARNING     more than the card has: hf-llama-plan says what to change (--gpu {total // 10**9}GB)"
            )
    return line


def _check_and_time(recipe: Recipe, data: Data, model: Any, trainer: Any, state: Any) -> list[str]:
    """One pass over the longest micro-batch, before the first step; what it says of the whole run."""
    from .guards import check_eos, check_labels, preflight
    from .processes import divides_weights

    examples = sorted(data.train, key=lambda example: -len(example.input_ids))[: recipe.micro_batch_size]
    batch = trainer.data_collator(examples)
    check_labels(examples, batch["labels"])
    if state.is_main_process:  # the others may be without weights, where the main process is to hand them out
        check_eos(model, data.encoder.eos)
    steps = recipe.max_steps or math.ceil(math.ceil(len(data.train) / recipe.batch_size) * recipe.epochs)
    if divides_weights():
        return [
            f"time        {steps} steps; no process holds the whole model, so that the first step is the first check"
        ]
    first = preflight(model, {name: tensor.to(state.device) for name, tensor in batch.items()})
    tokens = sum(len(example.input_ids) for example in data.train)
    epochs = steps * recipe.batch_size / len(data.train)
    seconds = first.seconds / first.tokens * tokens * epochs / state.num_processes
    return [
        f"check       loss {first.loss:.4f}, {first.num_gradients} trained tensors with finite gradients, over the "
        f"longest {len(examples)} records ({first.tokens} tokens)",
        f"time        {steps} steps, about {_duration(seconds)} at {first.tokens / first.seconds:.0f} tokens/s",
    ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _held_out_before(recipe: Recipe) -> float:
    """The loss that the run measured before its first step."""
    from hf_llama_repro.metrics import read_metrics

    from .training import METRICS

    lines = read_metrics(Path(recipe.output_dir) / METRICS)
    return next((line["eval_loss"] for line in lines if line["step"] == 0 and "eval_loss" in line), float("nan"))


def _picture(output_dir: Path) -> str:
    from hf_llama_repro.metrics import read_metrics

    from .progress import draw_losses
    from .training import METRICS

    try:
        return f"picture     {draw_losses(read_metrics(output_dir / METRICS), output_dir / 'loss.png')}"
    except ImportError:
        return "picture     none: pip install matplotlib (it is part of hf-llama-repro[finetune])"


def inspect(recipe: Recipe, count: int) -> None:
    """Prints the first records as the model sees them, with what is supervised between ⟦ and ⟧."""
    data = prepare_data(recipe)
    print("\n".join(data.lines))
    for number, example in enumerate(data.train[:count], start=1):
        supervised = sum(label != -100 for label in example.labels)
        print(f"\n--- {number}: {len(example.input_ids)} tokens, {supervised} supervised (between ⟦ and ⟧)")
        print(data.encoder.marked(example))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-llama-finetune",
        description="Fine-tune a LLaMA on instructions, by a recipe.",
        epilog="Exit code 2: the message says what to mend; what was saved before is intact.",
    )
    parser.add_argument("recipe", help="YAML file, or the name of one in finetune/recipes/")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
    parser.add_argument("--inspect", type=int, metavar="N", help="print N records as the model sees them, and end")
    add_recipe_flags(parser)
    add_version(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)

    quiet()

    def work() -> None:
        recipe = load_recipe(arguments.recipe, overrides(arguments))
        if arguments.inspect is not None:
            inspect(recipe, arguments.inspect)
        else:
            finetune(recipe, resume=arguments.resume)

    return run(work, interrupted="the checkpoints are whole; go on with the same command and --resume")


if __name__ == "__main__":
    sys.exit(main())

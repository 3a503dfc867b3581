"""Instruction tuning by a recipe: one command, which says what it does, watches itself, and can be stopped and resumed.

python -m finetune.alpaca RECIPE.yaml [--key value ...]
accelerate launch --config_file finetune/accelerate/ddp.yaml --num_processes 2 -m finetune.alpaca RECIPE.yaml
"""

import argparse
import functools
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llama_repro.checkpoints import failed_writes_reported, sha256_of
from hf_llama_repro.command import Parser, add_version, run
from hf_llama_repro.errors import InputError
from hf_llama_repro.local_path import refuse_hub_name
from hf_llama_repro.outputs import check_output_folder
from hf_llama_repro.run_folder import RECIPE_FILE, Input, open_run
from hf_llama_repro.token_ids import check_token_ids, save_token_ids

from .published_flags import environment
from .recipe import Recipe, add_recipe_flags, load_recipe, nothing_to_train_on, overrides, recipe_for_flags

# torch and transformers are imported where they are used, so that --help answers at once.
if TYPE_CHECKING:
    from .encoding import Encoder, Example
    from .template import Template

# The files of a base on which a run depends.
_BASE_FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("*.safetensors", "pytorch_model*.bin"),
)
# Bytes whose checksums take seconds: announced beforehand.
_LONG_TO_READ = 10**9
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


def prepare_data(recipe: Recipe, *, say: Callable[..., None] | None = None) -> Data:
    """Reads, lints, splits and encodes the recipe's data; `say` prints what it is about, and a terminal shows bars.

    Raises `InputError` for data that cannot be used, with `strict` for data in which the linter finds anything.
    """
    for name in ("base_model", "data"):
        if not getattr(recipe, name):
            raise InputError(f"the recipe names no {name}: add the key, or --{name.replace('_', '-')} PATH")
        refuse_hub_name(getattr(recipe, name), key=name, dataset=name == "data")
    import random

    path, folder = Path(recipe.data), Path(recipe.base_model)
    if say is not None and os.path.isfile(path):  # Path.is_file raises where a name is too long
        say(f"reading     {path}, {path.stat().st_size / 1e6:,.1f} MB", flush=True)

    from tqdm import tqdm

    from .encoding import Encoder
    from .model import load_tokenizer, read_config
    from .records import read_records, summary
    from .template import load_template

    context = read_config(folder).max_position_embeddings
    if recipe.max_length > context:
        raise InputError(f"max_length={recipe.max_length} is more than the base's context of {context} tokens")
    template = load_template(recipe.template)
    encoder = Encoder(load_tokenizer(folder), template)
    watch = functools.partial(tqdm, unit=" records", disable=True if say is None else None, leave=False)
    records, findings = read_records(path, watch=functools.partial(watch, desc="reading"))
    if recipe.strict and findings:
        raise InputError("strict=true, and the linter finds:\n" + "\n".join(f"  {line}" for line in summary(findings)))
    if recipe.held_out >= len(records):
        raise InputError(nothing_to_train_on(recipe.held_out, len(records)))
    chosen = set(random.Random(recipe.seed).sample(range(len(records)), recipe.held_out))
    limits: dict[str, Any] = {"max_length": recipe.max_length, "truncation": recipe.truncation}
    train, cuts = encoder.encode_all(
        [record for index, record in enumerate(records) if index not in chosen],
        train_on_prompt=recipe.train_on_prompt,
        watch=functools.partial(watch, desc="encoding"),
        **limits,
    )
    held_out, held_out_cuts = (
        encoder.encode_all([records[index] for index in sorted(chosen)], **limits) if chosen else ([], None)
    )
    lines = [
        f"data        {path}: {len(records)} records, {len(train)} to train on, {len(held_out)} held out",
        *(f"lint        {line}" for line in summary(findings)),
        *(f"length      {line}" for line in cuts.lines(recipe.max_length)),
    ]
    if held_out_cuts is not None and held_out_cuts.records:
        lines += [f"length      held out: {line}" for line in held_out_cuts.lines(recipe.max_length)]
    return Data(encoder, template, train, held_out, [*lines, *_counted(recipe, train)])


def _counted(recipe: Recipe, train: list["Example"]) -> list[str]:
    """Tokens of an epoch, and the padding that they need."""
    from .encoding import IGNORED, padding_share
    from .training import BatchesOfOneLength

    sampler = BatchesOfOneLength([len(example.input_ids) for example in train], recipe.batch_size, recipe.seed)
    before, after = (
        padding_share([sampler.lengths[index] for index in order], recipe.micro_batch_size)
        for order in (sampler.shuffled(), sampler)
    )
    supervised = sum(len(example.labels) - example.labels.count(IGNORED) for example in train)
    return [
        f"tokens      {sum(sampler.lengths):,} an epoch, {supervised:,} of them supervised",
        f"padding     {after:.1%} of the tokens computed; {before:.1%} without sorting by length within a step",
    ]


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
    data = prepare_data(recipe, say=say if state.is_main_process else None)
    say("\n".join(data.lines), flush=True)
    checkpoint = open_run(
        recipe,
        load=load_recipe,
        free_fields=FREE_FIELDS,
        resume=resume,
        say=say,
        is_main=state.is_main_process,
        inputs=_inputs(recipe, data.template, say),
    )
    if checkpoint is not None:
        check_token_ids(checkpoint, data.encoder.tokenizer, Path(recipe.base_model))
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
    target = Path(recipe.output_dir) / ("adapter" if recipe.method == "lora" else "model")
    with failed_writes_reported(Path(recipe.output_dir), Path(recipe.output_dir), only_full_disk=True):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
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


def _inputs(recipe: Recipe, template: "Template", say: Callable[..., None]) -> dict[str, Callable[[], Input]]:
    """Return functions that read the content of the data, the base and the template, which identifies the run."""

    def checksums(path: str, files: dict[str, Path]) -> Input:
        try:
            if (size := sum(file.stat().st_size for file in files.values())) > _LONG_TO_READ:
                say(f"checksums   of {path}, {size / 1e9:,.1f} GB", flush=True)
            with ThreadPoolExecutor(4) as pool:
                found = dict(zip(files, pool.map(sha256_of, files.values()), strict=True))
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error})") from None
        return Input(str(Path(path).resolve()), found)

    def read_template() -> Input:
        said = {name: value for name, value in vars(template).items() if name != "description"}
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
        path = Path(recipe.template)
        return Input(str(path.resolve()) if path.is_file() else recipe.template, {"the prompts": digest})

    base = Path(recipe.base_model)
    return {
        "data": lambda: checksums(recipe.data, {"the file": Path(recipe.data)}),
        "base_model": lambda: checksums(
            recipe.base_model, {p.name: p for name in _BASE_FILES for p in base.glob(name)}
        ),
        "template": read_template,
    }


def _check_reporting(recipe: Recipe) -> None:
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if unknown := sorted(set(recipe.report_to) - INTEGRATION_TO_CALLBACK.keys()):
        raise InputError(f"report_to names {', '.join(unknown)}: one of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
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
        save_token_ids(data.encoder.tokenizer, folder)

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
    data = prepare_data(recipe, say=print)
    print("\n".join(data.lines))
    for number, example in enumerate(data.train[:count], start=1):
        supervised = sum(label != -100 for label in example.labels)
        print(f"\n--- {number}: {len(example.input_ids)} tokens, {supervised} supervised (between ⟦ and ⟧)")
        print(data.encoder.marked(example))


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hf-llama-finetune",
        description="Fine-tune a LLaMA on instructions, by a recipe.",
        epilog="Exit code 2: the message says what to mend; what was saved before is intact.",
    )
    parser.add_argument(
        "recipe",
        nargs="?",
        help="YAML file, or the name of one in finetune/recipes/; needless with alpaca-lora's or Stanford's flags",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
    parser.add_argument("--inspect", type=int, metavar="N", help="print N records as the model sees them, and end")
    add_recipe_flags(parser)
    add_version(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)

    def say(line: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(line, flush=True)

    def work() -> None:
        name = arguments.recipe or recipe_for_flags(arguments, say=say)
        recipe = load_recipe(name, overrides(arguments, say=say))
        os.environ.update(environment(arguments))
        if arguments.inspect is not None:
            inspect(recipe, arguments.inspect)
        else:
            finetune(recipe, resume=arguments.resume)

    return run(work, interrupted="the checkpoints are whole; go on with the same command and --resume")


if __name__ == "__main__":
    sys.exit(main())

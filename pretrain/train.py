"""Pre-training by a recipe: one command, which says what it does, watches itself, and can be stopped and resumed.

python -m pretrain.train RECIPE.yaml [--key value ...]
accelerate launch --num_processes N -m pretrain.train RECIPE.yaml
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llama_repro import recipe_file
from hf_llama_repro.command import add_version, run
from hf_llama_repro.errors import InputError
from hf_llama_repro.outputs import check_output_folder
from hf_llama_repro.run_folder import open_run

from .recipe import Recipe, add_recipe_flags, load_recipe

# torch and transformers are imported where they are used, so that --help answers at once.
if TYPE_CHECKING:
    from .prepared import Prepared
    from .training import Run

REPORT = "report.md"
# Keys that may differ between a run and its continuation: they change nothing of what is computed.
FREE_FIELDS = (
    *("output_dir", "data_dir", "logging_steps", "eval_steps", "eval_tokens", "final_eval_tokens", "compare_with_xz"),
    *("prompts", "save_steps", "save_total_limit", "gpu", "gpus", "gpu_price", "utilisation"),
)
Say = Callable[..., None]


def pretrain(recipe: Recipe, *, resume: bool = False, stop_after: str = "") -> Path:
    """Trains by the recipe, printing what it does. The folder of the finished model.

    `resume` goes on from the newest checkpoint that is whole, or starts where there is none. With `stop_after`
    "prepare" the tokens are written and no more. Raises `InputError`.
    """
    from .plan import model_config
    from .training import Run, choose_dtype, make_accelerator

    if not recipe.output_dir:
        raise InputError("the recipe names no output_dir: add the key, or --output-dir PATH")
    check_output_folder("output_dir", Path(recipe.output_dir))
    check_output_folder("data_dir", recipe.data_path)
    model_config(recipe, recipe.vocab_size)
    accelerator = make_accelerator(recipe)
    recipe.accumulation(accelerator.num_processes)
    say: Say = print if accelerator.is_main_process else (lambda *_, **__: None)
    checkpoint = open_run(
        recipe,
        load=load_recipe,
        free_fields=FREE_FIELDS,
        resume=resume,
        say=say,
        is_main=accelerator.is_main_process,
    )
    prepared = _prepared(recipe, accelerator, say)
    if stop_after == "prepare":
        return recipe.data_path
    training = Run(recipe, prepared, accelerator)
    say(f"model       {sum(p.numel() for p in training.model.parameters()):,} parameters, ", end="")
    say(f"context {recipe.context_length}, products in {str(choose_dtype(recipe)).removeprefix('torch.')}")
    say(
        f"run         {recipe.num_steps:,} steps of {recipe.batch_tokens:,} tokens in {training.accumulation} parts of "
        f"{recipe.micro_batch_size} rows, {accelerator.num_processes} process(es); at best "
        f"{training.peak / 1e9:,.0f} GFLOP/s",
        flush=True,
    )
    if checkpoint is not None:
        training.resume(checkpoint)
    begin, target = time.perf_counter(), Path(recipe.output_dir) / "model"
    with training.sums_in_order():
        _train_with_bar(training)
        say(f"trained     {time.perf_counter() - begin:.0f} s")
        training.save_model(target)
        _report(training, target, say)
    say(f"written     {target}")
    return target


def _prepared(recipe: Recipe, accelerator: Any, say: Say) -> "Prepared":
    """Tokenizer and tokens, made by the first process; the others find them."""
    from .prepared import open_prepared, prepare
    from .tokenizer import prepare_tokenizer

    if accelerator.is_main_process:
        begin = time.perf_counter()
        say(f"tokenizer   {prepare_tokenizer(recipe)}", flush=True)
        say(*prepare(recipe), sep="\n", end="\n" if recipe.sources else "")
        say(f"data        {recipe.data_path}, {time.perf_counter() - begin:.0f} s")
    accelerator.wait_for_everyone()
    prepared = open_prepared(recipe)
    say("\n".join(prepared.lines), flush=True)
    return prepared


def _train_with_bar(training: "Run") -> None:
    from tqdm import tqdm

    # Lines of a run whose output is not a terminal.
    every = max(1, training.recipe.num_steps // 20)
    total, is_main = training.recipe.num_steps, training.accelerator.is_main_process
    bar = tqdm(total=total, initial=training.step, desc="steps", disable=None if is_main else True, dynamic_ncols=True)
    shown = -1

    def tell(line: dict[str, Any]) -> None:
        nonlocal shown
        bar.update(line["step"] - bar.n)
        if "loss" in line:
            bar.set_postfix(loss=f"{line['loss']:.4f}", speed=f"{line['tokens_per_second']:,.0f}")
        if sys.stderr.isatty():
            return
        if "loss" in line and (line["step"] // every != shown or line["step"] == total):
            shown = line["step"] // every
            mfu = "" if line["mfu"] is None else f", {line['mfu']:.1%} of the peak"
            print(
                f"step        {line['step']} of {total}: loss {line['loss']:.4f}, learning rate "
                f"{line['learning_rate']:.2e}, gradient norm {line['grad_norm']:.2f}, "
                f"{line['tokens_per_second']:,.0f} tokens/s{mfu}",
                flush=True,
            )
        elif "bits_per_byte" in line:
            print(f"held out    {line['bits_per_byte']:.4f} bits per byte after {line['step']} steps", flush=True)

    try:
        training.train(tell)
    finally:
        bar.close()


def _report(training: "Run", model: Path, say: Say) -> None:
    """The last measurement, the comparison, the picture and the samples; all but the first on one process."""
    from hf_llama_repro.metrics import read_metrics

    from .curves import draw
    from .report import comparison, samples
    from .training import METRICS

    recipe, output_dir = training.recipe, Path(training.recipe.output_dir)
    begin = time.perf_counter()
    found = training.evaluate(recipe.final_eval_tokens, lambda _: None)
    if not training.accelerator.is_main_process:
        return
    say(f"measured    {time.perf_counter() - begin:.0f} s")
    table, levels = comparison(recipe, found, lambda line: say(line, flush=True))
    say(*table, sep="\n", end="\n" if table else "")
    texts = samples(model, recipe.prompts)
    (output_dir / REPORT).write_text("\n".join([*table, "", *texts]) + "\n", encoding="utf-8")
    say(*texts, sep="\n", end="\n" if texts else "")
    try:
        say(f"picture     {draw(read_metrics(output_dir / METRICS), output_dir / 'curves.png', levels)}")
    except ImportError:
        say("picture     none: pip install matplotlib (it is part of hf-llama-repro[pretrain])")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-llama-pretrain",
        description="Train a LLaMA from nothing, by a recipe.",
        epilog="Exit code 2: the message says what to mend; what was saved before is intact.",
    )
    parser.add_argument("recipe", help="YAML file, or the name of one in pretrain/recipes/")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--plan", action="store_true", help="print parameters, time, cost and epochs, and end")
    only.add_argument("--prepare", action="store_true", help="write the tokenizer and the tokens, and end")
    add_recipe_flags(parser)
    add_version(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)

    def work() -> None:
        recipe = load_recipe(arguments.recipe, recipe_file.overrides(Recipe, arguments))
        if arguments.plan:
            from .plan import plan_lines

            print("\n".join(plan_lines(recipe)))
        else:
            pretrain(recipe, resume=arguments.resume, stop_after="prepare" if arguments.prepare else "")

    return run(work, interrupted="the checkpoints are whole; go on with the same command and --resume")


if __name__ == "__main__":
    sys.exit(main())

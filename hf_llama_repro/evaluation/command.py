"""Measures a model on the papers' benchmarks, as the papers did, and on tasks of one's own.

hf-llama-eval MODEL --tasks mmlu,hellaswag
hf-llama-eval MODEL --tasks facts,prose --include-path examples/eval_tasks
"""

import argparse
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

from ..command import add_version, run
from ..errors import InputError
from ..outputs import check_output_folder

DEFAULT_TASKS = "mmlu,hellaswag,triviaqa,nq_open"
PACKAGES = ("hf-llama-repro", "lm-eval", "torch", "transformers", "datasets")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-llama-eval",
        description="Measure a model by lm-evaluation-harness, with the LLaMA papers' shots and normalisation, beside "
        "the published numbers.",
        epilog="A task's YAML file may call Python code of its folder: --include-path is for folders that you trust.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="llama_repro or llama folder, with its tokenizer")
    parser.add_argument(
        "--tasks",
        default=DEFAULT_TASKS,
        metavar="NAMES",
        help=f"default: {DEFAULT_TASKS}; there is humaneval too, and every task of lm-evaluation-harness",
    )
    parser.add_argument(
        "--settings", metavar="NAMES", help="of the papers' columns, such as 5-shot,pass@1; default: all of a task"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each task; default: all")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="trained adapter for the model")
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help="tasks of your own, which go first")
    parser.add_argument("--execute-code", action="store_true", help="let humaneval run what the model writes")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="sequences at a time; default: 1")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="on a CPU, our compiled code, for tasks that generate; the last digits are not stock's",
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path("evaluation"), metavar="FOLDER", help="default: evaluation"
    )
    add_version(parser)
    return parser


def evaluate(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    for name, value in (("limit", arguments.limit), ("batch_size", arguments.batch_size)):
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1")
    from .model import check_folder

    check_output_folder("--output-dir", arguments.output_dir)
    check_folder(arguments.model)
    if arguments.adapter is not None and not (arguments.adapter / "adapter_config.json").is_file():
        raise InputError(f"{arguments.adapter} is no adapter: it has no adapter_config.json")
    from .execution import require_limits
    from .harness import Tasks, require_harness
    from .settings import jobs

    names = list(dict.fromkeys(_listed(arguments.tasks)))
    if not names:
        raise InputError(f"--tasks {arguments.tasks!r} names no task; the default is {DEFAULT_TASKS}")
    settings = None if arguments.settings is None else _listed(arguments.settings)
    planned = jobs(names, settings)
    require_harness()
    if arguments.execute_code:
        require_limits()
    tasks = Tasks(arguments.include_path)
    tasks.check(names, execute_code=arguments.execute_code)
    _make_folder(arguments.output_dir)
    loaded = {job: tasks.load(job) for job in planned}
    measured = _measure(arguments, tasks, loaded)
    _report(arguments, measured)


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output-dir {folder} cannot be made: {error}") from None


def _measure(arguments: argparse.Namespace, tasks: Any, loaded: dict[Any, Any]) -> dict[str, Any]:
    """Runs every job, and says before what and after each how far it is."""
    import torch

    from .harness import run_job, wrapped
    from .model import load, plain_paths, recognised
    from .report import rows_of

    rows, metrics = [], {}
    with plain_paths(not arguments.fast):
        model, tokenizer = load(arguments.model, arguments.adapter, dtype=arguments.dtype)
        size = recognised(model.config)
        print(f"model       {arguments.model}" + (f" with {arguments.adapter}" if arguments.adapter else ""))
        known = size.title if size else "no size of the papers"
        print(f"            {next(model.parameters()).dtype} on {model.device}, {known}")
        print(f"tasks       {', '.join(map(str, loaded))}", flush=True)
        lm = wrapped(model, tokenizer, batch_size=arguments.batch_size)
        for job, task in loaded.items():
            results = run_job(lm, job, task, tasks.manager(job.task), limit=arguments.limit)
            found = rows_of(job, results, size)
            rows += found
            metrics[str(job)] = {
                "results": results["results"],
                "n-shot": results["n-shot"],
                "versions": results["versions"],
            }
            shown = ", ".join(f"{row.metric} {row.value:.4f}" for row in found[:3])
            print(f"measured    {job}: {shown}", flush=True)
    header = {
        "model": str(arguments.model),
        "adapter": str(arguments.adapter) if arguments.adapter else None,
        "size": size.title if size else None,
        "dtype": str(next(model.parameters()).dtype),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "fast_paths": arguments.fast,
        "batch_size": arguments.batch_size,
        "limit": arguments.limit,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    return {"header": header, "rows": rows, "metrics": metrics, "size": size}


def _report(arguments: argparse.Namespace, measured: dict[str, Any]) -> None:
    from .report import draw, table, write_json

    rows, size = measured["rows"], measured["size"]
    print(f"\n{table(rows, size).text()}")
    if arguments.limit:
        print(f"Of the first {arguments.limit} questions of each task: no figure to compare with published ones.")
    json_file, picture = arguments.output_dir / "results.json", arguments.output_dir / "results.png"
    try:
        write_json(json_file, measured["header"], rows, measured["metrics"])
        draw(picture, str(arguments.model), rows, size)
    except OSError as error:
        raise InputError(f"--output-dir {arguments.output_dir} cannot be written: {error}") from None
    print(f"wrote       {json_file}, {picture}")


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if not sys.stderr.isatty():
        # Read when transformers and datasets are imported.
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    return run(lambda: evaluate(arguments), interrupted="no results were written")


if __name__ == "__main__":
    sys.exit(main())

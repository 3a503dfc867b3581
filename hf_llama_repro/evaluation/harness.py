"""Tasks and runs of lm-evaluation-harness, with errors that say what to do."""

import contextlib
import difflib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError
from .execution import human_eval
from .settings import Job

BOOTSTRAP = 1_000
"""Samples for the standard error of a metric that has no formula for it."""


def require_harness() -> None:
    """Raises `InputError` where lm-evaluation-harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"evaluation needs lm-evaluation-harness ({error}): pip install 'hf-llama-repro[eval]'"
        ) from None
    # It tells of every default that it takes.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


class Tasks:
    """The tasks of lm-evaluation-harness and those of a folder, which go first."""

    def __init__(self, include_path: Path | None, names: list[str]):
        from lm_eval.tasks import TaskManager

        if include_path is not None and not include_path.is_dir():
            raise InputError(f"--include-path {include_path} is no folder: give one that holds the tasks' YAML files")
        self.folder = None if include_path is None else include_path.resolve()
        self.own: set[str] = set()
        if self.folder is not None:
            self.manager = TaskManager(include_path=str(self.folder), include_defaults=False)
            self.own = set(self.manager.all_tasks)
            if set(names) <= set(self.manager.all_subtasks):  # reading the index of all others takes seconds
                return
        self.manager = TaskManager(include_path=None if self.folder is None else str(self.folder))

    def check(self, names: list[str], *, execute_code: bool) -> None:
        """Raises `InputError` for a name that no task has, and for code that may not be executed."""
        for name in names:
            if name not in self.manager.task_index:
                near = difflib.get_close_matches(name, self.manager.all_tasks, 3)
                hint = f"; near: {', '.join(near)}" if near else ""
                own = f"; {self.folder} has {', '.join(sorted(self.own)) or 'none'}" if self.folder else ""
                raise InputError(f"no task named {name!r}{hint}{own}; `lm-eval ls tasks` shows all")
        if "humaneval" in names and not execute_code:
            raise InputError(
                "humaneval executes code that the model writes, on this machine, in processes with limits on time, "
                "memory and files: add --execute-code where that is right, or leave humaneval out of --tasks"
            )

    def load(self, job: Job) -> dict[str, Any]:
        """The task of a job with its data, as `simple_evaluate` takes it. Raises `InputError` where it is not there."""
        from huggingface_hub.errors import HfHubHTTPError

        spec: Any = self._human_eval(job) if job.task == "humaneval" else job.task
        try:
            with _inside(self.folder):  # relative paths of data files are those of the folder
                loaded = self.manager.load([spec])
        except (OSError, HfHubHTTPError) as error:
            raise InputError(f"the data of task {job.task} is not here: {_first_line(error)}. {_OFFLINE}") from None
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise InputError(
                f"task {job.task} cannot be loaded: {type(error).__name__}: {_first_line(error)}"
            ) from None
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) and job.task != "humaneval":
                raise InputError(
                    f"task {name} executes code that the model writes inside of this process, which is not done here; "
                    "of such tasks there is humaneval, in processes with limits"
                )
        return dict(loaded)

    def _human_eval(self, job: Job) -> dict[str, Any]:
        entry = self.manager.task_index["humaneval"]
        names = ("dataset_path", "dataset_name", "dataset_kwargs", "test_split")
        dataset = {name: entry.cfg[name] for name in names if entry.cfg and name in entry.cfg}
        k = int(job.setting.name.removeprefix("pass@"))
        return human_eval(k, job.setting.samples, dataset if "humaneval" in self.own else {})


_OFFLINE = (
    "It comes from the Hugging Face hub when a task first runs, and is then in the cache (HF_HOME). Without network: "
    "copy the cache from a machine that has it, or give --include-path FOLDER with a task of this name and its data"
)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")


@contextlib.contextmanager
def _inside(folder: Path | None) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder or before)
    try:
        yield
    finally:
        os.chdir(before)


def wrapped(model: Any, tokenizer: Any, *, batch_size: int) -> Any:
    """The model as lm-evaluation-harness takes it; what it generates keeps a space at its beginning.

    SentencePiece's decoder drops that space, as of a text's beginning: of code it is part of the indentation.
    """
    from lm_eval.models.huggingface import HFLM

    newline = tokenizer.encode("\n", add_special_tokens=False)[-1:]
    keeps = tokenizer.decode(newline) == "\n"

    class Continuing(HFLM):
        def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
            if not keeps or isinstance(tokens, int):
                return super().tok_decode(tokens, skip_special_tokens=skip_special_tokens)
            text = super().tok_decode([*newline, *tokens], skip_special_tokens=skip_special_tokens)
            return text.removeprefix("\n")

    return Continuing(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def run_job(lm: Any, job: Job, loaded: dict[str, Any], manager: Any, *, limit: int | None) -> dict[str, Any]:
    """lm-evaluation-harness's results of one job, with its samples."""
    from lm_eval import simple_evaluate

    _check_room(lm, job, loaded)
    results = simple_evaluate(
        model=lm,
        tasks=[loaded["groups"][job.task]] if job.task in loaded.get("groups", {}) else [*loaded["tasks"].values()],
        task_manager=manager,
        num_fewshot=job.setting.num_fewshot,
        gen_kwargs=job.setting.generation or None,
        limit=limit,
        bootstrap_iters=BOOTSTRAP,
        confirm_run_unsafe_code=job.task == "humaneval",
    )
    assert results is not None
    return dict(results)


def _check_room(lm: Any, job: Job, loaded: dict[str, Any]) -> None:
    """Raises `InputError` where the context leaves no room for a question beside the answer."""
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE == "generate_until":
            answer = (task.config.generation_kwargs or {}).get("max_gen_toks", lm.max_gen_toks)
            if answer >= lm.max_length:
                raise InputError(
                    f"task {name} generates up to {answer} tokens, and the model's context is {lm.max_length}: "
                    "no room for the question"
                )

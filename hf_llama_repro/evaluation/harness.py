"""Tasks and runs of lm-evaluation-harness, with errors that say what to do."""

import contextlib
import difflib
import functools
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


@functools.cache
def _harness() -> Any:
    """The tasks of lm-evaluation-harness; reading their index takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


class Tasks:
    """The tasks of lm-evaluation-harness and those of a folder, which go first."""

    def __init__(self, include_path: Path | None):
        from lm_eval.tasks import TaskManager

        if include_path is not None and not include_path.is_dir():
            raise InputError(f"--include-path {include_path} is no folder: give one that holds the tasks' YAML files")
        self.folder = None if include_path is None else include_path.resolve()
        self._own: Any = self.folder and TaskManager(include_path=str(self.folder), include_defaults=False)
        self.own: list[str] = self._own.all_tasks if self._own else []

    def manager(self, name: str) -> Any:
        """Knows the task, and what it is made of: a group of the folder may have tasks of lm-evaluation-harness."""
        from lm_eval.tasks import TaskManager

        if name not in self.own:
            return _harness()
        return self._own if name in self._own.all_subtasks else TaskManager(include_path=str(self.folder))

    def check(self, names: list[str], *, execute_code: bool) -> None:
        """Raises `InputError` for a name that no task has, and for code that may not be executed."""
        if "humaneval" in names and not execute_code:
            raise InputError(
                "humaneval executes code that the model writes, on this machine, in processes with limits on time, "
                "memory and files: add --execute-code where that is right, or leave humaneval out of --tasks"
            )
        for name in names:
            if name not in self.own and name not in _harness().task_index:
                near = difflib.get_close_matches(name, [*self.own, *_harness().all_tasks], 3)
                hint = f"; near: {', '.join(near)}" if near else ""
                own = f"; {self.folder} has {', '.join(self.own) or 'none'}" if self.folder else ""
                raise InputError(f"no task named {name!r}{hint}{own}; `lm-eval ls tasks` shows all")

    def load(self, job: Job) -> dict[str, Any]:
        """The task of a job with its data, as `simple_evaluate` takes it. Raises `InputError` where it is not there."""
        from huggingface_hub.errors import HfHubHTTPError

        spec: Any = self._human_eval(job) if job.task == "humaneval" else job.task
        try:
            with _inside(self.folder):  # relative paths of data files are those of the folder
                loaded = self.manager(job.task).load([spec])
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
        own = self._own.task_index["humaneval"].cfg if "humaneval" in self.own else {}
        names = ("dataset_path", "dataset_name", "dataset_kwargs", "test_split")
        dataset = {name: own[name] for name in names if name in own}
        return human_eval(int(job.setting.name.removeprefix("pass@")), job.setting.samples, dataset)


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

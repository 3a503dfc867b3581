"""How the papers measured: for each benchmark the metric, and the numbers of shots or the sampling.

Sources: LLaMA (arXiv 2302.13971), section 3 and the tables named in `paper.results`.
"""

from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..paper.results import BENCHMARKS


@dataclass(frozen=True)
class Setting:
    """A column of a published table."""

    name: str
    """As the table's column is called in `paper.results`."""
    num_fewshot: int | None
    """None: what the task says of itself."""
    samples: int = 1
    """Answers to each question."""
    generation: dict[str, Any] = field(default_factory=dict, hash=False)
    """What differs from the task's own way to generate."""


@dataclass(frozen=True)
class PaperTask:
    """A benchmark as the papers report it."""

    metric: str
    """lm-evaluation-harness's name of what the table shows: metric and filter."""
    settings: tuple[Setting, ...]


def _shots(*numbers: int) -> tuple[Setting, ...]:
    return tuple(Setting(f"{number}-shot", number) for number in numbers)


def _sampling(temperature: float) -> dict[str, Any]:
    # top_k and top_p are set so that nothing of a folder's generation_config.json is taken.
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


PAPER_TASKS: dict[str, PaperTask] = {
    "mmlu": PaperTask("acc,none", _shots(5)),
    # acc_norm: the log-likelihood divided by the number of characters.
    "hellaswag": PaperTask("acc_norm,none", _shots(0)),
    "triviaqa": PaperTask("exact_match,remove_whitespace", _shots(0, 1, 5, 64)),
    "nq_open": PaperTask("exact_match,remove_whitespace", _shots(0, 1, 5, 64)),
    "humaneval": PaperTask(
        "pass@k",
        (
            Setting("pass@1", 0, samples=1, generation=_sampling(0.1)),
            Setting("pass@100", 0, samples=100, generation=_sampling(0.8)),
        ),
    ),
}

OWN_SETTING = Setting("", None)
"""Of a task that is none of the papers'."""


@dataclass(frozen=True)
class Job:
    """One task under one setting."""

    task: str
    setting: Setting

    @property
    def metric(self) -> str | None:
        """What the paper's table shows; None: whatever the task measures."""
        if self.task not in PAPER_TASKS:
            return None
        return f"{self.setting.name},none" if self.task == "humaneval" else PAPER_TASKS[self.task].metric

    def __str__(self) -> str:
        return f"{self.task} {self.setting.name}".strip()


def jobs(tasks: list[str], chosen: list[str] | None) -> list[Job]:
    """Every task under each of its settings, or under those `chosen`.

    Raises `InputError` for a setting that no table has, and where none of the chosen is left for a task.
    """
    known = list(dict.fromkeys(name for benchmark in BENCHMARKS.values() for name in benchmark.settings))
    if unknown := [name for name in chosen or () if name not in known]:
        raise InputError(f"--settings {', '.join(unknown)}: the papers' tables have {', '.join(known)}")
    found = []
    for task in tasks:
        settings = PAPER_TASKS[task].settings if task in PAPER_TASKS else (OWN_SETTING,)
        kept = [setting for setting in settings if chosen is None or setting == OWN_SETTING or setting.name in chosen]
        if not kept:
            has = ", ".join(setting.name for setting in settings)
            raise InputError(f"--settings {', '.join(chosen or ())} leaves none for {task}, whose table has {has}")
        found += [Job(task, setting) for setting in kept]
    return found

"""What an evaluation ends in: rows beside the published numbers, a table, JSON, and a picture."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..durable import rename
from ..errors import InputError
from ..paper.results import BENCHMARKS, family
from ..paper.sizes import Size
from ..paper.tables import Table
from .settings import Job

PERCENT = ("acc", "acc_norm", "acc_bytes", "exact_match", "pass@")
"""Beginnings of the metrics that are shares."""


@dataclass(frozen=True)
class Row:
    """One measured number."""

    task: str
    setting: str
    metric: str
    value: float
    """As lm-evaluation-harness gives it: a share is 0 to 1."""
    stderr: float | None
    num_questions: int
    published: float | None
    """Percent, of the recognised size."""

    @property
    def is_share(self) -> bool:
        return self.metric.startswith(PERCENT)


def rows_of(job: Job, results: dict[str, Any], size: Size | None) -> list[Row]:
    """The rows of one job: of a paper's task the metric of the paper's table, of another all that it measures."""
    rows = []
    names = [job.task] if job.metric else list(results["results"])
    for name in names:
        measured = results["results"][name]
        for key, value in measured.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            if job.metric and key != job.metric:
                continue
            stderr = measured.get(f"{metric}_stderr,{filtered}")
            rows.append(
                Row(
                    task=name,
                    setting=job.setting.name,
                    metric=metric if filtered == "none" else key,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    num_questions=_num_questions(name, results),
                    published=BENCHMARKS[job.task].score(size.title, job.setting.name) if job.metric and size else None,
                )
            )
    if not rows:
        raise InputError(f"task {job.task} gave no metric {job.metric or ''}: it measures {sorted(names)}".strip())
    return rows


def _num_questions(name: str, results: dict[str, Any]) -> int:
    """Of a group, those of its tasks together."""
    counts, subtasks = results["n-samples"], results.get("group_subtasks", {})
    if name in counts:
        return counts[name]["effective"]
    return sum(_num_questions(child, results) for child in subtasks.get(name, []))


def table(rows: list[Row], size: Size | None) -> Table:
    """For the terminal."""
    published = size.title if size else "published"
    header = ("task", "setting", "metric", "questions", "measured", "±", published)
    cells = [
        (
            row.task,
            row.setting,
            row.metric,
            str(row.num_questions),
            f"{100 * row.value:.2f} %" if row.is_share else f"{row.value:.6g}",
            "" if row.stderr is None else f"{100 * row.stderr:.2f}" if row.is_share else f"{row.stderr:.2g}",
            "–" if row.published is None else f"{row.published:.1f} %",
        )
        for row in rows
    ]
    source = f"published: {size.title}, {_sources(rows)}" if size else "the model has no size of the papers"
    return Table("Results", source, header, cells)


def _sources(rows: list[Row]) -> str:
    sources = dict.fromkeys(BENCHMARKS[row.task].source for row in rows if row.published is not None)
    return "; ".join(sources) or "none for these tasks"


def write_json(path: Path, header: dict[str, Any], rows: list[Row], metrics: dict[str, Any]) -> None:
    """Everything measured, to the last digit; whole or not at all."""
    content = {**header, "rows": [asdict(row) for row in rows], "metrics": metrics}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    rename(partial, path)


def draw(path: Path, title: str, rows: list[Row], size: Size | None) -> None:
    """The shares measured, with what was published of the recognised size and of the others; the rest as bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares, others = [row for row in rows if row.is_share], [row for row in rows if not row.is_share]
    panels = [panel for panel in (shares, others) if panel]
    figure = Figure(figsize=(9, 1.6 + 0.55 * len(rows) + 0.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[len(panel) + 1 for panel in panels])
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        axes.set_yticks(range(len(panel)), [f"{row.task} {row.setting}".strip() + f"\n{row.metric}" for row in panel])
        axes.set_ylim(len(panel) - 0.4, -0.6)
        axes.grid(axis="x", alpha=0.3)
        (_draw_shares if panel is shares else _draw_others)(axes, panel, size)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw_shares(axes: Any, rows: list[Row], size: Size | None) -> None:
    for place, row in enumerate(rows):
        benchmark = BENCHMARKS.get(row.task)
        for model in benchmark.scores if benchmark and row.setting in benchmark.settings else ():
            score = benchmark.score(model, row.setting) if benchmark else None
            if score is not None and family(model).startswith("LLaMA"):
                own = size is not None and model == size.title
                colour = "tab:orange" if own else "0.75"
                label = "published, this size" if own else "published, LLaMA's sizes"
                axes.plot([score], [place], "D", color=colour, label=label, zorder=2 + own)
        error = 0 if row.stderr is None else 100 * row.stderr
        axes.errorbar(
            [100 * row.value], [place], xerr=error, fmt="o", color="tab:blue", label="measured", capsize=3, zorder=4
        )
        axes.annotate(
            f"{100 * row.value:.1f}",
            (100 * row.value, place),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color="tab:blue",
        )
    axes.set(xlim=(0, 105), xlabel="%")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))


def _draw_others(axes: Any, rows: list[Row], size: Size | None) -> None:
    bars = axes.barh(range(len(rows)), [row.value for row in rows], height=0.5, color="tab:blue")
    axes.bar_label(bars, [f"{row.value:.4g}" for row in rows], padding=3, fontsize=8)
    axes.set(xscale="log", xlabel="as the metric is defined")
    axes.margins(x=0.2)

"""The pictures of docs/paper.md: what each shows, as data, and how it is drawn. Needs matplotlib.

The data is written into the PNG file, so that a test can tell a picture that is no longer the code's.
"""

import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .formulas import kv_cache_bytes, learning_rate, num_steps
from .results import BENCHMARKS, BILLIONS, family
from .sizes import MIXTURE, RUNS, SIZES, TIMELINE, title

DATA_KEY = "Data"
"""Of the PNG file's text."""

COLOURS = {
    "LLaMA": "tab:blue",
    "LLaMA 2": "tab:orange",
    "GPT-3": "tab:green",
    "Gopher": "tab:red",
    "Chinchilla": "tab:purple",
    "PaLM": "tab:brown",
}
MARKERS = {"LLaMA": "o", "LLaMA 2": "D", "GPT-3": "s", "Gopher": "^", "Chinchilla": "v", "PaLM": "P"}
POINTS_OF_CURVE = 60


@dataclass(frozen=True)
class Picture:
    alt: str
    """What it shows, in one sentence."""
    data: Callable[[], dict[str, Any]]
    """JSON types."""
    draw: Callable[[Any, dict[str, Any]], None]
    """On a matplotlib figure."""
    inches: tuple[float, float]


def mixture_data() -> dict[str, Any]:
    return {source.name: [100 * source.share, source.epochs] for source in MIXTURE}


def draw_mixture(figure: Any, data: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(data)
    shares = left.barh(names, [data[name][0] for name in names], color="tab:blue")
    left.bar_label(shares, fmt="%.1f %%", padding=3)
    left.set(xlabel="share of the sampled tokens, %", xlim=(0, 80))
    left.invert_yaxis()
    epochs = right.barh(names, [data[name][1] for name in names], color="tab:orange")
    right.bar_label(epochs, fmt="%.2f", padding=3)
    right.axvline(1, color="0.3", linewidth=1, linestyle=":")
    right.set(xlabel="epochs, of 1.4T tokens", xlim=(0, 3))


def learning_rate_data() -> dict[str, Any]:
    """By models that share a schedule: [tokens in 1e12, learning rate]."""
    curves: dict[str, Any] = {}
    together: dict[tuple[str, int, float], list[str]] = {}
    for name, run in RUNS.items():
        key = ("LLaMA 2" if name.startswith("llama-2-") else "LLaMA", run.tokens, run.peak_learning_rate)
        together.setdefault(key, []).append(title(name).rpartition(" ")[2])
    for (papers, tokens, peak), names in together.items():
        total = num_steps(tokens)
        steps = sorted({2_000, *(round(total * point / POINTS_OF_CURVE) for point in range(POINTS_OF_CURVE + 1))})
        curves[f"{papers} {', '.join(names)}"] = [
            [step * tokens / total / 1e12, learning_rate(step, peak=peak, total_steps=total)] for step in steps
        ]
    return curves


def draw_learning_rate(figure: Any, data: dict[str, Any]) -> None:
    axes = figure.subplots()
    styles = ("-", "--")
    for number, (name, points) in enumerate(data.items()):
        colour = COLOURS["LLaMA 2" if name.startswith("LLaMA 2") else "LLaMA"]
        axes.plot(*zip(*points, strict=True), styles[number % 2], color=colour, label=name)
    axes.set(xlabel="tokens seen, 1e12", ylabel="learning rate", ylim=(0, 3.3e-4), xlim=(0, 2.05))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-4, -4))
    axes.grid(alpha=0.3)
    axes.legend()


def scores_data(*benchmarks: tuple[str, str]) -> dict[str, Any]:
    """By benchmark and setting: model -> [parameters in 1e9, score]."""
    return {
        f"{BENCHMARKS[name].title}, {setting}": {
            model: [round(BILLIONS[model], 3), BENCHMARKS[name].score(model, setting)]
            for model in BENCHMARKS[name].scores
            if BENCHMARKS[name].score(model, setting) is not None
        }
        for name, setting in benchmarks
    }


# Where a label stands beside its point, in points: right of it where nothing is said.
_RIGHT, _LEFT, _BELOW, _ABOVE = (7, -4, "left"), (-7, -4, "right"), (0, -16, "center"), (0, 8, "center")
LABEL_PLACES: dict[str, dict[str, tuple[int, int, str]]] = {
    "MMLU, 5-shot": {"PaLM 540B": _LEFT, "LLaMA 2 70B": _ABOVE},
    "HellaSwag, 0-shot": {"PaLM 540B": _LEFT, "Chinchilla 70B": _LEFT, "GPT-3 175B": _BELOW},
    "NaturalQuestions, 64-shot": {"PaLM 540B": _LEFT, "LLaMA 33B": _LEFT},
}


def draw_scores(figure: Any, data: dict[str, Any]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    for axes, (name, points) in zip(figure.subplots(1, len(data), squeeze=False)[0], data.items(), strict=True):
        for group in dict.fromkeys(family(model) for model in points):
            row = [point for model, point in points.items() if family(model) == group]
            axes.plot(
                *zip(*row, strict=True), MARKERS[group] + "-", color=COLOURS[group], label=group, linewidth=1, alpha=0.9
            )
        for model, (billions, score) in points.items():
            dx, dy, alignment = LABEL_PLACES.get(name, {}).get(model, _RIGHT)
            axes.annotate(
                f"{model.rpartition(' ')[2]} {score:.1f}",
                (billions, score),
                xytext=(dx, dy),
                textcoords="offset points",
                ha=alignment,
                fontsize=8,
                color=COLOURS[family(model)],
            )
        axes.set(title=name, xlabel="parameters, 1e9", xscale="log", xlim=(5, 1000))
        axes.xaxis.set_major_locator(FixedLocator([7, 13, 33, 65, 175, 540]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        axes.grid(alpha=0.3)
        axes.margins(y=0.12)
    figure.axes[0].set_ylabel("%")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def human_eval_data() -> dict[str, Any]:
    return {model: list(scores) for model, scores in BENCHMARKS["humaneval"].scores.items()}


def draw_human_eval(figure: Any, data: dict[str, Any]) -> None:
    axes = figure.subplots()
    _grouped_bars(axes, data, BENCHMARKS["humaneval"].settings, "%.1f")
    axes.set(ylabel="problems solved, %", ylim=(0, 90))


def kv_cache_data() -> dict[str, Any]:
    """GB of a full context in 16 bits: as published, and as if each head had its own K and V."""
    return {
        size.title: [kv_cache_bytes(size, grouped=grouped) * size.context / 1e9 for grouped in (True, False)]
        for size in SIZES.values()
    }


def draw_kv_cache(figure: Any, data: dict[str, Any]) -> None:
    axes = figure.subplots()
    _grouped_bars(axes, data, ("as published", "if each head had its own K and V"), "%.2f")
    axes.set(
        xlabel="model, and its context in tokens", ylabel="K/V cache of one full context, GB, 16 bits", ylim=(0, 12)
    )
    axes.set_xticks(
        range(len(data)), [f"{name}\n{size.context}" for name, size in zip(data, SIZES.values(), strict=True)]
    )


def _grouped_bars(axes: Any, data: dict[str, Any], names: tuple[str, ...], form: str) -> None:
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        places = [place + (number - (len(names) - 1) / 2) * width for place in range(len(data))]
        bars = axes.bar(places, [row[number] for row in data.values()], width, label=name)
        axes.bar_label(bars, fmt=form, fontsize=8, padding=2)
    axes.set_xticks(range(len(data)), list(data))
    axes.legend(loc="upper left")


def timeline_data() -> dict[str, Any]:
    return {event.name: [event.date, event.what] for event in TIMELINE}


def draw_timeline(figure: Any, data: dict[str, Any]) -> None:
    from matplotlib.dates import DateFormatter, MonthLocator

    axes = figure.subplots()
    heights = (1.0, -1.0, 2.5, -2.9, 1.0, -1.0, 1.0)
    for (name, (date, what)), height in zip(data.items(), heights, strict=True):
        day = datetime.date.fromisoformat(date)
        colour = COLOURS.get(name, "0.3")
        axes.plot([day, day], [0, height], color=colour, linewidth=1)
        axes.plot([day], [0], "o", color=colour)
        axes.annotate(
            f"{name}\n{date}\n{_folded(what)}",
            (day, height),
            xytext=(0, 4 if height > 0 else -4),
            textcoords="offset points",
            ha="center",
            va="bottom" if height > 0 else "top",
            fontsize=9,
            color=colour,
        )
    axes.axhline(0, color="0.3", linewidth=1)
    axes.set(ylim=(-4.6, 4.4), xlim=(datetime.date(2023, 2, 5), datetime.date(2023, 8, 12)), yticks=[])
    axes.xaxis.set_major_locator(MonthLocator())
    axes.xaxis.set_major_formatter(DateFormatter("%Y-%m"))
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)


def _folded(text: str, width: int = 24) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width, break_on_hyphens=False))


PICTURES: dict[str, Picture] = {
    "paper-mixture.png": Picture(
        "Share of the sampled tokens, and epochs, of the seven sources", mixture_data, draw_mixture, (9, 3.6)
    ),
    "paper-learning-rate.png": Picture(
        "Learning rate against tokens seen, of each size", learning_rate_data, draw_learning_rate, (8, 4)
    ),
    "paper-mmlu.png": Picture(
        "MMLU against parameters, beside GPT-3, Gopher, Chinchilla and PaLM",
        lambda: scores_data(("mmlu", "5-shot")),
        draw_scores,
        (8, 5.5),
    ),
    "paper-benchmarks.png": Picture(
        "HellaSwag, TriviaQA and NaturalQuestions against parameters",
        lambda: scores_data(("hellaswag", "0-shot"), ("triviaqa", "64-shot"), ("nq_open", "64-shot")),
        draw_scores,
        (14, 5.5),
    ),
    "paper-humaneval.png": Picture(
        "HumanEval, pass@1 and pass@100, beside PaLM", human_eval_data, draw_human_eval, (8, 4)
    ),
    "paper-kv-cache.png": Picture(
        "K/V cache of one full context, with and without grouped queries", kv_cache_data, draw_kv_cache, (9, 4.2)
    ),
    "paper-timeline.png": Picture(
        "From LLaMA to LLaMA 2: Alpaca, Vicuna, Koala, WizardLM, Orca", timeline_data, draw_timeline, (11, 5)
    ),
}


def data_text(picture: Picture) -> str:
    """What a picture shows, as it is written into its file; floats to 6 digits, which every machine agrees on."""
    return json.dumps(_rounded(picture.data()))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def drawn(picture: Picture) -> Any:
    """The matplotlib figure of a picture. Raises `InputError` where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("the pictures need matplotlib: pip install 'hf-llama-repro[finetune]'") from None
    figure = Figure(figsize=picture.inches, layout="constrained")
    FigureCanvasAgg(figure)
    picture.draw(figure, picture.data())
    return figure


def write_pictures(folder: Path) -> list[Path]:
    """Draws every picture into `folder`, and says where."""
    paths = []
    for name, picture in PICTURES.items():
        metadata = {"Software": None, DATA_KEY: data_text(picture)}
        drawn(picture).savefig(folder / name, dpi=110, metadata=metadata)
        paths.append(folder / name)
    return paths

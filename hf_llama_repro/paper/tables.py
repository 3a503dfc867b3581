"""The papers' tables, and those that follow from them: printed by the command, and written into docs/paper.md."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .formulas import (
    carbon_tonnes,
    cost,
    energy_mwh,
    exact_training_flops,
    forward_flops,
    kv_cache_bytes,
    layer_flops,
    model_flops_utilisation,
    num_parameters,
    num_steps,
    parameters,
    tokens_by_source,
    training_flops,
)
from .results import BENCHMARKS, BILLIONS, MISTAKES, Benchmark
from .sizes import (
    ADAM_EPS,
    BATCH_TOKENS,
    CLUSTER_GPUS,
    GPU_FLOPS,
    MIXTURE,
    MIXTURE_TOKENS,
    RUNS,
    SIZES,
    TIMELINE,
    TOKENS_PER_SECOND_PER_GPU,
    Size,
    title,
)

BYTES_PER_VALUE = 2
"""Of fp16 and bf16."""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header, with where they are from."""

    title: str
    source: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str] = ()

    def text(self) -> str:
        """For a terminal: columns of equal width, numbers to the right."""
        table = [self.header, *self.rows]
        widths = [max(len(row[column]) for row in table) for column in range(len(self.header))]
        lines = [
            "  ".join(
                cell.rjust(width) if numbers else cell.ljust(width)
                for cell, width, numbers in zip(row, widths, self._numbers(), strict=True)
            ).rstrip()
            for row in table
        ]
        return "\n".join([f"{self.title} ({self.source})", *lines, *self.notes])

    def markdown(self) -> str:
        """For docs/paper.md, without the title."""
        rule = ["---:" if numbers else "---" for numbers in self._numbers()]
        lines = ["| " + " | ".join(row) + " |" for row in [self.header, rule, *self.rows]]
        notes = [f"\n{note}." for note in self.notes]
        return "\n".join([*lines, f"\nSource: {self.source}.", *notes])

    def _numbers(self) -> list[bool]:
        """Of each column, whether it holds numbers, with a unit or without, and dashes."""
        cells = zip(*self.rows, strict=True)
        return [any(map(_NUMBER, column)) and all(cell == "–" or _NUMBER(cell) for cell in column) for column in cells]


_NUMBER = re.compile(r"[\d,.]+(e-?\d+)?( ?(%|[TG]B?))?").fullmatch


def _or_dash(value: float | None, form: str = "{}") -> str:
    return "–" if value is None else form.format(value)


def _e(value: float, digits: int = 2) -> str:
    """4.04e22, and 3e-4 with no digits."""
    mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _tokens(tokens: float) -> str:
    return f"{tokens / 1e12:.1f}T"


def sizes() -> Table:
    header = (
        "model",
        "dim",
        "layers",
        "heads",
        "KV heads",
        "FFN",
        "context",
        "norm eps",
        "parameters",
        "files",
        "dtype",
    )
    rows = [
        (
            size.title,
            str(size.dim),
            str(size.num_layers),
            str(size.num_heads),
            str(size.num_kv_heads),
            str(size.ffn_dim),
            str(size.context),
            _e(size.norm_eps, 0),
            f"{num_parameters(size):,}",
            str(size.num_shards),
            size.dtype,
        )
        for size in SIZES.values()
    ]
    notes = ("Files of 65B with 1e-5 are seen: the norm eps is to be taken from params.json",)
    return Table("Sizes", "LLaMA, Table 2; LLaMA 2, Table 1 and appendix A.2.1", header, rows, notes)


def parts(names: Sequence[str] = tuple(SIZES)) -> Table:
    chosen = [SIZES[name] for name in names]
    columns = [parameters(size) for size in chosen]
    rows = [(part, *(f"{column[part]:,}" for column in columns)) for part in columns[0]]
    rows.append(("all", *(f"{sum(column.values()):,}" for column in columns)))
    return Table("Parameters by part", "computed", ("part", *(size.title for size in chosen)), rows)


def mixture() -> Table:
    tokens = tokens_by_source(MIXTURE_TOKENS)
    rows = [
        (
            source.name,
            f"{100 * source.share:.1f} %",
            f"{source.epochs:.2f}",
            f"{source.disk_gb / 1000:.1f} TB" if source.disk_gb >= 1000 else f"{source.disk_gb} GB",
            f"{tokens[source.name][0] / 1e9:.0f}G",
            f"{tokens[source.name][1] / 1e9:.0f}G",
        )
        for source in MIXTURE
    ]
    header = ("source", "share", "epochs", "on disk", "tokens sampled", "tokens in it")
    return Table(
        "Data mixture of LLaMA", f"Table 1; tokens computed for {_tokens(MIXTURE_TOKENS)}, G is 1e9", header, rows
    )


def runs() -> Table:
    rows = []
    for name, run in RUNS.items():
        n = num_parameters(SIZES[name]) if name in SIZES else None
        eps = ADAM_EPS["LLaMA 2" if name.startswith("llama-2-") else "LLaMA"]
        rows.append(
            (
                title(name),
                _tokens(run.tokens),
                _e(run.peak_learning_rate, 1).replace(".0e", "e"),
                f"{num_steps(run.tokens):,}",
                "–" if eps is None else _e(eps, 0),
                "–" if n is None else _e(training_flops(n, run.tokens)),
                f"{run.gpu_hours:,}",
                _or_dash(run.energy_mwh),
                _or_dash(run.carbon_tonnes),
            )
        )
    header = ("model", "tokens", "peak rate", "steps", "Adam eps", "6 N D FLOPs", "GPU-hours", "MWh", "tCO2eq")
    notes = (
        "All: AdamW 0.9/0.95, weight decay 0.1, clipping 1.0, 2,000 warm-up steps, cosine to 10 % of the peak, "
        f"4M tokens a batch (steps computed with {BATCH_TOKENS:,})",
        "–: the paper does not say, or gives no shape to compute with (34B)",
    )
    return Table(
        "Pre-training", "LLaMA, Tables 2 and 15, section 2.3; LLaMA 2, Tables 1 and 2, section 2.2", header, rows, notes
    )


def costs() -> Table:
    """The published GPU-hours against what the formulas give."""
    rows = []
    for name, size in SIZES.items():
        run = RUNS[name]
        rule, exact = training_flops(num_parameters(size), run.tokens), exact_training_flops(size, run.tokens)
        used = rule / (run.gpu_hours * 3600 * GPU_FLOPS)
        rows.append(
            (
                size.title,
                _e(rule),
                _e(exact),
                f"{100 * used:.0f} %",
                f"{energy_mwh(run.gpu_hours):.0f}",
                f"{carbon_tonnes(run.gpu_hours):.0f}",
            )
        )
    header = ("model", "6 N D", "with attention", "of the GPUs' peak", "MWh", "tCO2eq")
    flops = 6 * num_parameters(SIZES["llama-65b"])
    share = model_flops_utilisation(flops, TOKENS_PER_SECOND_PER_GPU)
    notes = (
        f"65B at {TOKENS_PER_SECOND_PER_GPU} tokens/s on each of {CLUSTER_GPUS:,} GPUs uses {100 * share:.0f} % of "
        f"their {GPU_FLOPS / 1e12:.0f} TFLOP/s and takes "
        f"{RUNS['llama-65b'].tokens / (CLUSTER_GPUS * TOKENS_PER_SECOND_PER_GPU) / 86400:.1f} days",
        "Energy is 400 W a GPU and 1.1 for the data centre, carbon 0.385 t a MWh (LLaMA, section 6); for LLaMA 2 an "
        "estimate by the same assumptions",
    )
    return Table("Costs, computed", "the formulas, and the published GPU-hours", header, rows, notes)


def caches() -> Table:
    rows = []
    for size in SIZES.values():
        grouped = kv_cache_bytes(size, bytes_per_value=BYTES_PER_VALUE)
        single = kv_cache_bytes(size, grouped=False, bytes_per_value=BYTES_PER_VALUE)
        rows.append(
            (
                size.title,
                f"{grouped:,}",
                f"{grouped * size.context / 1e9:.2f} GB",
                f"{single:,}",
                f"{single * size.context / 1e9:.2f} GB",
                f"{single // grouped}",
            )
        )
    header = ("model", "bytes a token", "full context", "if each head had its own", "full context", "times")
    return Table("K/V cache, 16 bits a value", "computed", header, rows)


def benchmark(name: str) -> Table:
    shown: Benchmark = BENCHMARKS[name]
    rows = [(model, *(_or_dash(score, "{:.1f}") for score in scores)) for model, scores in shown.scores.items()]
    return Table(f"{shown.title}: {shown.metric}", shown.source, ("model", *shown.settings), rows, shown.notes)


def mistakes() -> Table:
    rows = [(mistake.of, mistake.said, mistake.right(), mistake.reason) for mistake in MISTAKES]
    return Table("Often repeated, and wrong", "the tables above", ("of", "said", "right", "why"), rows)


def timeline() -> Table:
    rows = [(event.date, event.name, event.what, event.source) for event in TIMELINE]
    return Table("From LLaMA to LLaMA 2", "as named", ("date", "name", "what", "source"), rows)


def every_table() -> list[Table]:
    """In the order in which the command prints them."""
    results = [benchmark(name) for name in BENCHMARKS]
    return [sizes(), parts(), mixture(), runs(), costs(), caches(), *results, timeline(), mistakes()]


def of_one_size(
    size: Size, *, context: int, num_gpus: int, utilisation: float, dollars_per_gpu_hour: float | None
) -> list[Table]:
    """What the command prints of one size: parameters, FLOPs by product, the training on a cluster."""
    run, total = RUNS[size.name], forward_flops(size, context)
    layer = {name: size.num_layers * flops for name, flops in layer_flops(size, context).items()}
    products = [*layer.items(), ("output", total - sum(layer.values())), ("all", total)]
    flops_rows = [(name, _e(flops, 4), f"{100 * flops / total:.1f} %") for name, flops in products]
    flops_source = f"computed; a sequence of {context:,} tokens, each sees itself and those before it"
    exact = exact_training_flops(size, run.tokens, context)
    taken = cost(exact, num_gpus=num_gpus, utilisation=utilisation, dollars_per_gpu_hour=dollars_per_gpu_hour or 0.0)
    training = [
        ("tokens", f"{run.tokens:,}"),
        ("6 N D FLOPs", _e(training_flops(num_parameters(size), run.tokens), 3)),
        ("FLOPs with attention", _e(exact, 3)),
        ("days", f"{taken.days:.1f}"),
        ("GPU-hours", f"{taken.gpu_hours:,.0f}"),
        ("GPU-hours, published", f"{run.gpu_hours:,}"),
    ]
    if dollars_per_gpu_hour is not None:
        training.append((f"cost at {dollars_per_gpu_hour:g} dollars a GPU-hour", f"{taken.dollars:,.0f}"))
    memory = kv_cache_bytes(size, bytes_per_value=BYTES_PER_VALUE)
    training.append((f"K/V cache of {context:,} tokens, bytes", f"{memory * context:,}"))
    cluster = f"computed; {num_gpus:,} GPUs at {100 * utilisation:g} % of {GPU_FLOPS / 1e12:.0f} TFLOP/s"
    return [
        parts([size.name]),
        Table("FLOPs of a forward pass", flops_source, ("product", "FLOPs", "share"), flops_rows),
        Table(f"Training {size.title}", cluster, ("what", "value"), training),
    ]


def content() -> dict:
    """Every table as JSON types, and the models' sizes in billions of parameters."""
    return {
        "billions": BILLIONS,
        "tables": {
            table.title: {
                "source": table.source,
                "header": list(table.header),
                "rows": [list(row) for row in table.rows],
            }
            for table in every_table()
        },
    }

"""The two LLaMA papers as data and functions: sizes, costs, recipe, results.

python -m hf_llama_repro.paper              # every table
python -m hf_llama_repro.paper llama-65b    # one size: parameters by part, FLOPs, time on a cluster

Sources: LLaMA is arXiv 2302.13971, LLaMA 2 is arXiv 2307.09288; each table names its own.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .formulas import (
        carbon_tonnes,
        cost,
        energy_mwh,
        exact_training_flops,
        forward_flops,
        kv_cache_bytes,
        layer_flops,
        learning_rate,
        model_flops_utilisation,
        num_steps,
        parameters,
        tokens_by_source,
        training_flops,
    )
    from .report import build_parser, main
    from .results import BENCHMARKS, MISTAKES
    from .sizes import MIXTURE, RUNS, SIZES, TIMELINE, Size, size

# Loaded when first asked for, so that --help answers at once: public name -> module.
_MODULE_OF = {
    **dict.fromkeys(("MIXTURE", "RUNS", "SIZES", "TIMELINE", "Size", "size"), "sizes"),
    **dict.fromkeys(("BENCHMARKS", "MISTAKES"), "results"),
    **dict.fromkeys(("build_parser", "main"), "report"),
    **dict.fromkeys(
        (
            "carbon_tonnes",
            "cost",
            "energy_mwh",
            "exact_training_flops",
            "forward_flops",
            "kv_cache_bytes",
            "layer_flops",
            "learning_rate",
            "model_flops_utilisation",
            "num_steps",
            "parameters",
            "tokens_by_source",
            "training_flops",
        ),
        "formulas",
    ),
}

__all__ = [
    "BENCHMARKS",
    "MISTAKES",
    "MIXTURE",
    "RUNS",
    "SIZES",
    "TIMELINE",
    "Size",
    "build_parser",
    "carbon_tonnes",
    "cost",
    "energy_mwh",
    "exact_training_flops",
    "forward_flops",
    "kv_cache_bytes",
    "layer_flops",
    "learning_rate",
    "main",
    "model_flops_utilisation",
    "num_steps",
    "parameters",
    "size",
    "tokens_by_source",
    "training_flops",
]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])

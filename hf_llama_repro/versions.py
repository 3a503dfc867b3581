"""The versions of transformers that the models were tested with, and names that differ between them."""

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import Any

FIRST_TESTED, LAST_TESTED = (5, 16), (5, 24)
"""Minor releases of transformers, both included."""

TRANSFORMERS = f">={FIRST_TESTED[0]}.{FIRST_TESTED[1]},<{LAST_TESTED[0]}.{LAST_TESTED[1] + 1}"
"""The same as pip takes it; pyproject.toml's requirement."""


def untested_transformers() -> str | None:
    """Return a line on the installed transformers if it lies outside of the tested range."""
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        return None
    if FIRST_TESTED <= _minor(installed) <= LAST_TESTED:
        return None
    return (
        f"hf_llama_repro was not tested with transformers {installed}, and its results may be wrong: "
        f"pip install 'transformers{TRANSFORMERS}'"
    )


def _minor(installed: str) -> tuple[int, ...]:
    return tuple(int(part) for part in installed.split(".")[:2] if part.isdigit())


def report_untested() -> None:
    """Log that line, where pip's refusal of the version was overruled."""
    if (line := untested_transformers()) is not None:
        logging.getLogger(__package__).warning(line)


def checkpoint_activations(model: Any, *, use_reentrant: bool) -> None:
    """Recompute the layers' activations in the backward pass (`activation_checkpointing_enable`, from 5.24 on)."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})

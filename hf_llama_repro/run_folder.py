"""The folder of a training run: its recipe, its checkpoints and its result."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .checkpoints import checkpoints, newest_whole
from .durable import rename
from .errors import InputError
from .recipe_file import as_yaml

RECIPE_FILE = "recipe.yaml"
RESULTS = ("adapter", "model")
"""What a finished run leaves, one of them."""
R = TypeVar("R")


def open_run(
    recipe: R,
    *,
    load: Callable[[Path], R],
    free_fields: tuple[str, ...],
    resume: bool,
    say: Callable[..., None],
    is_main: bool,
) -> Path | None:
    """Makes the recipe's `output_dir`, or finds the checkpoint to go on from; None: from the beginning.

    `load` reads a recipe's file, `free_fields` may differ between a run and its continuation, and only the main
    process writes. Raises `InputError` where the folder holds another run, or one that is not to be resumed, or cannot
    be written.
    """
    output_dir = Path(recipe.output_dir)  # type: ignore[attr-defined]
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        # Without a checkpoint there is nothing to lose: a run that was stopped before the first may be begun anew.
        begun = bool(checkpoints(output_dir)) and (output_dir / RECIPE_FILE).is_file()
        if resume and begun:
            _check_same(output_dir, recipe, load(output_dir / RECIPE_FILE), free_fields)
            checkpoint, warnings = newest_whole(output_dir)
            say(*(f"WARNING     {warning}" for warning in warnings), sep="\n", end="\n" if warnings else "")
            say(f"resume      {checkpoint or 'no checkpoint is whole: starts from the beginning'}")
            return checkpoint
        if begun or any((output_dir / name).exists() for name in RESULTS):
            raise InputError(f"{output_dir} holds a run: go on with it by --resume, or choose another output_dir")
        if is_main:
            aside = output_dir / f".{RECIPE_FILE}"
            aside.write_text(as_yaml(recipe), encoding="utf-8")
            rename(aside, output_dir / RECIPE_FILE)
    except OSError as error:
        raise InputError(f"output_dir={output_dir} cannot be written: {error}") from None
    return None


def _check_same(output_dir: Path, recipe: Any, begun: Any, free_fields: tuple[str, ...]) -> None:
    differing = [
        f"{field.name} was {getattr(begun, field.name)!r} and is {getattr(recipe, field.name)!r}"
        for field in dataclasses.fields(recipe)
        if field.name not in free_fields and getattr(begun, field.name) != getattr(recipe, field.name)
    ]
    if differing:
        raise InputError(
            f"{output_dir} was begun by another recipe ({'; '.join(differing)}): "
            "resume with the same, or choose another output_dir"
        )

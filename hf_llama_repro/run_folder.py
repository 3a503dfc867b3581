"""The folder of a training run: its recipe, its checkpoints and its result."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .checkpoints import bring_back_all, checkpoints, newest_whole
from .durable import rename
from .errors import InputError
from .recipe_file import as_yaml

RECIPE_FILE = "recipe.yaml"
INPUTS_FILE = "inputs.json"
"""Holds the paths of the run's inputs and the sha256 of their content."""
RESULTS = ("adapter", "model")
"""What a finished run leaves, one of them."""
R = TypeVar("R")


class Input(NamedTuple):
    """The content that a key of the recipe names."""

    path: str
    """Resolved, for people: the content may lie elsewhere the next time."""
    sha256: dict[str, str]
    """Part, such as the name of a file -> checksum of its content."""


def open_run(
    recipe: R,
    *,
    load: Callable[[Path], R],
    free_fields: tuple[str, ...],
    resume: bool,
    say: Callable[..., None],
    is_main: bool,
    inputs: Mapping[str, Callable[[], Input]] | None = None,
) -> Path | None:
    """Makes the recipe's `output_dir`, or finds the checkpoint to go on from; None: from the beginning.

    `load` reads a recipe's file, `free_fields` may differ between a run and its continuation, and only the main
    process writes. `inputs` reads the content of what some fields name, by which a continuation is compared. Raises
    `InputError` where the folder holds another run, or one that is not to be resumed, or cannot be written.
    """
    output_dir = Path(recipe.output_dir)  # type: ignore[attr-defined]
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if is_main:
            bring_back_all(output_dir)
        # Without a checkpoint there is nothing to lose: a run that was stopped before the first may be begun anew.
        begun = bool(checkpoints(output_dir)) and (output_dir / RECIPE_FILE).is_file()
        if resume and begun:
            _check_inputs(output_dir, inputs or {}, say, is_main=is_main)
            _check_same(output_dir, recipe, load(output_dir / RECIPE_FILE), free_fields, tuple(inputs or {}))
            checkpoint, warnings = newest_whole(output_dir)
            say(*(f"WARNING     {warning}" for warning in warnings), sep="\n", end="\n" if warnings else "")
            say(f"resume      {checkpoint or 'no checkpoint is whole: starts from the beginning'}")
            return checkpoint
        if begun or any((output_dir / name).exists() for name in RESULTS):
            raise InputError(f"{output_dir} holds a run: go on with it by --resume, or choose another output_dir")
        if is_main:
            content = {name: read()._asdict() for name, read in (inputs or {}).items()}
            (output_dir / INPUTS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            aside = output_dir / f".{RECIPE_FILE}"
            aside.write_text(as_yaml(recipe), encoding="utf-8")
            rename(aside, output_dir / RECIPE_FILE)
    except OSError as error:
        raise InputError(f"output_dir={output_dir} cannot be written: {error}") from None
    return None


def _check_inputs(
    output_dir: Path, inputs: Mapping[str, Callable[[], Input]], say: Callable[..., None], *, is_main: bool
) -> None:
    """Raise `InputError` where the content of an input differs from that at the start of the run."""
    if not is_main or not inputs:
        return
    if (begun := _read_inputs(output_dir)) is None:
        say(
            f"note        {output_dir} has no checksums of {', '.join(inputs)} (it was begun by an earlier version): "
            "whether they are the same is not checked"
        )
        return
    for name, read in inputs.items():
        now, before = read(), begun[name]
        parts = {*now.sha256, *before.sha256}
        if differing := sorted(part for part in parts if now.sha256.get(part) != before.sha256.get(part)):
            moved = "" if now.path == before.path else f", and not {before.path}"
            raise InputError(
                f"{output_dir} was begun with another {name}: the content of {', '.join(differing)} differs "
                f"({name} is {now.path}{moved}); resume with the same, or choose another output_dir"
            )


def _read_inputs(output_dir: Path) -> dict[str, Input] | None:
    path = output_dir / INPUTS_FILE
    if not path.is_file():
        return None
    try:
        return {name: Input(**content) for name, content in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged ({error}): remove it to resume without comparing what the run began with"
        ) from None


def _check_same(
    output_dir: Path, recipe: Any, begun: Any, free_fields: tuple[str, ...], inputs: tuple[str, ...]
) -> None:
    """Raise `InputError` where a field differs from that at the start.

    `inputs` are compared as resolved paths, and not at all where their content is.
    """
    by_content = (output_dir / INPUTS_FILE).is_file()

    def is_same(name: str) -> bool:
        before, now = getattr(begun, name), getattr(recipe, name)
        return before == now or (name in inputs and (by_content or Path(before).resolve() == Path(now).resolve()))

    differing = [
        f"{field.name} was {getattr(begun, field.name)!r} and is {getattr(recipe, field.name)!r}"
        for field in dataclasses.fields(recipe)
        if field.name not in free_fields and not is_same(field.name)
    ]
    if differing:
        raise InputError(
            f"{output_dir} was begun by another recipe ({'; '.join(differing)}): "
            "resume with the same, or choose another output_dir"
        )

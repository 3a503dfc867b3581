"""Recipes in YAML: a frozen dataclass gives the keys, their types, the flags and their help.

A field is made by `setting`. Its type is bool, int, float, str, one of several words (`Literal`), a list of names
(`tuple[str, ...]`), or a list of mappings that are dataclasses of their own (`tuple[Source, ...]`).
"""

import argparse
import dataclasses
import difflib
import os
import re
import reprlib
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from .errors import InputError

R = TypeVar("R")


def setting(default: Any, text: str) -> Any:
    """A field with its default and its help."""
    return dataclasses.field(default=default, metadata={"help": text})


def check(recipe: Any, name: str, right: bool, allowed: str) -> None:
    """Raises `InputError` for the field `name` where it is not `right`."""
    if not right:
        raise InputError(f"{name}={reprlib.repr(getattr(recipe, name))} must be {allowed}")


def fields(cls: Any) -> dict[str, Any]:
    """The dataclass's fields by name."""
    return {item.name: item for item in dataclasses.fields(cls)}


def load(cls: type[R], path: str | Path, folder: Path, overrides: dict[str, Any] | None = None) -> R:
    """The recipe in a YAML file, or of that name in `folder`; `overrides` replace its keys.

    Paths in the file that begin with "./" are taken from the file's own folder.
    Raises `InputError` for what is missing, malformed or unknown.
    """
    file = _recipe_path(path, folder)
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except Exception as error:  # PyYAML lets KeyError, AttributeError and others through: `strict: !!bool x`
        raise InputError(f"{file} cannot be read as YAML ({error})") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}, not keys with values")
    return make(cls, {**_from_folder(content, file.parent), **(overrides or {})}, where=str(file))


# Key, list of mappings, mapping, list of names: deeper there are no paths, and aliases may multiply without end.
_DEEPEST = 4


def _from_folder(value: Any, folder: Path, depth: int = 0) -> Any:
    """`value` with the texts in it that begin with "./" as paths from `folder`."""
    if isinstance(value, dict | list) and depth < _DEEPEST:
        if isinstance(value, list):
            return [_from_folder(part, folder, depth + 1) for part in value]
        return {name: _from_folder(part, folder, depth + 1) for name, part in value.items()}
    return os.path.normpath(folder / value) if isinstance(value, str) and value.startswith("./") else value


def make(cls: type[R], content: dict[str, Any], *, where: str) -> R:
    """A recipe of keys and values as YAML or JSON gives them. Raises `InputError` naming `where`."""
    known, types = fields(cls), typing.get_type_hints(cls)
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"do you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise InputError(f"{where}: unknown key {name!r}; {hint}")
    try:
        return cls(**{name: _typed(name, types[name], value) for name, value in content.items()})
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a file, of which the last would count silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands here for the second time", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _recipe_path(path: str | Path, folder: Path) -> Path:
    for file in (Path(path), folder / f"{path}.yaml"):
        if os.path.isfile(file):  # Path.is_file raises where a name is too long
            return file
    names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    raise InputError(f"there is no recipe {path}: give a YAML file, or one of {names}")


def _typed(name: str, wanted: Any, value: Any) -> Any:
    """`value` as the type `wanted`, for YAML writes 3e-4 as a string and 3 where 3.0 is meant."""
    choices = _choices(wanted)
    if choices:
        if value not in choices:
            raise InputError(f"{name}={reprlib.repr(value)} must be one of {', '.join(choices)}")
        return value
    if wanted is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if (part := _part(wanted)) is not None:
        if isinstance(value, list | tuple) and all(isinstance(content, dict) for content in value):
            return tuple(make(part, content, where=f"{name}[{index}]") for index, content in enumerate(value))
        raise InputError(f"{name}={reprlib.repr(value)} must be a list of mappings with {', '.join(fields(part))}")
    if wanted == tuple[str, ...]:
        if isinstance(value, str):
            return _names(value)
        if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
            return tuple(value)
    elif isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "keys with values"}
    raise InputError(f"{name}={reprlib.repr(value)} must be {names.get(wanted, 'a list of names')}")


def _names(text: str) -> tuple[str, ...]:
    """The names in "a,b", and in "[a, b]" or "['a', 'b']" as python-fire takes them."""
    bracketed = re.fullmatch(r"\s*[\[(](.*)[\])]\s*", text, re.DOTALL)
    parts = (part.strip() for part in (bracketed[1] if bracketed else text).split(","))
    return tuple(part.strip("'\"") if bracketed else part for part in parts if part)


def _choices(wanted: Any) -> tuple[Any, ...]:
    return typing.get_args(wanted) if typing.get_origin(wanted) is Literal else ()


def _part(wanted: Any) -> Any:
    """The dataclass that `wanted` is a list of, if it is one."""
    part = next(iter(typing.get_args(wanted)), None)
    return part if typing.get_origin(wanted) is tuple and dataclasses.is_dataclass(part) else None


def add_flags(cls: Any, parser: argparse.ArgumentParser) -> None:
    """`--key value` for every field that is one value; what is not given is not in the namespace."""
    group = parser.add_argument_group("keys of the recipe, which a flag replaces")
    types = typing.get_type_hints(cls)
    for name, item in fields(cls).items():
        wanted = types[name]
        if wanted is dict or _part(wanted) is not None:
            continue
        choices = _choices(wanted) or None
        default = ",".join(item.default) if isinstance(item.default, tuple) else item.default
        group.add_argument(
            *dict.fromkeys([as_flag(name), f"--{name}"]),
            dest=name,
            type=flag_type(wanted),
            nargs="?" if wanted is bool else None,
            const=True if wanted is bool else None,
            choices=choices,
            default=argparse.SUPPRESS,
            metavar=None if choices else name.rpartition("_")[2].upper(),
            help=f"{item.metadata['help']} (default: {default if default != '' else 'none'})".replace("%", "%%"),
        )


def as_flag(name: str) -> str:
    """The flag of a key, as help and messages write it."""
    return f"--{name.replace('_', '-')}"


def flag_type(wanted: Any) -> Any:
    """What makes a key's value out of a flag's text."""
    if wanted == tuple[str, ...]:
        return _names
    return _boolean if wanted is bool else wanted if wanted in (int, float) else str


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def overrides(cls: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of the recipe that were given as flags."""
    known = fields(cls)
    return {name: value for name, value in vars(arguments).items() if name in known}


def as_yaml(recipe: Any) -> str:
    """Every key with its value, as a file that `load` reads."""
    return yaml.safe_dump(_plain(dataclasses.asdict(recipe)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value

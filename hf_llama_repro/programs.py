"""Other programs with LlamaRepro in them: a launcher for those that load no plug-ins, and what vLLM loads by itself.

    hf-llama-run transformers serve FOLDER
    hf-llama-run lm_eval --model hf --model_args pretrained=FOLDER --tasks TASK
    hf-llama-run trl sft --model_name_or_path FOLDER --dataset_name json ...

It runs a console script of this environment, which finds our classes where it looks for those of transformers, and so
do the Python processes that it starts.
"""

import argparse
import contextlib
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .command import Parser, add_version, run
from .errors import InputError
from .versions import TRANSFORMERS


@dataclass(frozen=True)
class Program:
    """What is known of a program: the versions that it was run with, and what brings it."""

    distribution: str
    versions: str
    """As pip takes it."""
    extra: str
    """Of hf-llama-repro."""


PROGRAMS = {
    "transformers": Program("transformers", TRANSFORMERS, "serve"),
    "lm_eval": Program("lm_eval", ">=0.4.13,<0.5", "eval"),
    "lm-eval": Program("lm_eval", ">=0.4.13,<0.5", "eval"),
    "trl": Program("trl", ">=1.14,<2", "train"),
}
# Its sitecustomize.py is imported by every Python that has it in its path.
STARTUP = Path(__file__).parent / "startup"
# What `transformers serve` imports only when it is asked to serve.
SERVING = ("fastapi", "uvicorn", "openai")
VLLM_VERSIONS = ">=0.32,<0.33"
VLLM_ARCHITECTURES = {
    "LlamaReproForCausalLM": "vllm.model_executor.models.transformers:TransformersForCausalLM",
}
"""Architecture, as a config.json names it -> vLLM's class that runs it."""


def remedy(extra: str) -> str:
    return f"pip install 'hf-llama-repro[{extra}]'"


def outside(found: str, versions: str) -> bool:
    """Whether a version lies outside of a range."""
    from packaging.specifiers import SpecifierSet

    return not SpecifierSet(versions).contains(found, prereleases=True)


def console_script(name: str) -> EntryPoint:
    """The console script of that name. Raises `InputError` where there is none, or none of a version that was tried."""
    found = list(entry_points(group="console_scripts", name=name))
    known = PROGRAMS.get(name)
    if not found:
        brings = remedy(known.extra) if known else f"install it into the environment of {sys.executable}"
        raise InputError(f"there is no program {name} in this environment: {brings}")
    if known and outside(version(known.distribution), known.versions):
        raise InputError(
            f"{known.distribution} {version(known.distribution)} is outside of {known.versions}, "
            f"with which LlamaRepro was tried: pip install '{known.distribution}{known.versions}'"
        )
    return found[0]


def check_serving(arguments: Sequence[str]) -> None:
    """Raises `InputError` where `transformers serve` would fail after it has loaded the model, or with a traceback."""
    if missing := [name for name in SERVING if find_spec(name) is None]:
        raise InputError(f"transformers serve needs {', '.join(missing)}: {remedy('serve')}")
    host, port = option(arguments, "--host", "localhost"), option(arguments, "--port", "8000")
    if not re.fullmatch(r"\d{1,5}", port):
        return  # transformers says so itself
    try:
        with socket.create_server((host, int(port))):
            pass
    except (OSError, OverflowError) as error:
        raise InputError(f"port {port} of {host} cannot be had ({error}): name another one by --port") from error


def option(arguments: Sequence[str], name: str, default: str) -> str:
    """The value of an option among a program's arguments, written with a space or an equals sign."""
    for position, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
        if argument == name and position + 1 < len(arguments):
            return arguments[position + 1]
    return default


def expose() -> None:
    """Makes our model classes attributes of `transformers`, where programs look for what a config.json names."""
    import hf_llama_repro

    names = [name for name in hf_llama_repro.__all__ if name.startswith("LlamaRepro")]
    classes = {name: getattr(hf_llama_repro, name) for name in names}
    # Loading models puts another module in transformers' place: which one it is, is known only now.
    for name, model_class in classes.items():
        setattr(sys.modules["transformers"], name, model_class)


@contextlib.contextmanager
def exposed_in_children() -> Iterator[None]:
    """Does what `expose` does in Python processes that are started meanwhile: `trl` trains in one of its own."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(STARTUP), *filter(None, [before])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def register_with_vllm() -> None:
    """What vLLM calls in each of its processes (entry point group `vllm.general_plugins`).

    Registering with the Auto classes, which importing the package does, is not enough: vLLM has a table of its own.
    """
    import logging

    from vllm import ModelRegistry

    found = installed_vllm()
    if found and outside(found, VLLM_VERSIONS):
        logging.getLogger(__name__).warning(
            "vLLM %s is outside of %s, with which LlamaRepro was tried: compare its answers, or %s",
            found,
            VLLM_VERSIONS,
            remedy("vllm"),
        )
    for architecture, backend in VLLM_ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, backend)


def installed_vllm() -> str | None:
    """The version of vLLM here, whichever distribution brought it, without what names its build."""
    import vllm

    found = re.match(r"\d+(\.\d+)*", getattr(vllm, "__version__", ""))
    return found[0] if found else None


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hf-llama-run",
        description="Run a program of this environment that knows LlamaRepro folders: "
        "hf-llama-run transformers serve FOLDER",
    )
    parser.add_argument("program", help="console script to run, such as transformers or lm_eval")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the program is given")
    add_version(parser)
    return parser


def main(argv: list[str] | None = None) -> Any:
    arguments = build_parser().parse_args(argv)
    found: list[Callable[[], Any]] = []

    def load() -> None:
        script = console_script(arguments.program)
        serves = arguments.program == "transformers" and arguments.arguments[:1] == ["serve"]
        if serves and "--help" not in arguments.arguments:
            check_serving(arguments.arguments)
        expose()
        found.append(script.load())

    if code := run(load, quietly=False):
        return code
    sys.argv = [arguments.program, *arguments.arguments]
    with exposed_in_children():
        return found[0]()


if __name__ == "__main__":
    sys.exit(main())

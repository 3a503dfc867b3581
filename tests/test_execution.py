"""Programs that a model wrote: what passes, what the limits end, and the score."""

import os
import sys
import time

import pytest

from hf_llama_repro.errors import InputError
from hf_llama_repro.evaluation.execution import pass_at_k, passes, score

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 2",
        "import math, collections\nassert math.sqrt(4) == 2",
        "print('x' * 100_000)",
        "def f():\n    return 1\n\nif __name__ == '__main__':\n    assert f() == 1",
    ],
)
def test_a_right_program_passes(program):
    assert passes(program)


@pytest.mark.parametrize(
    "program",
    {
        "wrong": "assert 1 + 1 == 3",
        "syntax": "def f(:",
        "indentation": "def f():\n    '''x'''\n   return 1",
        "leaves before its tests": "import sys\nsys.exit(0)\nassert False",
        "leaves at once": "import os\nos._exit(0)",
        "says that it passed": "print('passed')\nimport os\nos.write(1, b'passed')\nos._exit(0)",
        "reads": "input()",
        "recursion": "def f():\n    return f()\nf()",
    }.items(),
    ids=lambda item: item[0],
)
def test_a_wrong_program_does_not_pass(program):
    assert not passes(program[1])


@pytest.mark.parametrize(
    "program",
    ["while True: pass", "import time\ntime.sleep(60)", "x = []\nwhile True: x.append('x' * 10_000_000)"],
    ids=["computes", "sleeps", "memory"],
)
def test_limits_end_a_program(program):
    start = time.monotonic()
    assert not passes(program, seconds=2)
    assert time.monotonic() - start < 10


def test_what_a_program_starts_ends_with_it(tmp_path):
    pid = tmp_path / "pid"
    child = f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    # `time.sleep` until the child has written its number.
    program = (
        f"import os, subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"while not (os.path.exists({str(pid)!r}) and open({str(pid)!r}).read()):\n    time.sleep(0.01)"
    )
    assert passes(program)
    number = int(pid.read_text())
    for _ in range(100):
        if not _runs(number):
            break
        time.sleep(0.05)
    assert not _runs(number)


def _runs(number):
    """Whether a process is there and no zombie, which in a container may stay for lack of a parent that reaps it."""
    try:
        os.kill(number, 0)
        with open(f"/proc/{number}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_files_lie_in_a_folder_that_goes_away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert passes("open('left', 'w').write('x')")
    assert not passes("open('large', 'wb').write(b'x' * 10_000_000)")
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_the_callers_environment_is_seen(monkeypatch):
    monkeypatch.setenv("A_SECRET", "1")
    assert passes("import os\nassert 'A_SECRET' not in os.environ")


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    assert pass_at_k(1, 1, 1) == 1
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10)  # of 10 pairs 3 have none of the 2
    assert pass_at_k(200, 0, 100) == 0
    assert pass_at_k(100, 1, 100) == 1
    with pytest.raises(InputError, match="pass@100 needs at least 100 samples of each problem, there are 10"):
        pass_at_k(10, 3, 100)


def test_score_of_candidates():
    right, wrong = "def add(a, b):\n    return a + b\n", "def add(a, b):\n    return a - b\n"
    test = "def check(f):\n    assert f(2, 3) == 5\ncheck(add)"
    assert score([right, wrong, wrong, right], test, 1) == pytest.approx(0.5)
    assert score([right, wrong], test, 2) == 1

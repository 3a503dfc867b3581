"""Runs code that a model wrote: each program in a process of its own, with limits, and scored by pass@k.

The limits keep an accident from harming the machine; they are no wall against code that means harm. What must not be
harmed does not belong on the machine that runs this.
"""

import concurrent.futures
import contextlib
import importlib.util
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from typing import Any

from ..errors import InputError

SECONDS = 10
"""Of wall time for a program; half of it of the processor's."""
MEMORY_BYTES = 1 << 30
FILE_BYTES = 1 << 20
OPEN_FILES = 32

# Reads {"program", "token", limits} on stdin. It says the token when the program came to its end: an exit code of 0 is
# also that of a program that left before its tests. The output of the program itself goes nowhere.
_RUNNER = """
import ctypes, json, os, resource, sys
job = json.load(sys.stdin)
answer = os.dup(1)
nowhere = os.open(os.devnull, os.O_RDWR)
for number in (0, 1, 2):
    os.dup2(nowhere, number)
try:  # no network, where the kernel lets a user have a namespace: CLONE_NEWUSER | CLONE_NEWNET
    ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)
except (AttributeError, OSError):
    pass
for name, value in job["limits"].items():
    resource.setrlimit(getattr(resource, name), (value, value))
exec(compile(job["program"], "<program>", "exec"), {"__name__": "__main__"})
os.write(answer, job["token"].encode())
"""


def require_limits() -> None:
    """Raises `InputError` where the operating system has no limits for a process."""
    if importlib.util.find_spec("resource") is None:
        raise InputError(
            "code is executed under POSIX limits, which this system does not have: run it on Linux or macOS"
        )


def passes(program: str, *, seconds: float = SECONDS) -> bool:
    """Whether `program` runs to its end without an error, within the limits."""
    token = secrets.token_hex(16)
    limits = {
        "RLIMIT_CPU": max(1, math.ceil(seconds / 2)),
        "RLIMIT_AS": MEMORY_BYTES,
        "RLIMIT_FSIZE": FILE_BYTES,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_CORE": 0,
    }
    job = json.dumps({"program": program, "token": token, "limits": limits})
    with tempfile.TemporaryDirectory(prefix="hf-llama-eval-") as folder:
        # -I: nothing of the caller's environment, user or working folder is imported. A session of its own, so that
        # what the program starts ends with it.
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
            text=True,
        )
        try:
            output, _ = process.communicate(job, timeout=seconds)
        except (subprocess.TimeoutExpired, UnicodeDecodeError, BrokenPipeError):
            output = ""
        finally:
            _end(process)
    return output == token


def _end(process: subprocess.Popen) -> None:
    """Ends the program and whatever it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Probability that one of `k` samples passes, without bias: Chen et al., arXiv 2107.03374, section 2.1."""
    if num_samples < k:
        raise InputError(f"pass@{k} needs at least {k} samples of each problem, there are {num_samples}")
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def score(candidates: list[str], test: str, k: int) -> float:
    """pass@k of the candidates, complete programs but for `test`; as many at a time as there are processors."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = sum(pool.map(lambda candidate: passes(f"{candidate}\n{test}\n"), candidates))
    return pass_at_k(len(candidates), passed, k)


def human_eval(k: int, samples: int, dataset: dict[str, Any]) -> dict[str, Any]:
    """The HumanEval task for lm-evaluation-harness, whose own one executes code in its own process.

    `dataset`: what of `dataset_path`, `dataset_kwargs` and `test_split` differs from the published one.
    """

    def completed(answers: list[list[str]], problems: list[dict]) -> list[list[str]]:
        return [[problem["prompt"] + text for text in texts] for texts, problem in zip(answers, problems, strict=True)]

    def solved(references: list[str], predictions: list[list[str]]) -> dict[str, float]:
        return {f"pass@{k}": score(predictions[0], references[0], k)}

    return {
        "task": "humaneval",
        "dataset_path": "openai/openai_humaneval",
        "test_split": "test",
        **dataset,
        "output_type": "generate_until",
        "unsafe_code": True,
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{test}}\ncheck({{entry_point}})",
        "num_fewshot": 0,
        "repeats": samples,
        "generation_kwargs": {"until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], "max_gen_toks": 512},
        "filter_list": [{"name": "none", "filter": [{"function": "custom", "filter_fn": completed}]}],
        "metric_list": [{"metric": solved, "aggregation": "mean", "higher_is_better": True}],
    }

"""llama.cpp and litgpt, timed for `inference.py`, in an environment of their own: JSON lines in, JSON lines out.

    PEERS_PYTHON benchmarks/peers.py MODEL.gguf

llama.cpp gets the same weights in F32, BF16 and Q8_0, written beside the given file; litgpt a random model of the same
shape (its time does not depend on the values). Both use 2 threads, or as many as there are cores if fewer.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = min(2, os.cpu_count() or 1)
FILE_TYPES = {"F32": 0, "BF16": 32, "Q8_0": 7}  # enum llama_ftype
CONTEXT = 2048

Run = Callable[[int, int], None]
"""Reads a prompt of so many tokens, and decodes so many."""


def llama_cpp(gguf: Path, kind: str) -> Run:
    import llama_cpp as cpp

    file = gguf.with_name(f"{gguf.stem.split('.')[0]}.{kind}.bench.gguf")
    if not file.is_file():
        settings = cpp.llama_model_quantize_default_params()
        settings.ftype, settings.allow_requantize = FILE_TYPES[kind], True
        if cpp.llama_model_quantize(str(gguf).encode(), str(file).encode(), ctypes.byref(settings)):
            raise RuntimeError(f"llama.cpp could not write {file}")
    model = cpp.Llama(str(file), n_ctx=CONTEXT, n_batch=512, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)

    def run(prompt: int, new: int) -> None:
        model.reset()
        model.eval(list(range(100, 100 + prompt)))
        for number in range(new - 1):
            model.eval([200 + number])

    return run


def litgpt_model(gguf: Path, kind: str) -> Run:
    import litgpt
    import torch

    torch.set_num_threads(THREADS)
    model = litgpt.GPT(litgpt.Config.from_name("SmolLM2-135M")).to(torch.bfloat16).eval()
    model.set_kv_cache(batch_size=1, max_seq_length=CONTEXT, dtype=torch.bfloat16)

    @torch.no_grad()
    def run(prompt: int, new: int) -> None:
        token = model(torch.arange(100, 100 + prompt)[None], torch.arange(prompt))[:, -1:].argmax(-1)
        for place in range(prompt, prompt + new - 1):
            token = model(token, torch.tensor([place]))[:, -1:].argmax(-1)

    return run


MAKE: dict[str, tuple[Callable[[Path, str], Run], str]] = {
    **{f"llama.cpp {kind}": (llama_cpp, kind) for kind in FILE_TYPES},
    "litgpt bf16": (litgpt_model, "bf16"),
}


def main() -> None:
    gguf, answers = Path(sys.argv[1]), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    runs: dict[str, Run] = {}
    missing: dict[str, str] = {}
    for name, (make, kind) in MAKE.items():
        try:
            runs[name] = make(gguf, kind)
            runs[name](8, 2)
        except Exception as error:  # whatever a peer fails with is its column's text
            missing[name] = f"{type(error).__name__}: {error}"
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        answer: dict[str, Any] = {"missing": missing}
        if order["work"] == "run":
            start = time.perf_counter()
            runs[order["name"]](order["prompt"], order["new"])
            answer = {"seconds": time.perf_counter() - start}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

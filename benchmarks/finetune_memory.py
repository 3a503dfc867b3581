"""What finetune/plan.py says beside the memory of real training steps: resident on a CPU, allocated on a CUDA device.

    python benchmarks/finetune_memory.py                    # on the device there is
    python benchmarks/finetune_memory.py --base FOLDER      # a converted model in place of SmolLM2-135M's shape

Each setting runs in a process of its own: two training steps on a random model of SmolLM2-135M's shape (memory does not
depend on the weights). Measured: the peak less what was there before the model was loaded. The plan is for the device.
On a CPU glibc is told to give freed memory back at once; oneDNN's scratch is in the measurement and not in the plan.
There the blocks of logits are smaller, and int8 is bitsandbytes' way for CPUs (the weights are dequantized to the
compute dtype for each product; on CUDA the inputs are quantized, and int32 results are in between). nf4 is measured on
CUDA only: on a CPU a step takes many minutes.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA, bf16, 4 x 512": {"micro_batch_size": 4, "max_length": 512},
    "LoRA, bf16, 8 x 512, checkpointing": {
        "micro_batch_size": 8,
        "max_length": 512,
        "gradient_checkpointing": True,
    },
    "LoRA, int8, 4 x 256": {"micro_batch_size": 4, "max_length": 256, "quantization": "int8"},
    "LoRA, int8, 4 x 512, checkpointing": {
        "micro_batch_size": 4,
        "max_length": 512,
        "quantization": "int8",
        "gradient_checkpointing": True,
    },
    "full, fp32, 2 x 256": {"method": "full", "dtype": "float32", "micro_batch_size": 2, "max_length": 256},
    "full, bf16 autocast, 4 x 256, checkpointing": {
        "method": "full",
        "micro_batch_size": 4,
        "max_length": 256,
        "gradient_checkpointing": True,
    },
}
ON_CUDA: dict[str, dict[str, Any]] = {
    "LoRA, nf4, 4 x 512, checkpointing": {**SETTINGS["LoRA, int8, 4 x 512, checkpointing"], "quantization": "nf4"},
    "LoRA, nf4, 4 x 512": {"micro_batch_size": 4, "max_length": 512, "quantization": "nf4"},
}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident(name: str) -> int:
    """Bytes of VmRSS, or of VmHWM, the most there was since the last reset."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def meter(device: str) -> tuple[Callable[[], int], Callable[[], int]]:
    """Functions: begins a measurement and gives the bytes in use now; gives the most since then."""
    import torch

    def begin() -> int:
        gc.collect()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM
        return resident("VmRSS")

    return begin, lambda: torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def measure(name: str, folder: Path, device: Any) -> dict[str, int]:
    """Plan and measurement of one setting."""
    import torch

    from finetune.memory import StorageRecord, train
    from finetune.model import Compute, load_model, read_config
    from finetune.plan import plan
    from finetune.recipe import Recipe
    from hf_llama_repro.quiet import quiet

    quiet()
    settings = {**SETTINGS, **ON_CUDA}[name]
    recipe = Recipe(base_model=str(folder), **{"dtype": "bfloat16", **settings})
    planned = plan(recipe, read_config(folder), records=None, device=device).peak
    dtype = getattr(torch, recipe.dtype)
    warm_up = torch.nn.Linear(256, 256, dtype=dtype, device=device)
    warm_up(torch.zeros(256, 256, dtype=dtype, device=device)).sum().backward()  # threads, oneDNN, cuBLAS
    del warm_up
    begin, most = meter(device)
    before = begin()
    model = load_model(recipe, Compute(torch.device(device), dtype, "the benchmark's")).train()
    # A weight that is a view of the file keeps all of the file's pages resident, those of quantized layers as well.
    for parameter in model.parameters() if device == "cpu" else ():
        if parameter.dtype.is_floating_point:
            parameter.data = parameter.data.clone()
    loaded = most() - before
    begin()
    # The record is not entered: it is only what `train` writes its phases to.
    train(model, recipe, StorageRecord(device), device=device, accumulates=True)
    return {"planned": planned, "measured": most() - before, "loading": loaded}


def write_model(folder: Path) -> None:
    import torch

    from hf_llama_repro import LlamaReproConfig, LlamaReproForCausalLM

    LlamaReproForCausalLM._from_config(LlamaReproConfig(**SHAPE), dtype=torch.bfloat16).save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="a converted model (full fine-tuning is left out)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well, in bytes")
    parser.add_argument("--one", choices=[*SETTINGS, *ON_CUDA], help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.base, arguments.device)))
        return 0
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [*SETTINGS, *(ON_CUDA if device == "cuda" else ())]
    if arguments.base:
        names = [name for name in names if name.startswith("LoRA")]
    figures = {}
    print(f"on {torch.cuda.get_device_name() if device == 'cuda' else 'a CPU'}", end="\n\n")
    print("| setting | planned, GB | measured, GB | measured / planned |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.base or Path(made)
        if not arguments.base:
            write_model(folder)
        for name in names:
            command = [sys.executable, __file__, "--one", name, "--base", str(folder), "--device", device]
            run = subprocess.run(
                command, env={**os.environ, **GIVE_BACK}, stdout=subprocess.PIPE, text=True, check=True
            )
            figures[name] = found = json.loads(run.stdout.splitlines()[-1])
            planned, measured = found["planned"], found["measured"]
            print(f"| {name} | {planned / 1e9:.2f} | {measured / 1e9:.2f} | {measured / planned:.3f} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    return 0 if all(abs(item["measured"] / item["planned"] - 1) <= 0.15 for item in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

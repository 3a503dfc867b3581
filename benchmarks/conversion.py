"""Conversion of random Meta checkpoints of growing size: time beside `cp`, peak memory, verification.

    python benchmarks/conversion.py --folder DISK                # LLaMA 7B with 2, 8 and 32 layers, 13B cut to 20
    python benchmarks/conversion.py --layers 2 8 --no-13b        # without the largest

Each run is a process of its own; before each the files of the source leave the page cache. Printed: seconds, the ratio
to `cp -r` of the same folder to the same disk, peak resident memory. A picture goes to docs/conversion.png.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SHARD = "1GB"
LIMITS = {"convert": 2e9, "verify": 4e9}
ROUNDS = 3
LARGEST = "7B, 32 layers"
"""The model that is also loaded."""


def write_random_meta(folder: Path, *, layers: int, dim: int, heads: int, shards: int) -> None:
    """Meta's layout in bf16, written as it streams; one block of random values, from another place each time."""
    import torch

    from conversion.keys import expand, sizes
    from conversion.params import ffn_size
    from conversion.pth_file import PthWriter
    from hf_llama_repro import LlamaReproConfig

    params = {"dim": dim, "multiple_of": 256, "n_heads": heads, "n_layers": layers, "norm_eps": 1e-5, "vocab_size": -1}
    config = LlamaReproConfig(
        hidden_size=dim,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        intermediate_size=ffn_size(dim, 256),
        vocab_size=32000,
    )
    named, noise = sizes(config), torch.randn(200_000_003, generator=torch.Generator().manual_seed(0))
    noise = (noise * dim**-0.5).bfloat16()
    folder.mkdir(parents=True)
    for rank in range(shards):
        layout = {}
        for row, meta, _ in expand(config):
            shape = tuple(named[size] // (shards if axis == row.cut else 1) for axis, size in enumerate(row.shape))
            layout[meta] = (shape, torch.bfloat16)
        with PthWriter(folder / f"consolidated.{rank:02d}.pth", layout) as writer:
            for number, (name, (shape, _)) in enumerate(layout.items()):
                count = torch.Size(shape).numel()
                norm = len(shape) == 1  # every shard has the same
                start = (number * shards + (0 if norm else rank)) * 1_000_003 % (len(noise) - count)
                values = noise[start : start + count].view(shape)
                writer.add(name, 1 + values if norm else values)
            writer.finish()
    (folder / "params.json").write_text(json.dumps(params))


def write_apart(folder: Path, **shape: int) -> None:
    """`write_random_meta` in a process of its own: the peak of a child begins at the size of its parent."""
    writer = multiprocessing.get_context("spawn").Process(target=write_random_meta, args=(folder,), kwargs=shape)
    writer.start()
    writer.join()
    assert writer.exitcode == 0, "the model could not be written"


def evict(folder: Path) -> None:
    """The files leave the page cache, where the system allows it."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list[str], source: Path) -> tuple[float, int, int]:
    """Seconds, peak resident bytes, and exit code of a command that reads `source`."""
    evict(source)
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return time.perf_counter() - start, usage.ru_maxrss * 1024, process.returncode


# Loads a folder as a user does, and touches every page of its weights, as the first forward pass does.
LOAD = """
import contextlib, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
import hf_llama_repro
from hf_llama_repro.mapped_pages import mapped_pages_released

folder, how = sys.argv[1:]
int8 = dict(quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map={"": "cpu"})
with mapped_pages_released(Path(folder)) if how == "int8" else contextlib.nullcontext():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **(int8 if how == "int8" else {}))
for weights in [*model.parameters(), *model.buffers()]:
    weights.flatten()[::1024].sum()
"""
LOADS = ("bf16", "int8")


def measure(source: Path, *, rounds: int, loads: tuple[str, ...] = ()) -> dict[str, Any]:
    """Medians of `cp` and of the conversion, which take turns, one verification, and one loading of each kind."""
    copied, ours = source.with_name("copy"), source.with_name("ours")
    convert = [sys.executable, "-m", "conversion.convert", str(source), str(ours), "--no-tokenizer"]
    convert += ["--max-shard-size", SHARD]
    seconds: dict[str, list[float]] = {"cp": [], "convert": []}
    peak = 0
    for _ in range(rounds):
        for target in (copied, ours):
            shutil.rmtree(target, ignore_errors=True)
        seconds["cp"].append(timed(["cp", "-r", str(source), str(copied)], source)[0])
        shutil.rmtree(copied)
        took, memory, code = timed(convert, source)
        assert code == 0, "the conversion failed"
        seconds["convert"].append(took)
        peak = max(peak, memory)
    took, memory, code = timed([sys.executable, "-m", "conversion.verify", str(source), str(ours)], source)
    loaded = {how: timed([sys.executable, "-c", LOAD, str(ours), how], ours) for how in loads}
    shutil.rmtree(ours)
    return {
        "loads": {
            how: {"seconds": seconds, "peak": peak, "code": code} for how, (seconds, peak, code) in loaded.items()
        },
        "bytes": sum(path.stat().st_size for path in source.iterdir()),
        "cp": sorted(seconds["cp"])[rounds // 2],
        "convert": sorted(seconds["convert"])[rounds // 2],
        "peak": peak,
        "verify": took,
        "verify_peak": memory,
        "verified": code == 0,
    }


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, duration) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    size = [result["bytes"] / 1e9 for result in results.values()]
    memory.plot(size, size, "--", color="grey", label="size of the model")
    for axes, key, label, scale in (
        (memory, "peak", "convert", 1e9),
        (memory, "verify_peak", "verify", 1e9),
        (duration, "cp", "cp", 1),
        (duration, "convert", "convert", 1),
    ):
        axes.plot(size, [result[key] / scale for result in results.values()], "o-", label=label)
    memory.set(xlabel="model, GB", ylabel="peak resident memory, GB", ylim=(0, 6))
    duration.set(xlabel="model, GB", ylabel="seconds", ylim=(0, None))
    for axes in (memory, duration):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "demo-output" / "conversion", help="with 45 GB free")
    parser.add_argument("--layers", type=int, nargs="*", default=[2, 8, 32], help="of LLaMA 7B's shape")
    parser.add_argument("--no-13b", dest="with_13b", action="store_false", help="without 20 layers of 13B in 2 shards")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    arguments = parser.parse_args()
    from benchmarks.model import machine

    models = {
        f"7B, {layers} layers": {"layers": layers, "dim": 4096, "heads": 32, "shards": 1} for layers in arguments.layers
    }
    if arguments.with_13b:
        models["13B, 20 layers, 2 shards"] = {"layers": 20, "dim": 5120, "heads": 40, "shards": 2}
    print(machine(), end="\n\n")
    print("| | GB | cp, s | convert, s | ratio | peak, GB | verify, s | peak, GB | |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    results: dict[str, dict[str, Any]] = {}
    for name, shape in models.items():
        source = arguments.folder / "meta"
        shutil.rmtree(arguments.folder, ignore_errors=True)
        write_apart(source, **shape)
        result = results[name] = measure(source, rounds=arguments.rounds, loads=LOADS if name == LARGEST else ())
        print(
            f"| {name} | {result['bytes'] / 1e9:.2f} | {result['cp']:.1f} | {result['convert']:.1f} | "
            f"{result['convert'] / result['cp']:.2f} | {result['peak'] / 1e9:.2f} | {result['verify']:.0f} | "
            f"{result['verify_peak'] / 1e9:.2f} | {'equal' if result['verified'] else 'DIFFERENT'} |",
            flush=True,
        )
    for how, load in results.get(LARGEST, {"loads": {}})["loads"].items():
        size, seconds, peak = results[LARGEST]["bytes"], load["seconds"], load["peak"]
        print(f"loading {LARGEST}, {how}: {seconds:.0f} s, {peak / 1e9:.2f} GB, {peak / size:.2f} times the file")
    shutil.rmtree(arguments.folder)
    if len(arguments.layers) > 1:
        of_7b = {name: result for name, result in results.items() if name.startswith("7B")}
        draw(of_7b, ROOT / "docs" / "conversion.png")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "runs": results}, indent=2))
    for name, result in results.items():
        for what, key in (("convert", "peak"), ("verify", "verify_peak")):
            if result[key] > LIMITS[what]:
                print(f"{what} of {name} took more than {LIMITS[what] / 1e9:.0f} GB")
                return 1
    return 0 if all(result["verified"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

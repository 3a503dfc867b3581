"""LLaMA 7B's shape, 13.5 GB, random: memory, both ways, other shards, kills, planted faults. `make test-long`.

Needs 55 GB of disk under the folder of temporary files.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
import torch

from benchmarks.conversion import timed, write_apart
from conversion.keys import to_half_split, to_interleaved
from conversion.manifest import MANIFEST
from hf_llama_repro.mapped_pages import release_mapped_pages

ROOT = Path(__file__).parent.parent
LAYERS = int(os.environ.get("LAYERS", "32"))
HEADS = 32
KILLS = LAYERS // 4
MEMORY = {"conversion.convert": 2e9, "conversion.export": 2e9, "conversion.verify": 4e9}
"""Peak resident bytes that each command may take."""

pytestmark = pytest.mark.slow


def run(module: str, source: Path, *arguments: object) -> int:
    """Exit code of one of our commands, which must keep within its memory."""
    command = [sys.executable, "-m", module, str(source), *map(str, arguments)]
    _, peak, code = timed(command, source)
    assert peak < MEMORY[module], f"{command}: {peak / 1e9:.2f} GB"
    return code


@pytest.fixture(scope="module")
def meta(tmp_path_factory, llama_tokenizer_model) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("7B")
    write_apart(folder / "meta", layers=LAYERS, dim=4096, heads=HEADS, shards=1)
    shutil.copyfile(llama_tokenizer_model, folder / "meta/tokenizer.model")
    yield folder / "meta"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def ours(meta) -> Path:
    assert run("conversion.convert", meta, meta.with_name("ours"), "--max-shard-size", "1GB") == 0
    return meta.with_name("ours")


@pytest.fixture
def again(meta) -> Iterator[Path]:
    """A folder to make on the way."""
    folder = meta.with_name("again")
    yield folder
    for path in meta.parent.glob("*again*"):
        shutil.rmtree(path)


def sums(folder: Path) -> dict[str, str]:
    """sha256 of every file of weights, as the manifest has them."""
    files = json.loads((folder / MANIFEST).read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith((".safetensors", ".pth"))}


def assert_same_pth(one: Path, other: Path) -> None:
    first, second = (torch.load(path, weights_only=True, mmap=True) for path in (one, other))
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor.view(torch.int16), second[name].view(torch.int16)), name
        release_mapped_pages([one, other])  # the peak of the next command begins at the size of this process


def test_the_right_conversion_passes_in_4_gb(meta, ours, tmp_path):
    assert run("conversion.verify", meta, ours, "--json", tmp_path / "figures.json") == 0
    figures = {check["name"]: check for check in json.loads((tmp_path / "figures.json").read_text())}
    assert all(check["outcome"] == "ok" for check in figures.values())
    assert len(figures["computation"]["figures"]["hidden_relative"]) == 1 + LAYERS


def test_meta_to_ours_and_back(meta, ours, again):
    assert run("conversion.export", ours, again) == 0
    assert_same_pth(meta / "consolidated.00.pth", again / "consolidated.00.pth")
    assert (
        json.loads((again / "params.json").read_text()).items()
        <= {
            **json.loads((meta / "params.json").read_text()),
            "vocab_size": -1,
        }.items()
    )
    assert (again / "tokenizer.model").read_bytes() == (meta / "tokenizer.model").read_bytes()


def test_one_shard_to_eight_and_back(meta, again):
    assert run("conversion.export", meta, again, "--shards", 8) == 0
    assert len(list(again.glob("consolidated.*.pth"))) == 8
    assert run("conversion.export", again, again.with_name("once again")) == 0
    assert_same_pth(meta / "consolidated.00.pth", again.with_name("once again") / "consolidated.00.pth")


def test_ours_to_stock_llama_and_back(ours, again):
    assert run("conversion.convert", ours, again, "--as", "llama", "--max-shard-size", "5GB") == 0
    assert sums(again).keys() != sums(ours).keys()
    back = again.with_name("once again")
    assert run("conversion.convert", again, back, "--max-shard-size", "1GB") == 0
    assert sums(back) == sums(ours)


def num_finished(folder: Path) -> int:
    """Files that an interrupted conversion to `folder` has finished."""
    noted = folder.with_name(f".{folder.name}.partial") / MANIFEST
    return len(json.loads(noted.read_text())["unfinished"]["finished"]) if noted.exists() else 0


def test_killed_and_gone_on_with(meta, ours, again):
    command = [sys.executable, "-m", "conversion.convert", str(meta), str(again), "--max-shard-size", "1GB"]
    chance, before = random.Random(3), 0
    for _ in range(KILLS):
        process = subprocess.Popen([*command, *(["--resume"] if before else [])], cwd=ROOT)
        while num_finished(again) == before:
            assert process.poll() is None, "it ended, or lost what was finished"
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not again.exists()
        assert num_finished(again) > before
        before = num_finished(again)
    assert run("conversion.convert", meta, again, "--max-shard-size", "1GB", "--resume") == 0
    assert sums(again) == sums(ours)
    assert run("conversion.verify", meta, again, "--layers", 1) == 0


@contextmanager
def opened(folder: Path, *names: str) -> Iterator[list[torch.Tensor]]:
    """Tensors of a converted folder as they lie in its files, to be written to; afterwards they are as before."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = []
    for name in names:
        path = folder / index[name]
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(length))[name]
        start, end = entry["data_offsets"]
        values = numpy.memmap(path, numpy.uint8, "r+", offset=8 + length + start, shape=(end - start,))
        tensors.append(torch.from_numpy(values).view(torch.bfloat16).view(entry["shape"]))
    before = [tensor.clone() for tensor in tensors]
    try:
        yield tensors
    finally:
        for tensor, content in zip(tensors, before, strict=True):
            tensor.copy_(content)


def swap(one: torch.Tensor, other: torch.Tensor) -> None:
    content = one.clone()
    one.copy_(other)
    other.copy_(content)


def flip(matrix: torch.Tensor) -> None:
    matrix.view(torch.int16)[77, 1234] ^= 1


LAYER = "model.layers.1."
# What is done to which tensors, and where the computation parts from the source's ("" where that is nowhere).
FAULTS = {
    "no permutation": (lambda q: q.copy_(to_interleaved(q, HEADS)), ["self_attn.q_proj"], "layer 1"),
    "another number of heads": (
        lambda k: k.copy_(to_half_split(to_interleaved(k, HEADS), HEADS // 2)),
        ["self_attn.k_proj"],
        "layer 1",
    ),
    "swapped norms": (swap, ["input_layernorm", "post_attention_layernorm"], "layer 1"),
    "swapped gate and up": (swap, ["mlp.gate_proj", "mlp.up_proj"], "layer 1"),
    "a flipped bit": (flip, ["mlp.down_proj"], ""),
    "a shifted vocabulary": (lambda e: e.copy_(e.roll(1, dims=0)), ["model.embed_tokens"], "the embedding"),
}


def verified(meta: Path, ours: Path) -> str:
    """What is printed of a folder that must not pass."""
    command = [sys.executable, "-m", "conversion.verify", str(meta), str(ours), "--layers", "2", "--tokens", "64"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    return result.stdout


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_weights_is_named(meta, ours, fault):
    spoil, parts, parts_at = FAULTS[fault]
    names = [f"{part}.weight" if part.startswith("model.") else f"{LAYER}{part}.weight" for part in parts]
    with opened(ours, *names) as tensors:
        spoil(*tensors)
        printed = verified(meta, ours)
    assert re.search(rf"FAILED +weights +{len(names)} of \d+ tensors differ", printed), printed
    assert all(name in printed for name in names)
    assert (
        f"FAILED       computation    parts at {parts_at}" in printed
        if parts_at
        else "ok           computation" in printed
    )


@pytest.mark.parametrize(
    ("name", "value", "parts_at"), [("rope_theta", 500000.0, "layer 0"), ("rms_norm_eps", 1e-3, "")]
)
def test_a_fault_of_the_configuration_is_named(meta, ours, name, value, parts_at):
    path = ours / "config.json"
    before = path.read_text()
    config = json.loads(before)
    if name == "rope_theta":
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": value}
    config[name] = value
    path.write_text(json.dumps(config))
    try:
        printed = verified(meta, ours)
    finally:
        path.write_text(before)
    assert re.search(rf"FAILED +configuration +{name} is {value}, not ", printed), printed
    assert "parts at layer 0" in printed

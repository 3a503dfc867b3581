"""Conversion tensor by tensor: the files, their sums, what a kill leaves, and how it is gone on with."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from meta_checkpoints import (
    METAS,
    fingerprint,
    meta_folder,
    meta_params,
    meta_weights,
    write_meta,
    write_sentencepiece,
)
from safetensors import safe_open
from safetensors.torch import load_file

from conversion import convert as command
from conversion import safetensors_file
from conversion import sums as sums_module
from conversion import target as target_module
from conversion.convert import convert
from conversion.export import export
from conversion.keys import expand, our_shapes, sizes
from conversion.manifest import MANIFEST
from conversion.pth_file import PthWriter
from conversion.safetensors_file import SafetensorsWriter
from conversion.source import open_source
from hf_llama_repro import LlamaReproConfig
from hf_llama_repro.errors import CheckpointError

ROOT = Path(__file__).parent.parent
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
SHARD = "60KB"


@pytest.fixture
def meta(tmp_path):
    tokenizer = write_sentencepiece(tmp_path / "tokenizer.model")
    return write_meta(tmp_path / "meta", meta_params(), meta_weights(meta_params()), shards=2, tokenizer=tokenizer)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sums(folder: Path) -> dict[str, dict]:
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.name != MANIFEST
    }


# The files.


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Odd sizes, an empty one, one that is a view with other strides."""
    torch.manual_seed(0)
    return {
        "b": torch.randn(7, 3).to(dtype),
        "a": torch.randn(5).to(dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
        "transposed": torch.randn(6, 11).to(dtype).T,
    }


def layout(content: dict[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in content.items()}


@DTYPES
def test_safetensors_reads_what_is_written(tmp_path, dtype):
    content, path = tensors(dtype), tmp_path / "file.safetensors"
    with SafetensorsWriter(path, layout(content)) as writer:
        for name, tensor in content.items():
            writer.add(name, tensor)
        sha256 = writer.finish()
    read = load_file(path)
    assert all(torch.equal(read[name], tensor) for name, tensor in content.items())
    assert read.keys() == content.keys()
    assert (sha256, writer.num_bytes) == (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)


@DTYPES
@pytest.mark.parametrize("mmap", [True, False])
def test_torch_load_reads_what_is_written(tmp_path, dtype, mmap):
    content, path = tensors(dtype), tmp_path / "consolidated.00.pth"
    with PthWriter(path, layout(content)) as writer:
        for name, tensor in content.items():
            writer.add(name, tensor)
        writer.finish()
    read = torch.load(path, weights_only=True, mmap=mmap)
    assert list(read) == list(content)
    for name, tensor in content.items():
        assert torch.equal(read[name], tensor)
        assert read[name].is_contiguous()
        assert read[name].data_ptr() % 64 == 0 or not mmap
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    torch.save(content, tmp_path / "torch.pth")
    with zipfile.ZipFile(tmp_path / "torch.pth") as theirs, zipfile.ZipFile(path) as ours:
        names = [{entry.partition("/")[2] for entry in archive.namelist()} for archive in (ours, theirs)]
        assert names[0] == names[1] - {".data/serialization_id"}


@pytest.mark.parametrize("writer", [SafetensorsWriter, PthWriter])
def test_another_tensor_than_the_layout_says_is_a_fault(tmp_path, writer):
    with writer(tmp_path / "file", {"a": ((2, 3), torch.float32)}) as opened, pytest.raises(AssertionError):
        opened.add("a", torch.zeros(3, 2))
    with writer(tmp_path / "file", {"a": ((2, 3), torch.float32)}) as opened, pytest.raises(AssertionError):
        opened.finish()


# Sums.


def test_the_manifest_has_the_sums_of_every_file(meta, tmp_path):
    convert(meta, tmp_path / "ours", max_shard_size=SHARD)
    manifest = json.loads((tmp_path / "ours" / MANIFEST).read_text())
    assert manifest["files"] == sums(tmp_path / "ours")
    assert len([name for name in manifest["files"] if name.endswith(".safetensors")]) > 3
    assert manifest["source"] == sums(meta)
    assert "tokenizer.model" in manifest["source"]


def test_export_has_a_manifest_as_well(meta, tmp_path):
    export(meta, tmp_path / "meta again", shards=1)
    manifest = json.loads((tmp_path / "meta again" / MANIFEST).read_text())
    assert manifest["files"] == sums(tmp_path / "meta again")
    assert {"params.json", "consolidated.00.pth", "consolidated.01.pth"} <= manifest["source"].keys()


@pytest.mark.parametrize("function", [convert, export])
@pytest.mark.parametrize("name", ["params.json", "consolidated.01.pth"])
def test_a_file_that_the_checklist_knows_otherwise_is_named(meta, tmp_path, function, name):
    lines = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in meta.iterdir()}
    write = lambda: (meta / "checklist.chk").write_text("".join(f"{md5}  {file}\n" for file, md5 in lines.items()))  # noqa: E731
    write()
    function(meta, tmp_path / "good")
    lines[name] = "0" * 32
    write()
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(name)} has the md5 [0-9a-f]{{32}}, but checklist\.chk says 0{{32}}"
    ):
        function(meta, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    assert not list(tmp_path.glob(".*"))


def test_sums_wait_for_the_weights(tmp_path, monkeypatch):
    # Files beyond memory would otherwise be read from the disk twice.
    monkeypatch.setattr(sums_module, "BLOCK", 1 << 12)
    monkeypatch.setattr(sums_module, "_AHEAD", 1 << 13)
    paths = [tmp_path / name for name in ("a", "b", "empty")]
    for path, num_bytes in zip(paths, (1 << 16, 1 << 15, 0), strict=True):
        path.write_bytes(os.urandom(num_bytes))
    with sums_module.summed(dict.fromkeys(paths)) as taken:
        for share in (0, 0.25, 0.5):
            taken.advance(share)
            allowed = share * (3 << 15) + (1 << 13)
            wait_until(lambda allowed=allowed: taken.position >= allowed)
            time.sleep(0.05)
            assert allowed <= taken.position < allowed + (1 << 12)
            large, small, _ = taken._files
            assert abs(large.position - 2 * small.position) <= 2 << 12, "not side by side"
        found = taken.result()
    assert found == sums(tmp_path)


def test_a_small_file_with_a_wrong_md5_is_found_before_the_weights_are_read(meta, tmp_path, monkeypatch):
    monkeypatch.setattr(sums_module, "BLOCK", 1 << 12)
    monkeypatch.setattr(sums_module, "_AHEAD", 1 << 12)
    (meta / "checklist.chk").write_text(f"{'0' * 32}  params.json\n")
    with (
        sums_module.summed(open_source(meta).files) as taken,
        pytest.raises(CheckpointError, match=r"params\.json has the md5"),
    ):
        wait_until(lambda: taken.advance(0))
    assert taken.position < sum(path.stat().st_size for path in meta.glob("*.pth")) / 2


def wait_until(reached: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def test_a_file_that_the_checklist_names_must_be_there(meta, tmp_path):
    (meta / "checklist.chk").write_text(f"{'0' * 32}  consolidated.02.pth\n")
    with pytest.raises(CheckpointError, match=r"names consolidated\.02\.pth, which is not there"):
        convert(meta, tmp_path / "ours")


# Kill and resume.

# Converts in children that are killed at random moments; prints a JSON line for each.
KILLED = """
import json, os, random, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, "tests")
import torch
from tqdm import tqdm
from conversion.convert import convert

torch.set_num_threads(1)
tqdm.set_lock(threading.RLock())  # its own is shared with the children, and a killed one may hold it
meta, folder, times, shard = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

def child(target, resume):
    pid = os.fork()
    if pid == 0:
        try:
            convert(meta, target, max_shard_size=shard, resume=resume)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid

convert(meta, folder / "warm/ours", max_shard_size=shard)  # imports, which the children need not repeat
def timed(target):
    start = time.perf_counter()
    assert os.waitpid(child(target, None), 0)[1] == 0
    return time.perf_counter() - start

# The shortest of three: on a busy machine most moments of a long one would be after the end of the others.
duration = min(timed(folder / name / "ours") for name in ("first", "second", "whole"))
whole = contents(folder / "whole/ours")
chance = random.Random(5)
for number in range(times):
    target = folder / str(number) / "ours"
    pid = child(target, None)
    time.sleep(chance.uniform(0, duration))
    os.kill(pid, signal.SIGKILL)
    killed = os.waitpid(pid, 0)[1] == signal.SIGKILL
    manifest = target.parent / ".ours.partial/manifest.json"
    noted = json.loads(manifest.read_text()) if manifest.exists() else {}
    result = {"killed": killed, "finished": len(noted.get("unfinished", {"finished": {}})["finished"])}
    result |= {"exists": target.exists()}
    result["whole"] = target.exists() and contents(target) == whole
    if not target.exists():
        result["resumed"] = os.waitpid(child(target, True), 0)[1] == 0 and contents(target) == whole
    result["left"] = [path.name for path in target.parent.iterdir() if path.name.startswith(".")]
    print(json.dumps(result), flush=True)
"""


def test_killed_at_25_moments_and_gone_on_with(meta, tmp_path):
    (tmp_path / "out").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(meta), str(tmp_path / "out"), "25", SHARD],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    runs = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(runs) == 25
    for run in runs:
        assert run["whole"] if run["exists"] else run["resumed"], (run, result.stderr)
        assert run["left"] == [], run
    # The moments must have been before, within and after the writing, or nothing was shown.
    assert sum(run["killed"] for run in runs) > 12
    assert len({run["finished"] for run in runs}) > 3


class Full:
    """Stops a conversion by an error once some files are finished."""

    def __init__(self, monkeypatch, after, error):
        self.monkeypatch, self.after, self.error = monkeypatch, after, error

    def __enter__(self):
        finish, count = SafetensorsWriter.finish, iter(range(self.after))

        def full(writer):
            if next(count, None) is None:
                raise self.error
            return finish(writer)

        self.monkeypatch.setattr(SafetensorsWriter, "finish", full)

    def __exit__(self, *_):
        self.monkeypatch.undo()


@pytest.fixture
def interrupted(meta, tmp_path, monkeypatch):
    """A conversion to `ours` of which three files are finished."""
    with (
        Full(monkeypatch, 3, OSError(28, "No space left on device")),
        pytest.raises(CheckpointError, match=r"no space left on the disk\); what is finished is kept in .*--resume"),
    ):
        convert(meta, tmp_path / "ours", max_shard_size=SHARD)
    assert len(list((tmp_path / ".ours.partial").glob("model-*"))) == 4
    return tmp_path / ".ours.partial"


def test_finished_files_are_not_written_again(meta, tmp_path, interrupted):
    convert(meta, tmp_path / "whole/ours", max_shard_size=SHARD)
    before = {path.name: path.stat().st_ino for path in interrupted.glob("model-0000[123]-*")}
    convert(meta, tmp_path / "ours", max_shard_size=SHARD, resume=True)
    assert len(before) == 3
    assert {name: (tmp_path / "ours" / name).stat().st_ino for name in before} == before
    assert contents(tmp_path / "ours") == contents(tmp_path / "whole/ours")
    assert not interrupted.exists()


def test_a_finished_file_that_has_changed_is_written_again(meta, tmp_path, interrupted):
    damaged = next(interrupted.glob("model-00002-*"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    convert(meta, tmp_path / "whole/ours", max_shard_size=SHARD)
    convert(meta, tmp_path / "ours", max_shard_size=SHARD, resume=True)
    assert contents(tmp_path / "ours") == contents(tmp_path / "whole/ours")


def test_what_a_kill_left_half_written_is_not_taken_over(meta, tmp_path, interrupted):
    convert(meta, tmp_path / "whole/ours", max_shard_size=SHARD)
    for name in (f".{MANIFEST}", "config.json", "tmp_half/half"):
        (interrupted / name).parent.mkdir(exist_ok=True)
        (interrupted / name).write_text('{"half')
    convert(meta, tmp_path / "ours", max_shard_size=SHARD, resume=True)
    assert contents(tmp_path / "ours") == contents(tmp_path / "whole/ours")


def test_what_was_interrupted_is_not_lost_by_forgetting_to_resume(meta, tmp_path, interrupted, capsys):
    arguments = [str(meta), str(tmp_path / "ours"), "--max-shard-size", SHARD]
    assert command.main(arguments) == 2
    assert "holds 3 finished files of an interrupted run: go on with --resume, or begin anew" in capsys.readouterr().err
    assert command.main([*arguments, "--no-resume"]) == 0
    assert (tmp_path / "ours/config.json").is_file()
    assert not interrupted.exists()


@pytest.mark.parametrize("change", ["options", "source"])
def test_another_conversion_does_not_go_on_with_it(meta, tmp_path, interrupted, change):
    before = fingerprint(interrupted)
    if change == "source":
        os.utime(meta / "consolidated.00.pth", ns=(1, 1))
    dtype = "bfloat16" if change == "options" else "auto"
    with pytest.raises(CheckpointError, match=f"was begun with another {change}: go on with the same"):
        convert(meta, tmp_path / "ours", max_shard_size=SHARD, dtype=dtype, resume=True)
    assert fingerprint(interrupted) == before


def test_too_little_space_leaves_what_is_finished(meta, tmp_path, interrupted, monkeypatch):
    usage = target_module.shutil.disk_usage(tmp_path)._replace(free=1)
    monkeypatch.setattr(target_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="are free there"):
        convert(meta, tmp_path / "ours", max_shard_size=SHARD, resume=True)
    assert len(list(interrupted.glob("model-*"))) == 3


def test_two_processes_do_not_write_the_same_folder(meta, tmp_path):
    with target_module.whole_or_nothing(tmp_path / "ours", overwrite=False, num_bytes=0) as folder:
        (folder / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match="is being written by another process"):
            convert(meta, tmp_path / "ours")
        assert folder.exists()
    assert (tmp_path / "ours/config.json").read_text() == "{}"


def test_the_space_needed_is_told_first(meta, tmp_path, capsys):
    assert command.main([str(meta), str(tmp_path / "ours")]) == 0
    assert re.match(r"space      0\.\d\d GB to write, \d+\.\d\d GB free\n", capsys.readouterr().out)


def test_a_kill_between_two_renames_loses_nothing(meta, tmp_path):
    convert(meta, tmp_path / "ours")
    before = fingerprint(tmp_path / "ours")
    (tmp_path / "ours").rename(tmp_path / ".ours.replaced")
    with pytest.raises(CheckpointError, match="exists: choose another target"):
        convert(meta, tmp_path / "ours")
    assert fingerprint(tmp_path / "ours") == before
    assert not list(tmp_path.glob(".*"))


def test_resuming_nothing_begins(meta, tmp_path):
    convert(meta, tmp_path / "ours", resume=True)
    assert (tmp_path / "ours/config.json").is_file()


# Memory.

PEAK = """
import sys
from pathlib import Path
from conversion.convert import convert
import torch, transformers

def peak():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))

convert(Path(sys.argv[1]), Path(sys.argv[3]), with_tokenizer=False)  # imports, small
before = peak()
convert(Path(sys.argv[2]), Path(sys.argv[4]), with_tokenizer=False)
print(peak() - before)
"""


def test_memory_is_bounded_by_a_tensor_and_not_by_a_file(tmp_path):
    small = meta_folder(tmp_path / "small", shards=2)
    params = meta_params(dim=1024, n_heads=8, n_kv_heads=8, n_layers=16, multiple_of=256)
    large = write_meta(tmp_path / "large", params, meta_weights(params, dtype=torch.bfloat16), shards=2)
    size = sum(path.stat().st_size for path in large.glob("*.pth"))
    targets = [str(tmp_path / name) for name in ("one", "two")]
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(small), str(large), *targets], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "two/model.safetensors").stat().st_size > 400e6
    assert int(result.stdout.splitlines()[-1]) * 1024 < size / 2, result.stdout


# 70B: 138 GB.


def sparse_70b(folder: Path) -> Path:
    """Eight shards of LLaMA 2 70B, all shapes right: every tensor is one value, expanded without memory."""
    config = LlamaReproConfig.from_paper("llama-2-70b")
    named = sizes(config)
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(METAS["llama-2-70b"]))
    for rank in range(8):
        shard = {}
        for row, meta, _ in expand(config):
            shape = [named[size] // (8 if axis == row.cut else 1) for axis, size in enumerate(row.shape)]
            value = rank + 1.0 if row.cut is not None else 1.0
            shard[meta] = torch.full((1,), value, dtype=torch.bfloat16).expand(shape)
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    return folder


def test_70b_is_planned_and_begun(tmp_path, monkeypatch):
    source = sparse_70b(tmp_path / "meta")
    usage = target_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(target_module.shutil, "disk_usage", lambda _: usage._replace(free=137_000_000_000))
    with pytest.raises(CheckpointError, match=r"ours needs 137\.95 GB, but 137\.00 GB are free there"):
        convert(source, tmp_path / "ours", with_tokenizer=False)
    monkeypatch.setattr(target_module.shutil, "disk_usage", lambda _: usage._replace(free=140_000_000_000))
    told: list[str] = []
    with (
        Full(monkeypatch, 1, OSError(28, "No space left on device")),
        pytest.raises(CheckpointError, match="what is finished is kept"),
    ):
        convert(source, tmp_path / "ours", with_tokenizer=False, max_shard_size="600MB", tell=told.append)
    assert told == ["space      137.95 GB to write, 140.00 GB free"]
    names = sorted(path.name for path in (tmp_path / ".ours.partial").glob("model-*"))
    assert [re.sub(r"of-\d+", "of", name) for name in names] == [f"model-0000{n}-of.safetensors" for n in (1, 2)]
    first = load_file(tmp_path / ".ours.partial" / names[0])
    embedding = first["model.embed_tokens.weight"]
    assert embedding.shape == (32000, 8192)
    # The embedding is cut by columns: 1024 of each rank.
    assert embedding[0, ::1024].tolist() == embedding[-1, 1023::1024].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_one_file_may_be_larger_than_4_gb(tmp_path):
    """Offsets of both formats are 64 bits wide: the header says 138 GB, and reads back."""
    config = LlamaReproConfig.from_paper("llama-2-70b")
    content = {name: (shape, torch.bfloat16) for name, shape in our_shapes(config).items()}
    header = safetensors_file._header(content)
    entries = json.loads(header[8:])
    assert entries["lm_head.weight"]["data_offsets"][1] == 137_953_296_384
    # Read back at 5 GB, as a hole.
    content = {"a": ((5, 2**29), torch.bfloat16), "b": ((3,), torch.bfloat16)}
    header = safetensors_file._header(content)
    path = tmp_path / "sparse.safetensors"
    path.write_bytes(header)
    os.truncate(path, len(header) + 5 * 2**30)
    with path.open("ab") as file:
        file.write(torch.tensor([1, 2, 3], dtype=torch.bfloat16).view(torch.uint8).numpy().data)
    with safe_open(path, framework="pt") as opened:
        assert opened.get_slice("a").get_shape() == [5, 2**29]
        assert opened.get_tensor("b").tolist() == [1, 2, 3]

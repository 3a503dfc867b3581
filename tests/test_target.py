"""The target appears whole or not at all: where it may be, what stops the writing, and what --overwrite replaces."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from meta_checkpoints import fingerprint, meta_folder, meta_params, meta_weights, write_meta, write_sentencepiece
from random_models import random_model, tiny_config

from conversion import convert as convert_command
from conversion import export as export_command
from conversion.convert import convert
from conversion.export import export
from conversion.pth_file import PthWriter
from conversion.safetensors_file import SafetensorsWriter
from hf_llama_repro.errors import CheckpointError

ROOT = Path(__file__).parent.parent
COMMANDS = {"convert": (convert, convert_command.main), "export": (export, export_command.main)}
commands = pytest.mark.parametrize("command", COMMANDS)


@pytest.fixture
def meta(tmp_path):
    tokenizer = write_sentencepiece(tmp_path / "tokenizer.model")
    return write_meta(tmp_path / "meta", meta_params(), meta_weights(meta_params()), shards=2, tokenizer=tokenizer)


@pytest.fixture
def refused(tmp_path, capfd):
    """Asserts that function and command refuse with one and the same message, and change nothing."""

    def check(command, source, target, *options, message, **keywords):
        function, main = COMMANDS[command]
        before = fingerprint(tmp_path)
        with pytest.raises(CheckpointError, match=message) as refusal:
            function(source, target, **keywords)
        capfd.readouterr()
        assert main([str(source), str(target), *options]) == 2
        output = capfd.readouterr()
        assert output.err == f"error: {refusal.value}\n"
        assert not output.out or output.out.startswith("space ")
        assert fingerprint(tmp_path) == before
        assert not list(tmp_path.rglob(".*"))

    return check


# Where the target may be.


def make(path, content):
    if isinstance(content, dict):
        path.mkdir()
        for name, text in content.items():
            (path / name).write_text(text)
    else:
        path.write_text(content)
    return path


@commands
@pytest.mark.parametrize("content", ["a file", {"notes.txt": "mine"}, {"config.json": "{}"}], ids=str)
def test_target_that_exists(meta, tmp_path, refused, command, content):
    target = make(tmp_path / "target", content)
    refused(command, meta, target, message="exists: choose another target, or replace it with --overwrite")


@commands
@pytest.mark.parametrize("content", ["a file", {"notes.txt": "mine"}], ids=str)
def test_overwrite_replaces_only_checkpoints(meta, tmp_path, refused, command, content):
    target = make(tmp_path / "target", content)
    refused(command, meta, target, "--overwrite", message="exists and is no checkpoint", overwrite=True)


@commands
@pytest.mark.parametrize("where", [".", "ours", "a/b"])
def test_target_inside_the_source(meta, refused, command, where):
    message = "are inside of one another: choose another target"
    refused(command, meta, meta / where, "--overwrite", message=message, overwrite=True)


@commands
def test_source_inside_the_target(meta, tmp_path, refused, command):
    (tmp_path / "config.json").write_text("{}")
    refused(command, meta, tmp_path, "--overwrite", message="are inside of one another", overwrite=True)


@commands
def test_target_that_is_the_source_by_another_name(meta, tmp_path, refused, command):
    (tmp_path / "link").symlink_to(meta)
    refused(command, meta, tmp_path / "link", "--overwrite", message="are inside of one another", overwrite=True)


def test_empty_target_folder_is_filled(meta, tmp_path):
    (tmp_path / "ours").mkdir()
    convert(meta, tmp_path / "ours")
    assert (tmp_path / "ours/config.json").is_file()


def test_folders_above_the_target_are_made(meta, tmp_path):
    convert(meta, tmp_path / "a/b/ours")
    assert (tmp_path / "a/b/ours/config.json").is_file()


@pytest.mark.parametrize("size", ["", "5", "GB", "0GB", "-1GB", "5 apples", "1e3MB", "5GiB", "nan", "∞GB"])
def test_bad_max_shard_size(meta, tmp_path, refused, size):
    options = [f"--max-shard-size={size}"]
    message = f"{size!r} is not a size: write it like 5GB or 200MB"
    refused("convert", meta, tmp_path / "ours", *options, message=re.escape(message), max_shard_size=size)


# What stops the writing.


@commands
def test_target_below_a_file(meta, tmp_path, refused, command):
    (tmp_path / "file").write_text("")
    refused(command, meta, tmp_path / "file/ours", message=r"file/ours could not be written")


@commands
def test_no_permission_to_write(command):
    """As root, who may write everywhere, this runs as nobody."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        meta = meta_folder(folder / "meta")
        function, _ = COMMANDS[command]
        function(meta, folder / "warm up", with_tokenizer=False)  # imports what nobody may not read
        shutil.rmtree(folder / "warm up")
        folder.chmod(0o555)
        user = os.geteuid()
        try:
            os.seteuid(65534 if user == 0 else user)
            with pytest.raises(CheckpointError, match=r"ours could not be written .*Permission denied"):
                function(meta, folder / "ours", with_tokenizer=False)
        finally:
            os.seteuid(user)
            folder.chmod(0o755)
        assert [path.name for path in folder.iterdir()] == ["meta"]


@commands
def test_too_little_space_is_told_before_anything_is_written(meta, tmp_path, refused, command, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(command, meta, tmp_path / "ours", message=r"ours needs 0\.00 GB, but 0\.00 GB are free there")


@commands
@pytest.mark.parametrize("limit", [100, 300_000, 1_000_000])
def test_file_that_cannot_be_written_to_its_end(meta, tmp_path, refused, command, limit):
    """A limit on the size of files stands for a full disk: the write fails half-way through."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # pytest's own files stay smaller than the limit.
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(CheckpointError, match="ours could not be written"):
            COMMANDS[command][0](meta, tmp_path / "ours")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta", "tokenizer.model"]


# Starts a command that stops for ever once a part of it is written, and says so.
STOPS = """
import sys, time
from conversion import {command} as command
from conversion.pth_file import PthWriter
from conversion.safetensors_file import SafetensorsWriter

writer = SafetensorsWriter if "{command}" == "convert" else PthWriter
finish = writer.finish

def stop(self):
    finish(self)
    print("writing", flush=True)
    time.sleep(60)

writer.finish = stop
sys.exit(command.main(sys.argv[1:]))
"""


@commands
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("overwrite", [False, True])
def test_interrupted_command_leaves_nothing_and_says_so(meta, tmp_path, command, number, overwrite):
    options = ["--overwrite"] if overwrite else []
    if overwrite:
        convert(meta, tmp_path / "ours")
    before = fingerprint(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", STOPS.format(command=command), str(meta), str(tmp_path / "ours"), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while (line := process.stdout.readline()) != "writing\n":
        assert line.startswith("space "), line
    assert list(tmp_path.glob(".ours.partial/*"))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    left = {"convert": f"{tmp_path / 'ours'} was not made; --resume goes on from the files that are finished"}
    assert (process.returncode, errors) == (130, f"interrupted: {left.get(command, 'nothing was written')}\n")
    assert fingerprint(tmp_path) == before
    assert not list(tmp_path.rglob(".*"))


# --overwrite


@commands
def test_overwrite_replaces_the_whole_checkpoint(meta, tmp_path, command):
    random_model(tiny_config()).save_pretrained(tmp_path / "ours")
    (tmp_path / "ours/left over.txt").write_text("of the old one")
    function, _ = COMMANDS[command]
    function(meta, tmp_path / "new")
    function(meta, tmp_path / "ours", overwrite=True)
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {path.name for path in (tmp_path / "new").iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta", "new", "ours", "tokenizer.model"]


@commands
def test_failing_overwrite_leaves_the_old_checkpoint_whole(meta, tmp_path, refused, command, monkeypatch):
    random_model(tiny_config()).save_pretrained(tmp_path / "ours")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    for writer in (SafetensorsWriter, PthWriter):
        monkeypatch.setattr(writer, "finish", fail)
    refused(command, meta, tmp_path / "ours", "--overwrite", message="no space left on the disk", overwrite=True)


@pytest.mark.parametrize(
    "error", [OSError(13, "Permission denied"), KeyboardInterrupt()], ids=["failed", "interrupted"]
)
def test_old_checkpoint_comes_back_when_the_new_one_cannot_take_its_name(meta, tmp_path, monkeypatch, error):
    random_model(tiny_config()).save_pretrained(tmp_path / "ours")
    before = fingerprint(tmp_path)
    rename = Path.rename

    def fail_for_the_new_one(path, target):
        if "replaced" not in path.name and path.name.startswith("."):
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        convert(meta, tmp_path / "ours", overwrite=True)
    assert fingerprint(tmp_path) == before
    assert not list(tmp_path.rglob(".*"))

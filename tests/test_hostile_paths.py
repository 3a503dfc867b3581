"""Names that lead out of a folder, and what else a file of another's may say: one explicit test for each."""

import json
import os
import re
import zipfile

import pytest
import torch
from meta_checkpoints import fingerprint, meta_folder
from test_convert_hugging_face import stock_folder

from conversion.convert import convert, main
from hf_llama_repro.errors import CheckpointError


@pytest.fixture
def meta(tmp_path):
    return meta_folder(tmp_path / "around/meta", shards=2)


@pytest.fixture
def refused(tmp_path, meta, capfd):
    """Asserts that function and command refuse with one message, and that nothing changes on the disk."""

    def check(message, source=meta):
        before = fingerprint(tmp_path)
        with pytest.raises(CheckpointError, match=message):
            convert(source, tmp_path / "around/ours", with_tokenizer=False)
        capfd.readouterr()
        assert main([str(source), str(tmp_path / "around/ours"), "--no-tokenizer"]) == 2
        assert re.search(message, capfd.readouterr().err)
        assert fingerprint(tmp_path) == before
        assert not list(tmp_path.rglob("*ours*"))

    return check


# Where a record is written that is unpacked without care into the folder of its shard.
INSIDE, OUTSIDE = "consolidated.01/../../../evidence", "../../evidence"


def add_record(path, name):
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "traversal")


def test_a_record_that_leads_out_of_the_archive_is_not_unpacked(tmp_path, meta):
    """Such a file is read like any other: nothing in it is ever unpacked."""
    add_record(meta / "consolidated.01.pth", INSIDE)
    before = fingerprint(tmp_path)
    convert(meta, tmp_path / "around/ours", with_tokenizer=False)
    assert not list(tmp_path.rglob("evidence*"))
    written = [path for path in fingerprint(tmp_path) if path not in before]
    assert written
    assert all(path.startswith(f"{tmp_path}/around/ours/") for path in written)


@pytest.mark.parametrize("name", [OUTSIDE, "{absolute}"])
def test_a_record_that_is_not_in_the_archives_folder_is_refused(tmp_path, meta, refused, name):
    add_record(meta / "consolidated.01.pth", name.format(absolute=tmp_path / "evidence"))
    refused(r"\.01\.pth is truncated or damaged")
    assert not list(tmp_path.rglob("evidence*"))


@pytest.mark.parametrize("name", [INSIDE, OUTSIDE, "{absolute}"])
def test_these_records_do_leave_the_folder_where_they_are_unpacked_without_care(tmp_path, meta, name):
    """Control: there is something to refuse."""
    (meta / "consolidated.01").mkdir()
    name = name.format(absolute=tmp_path / "evidence")
    add_record(meta / "consolidated.01.pth", name)
    with zipfile.ZipFile(meta / "consolidated.01.pth") as archive:
        (meta / name).write_bytes(archive.read(name))
    assert [path.is_relative_to(meta) for path in tmp_path.rglob("evidence")] == [False]


def test_an_archive_of_such_records_alone_is_refused(tmp_path, meta, refused):
    (meta / "consolidated.01.pth").unlink()
    with zipfile.ZipFile(meta / "consolidated.01.pth", "w") as archive:
        archive.writestr("../../evidence", "traversal")
    refused(r"\.01\.pth is truncated or damaged")
    assert not list(tmp_path.rglob("evidence*"))


def test_shards_may_be_symbolic_links(tmp_path, meta):
    (tmp_path / "elsewhere").mkdir()
    for path in meta.glob("*.pth"):
        path.rename(tmp_path / "elsewhere" / path.name)
        path.symlink_to(tmp_path / "elsewhere" / path.name)
    before = fingerprint(tmp_path / "elsewhere")
    convert(meta, tmp_path / "around/ours", with_tokenizer=False)
    assert fingerprint(tmp_path / "elsewhere") == before
    assert not any(path.is_symlink() for path in (tmp_path / "around/ours").iterdir())


@pytest.mark.parametrize("name", ["../secret", "{absolute}", "../meta/params.json", ".", "..", "a" * 300])
def test_a_checklist_names_only_files_of_its_folder(tmp_path, meta, refused, name):
    (meta.parent / "secret").write_text("not the checkpoint's")
    name = name.format(absolute=meta.parent / "secret")
    (meta / "checklist.chk").write_text(f"{'0' * 32}  {name}\n")
    refused("checklist.chk names .* which is not (in the same folder: remove that line|there: download it)")


@pytest.mark.parametrize("name", ["../stock/model.safetensors", "..", "", "a" * 300, "\x00", "\ud800"])
def test_an_index_names_only_files_of_its_folder(tmp_path, refused, name):
    stock = stock_folder(tmp_path / "stock")
    (stock / "model.safetensors").rename(stock / "weights.safetensors")  # which would count, and not the index
    index = {"weight_map": {"model.norm.weight": name}}
    (stock / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("index.json names .*, which is not there", stock)


def test_a_pipe_in_a_shards_place_is_refused(meta, refused, tmp_path):
    """Opening it would wait for ever."""
    (meta / "consolidated.01.pth").unlink()
    os.mkfifo(meta / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"\.01\.pth is not a file"):
        convert(meta, tmp_path / "ours", with_tokenizer=False)


def test_a_message_does_not_steer_the_terminal(meta, capfd, tmp_path):
    """A name may hold the sequence that clears the screen, and be of any length."""
    path = meta / "consolidated.00.pth"
    torch.save(torch.load(path, weights_only=True) | {"\x1b[2J" + "a" * 100_000: torch.ones(1)}, path)
    assert main([str(meta), str(tmp_path / "ours"), "--no-tokenizer"]) == 2
    error = capfd.readouterr().err
    assert r"unknown tensors (\x1b[2Jaaa" in error
    assert "\x1b" not in error
    assert len(error) < 6000

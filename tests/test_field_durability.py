"""Written folders survive a power cut: files and folders are on the disk before a rename, and the rename after it.

Watches the calls: what a rename gives a name to must have been fsynced as it is now, and the folder of the new name
must be fsynced before the work ends.
"""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest
from adapters import adapter_folder, base_folder
from meta_checkpoints import meta_folder, meta_params, meta_weights, write_meta, write_sentencepiece

from conversion.convert import convert
from conversion.export import export
from conversion.merge import merge
from conversion.tokenizer_folder import write_tokenizer
from hf_llama_repro import durable
from hf_llama_repro.checkpoints import publish
from hf_llama_repro.evaluation.report import write_json
from hf_llama_repro.run_folder import open_run

ROOT = Path(__file__).parent.parent


class Watch:
    """Renames below a folder, and what of them would not survive a power cut."""

    def __init__(self, folder):
        self.folder, self.renamed, self.lost = folder, [], []
        self._synced, self._open = {}, {}

    @staticmethod
    def _key(status):
        return status.st_dev, status.st_ino

    def fsync(self, descriptor):
        status = os.fstat(descriptor)
        self._synced[self._key(status)] = status.st_mtime_ns
        if stat.S_ISDIR(status.st_mode):
            self._open.pop(self._key(status), None)

    def rename(self, source, target):
        source, target = Path(source), Path(target)
        # What is moved out of the way was synced when it was made.
        if self.folder not in target.parents or "replaced" in f"{source.name} {target.name}":
            return
        self.renamed.append(target.name)
        for path in (source, *source.rglob("*")) if source.is_dir() else (source,):
            if self._synced.get(self._key(path.stat())) != path.stat().st_mtime_ns:
                self.lost.append(path.name)
        self._open[self._key(target.parent.stat())] = target.name

    def check(self, *expected):
        assert set(expected) <= set(self.renamed)
        assert self.lost == []
        assert list(self._open.values()) == [], "renamed, and the folder's names not brought to the disk"


@pytest.fixture
def watch(tmp_path, monkeypatch):
    watching = Watch(tmp_path)
    originals = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def fsync(descriptor):
        originals["fsync"](descriptor)
        watching.fsync(descriptor)

    def renaming(name):
        def wrapped(source, target, **keywords):
            watching.rename(source, target)
            return originals[name](source, target, **keywords)

        return wrapped

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", renaming("rename"))
    monkeypatch.setattr(os, "replace", renaming("replace"))
    return watching


@pytest.fixture
def meta(tmp_path):
    tokenizer = write_sentencepiece(tmp_path / "tokenizer.model")
    return write_meta(tmp_path / "meta", meta_params(), meta_weights(meta_params()), shards=2, tokenizer=tokenizer)


def test_converted_folder_is_on_the_disk_before_it_has_its_name(meta, tmp_path, watch):
    convert(meta, tmp_path / "ours", max_shard_size="200KB")
    watch.check("manifest.json", "ours")


def test_folder_that_replaces_another_is_on_the_disk_before(meta, tmp_path, watch):
    convert(meta, tmp_path / "ours", with_tokenizer=False)
    convert(meta, tmp_path / "ours", overwrite=True)
    watch.check("ours")
    assert watch.renamed.count("ours") == 2


def test_exported_folder_is_on_the_disk_before_it_has_its_name(meta, tmp_path, watch):
    export(meta, tmp_path / "back", shards=3)
    watch.check("back")


def test_merged_folder_is_on_the_disk_before_it_has_its_name(tmp_path, watch):
    base = base_folder(tmp_path / "base", num_hidden_layers=1)
    merge(adapter_folder(tmp_path / "adapter", base, target_modules=["q_proj"]), tmp_path / "merged")
    watch.check("merged")


def test_tokenizer_folder_is_on_the_disk_before_it_has_its_name(tmp_path, watch):
    write_tokenizer(write_sentencepiece(tmp_path / "tokenizer.model"), tmp_path / "tokenizer", context_length=64)
    watch.check("tokenizer")


def test_checkpoint_of_a_run_is_on_the_disk_before_it_has_its_name(tmp_path, watch):
    """Fine-tuning and pre-training publish everything that they save this way."""
    partial = tmp_path / ".partial" / "checkpoint-3"
    (partial / "deeper").mkdir(parents=True)
    (partial / "deeper/weights").write_text("w")
    publish(partial, tmp_path / "checkpoint-3")
    watch.check("checkpoint-3")


@dataclass
class Recipe:
    output_dir: str


def test_recipe_of_a_run_is_on_the_disk_before_it_has_its_name(tmp_path, watch):
    run = tmp_path / "run"
    open_run(Recipe(str(run)), load=None, free_fields=(), resume=False, say=print, is_main=True)
    watch.check("recipe.yaml")


def test_report_is_on_the_disk_before_it_has_its_name(tmp_path, watch):
    write_json(tmp_path / "report.json", {}, [], {})
    watch.check("report.json")


@pytest.mark.parametrize("skipped", ["every", "the last"])
def test_planted_fault_is_seen(tmp_path, watch, monkeypatch, skipped):
    """Control: without the calls of fsync, or without that for the new name, the watch reports what could be lost."""
    sync = durable.sync
    monkeypatch.setattr(durable, "sync", lambda path: sync(path) if skipped != "every" and path != tmp_path else None)
    convert(meta_folder(tmp_path / "meta"), tmp_path / "ours", with_tokenizer=False)
    with pytest.raises(AssertionError, match=r"\.manifest|renamed, and the folder's names"):
        watch.check("ours")


def test_nothing_gives_a_name_in_another_way():
    """A rename of its own would be one that `durable` does not know; a folder moved out of the way needs none."""
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for package in ("conversion", "finetune", "pretrain", "hf_llama_repro")
        for path in sorted((ROOT / package).rglob("*.py"))
        for line in path.read_text().splitlines()
        if re.search(r"\.rename\(|os\.replace\(|shutil\.move\(|partial\.replace\(|aside\.replace\(", line)
        # What is compiled again where it is damaged, and what takes or gives back the name of an old folder.
        if path.name not in ("durable.py", "cpu_kernel.py") and "replaced" not in line
    ]
    assert found == []

"""Files that would run code when they are loaded."""

import os
import pickle

import pytest
import torch
from meta_checkpoints import meta_folder, meta_params, meta_weights
from random_models import random_model, tiny_config

from conversion.convert import convert, main
from hf_llama_repro.errors import CheckpointError


class Call:
    """Unpickles by calling `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def hostile(kind, evidence):
    """What a pickle may hold that creates the file `evidence` when it is loaded with pickle.load."""
    write = f"open({str(evidence)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch '{evidence}'"),
        "builtins.eval": Call(eval, write),
        "builtins.exec": Call(exec, write),
        "nested": {"norm.weight": [Call(getattr, Call(__import__, "os"), "system"), Call(os.mkdir, str(evidence))]},
        "in a tensor's place": {**meta_weights(meta_params()), "norm.weight": Call(os.mkdir, str(evidence))},
    }[kind]


KINDS = ["os.system", "builtins.eval", "builtins.exec", "nested", "in a tensor's place"]


def save_zip(content, path):
    torch.save(content, path)


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_bare(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


def save_bare_newer(content, path):
    path.write_bytes(pickle.dumps(content, protocol=4))


writers = pytest.mark.parametrize("save", [save_zip, save_legacy, save_bare])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("save", [save_zip, save_legacy, save_bare, save_bare_newer])
def test_the_hostile_files_of_these_tests_do_run_their_code(tmp_path, kind, save):
    """Control: what is refused below is not refused for being broken."""
    save(hostile(kind, tmp_path / "evidence"), tmp_path / "file")
    if save in (save_bare, save_bare_newer):
        pickle.loads((tmp_path / "file").read_bytes())
    else:
        torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "evidence").exists()


@pytest.mark.parametrize("kind", KINDS)
@writers
def test_code_in_a_shard_is_refused_and_not_run(tmp_path, capsys, kind, save):
    meta = meta_folder(tmp_path / "meta", shards=2)
    save(hostile(kind, tmp_path / "evidence"), meta / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"\.01\.pth holds code that loading would execute \([\w.]+\)"):
        convert(meta, tmp_path / "ours", with_tokenizer=False)
    assert main([str(meta), str(tmp_path / "ours"), "--no-tokenizer"]) == 2
    assert "nothing was run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


@pytest.mark.parametrize("kind", KINDS)
def test_code_in_a_pickle_that_torch_never_writes_is_not_run(tmp_path, kind):
    meta = meta_folder(tmp_path / "meta", shards=2)
    save_bare_newer(hostile(kind, tmp_path / "evidence"), meta / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"\.01\.pth was saved with pickle protocol 4"):
        convert(meta, tmp_path / "ours", with_tokenizer=False)
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


@writers
def test_code_in_a_pytorch_model_bin_is_refused_and_not_run(tmp_path, save):
    folder = tmp_path / "stock"
    random_model(tiny_config()).config.save_pretrained(folder)
    save(hostile("os.system", tmp_path / "evidence"), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds code that loading would execute"):
        convert(folder, tmp_path / "ours", with_tokenizer=False)
    assert not (tmp_path / "evidence").exists()


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_both_file_formats_of_torch_are_read(tmp_path, save):
    meta = meta_folder(tmp_path / "meta")
    save(meta_weights(meta_params()), meta / "consolidated.00.pth")
    convert(meta, tmp_path / "ours", with_tokenizer=False)


def test_damage_is_not_mistaken_for_code(tmp_path):
    meta = meta_folder(tmp_path / "meta")
    (meta / "consolidated.00.pth").write_bytes(b"\x80\x02" + b"\xff" * 100)
    with pytest.raises(CheckpointError, match=r"is truncated or damaged .*: download it again"):
        convert(meta, tmp_path / "ours", with_tokenizer=False)

"""A run is identified by the content of what it began with, and nothing good is lost where writing it is stopped."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from finetune_runs import records, tiny_recipe
from pretrain_runs import CONTEXT, command, sources, tiny_pretraining
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.alpaca import finetune, main
from finetune.recipe import Recipe, as_yaml
from finetune.template import TEMPLATES
from hf_llama_repro.checkpoints import publish, sha256_of
from hf_llama_repro.errors import InputError
from hf_llama_repro.run_folder import INPUTS_FILE, open_run
from pretrain import training as pretraining
from pretrain.recipe import Source
from pretrain.sources import fingerprint
from pretrain.tokenizer import SETTINGS, prepare_tokenizer
from pretrain.train import main as pretrain_main
from pretrain.train import pretrain

FULL = OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def full_run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base/, data.json, template.json, and run/ of two steps of full fine-tuning on them."""
    folder = tmp_path_factory.mktemp("identity")
    shutil.copytree(tiny_base, folder / "base")
    shutil.copyfile(TEMPLATES / "alpaca_short.json", folder / "template.json")
    (folder / "data.json").write_text(json.dumps(records(8)))
    finetune(recipe_in(folder))
    return folder


def recipe_in(folder: Path, **fields: Any) -> Recipe:
    short = {"method": "full", "held_out": 0, "max_steps": 2, "save_steps": 1, "learning_rate": 1e-3, **fields}
    template = str(folder / "template.json")
    return tiny_recipe(folder / "base", folder / "data.json", folder / "run", **{"template": template, **short})


@pytest.fixture
def copied(full_run: Path, tmp_path: Path) -> Path:
    """The same elsewhere: of what the run began with, only the paths differ."""
    shutil.copytree(full_run, tmp_path / "copied")
    return tmp_path / "copied"


def other_data(folder: Path) -> None:
    (folder / "data.json").write_text(json.dumps(records(8, seed=1)))


def other_template(folder: Path) -> None:
    content = json.loads((folder / "template.json").read_text())
    (folder / "template.json").write_text(json.dumps({**content, "response": "{response} "}))


def other_weights(folder: Path) -> None:
    path = folder / "base" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_tokenizer(folder: Path) -> None:
    path = folder / "base" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_bos_token": False}))


CHANGES = {
    "data: the content of the file": other_data,
    "template: the content of the prompts": other_template,
    "base_model: the content of model.safetensors": other_weights,
    "base_model: the content of tokenizer_config.json": other_tokenizer,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_does_not_resume_on_other_content_under_the_same_path(copied: Path, what: str, capsys: Any) -> None:
    CHANGES[what](copied)
    (copied / "recipe.yaml").write_text(as_yaml(recipe_in(copied)))
    assert main([str(copied / "recipe.yaml"), "--resume"]) == 2
    message = capsys.readouterr().err
    assert f"was begun with another {what} differs" in message
    assert "Traceback" not in message


def test_a_run_resumes_on_the_same_content_under_another_path(copied: Path, monkeypatch: Any, capsys: Any) -> None:
    (copied / "data.json").rename(copied / "renamed.json")
    monkeypatch.chdir(copied)
    recipe = replace(recipe_in(Path(".")), data="renamed.json", template="template.json", base_model="base")
    finetune(replace(recipe, output_dir="run"), resume=True)
    assert "resume      run/checkpoint-2" in capsys.readouterr().out


def test_a_run_without_checksums_resumes_with_a_note(copied: Path, capsys: Any) -> None:
    (copied / "run" / INPUTS_FILE).unlink()
    (copied / "run" / "recipe.yaml").write_text(as_yaml(recipe_in(copied)))
    finetune(recipe_in(copied), resume=True)
    printed = capsys.readouterr().out
    assert "has no checksums of data, base_model, template (it was begun by an earlier version)" in printed
    assert "resume      " in printed


def test_a_run_without_checksums_is_compared_by_resolved_paths(copied: Path, monkeypatch: Any) -> None:
    (copied / "run" / INPUTS_FILE).unlink()
    (copied / "run" / "recipe.yaml").write_text(as_yaml(recipe_in(copied)))
    monkeypatch.chdir(copied)
    opened: dict[str, Any] = {"free_fields": ("output_dir",), "resume": True, "say": print, "is_main": True}
    inputs: dict[str, Any] = dict.fromkeys(("data", "base_model", "template"))
    from finetune.recipe import load_recipe

    same = replace(recipe_in(copied), data="data.json", base_model="base/../base")
    assert open_run(same, load=load_recipe, inputs=inputs, **opened) == copied / "run" / "checkpoint-2"
    with pytest.raises(InputError, match="begun by another recipe"):
        open_run(replace(same, data="other.json"), load=load_recipe, inputs=inputs, **opened)


def test_the_sums_of_a_run_are_those_of_its_files(full_run: Path) -> None:
    inputs = json.loads((full_run / "run" / INPUTS_FILE).read_text())
    assert inputs["data"]["path"] == str((full_run / "data.json").resolve())
    assert inputs["data"]["sha256"] == {"the file": sha256_of(full_run / "data.json")}
    weights = "model.safetensors"
    assert inputs["base_model"]["sha256"][weights] == sha256_of(full_run / "base" / weights)


# What is published


def test_a_fully_trained_model_keeps_the_bases_use_cache(full_run: Path) -> None:
    assert json.loads((full_run / "base" / "config.json").read_text())["use_cache"] is True
    for folder in ("model", "checkpoint-2"):
        assert json.loads((full_run / "run" / folder / "config.json").read_text())["use_cache"] is True
    model = AutoModelForCausalLM.from_pretrained(full_run / "run" / "model")
    ids = AutoTokenizer.from_pretrained(full_run / "run" / "model")("a", return_tensors="pt").input_ids
    assert model(ids).past_key_values is not None


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    output = tmp_path / "run"
    for folder, content in ((output / "adapter", "good"), (output / ".partial" / "adapter", "new")):
        folder.mkdir(parents=True)
        (folder / "weights").write_text(content)
    if (child := os.fork()) == 0:  # dies as by kill -9, without a finally
        rename, count = Path.rename, []

        def dies(self: Path, target: Path) -> Any:
            count.append(target)
            return rename(self, target) if len(count) == 1 else os._exit(9)

        Path.rename = dies  # type: ignore[method-assign]
        publish(output / ".partial" / "adapter", output / "adapter")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (output / "adapter").exists()
    shutil.rmtree(output / ".partial")  # as every save begins
    with pytest.raises(InputError, match="holds a run"):
        open_run(
            Recipe(output_dir=str(output)), load=lambda _: None, free_fields=(), resume=False, say=print, is_main=True
        )  # type: ignore[misc]
    assert (output / "adapter" / "weights").read_text() == "good"


def test_a_publish_that_fails_brings_the_replaced_folder_back(tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("adapter", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    rename = Path.rename

    def fails(self: Path, target: Path) -> Any:
        if self.name == "new":
            raise FULL
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="No space left"):
        publish(tmp_path / "new", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "weights").read_text() == "adapter"


# Full disks


def fill_the_disk(monkeypatch: Any, module: Any, name: str, when: Any = lambda *_: True) -> None:
    """From then on the function fails as on a full disk, where `when` is true of its arguments."""
    function = getattr(module, name)

    def full(*arguments: Any, **others: Any) -> Any:
        if when(*arguments):
            raise FULL
        return function(*arguments, **others)

    monkeypatch.setattr(module, name, full)


@pytest.mark.parametrize("step", ["metrics", "model", "picture"])
def test_a_disk_that_is_full_at_any_time_ends_fine_tuning_with_one_message(
    full_run: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, step: str
) -> None:
    from finetune import progress, training

    if step == "metrics":
        fill_the_disk(monkeypatch, training, "add_metrics", lambda _, line: line["step"] == 2)
    elif step == "model":
        fill_the_disk(monkeypatch, training, "publish", lambda _, target: target.name == "model")
    else:
        fill_the_disk(monkeypatch, progress, "draw_losses")
    (tmp_path / "recipe.yaml").write_text(as_yaml(replace(recipe_in(full_run), output_dir=str(tmp_path / "run"))))
    assert main([str(tmp_path / "recipe.yaml")]) == 2
    message = capsys.readouterr().err
    checkpoint = tmp_path / "run" / ("checkpoint-1" if step == "metrics" else "checkpoint-2")
    assert f"(no space left on the disk); the last good checkpoint is {checkpoint}: free some space" in message
    assert "Traceback" not in message


@pytest.fixture
def short_pretraining(text_folder: Path, pretrain_data: Path, tmp_path: Path) -> Any:
    tokens = 2 * 8 * CONTEXT
    return tiny_pretraining(text_folder, tmp_path / "run", data_dir=str(pretrain_data), tokens=tokens, save_steps=1)


def test_a_disk_that_is_full_at_the_last_save_ends_pretraining_with_one_message(
    short_pretraining: Any, monkeypatch: Any, capfd: Any
) -> None:
    path = command(short_pretraining)[3]
    with monkeypatch.context() as full:
        fill_the_disk(full, pretraining, "publish", lambda _, target: target.name == "model")
        assert pretrain_main([path]) == 2
    output = Path(short_pretraining.output_dir)
    message = capfd.readouterr().err
    assert f"{output}/model could not be written (no space left on the disk); the last good checkpoint is " in message
    assert f"{output}/checkpoint-2: free some space, and resume with --resume" in message
    assert "Traceback" not in message
    assert not (output / ".partial-model").exists()
    assert pretrain_main([path, "--resume"]) == 0
    assert (output / "model" / "config.json").is_file()


def test_an_error_that_is_no_full_disk_is_not_taken_for_one(full_run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from finetune import progress

    def broken(*_: Any) -> None:
        raise ConnectionError("a service of the network")

    monkeypatch.setattr(progress, "draw_losses", broken)
    with pytest.raises(ConnectionError):
        finetune(replace(recipe_in(full_run), output_dir=str(tmp_path / "run")))


# Pre-training's data and tokenizer


def test_pretraining_does_not_resume_on_other_text_of_the_same_size(
    text_folder: Path, pretrain_data: Path, tmp_path: Path, capfd: Any
) -> None:
    folder = tmp_path / "texts"
    shutil.copytree(text_folder, folder)
    shutil.copytree(pretrain_data / "tokenizer", tmp_path / "run" / "data" / "tokenizer")  # to make one takes long
    recipe = tiny_pretraining(folder, tmp_path / "run", sources=sources(folder), tokens=8 * CONTEXT)
    path = command(recipe)[3]
    assert pretrain_main([path]) == 0
    one, other = folder / "words" / "000.txt", folder / "words" / "001.txt"
    texts = one.read_bytes(), other.read_bytes()
    other.write_bytes(texts[0])
    one.write_bytes(texts[1])
    assert pretrain_main([path, "--resume"]) == 2
    assert "was trained on other data: documents, tokens or bytes of words differ" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 420}, "vocab_size was 400 and is 420"),
        ({"tokenizer_bytes": 5000}, "tokenizer_bytes was 1000000000 and is 5000"),
        ({"tokenizer": "small_model"}, "tokenizer was "),
    ],
    ids=str,
)
def test_a_tokenizer_made_with_other_settings_is_not_reused(
    short_pretraining: Any, change: dict[str, Any], said: str, request: Any
) -> None:
    if "tokenizer" in change:
        change = {"tokenizer": str(request.getfixturevalue(change["tokenizer"]))}
    with pytest.raises(InputError, match=f"was made with other settings .{said}.*choose another data_dir"):
        prepare_tokenizer(replace(short_pretraining, **change))


def test_a_tokenizer_made_with_the_same_settings_is_reused(short_pretraining: Any) -> None:
    assert prepare_tokenizer(short_pretraining).endswith(f"400 pieces, from {short_pretraining.data_dir}/tokenizer")


def test_a_tokenizer_whose_mixture_has_changed_is_reused_and_that_is_said(short_pretraining: Any) -> None:
    shares = tuple(replace(source, share=0.5) for source in short_pretraining.sources)
    other = replace(short_pretraining, sources=shares)
    assert prepare_tokenizer(other).endswith("; files or settings of the mixture have changed since it was trained")


def test_a_tokenizer_of_which_no_settings_are_recorded_is_compared_by_its_size(
    short_pretraining: Any, pretrain_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(pretrain_data / "tokenizer", tmp_path / "data" / "tokenizer")
    old = replace(short_pretraining, data_dir=str(tmp_path / "data"))
    assert not (tmp_path / "data" / SETTINGS).exists()
    assert prepare_tokenizer(old).endswith("; how it was trained is not recorded")
    with pytest.raises(InputError, match="vocab_size was 400 and is 401"):
        prepare_tokenizer(replace(old, vocab_size=401))


def test_a_model_has_its_own_context_in_a_tokenizer_that_runs_share(short_pretraining: Any) -> None:
    pretrain(replace(short_pretraining, context_length=32))
    config = json.loads((Path(short_pretraining.output_dir) / "model" / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 32


def test_a_dataset_in_a_folder_and_this_pythons_library_are_seen_to_change(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "train.parquet").write_text("a")
    dataset = Source(name="d", format="dataset", files=(str(tmp_path / "dataset"),), share=1.0)
    library = Source(name="p", format="python_sources", share=1.0)
    before = fingerprint(dataset), fingerprint(library)
    (tmp_path / "dataset" / "train.parquet").write_text("ab")
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    assert before[0] != fingerprint(dataset)
    assert before[1] != fingerprint(library)

"""Recipes: what a file or a flag may say, and what it means."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.recipe import FIELDS, RECIPES, Recipe, add_recipe_flags, as_yaml, load_recipe, make_recipe, overrides
from hf_llama_repro.errors import InputError

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
# Each different from the default, and allowed together.
OTHER: dict[str, Any] = {
    "base_model": "models/é",
    "output_dir": "out: 1",
    "data": "data.json",
    "held_out": 10,
    "template": "vicuna",
    "train_on_prompt": True,
    "max_length": 256,
    "truncation": "drop",
    "strict": True,
    "method": "full",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "lora_targets": ("q_proj", "o_proj"),
    "quantization": "nf4",
    "dtype": "float16",
    "gradient_checkpointing": True,
    "epochs": 1.5,
    "max_steps": 7,
    "batch_size": 64,
    "micro_batch_size": 2,
    "learning_rate": 1e-5,
    "lr_schedule": "cosine",
    "warmup_steps": 100,
    "warmup_ratio": 0.03,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "optimizer": "adafactor",
    "seed": 1,
    "logging_steps": 5,
    "eval_steps": 50,
    "save_steps": 100,
    "save_total_limit": 2,
    "report_to": ("tensorboard", "wandb"),
}
TOGETHER = {name: value for name, value in OTHER.items() if name not in ("quantization", "warmup_ratio")}


def load(folder: Path, text: str, name: str = "recipe.yaml", **flags: Any) -> Recipe:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, flags)


def refused(folder: Path, text: str) -> str:
    with pytest.raises(InputError) as error:
        load(folder, text)
    prefix = f"{folder / 'recipe.yaml'}"
    assert str(error.value).startswith(prefix)
    return str(error.value)[len(prefix) :]


# Files


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_recipe_loads_by_its_name(name: str) -> None:
    assert load_recipe(name) == load_recipe(RECIPES / f"{name}.yaml")


def test_a_file_may_be_empty_and_then_the_defaults_count(tmp_path: Path) -> None:
    assert load(tmp_path, "") == load(tmp_path, "# nothing\n---\n") == Recipe()
    assert load(tmp_path, "\ufeffseed: 5\r\nheld_out: 2\r\n") == Recipe(seed=5, held_out=2)


def test_every_field_is_tested_with_another_value_than_its_default() -> None:
    assert list(OTHER) == list(FIELDS)
    assert all(OTHER[name] != field.default for name, field in FIELDS.items())


@pytest.mark.parametrize("name", FIELDS)
def test_a_key_of_the_file_is_the_field(tmp_path: Path, name: str) -> None:
    value = list(OTHER[name]) if isinstance(OTHER[name], tuple) else OTHER[name]
    assert load(tmp_path, yaml.safe_dump({name: value})) == dataclasses.replace(Recipe(), **{name: OTHER[name]})


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 3e-4", "learning_rate", 3e-4),
        ("learning_rate: '0.001'", "learning_rate", 0.001),
        ("epochs: 2", "epochs", 2.0),
        ("weight_decay: 0", "weight_decay", 0.0),
        ("lora_targets: q_proj, v_proj,o_proj", "lora_targets", ("q_proj", "v_proj", "o_proj")),
        ("lora_targets: [q_proj]", "lora_targets", ("q_proj",)),
        ("report_to: ''", "report_to", ()),
        ("report_to: []", "report_to", ()),
        ("strict: yes", "strict", True),
        ("quantization: none", "quantization", "none"),
        ("max_grad_norm: .inf", "max_grad_norm", float("inf")),
    ],
)
def test_yamls_ways_to_write_a_value_are_understood(tmp_path: Path, text: str, name: str, value: Any) -> None:
    read = getattr(load(tmp_path, text), name)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *((name, [True, 1.5, "8", "1e3", None, [1], "x"]) for name in ("batch_size", "seed", "lora_r", "max_steps")),
        *((name, [True, "x", "", None, [0.1], {}, "3e-4x"]) for name in ("learning_rate", "epochs", "lora_dropout")),
        *((name, [0, 1, "true", "no", None, []]) for name in ("strict", "train_on_prompt")),
        *((name, [5, None, True, ["a"], {"a": 1}, 1.5]) for name in ("base_model", "template", "optimizer")),
        *((name, [5, None, True, [1], ["a", None], {"a": 1}, [["a"]]]) for name in ("lora_targets", "report_to")),
        *((name, [None, True, 4, "int4", [], ["none"], ""]) for name in ("quantization", "method", "truncation")),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(tmp_path: Path, name: str, wrong: list[Any]) -> None:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "a list of names"}
    allowed = "one of " if name in ("quantization", "method", "truncation") else names[type(FIELDS[name].default)]
    for value in wrong:
        message = refused(tmp_path, json.dumps({name: value}))
        assert message.startswith(f": {name}={value!r} must be {allowed}")


@pytest.mark.parametrize(
    ("name", "wrong", "allowed"),
    [
        *((name, [0, -1], "at least 1") for name in ("max_length", "lora_r", "lora_alpha", "logging_steps")),
        *((name, [0, -4], "at least 1") for name in ("batch_size", "micro_batch_size")),
        *((name, [-1], "0 or more") for name in ("held_out", "max_steps", "warmup_steps", "eval_steps", "seed")),
        ("weight_decay", [-0.1], "0 or more"),
        *((name, [0, -1.0, float("nan")], "") for name in ("epochs", "learning_rate", "max_grad_norm")),
        *((name, [float("inf"), "nan", "inf"], "a finite number") for name in ("epochs", "learning_rate")),
        ("save_steps", [0], "more than 0"),
        *((name, [-0.1, 1, float("nan")], "at least 0 and less than 1") for name in ("lora_dropout", "warmup_ratio")),
        ("save_total_limit", [0, 1], "at least 2"),
        ("lora_targets", [[], "", " , "], "at least one layer's name"),
        ("seed", [2**32], "less than 2**32"),
        ("epochs", [10**400], "a number"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused(tmp_path: Path, name: str, wrong: list[Any], allowed: str) -> None:
    for value in wrong:
        message = refused(tmp_path, yaml.safe_dump({name: value}))
        assert message.startswith(f": {name}=")
        assert f"must be {allowed}" in message
        assert len(message) < 200


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("warmup_steps: 5\nwarmup_ratio: 0.1", "warmup_steps=5 and warmup_ratio=0.1 say the same thing twice"),
        ("batch_size: 10\nmicro_batch_size: 4", "batch_size=10 is not a multiple of micro_batch_size=4"),
        ("batch_size: 2", "batch_size=2 is not a multiple of micro_batch_size=4"),
        ("method: full\nquantization: int8", "method=full cannot train a base in int8"),
        ("method: full\nquantization: nf4", "method=full cannot train a base in nf4"),
    ],
)
def test_a_contradiction_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    assert reason in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("learning_rat", "do you mean learning_rate?"),
        ("lr_scheduler", "do you mean lr_schedule?"),
        ("LORA_R", "there are base_model, output_dir"),
        ("zzzzzzzz", "there are base_model, output_dir"),
        (5, "there are base_model"),
        (None, "there are base_model"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path: Path, key: Any, hint: str) -> None:
    assert refused(tmp_path, yaml.safe_dump({key: 1})).startswith(f": unknown key {key!r}; {hint}")


@pytest.mark.parametrize(
    ("text", "line"),
    [("seed: 1\nepochs: 2\nseed: 1\n", 3), ("seed: 1\n'seed': 2", 2), ("{seed: 1, seed: 2}", 1)],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str, line: int) -> None:
    # PyYAML takes the last one silently.
    message = refused(tmp_path, text)
    assert "the key 'seed' stands here for the second time" in message
    assert f"line {line}," in message
    assert yaml.safe_load(text)["seed"]


@pytest.mark.parametrize("text", ["- seed: 1", "text", "5", "[]", "false", "0", "''", "2020-01-01"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert "not keys with values" in refused(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        *("seed: 'a", "seed: 1\n epochs: 2", "seed: *x", "{", "seed: 1\n---\nseed: 2", "seed: \x07", "? [a]\n: 1"),
        *("seed: 2020-13-45", "seed: " + "1" * 5000, "strict: !!bool x", "seed: !!int ''", "seed: !!timestamp x"),
        *("a: b: c", "!!map [a, b]", "!!map x", "[" * 5000),
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_what_is_not_yaml_is_refused(tmp_path: Path, text: str) -> None:
    assert refused(tmp_path, text).startswith(" cannot be read as YAML (")


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"data: \xe9\n")
    with pytest.raises(InputError, match=r"r\.yaml cannot be read as YAML"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("call", ["object/apply:os.mkdir", "object/new:os.mkdir"])
def test_a_tag_of_python_is_not_carried_out(tmp_path: Path, call: str) -> None:
    made = tmp_path / "made"
    text = f"seed: !!python/{call} ['{made}']"
    assert "could not determine a constructor" in refused(tmp_path, text)
    assert not made.exists()
    yaml.unsafe_load(text)  # the control: this text would
    assert made.exists()


@pytest.mark.parametrize("levels", [3, 30])
def test_aliases_that_multiply_do_not_fill_the_memory(tmp_path: Path, levels: int) -> None:
    text = "lora_targets:\n- &a0 [x, x]\n" + "".join(f"- &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, levels))
    assert len(refused(tmp_path, text)) < 1000


@pytest.mark.parametrize("name", ["missing", "", ".", "missing.yaml", "a\0b", "x" * 5000, "alpaca_lora.yaml"])
def test_a_missing_recipe_is_answered_with_the_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        load_recipe(name)
    assert str(error.value) == f"there is no recipe {name}: give a YAML file, or one of {', '.join(NAMES)}"


def test_a_folder_of_the_same_name_does_not_hide_a_shipped_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NAMES[0]).mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe(NAMES[0]) == load_recipe(RECIPES / f"{NAMES[0]}.yaml")


# Paths


@pytest.mark.parametrize("name", ["base_model", "output_dir", "data", "template"])
@pytest.mark.parametrize(
    ("written", "meant"),
    [("./a/b", "{folder}/a/b"), (".//a", "{folder}/a"), ("a/b", "a/b"), ("../a", "../a"), ("/a", "/a"), (".a", ".a")],
)
def test_a_path_that_begins_with_a_dot_is_beside_the_file(tmp_path: Path, name: str, written: str, meant: str) -> None:
    assert getattr(load(tmp_path, f"{name}: {written}"), name) == meant.format(folder=tmp_path)


@pytest.mark.parametrize("name", ["base_model", "output_dir", "data", "template"])
def test_a_flags_path_stays_where_it_was_after_the_recipe_was_saved(tmp_path: Path, name: str) -> None:
    # Read again from the output's folder, ./a had become that folder's: a resumed run was told to be another one.
    given = load(tmp_path, "", **{name: "./a/b"})
    assert getattr(given, name) == "a/b"
    assert load(tmp_path, as_yaml(given), "saved.yaml") == given
    built = dataclasses.replace(Recipe(), **{name: "./a/b"})  # type: ignore[arg-type]
    assert built == given


# There and back


def test_the_saved_recipe_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    for recipe in (Recipe(), Recipe(**TOGETHER), *map(load_recipe, NAMES)):
        assert load(tmp_path, as_yaml(recipe)) == recipe
        assert list(yaml.safe_load(as_yaml(recipe))) == list(FIELDS)


# PyYAML folds the line ends of Unicode, which no path has.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029"), max_size=12)
texts = texts.filter(lambda text: not text.startswith("./"))


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    base_model=texts,
    data=texts | st.sampled_from(["true", "1", "null", "2020-01-01", "a: b", "- x", "#", "!!int 1", "~", "1:30"]),
    learning_rate=st.floats(min_value=1e-30, max_value=1e30),
    lora_targets=st.lists(texts, min_size=1, max_size=3).map(tuple),
)
def test_any_recipe_is_the_same_after_saving(tmp_path: Path, **fields: Any) -> None:
    assert load(tmp_path, as_yaml(Recipe(**fields))) == Recipe(**fields)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    content=st.dictionaries(
        st.sampled_from(list(FIELDS)) | st.text(max_size=3) | st.none(),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.text(max_size=3)),
        max_size=5,
    )
)
def test_any_mapping_ends_in_a_recipe_or_an_input_error(content: dict[Any, Any]) -> None:
    try:
        recipe = make_recipe(content, where="here")
    except InputError as error:
        assert str(error).startswith("here: ")  # noqa: PT017 - others are recipes
    else:
        assert {type(getattr(recipe, name)) for name in content} <= {int, float, bool, str, tuple}


# Flags


def flags(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    add_recipe_flags(parser)
    return overrides(parser.parse_args(["name", *arguments]))


def as_argument(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("dashes", [True, False])
def test_each_field_has_a_flag_that_replaces_the_files_value(tmp_path: Path, name: str, dashes: bool) -> None:
    given = flags(f"--{name.replace('_', '-') if dashes else name}", as_argument(OTHER[name]))
    assert list(given) == [name]
    before = as_yaml(Recipe())
    assert load(tmp_path, before, **given) == dataclasses.replace(Recipe(), **{name: OTHER[name]})


def test_what_is_not_given_replaces_nothing(tmp_path: Path) -> None:
    assert flags() == {}
    assert load(tmp_path, as_yaml(Recipe(**TOGETHER)), **flags()) == Recipe(**TOGETHER)


@pytest.mark.parametrize(
    ("text", "value"), [("", True), ("true", True), ("True", True), ("false", False), ("FALSE", False)]
)
def test_a_flag_of_true_or_false_takes_both_and_stands_for_true_alone(text: str, value: bool) -> None:
    assert flags("--strict", *text.split()) == {"strict": value}


@pytest.mark.parametrize(
    "arguments",
    ["--strict yes", "--strict 1", "--seed 1.5", "--epochs x", "--method qlora", "--learningrate 1"],
)
def test_a_wrong_flag_ends_the_command(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        flags(*arguments.split())
    assert ended.value.code == 2
    assert arguments.split()[0] in capsys.readouterr().err


def test_a_flag_that_contradicts_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch_size=128 is not a multiple of micro_batch_size=3"):
        load(tmp_path, "batch_size: 128", **flags("--micro-batch-size", "3"))


def test_every_field_has_help_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # without breaks in words
    parser = argparse.ArgumentParser()
    add_recipe_flags(parser)
    text = " ".join(parser.format_help().split())
    for name, field in FIELDS.items():
        assert len(field.metadata["help"]) > 5
        assert field.metadata["help"] in text
        assert f"--{name.replace('_', '-')}" in text
        assert f"(default: {as_argument(field.default) or 'none'})" in text


# Batches


@pytest.mark.parametrize(("processes", "passes"), [(1, 32), (2, 16), (4, 8), (32, 1)])
def test_the_batch_is_divided_among_processes_and_passes(processes: int, passes: int) -> None:
    assert Recipe(batch_size=128, micro_batch_size=4).accumulation(processes) == passes


@pytest.mark.parametrize("processes", [3, 64])
def test_a_batch_that_does_not_divide_is_refused_with_the_numbers(processes: int) -> None:
    with pytest.raises(InputError) as error:
        Recipe(batch_size=128, micro_batch_size=4).accumulation(processes)
    for part in ("batch_size=128", f"{processes} processes", "micro_batch_size=4", f"a multiple of {4 * processes}"):
        assert part in str(error.value)

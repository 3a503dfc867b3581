"""What people really type: mistyped flags, flags of published scripts, names on the Hub, and commands in threads."""

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_runs import changed, tiny_recipe
from random_models import stock_config, tiny_config
from transformers import MistralConfig, get_scheduler

from conversion import convert, export, merge, tokenizer_folder, verify
from finetune import alpaca, chat, generate, plan
from finetune.published_flags import FLAGS, SCRIPTS
from finetune.recipe import FIELDS, RECIPES, Recipe, as_yaml, load_recipe, overrides, recipe_for_flags
from finetune.training import training_arguments
from hf_llama_repro import LlamaReproConfig, info, programs
from hf_llama_repro.command import Parser, run
from hf_llama_repro.errors import InputError
from hf_llama_repro.evaluation import command as evaluation
from hf_llama_repro.local_path import hub_hint, input_path
from hf_llama_repro.paper import report
from pretrain import train

COMMANDS: list[Any] = [
    alpaca,
    chat,
    convert,
    evaluation,
    export,
    generate,
    info,
    merge,
    plan,
    programs,
    report,
    tokenizer_folder,
    train,
    verify,
]
HUB = "meta-llama/Llama-2-7b-hf"


def refused(capsys: pytest.CaptureFixture[str], module: Any, *arguments: str) -> str:
    """The one line with which a command ends by exit code 2."""
    try:
        code = module.main(list(arguments))
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


# Flags


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_each_command_suggests_the_nearest_flag(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    long = [flag for flag in module.build_parser()._option_string_actions if len(flag) > 5]
    for flag in {long[0], long[-1]}:
        mistyped = flag[:-2] + flag[-1] + flag[-2] + "x"
        assert f"unknown flag {mistyped}; do you mean " in refused(capsys, module, mistyped)
        assert f"unknown flag {mistyped}; do you mean " in refused(capsys, module, f"{mistyped}=1")


@pytest.mark.parametrize(
    ("module", "arguments", "near"),
    [
        (alpaca, ["demo", "--learningrate", "1"], "--learning-rate"),
        (alpaca, ["demo", "--lora-target", "q_proj", "--batchsize", "2"], "--batch-size"),
        (alpaca, ["demo", "--cutof_len", "256"], "--cutoff_len"),
        (generate, ["folder", "--instrucion", "a required flag"], "--instruction"),
        (convert, ["a", "b", "--overwite"], "--overwrite"),
        (convert, ["a", "b", "-verfy"], "--verify"),
    ],
)
def test_a_mistyped_flag_is_told_apart_from_a_missing_one(
    module: Any, arguments: list[str], near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"do you mean {near}?" in refused(capsys, module, *arguments)


def test_values_that_look_like_flags_are_values(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser()
    parser.add_argument("texts", nargs="*")
    parser.add_argument("--number", type=int)
    parser.add_argument("--text")
    parsed = parser.parse_args(["--number", "-1", "--text=--unknown", "--unknown with a space", "--", "--unknown"])
    assert parsed.number == -1
    assert parsed.text == "--unknown"
    assert parsed.texts == ["--unknown with a space", "--unknown"]
    assert parser.parse_args(["--num", "3"]).number == 3


# Published command lines

ALPACA_LORA = """--base_model={base} --data_path={data} --output_dir={run} --batch_size=8 --micro_batch_size=4
    --num_epochs=2 --learning_rate=1e-4 --cutoff_len=128 --val_set_size=5 --lora_r=4 --lora_alpha=32
    --lora_dropout=0.1 --lora_target_modules=['q_proj','k_proj'] --train_on_inputs --add_eos_token False
    --group_by_length --wandb_project= --wandb_watch gradients --resume_from_checkpoint=None
    --prompt_template_name alpaca_short"""
STANFORD = """--model_name_or_path {base} --data_path {data} --bf16 True --output_dir {run} --num_train_epochs 3
    --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 8
    --evaluation_strategy no --save_strategy steps --save_steps 2000 --save_total_limit 1 --learning_rate 2e-5
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --fsdp full_shard
    --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer --tf32 True"""


def understood(line: str) -> tuple[Recipe, list[str]]:
    """The recipe that a published command line comes to, and what is said of it."""
    said: list[str] = []
    arguments = alpaca.build_parser().parse_args(line.split())
    name = arguments.recipe or recipe_for_flags(arguments, say=said.append)
    return load_recipe(name, overrides(arguments, say=said.append)), said


def test_a_command_line_of_alpaca_lora_means_here_what_it_meant_there() -> None:
    recipe, said = understood(ALPACA_LORA.format(base="base", data="data.json", run="run"))
    expected = {
        "base_model": "base",
        "data": "data.json",
        "output_dir": "run",
        "batch_size": 8,
        "micro_batch_size": 4,
        "epochs": 2.0,
        "learning_rate": 1e-4,
        "max_length": 128,
        "held_out": 5,
        "lora_r": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "lora_targets": ("q_proj", "k_proj"),
        "train_on_prompt": True,
        "template": "alpaca_short",
        "report_to": (),
        "quantization": "int8",
        "truncation": "response",
    }
    assert {name: getattr(recipe, name) for name in expected} == expected
    for part in ("alpaca_lora: the flags are those of alpaca-lora", "--group_by_length", "--add_eos_token", "wandb"):
        assert sum(part in line for line in said) == 1, (part, said)
    assert len(said) == 4


def test_a_command_line_of_stanford_alpaca_means_here_what_it_meant_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    line = STANFORD.format(base="base", data="data.json", run="run")
    recipe, said = understood(line)
    expected = {
        "base_model": "base",
        "data": "data.json",
        "method": "full",
        "template": "alpaca_legacy",
        "dtype": "bfloat16",
        "epochs": 3.0,
        "micro_batch_size": 4,
        "batch_size": 32,
        "eval_steps": 0,
        "save_steps": 2000,
        "save_total_limit": 2,
        "learning_rate": 2e-5,
        "weight_decay": 0.0,
        "warmup_ratio": 0.03,
        "lr_schedule": "cosine",
        "logging_steps": 1,
    }
    assert {name: getattr(recipe, name) for name in expected} == expected
    for flag in ("per_device_eval_batch_size", "fsdp", "fsdp_transformer_layer_cls_to_wrap", "tf32"):
        assert sum(f"--{flag} " in line for line in said) == 1, (flag, said)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert understood(line)[0].batch_size == 128


def test_a_published_command_line_trains(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ALPACA_LORA.format(base=tiny_base, data=tiny_data, run=tmp_path / "run")
    extra = "--quantization none --dtype float32 --max-steps 1"
    assert alpaca.main([*line.split(), *extra.split()]) == 0
    assert "flag        --group_by_length true: without effect here" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["lora_alpha"] == 32


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("--data_path d --base_model b --resume_from_checkpoint out/checkpoint-200", "use --resume"),
        ("--model_name_or_path b --evaluation_strategy epoch", "use --eval-steps N"),
        ("--model_name_or_path b --save_strategy epoch", "--save-steps"),
        ("--model_name_or_path b --deepspeed ds.json", "zero3.yaml"),
        ("--model_name_or_path b --overwrite_output_dir", "choose another --output-dir"),
        ("--model_name_or_path b --gradient_accumulation_steps 8", "--batch-size"),
        ("--model_name_or_path b --gradient_accumulation_steps x", "a whole number"),
        ("--model_name_or_path b --bf16 yes", "true or false"),
        ("--model_name_or_path b --bf16 --fp16", "--bf16 and --fp16 contradict each other"),
        ("--data_path a --data b --base_model b", "--data and --data_path contradict each other"),
        ("--lr_scheduler_type polynomial --model_name_or_path b", "one of linear, cosine, constant"),
        ("--base-model b --data d --output-dir o", "name a recipe"),
    ],
)
def test_what_cannot_be_meant_here_is_refused_with_what_to_use(
    line: str, instead: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert instead in refused(capsys, alpaca, *line.split())


def test_sharding_is_not_dropped_where_it_matters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    line = ["--model_name_or_path", "base", "--fsdp", "full_shard auto_wrap"]
    assert "fsdp2.yaml" in refused(capsys, alpaca, *line)


def test_every_published_flag_has_one_meaning() -> None:
    for name, flag in FLAGS.items():
        assert (flag.key in FIELDS) != (flag.read is not None), name
        assert name not in FIELDS, name
    for script in SCRIPTS:
        assert set(script.same) <= set(FIELDS)
        assert (RECIPES / f"{script.recipe}.yaml").is_file()
        assert all(FLAGS[name] == flag for name, flag in script.flags.items())


def test_published_flags_change_a_recipe_that_is_named() -> None:
    recipe, said = understood("explained --num_epochs 7 --lora_target_modules [v_proj]")
    assert (recipe.epochs, recipe.lora_targets, said) == (7.0, ("v_proj",), [])


def test_a_project_at_wandb_reaches_wandb() -> None:
    arguments = alpaca.build_parser().parse_args(["demo", "--wandb_project", "llamas", "--wandb_run_name=one"])
    assert overrides(arguments) == {"report_to": ("wandb",)}
    assert alpaca.environment(arguments) == {"WANDB_PROJECT": "llamas", "WANDB_NAME": "one"}


def test_a_constant_learning_rate_is_warmed_up(recipe: Recipe) -> None:
    arguments = training_arguments(changed(recipe, lr_schedule="constant", warmup_steps=4), 1, torch.float32)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(arguments.lr_scheduler_type, optimizer, int(arguments.warmup_steps), 12)
    rates = []
    for _ in range(12):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert rates == [0.0, 0.25, 0.5, 0.75, *[1.0] * 8]


def test_reporting_to_none_is_reporting_to_nobody(recipe: Recipe) -> None:
    assert Recipe(report_to=("none",)).report_to == ()
    with pytest.raises(InputError, match=r"report_to names tensorbord: one of .*tensorboard"):
        alpaca._check_reporting(Recipe(report_to=("tensorbord",)))


# Held-out records


def test_too_many_held_out_records_name_the_flag(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(as_yaml(tiny_recipe(Path(recipe.base_model), Path(recipe.data), tmp_path / "run", held_out=40)))
    for module in (alpaca, plan):
        error = refused(capsys, module, str(path))
        assert "held_out=40 leaves nothing of 40 records to train on: set --held-out to less, such as 4" in error


# Names on the Hub


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (convert, [HUB, "target"]),
        (convert, ["source", "target", "--tokenizer", HUB]),
        (export, [HUB, "target"]),
        (verify, [HUB, "target"]),
        (verify, ["source", HUB]),
        (merge, [HUB, "target"]),
        (merge, ["adapter", "target", "--base", HUB]),
        (tokenizer_folder, [HUB, "target", "--context-length", "64"]),
        (generate, [HUB, "--instruction", "x"]),
        (generate, ["folder", "--adapter", HUB, "--instruction", "x"]),
        (chat, [HUB]),
        (chat, ["folder", "--adapter", HUB]),
        (evaluation, [HUB]),
        (evaluation, ["folder", "--adapter", HUB]),
        (plan, [HUB]),
        (plan, ["alpaca_lora", "--base-model", HUB]),
        (alpaca, ["alpaca_lora", "--base-model", HUB, "--data", "x.json", "--output-dir", "out"]),
        (alpaca, ["alpaca_lora", "--base-model", "b", "--data", "yahma/alpaca-cleaned", "--output-dir", "out"]),
        (train, ["llama_7b", "--tokenizer", HUB, "--output-dir", "out"]),
    ],
)
def test_a_name_on_the_hub_is_recognised(
    module: Any,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused(capsys, module, *arguments)
    assert "names on the Hugging Face Hub are not supported yet: download it first with `hf download " in error
    assert ("--repo-type dataset" in error) == ("yahma/alpaca-cleaned" in arguments)
    assert not list(tmp_path.iterdir())


def test_what_can_be_a_path_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    local = [
        "runs/mistyped",
        "data/records.json",
        "out/adapter",
        "out/checkpoint-20",
        "a/b/c",
        "/a/b",
        "../a",
        "llama",
        "models/7b.gguf",
        "",
        ".",
    ]
    assert [path for path in local if hub_hint(path)] == []
    assert input_path("runs/mistyped") == Path("runs/mistyped")
    for address in (f"https://huggingface.co/{HUB}", f"https://huggingface.co/{HUB}/tree/main"):
        assert f"`hf download {HUB} --local-dir Llama-2-7b-hf`" in hub_hint(address)
        assert f"`hf download {HUB} --local-dir Llama-2-7b-hf`" in hub_hint(Path(address))
    assert "--repo-type dataset" in hub_hint("https://huggingface.co/datasets/yahma/alpaca-cleaned")


# Threads


def test_a_command_runs_in_a_thread(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(report.main(["llama-7b"])))
    thread.start()
    thread.join()
    assert codes == [0]
    assert "LLaMA 7B" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_in_the_main_thread_ends_by_sigterm_as_by_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run(lambda: os.kill(os.getpid(), signal.SIGTERM), interrupted="all is well") == 130
    assert "interrupted: all is well" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


# What libraries tell their developers


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """What transformers and bitsandbytes log; transformers' loggers do not hand on to the root's."""
    messages: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    ear, loggers = Ear(), [logging.getLogger(name) for name in ("transformers", "bitsandbytes")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(ear)
        logger.setLevel(logging.WARNING)
    yield messages
    for logger, level in zip(loggers, before, strict=True):
        logger.removeHandler(ear)
        logger.setLevel(level)


def test_stock_llama_folders_are_opened_by_our_class_without_a_warning(tmp_path: Path, heard: list[str]) -> None:
    stock_config(tiny_config()).save_pretrained(tmp_path)
    config = LlamaReproConfig.from_pretrained(tmp_path)
    assert config.model_type == "llama_repro"
    assert config == LlamaReproConfig(**{**config.to_dict(), "model_type": "llama_repro"})
    assert heard == []
    MistralConfig().save_pretrained(tmp_path)
    LlamaReproConfig.from_pretrained(tmp_path)  # what is no Llama is still told
    assert any("of type `mistral`" in message for message in heard)


def test_commands_keep_bitsandbytes_off_the_screen(heard: list[str]) -> None:
    noise = "Failed to load CPU gemm_4bit_forward from kernels-community"
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning(noise)
    assert heard == [noise]
    assert run(lambda: logging.getLogger("bitsandbytes.backends.cpu.ops").warning(noise)) == 0
    assert heard == [noise]

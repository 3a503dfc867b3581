"""Folders and programs beside ours: what is saved names only what is there, and launched processes know our classes."""

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from finetune_runs import ON_CPU
from peft import AdaptionPromptConfig, get_peft_model
from random_models import TOLERANCE, random_model, random_tokens, relative_difference, stock_twin, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.processes import CONFIGURATIONS
from hf_llama_repro import (
    LlamaReproConfig,
    LlamaReproForCausalLM,
    LlamaReproForSequenceClassification,
    programs,
)
from hf_llama_repro.configuration_llama_repro import AUTO_MAP

ROOT = Path(__file__).parent.parent
PACKAGE = Path(programs.__file__).parent


def saved_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / "config.json").read_text()).get("auto_map", {})


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configuration and models saved with their code, as the documentation of transformers has it."""
    for each in (LlamaReproConfig, LlamaReproForCausalLM, LlamaReproForSequenceClassification):
        monkeypatch.setattr(each, "_auto_class", None)  # so that it is undone afterwards
        each.register_for_auto_class()


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("model_class", [LlamaReproForCausalLM, LlamaReproForSequenceClassification])
def test_a_model_registered_by_default_is_not_what_auto_model_gives(tmp_path: Path, model_class: Any) -> None:
    random_model(tiny_config(), model_class).save_pretrained(tmp_path)
    assert saved_map(tmp_path) == AUTO_MAP
    assert saved_map(tmp_path)["AutoModel"].endswith(".LlamaReproModel")
    assert saved_map(tmp_path)["AutoModelForCausalLM"].endswith(".LlamaReproForCausalLM")
    assert {f"{reference.partition('.')[0]}.py" for reference in AUTO_MAP.values()} <= {
        path.name for path in tmp_path.iterdir()
    }


@pytest.mark.usefixtures("registered")
def test_a_configuration_saved_with_its_code_names_that_alone(tmp_path: Path) -> None:
    config = tiny_config()
    config.auto_map = dict(AUTO_MAP)
    config.save_pretrained(tmp_path)
    assert saved_map(tmp_path) == {"AutoConfig": AUTO_MAP["AutoConfig"]}
    assert [path.name for path in tmp_path.glob("*.py")] == ["configuration_llama_repro.py"]


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    """A folder with `auto_map` and the files that it names, as hf-llama-convert writes it."""
    folder = tmp_path / "converted"
    random_model().save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "auto_map": AUTO_MAP}))
    for reference in AUTO_MAP.values():
        name = f"{reference.partition('.')[0]}.py"
        (folder / name).write_bytes((ROOT / "hf_llama_repro" / name).read_bytes())
    return folder


def test_a_configuration_saved_without_its_model_points_to_no_missing_file(converted: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(converted)
    config.save_pretrained(tmp_path / "merged")
    assert saved_map(tmp_path / "merged") == {}
    assert type(AutoConfig.from_pretrained(tmp_path / "merged")) is LlamaReproConfig
    assert config.auto_map == AUTO_MAP  # the object is what it was


def test_saving_into_the_folder_of_the_code_keeps_naming_it(converted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    model.config.save_pretrained(converted)
    assert saved_map(converted) == AUTO_MAP
    model.save_pretrained(converted)
    assert saved_map(converted) == AUTO_MAP


def test_code_on_the_hub_is_still_named(tmp_path: Path) -> None:
    config = tiny_config()
    config.auto_map = {"AutoConfig": f"org/name--{AUTO_MAP['AutoConfig']}", "AutoTokenizer": ["mine.Tokenizer", None]}
    config.save_pretrained(tmp_path)
    assert saved_map(tmp_path) == {"AutoConfig": f"org/name--{AUTO_MAP['AutoConfig']}"}


# PEFT


def test_adaption_prompts_compute_what_they_compute_with_stock_llama() -> None:
    model = random_model(tiny_config(attention_dropout=0.0))
    tokens = random_tokens(model.config)
    outputs = []
    for base in (model, stock_twin(model)):
        torch.manual_seed(0)
        config = AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
        adapted: Any = get_peft_model(base, config)
        for name, parameter in adapted.named_parameters():
            if "adaption_gate" in name:
                parameter.data.fill_(0.7)  # it starts at 0, where prompts do nothing
        with torch.no_grad():
            logits = adapted.eval()(tokens).logits
            with adapted.disable_adapter():
                moved = (adapted(tokens).logits - logits).abs().max()
        generated = adapted.generate(input_ids=tokens, max_new_tokens=4, do_sample=False)
        outputs.append((logits, generated))
        assert moved > 0.1
    assert relative_difference(outputs[0][0], outputs[1][0]) < TOLERANCE
    assert torch.equal(outputs[0][1], outputs[1][1])


# Programs that start others

# Loading models replaces the module `transformers` that was imported before.
SEES = "import transformers; transformers.AutoConfig; import transformers; print(transformers.LlamaReproForCausalLM)"


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs a Python program inside of a program of hf-llama-run; what it prints."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(programs, "expose", lambda: None)  # in this process nothing is to change

    def run_child(code: str, **environment: str) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        command = [sys.executable, "-c", code]
        printed: list[str] = []

        def launch() -> None:
            finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
            printed.append(finished.stdout + finished.stderr)

        module = ModuleType("launching_program")
        module.main = launch  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        script = EntryPoint("launches", f"{module.__name__}:main", "console_scripts")
        monkeypatch.setattr(programs, "entry_points", lambda **_: [script])
        before = os.environ.get("PYTHONPATH")
        assert programs.main(["launches"]) is None
        assert os.environ.get("PYTHONPATH") == before
        return printed[0]

    return run_child


def test_a_process_that_a_program_starts_has_our_classes_in_transformers(child: Any) -> None:
    assert child(SEES).splitlines()[-1] == "<class 'hf_llama_repro.modeling_llama_repro.LlamaReproForCausalLM'>"


def test_other_python_processes_pay_next_to_nothing(child: Any) -> None:
    code = "import sys; print(sorted({'torch', 'transformers', 'hf_llama_repro'} & {*sys.modules}), sys.path)"
    loaded, _, path = child(code).partition("] ")
    assert loaded == "['hf_llama_repro'"
    assert "startup" not in path


def test_the_wheel_brings_the_startup_of_other_processes() -> None:
    tomllib = pytest.importorskip("tomllib")
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = {path for pattern in setuptools["package-data"]["hf_llama_repro"] for path in PACKAGE.glob(pattern)}
    assert programs.STARTUP / "sitecustomize.py" in files


def test_the_environments_own_sitecustomize_still_runs(child: Any, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text("print('its own')")
    printed = child("import sys; print('hf_llama_repro' in sys.modules)", PYTHONPATH=str(tmp_path / "own"))
    assert printed.split("\n")[:2] == ["its own", "True"]


@pytest.mark.slow
def test_accelerate_launches_processes_that_know_our_classes(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(f"{SEES}\n")
    launch = ["accelerate", "launch", "--config_file", str(CONFIGURATIONS / "ddp.yaml"), "--num_processes", "2"]
    assert run_program([*launch, "script.py"], tmp_path).stdout.count("LlamaReproForCausalLM'>") == 2


@pytest.mark.slow
def test_trl_trains_our_folder_by_its_command_line(tmp_path: Path, tiny_base: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text(json.dumps([{"prompt": "a b", "completion": " c"}] * 4))
    sft = ["trl", "sft", "--model_name_or_path", str(tiny_base), "--dataset_name", "data", "--output_dir", "out"]
    run_program([*sft, "--max_steps", "1", "--report_to", "none", "--use_cpu"], tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is LlamaReproForCausalLM


def run_program(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **ON_CPU, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [sys.executable, "-m", "hf_llama_repro.programs", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished

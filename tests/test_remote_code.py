"""A folder saved with its code opens with trust_remote_code=True where hf_llama_repro is not installed."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_models import random_model, random_tokens, tiny_config
from transformers import AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import hf_llama_repro
from hf_llama_repro import LlamaReproConfig, LlamaReproForCausalLM, LlamaReproModel

PACKAGE = Path(hf_llama_repro.__file__).parent
CODE_FILES = ["configuration_llama_repro.py", "modeling_llama_repro.py"]
AUTO_MAP = {
    "AutoConfig": "configuration_llama_repro.LlamaReproConfig",
    "AutoModel": "modeling_llama_repro.LlamaReproModel",
    "AutoModelForCausalLM": "modeling_llama_repro.LlamaReproForCausalLM",
}
code_files = pytest.mark.parametrize("name", CODE_FILES)

# Loads SOURCE, writes what it computes to OUTPUT; then saves to TARGET, loads that, and saves to SECOND_TARGET.
CLEAN_PROCESS = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_llama_repro":
            raise ImportError("hf_llama_repro is not installed here")
sys.meta_path.insert(0, Blocked())

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
tokens, source, output, *targets = torch.load(sys.argv[1])
results = {}
for number, folder in enumerate([source, *targets]):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    body = AutoModel.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        results[number] = {
            "config": type(config).__name__,
            "body": type(body).__name__,
            "logits": model(tokens).logits,
            "hidden": body(tokens).last_hidden_state,
            "generated": model.generate(tokens, max_new_tokens=8, do_sample=False),
        }
    if number < len(targets):
        model.save_pretrained(targets[number])
torch.save(results, output)
"""


def in_clean_process(folder: Path, *arguments) -> dict:
    """What a process without our package computes; its Hugging Face home is new and it starts elsewhere."""
    folder.mkdir()
    torch.save(arguments, folder / "arguments")
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-I", "-c", CLEAN_PROCESS, str(folder / "arguments")],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    return torch.load(folder / "output")


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(eos_token_id=None, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory) -> list[Path]:
    """Where the model was saved by us, by a process that loaded that, and by the same after loading its own."""
    root = tmp_path_factory.mktemp("remote")
    with pytest.MonkeyPatch.context() as patch:
        for each in (LlamaReproConfig, LlamaReproModel, LlamaReproForCausalLM):
            patch.setattr(each, "_auto_class", None)  # so that it is undone afterwards
        LlamaReproConfig.register_for_auto_class()
        LlamaReproModel.register_for_auto_class("AutoModel")
        LlamaReproForCausalLM.register_for_auto_class("AutoModelForCausalLM")
        model.save_pretrained(root / "first")
    return [root / "first", root / "second", root / "third"]


@pytest.fixture(scope="module")
def results(model, folders) -> dict[str, dict]:
    """What each folder gave when it was loaded, the third in a process of its own as well."""
    tokens, root = random_tokens(model.config), folders[0].parent
    process, other = root / "process", root / "other"
    saving = in_clean_process(process, tokens, str(folders[0]), str(process / "output"), *map(str, folders[1:]))
    loading = in_clean_process(other, tokens, str(folders[2]), str(other / "output"))
    return {
        "saved by us": saving[0],
        "saved again": saving[1],
        "saved by the same process again": saving[2],
        "loaded in another process": loading[0],
    }


LOADED = ["saved by us", "saved again", "saved by the same process again", "loaded in another process"]
loaded = pytest.mark.parametrize("folder", LOADED)


@loaded
def test_remote_code_computes_the_same_logits(folder, model, results, plain_paths):
    with torch.no_grad():
        assert torch.equal(results[folder]["logits"], model(random_tokens(model.config)).logits)


@loaded
def test_remote_base_model_computes_the_same_hidden_states(folder, model, results, plain_paths):
    with torch.no_grad():
        hidden = model.model(random_tokens(model.config)).last_hidden_state
    assert torch.equal(results[folder]["hidden"], hidden)


@loaded
def test_remote_code_generates_the_same(folder, model, results):
    expected = model.generate(random_tokens(model.config), max_new_tokens=8, do_sample=False)
    assert torch.equal(results[folder]["generated"], expected)


@loaded
def test_remote_classes_are_ours(folder, results):
    assert (results[folder]["config"], results[folder]["body"]) == ("LlamaReproConfig", "LlamaReproModel")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_auto_map_names_what_vllm_and_transformers_ask_for(number, folders, results):
    assert json.loads((folders[number] / "config.json").read_text())["auto_map"].items() >= AUTO_MAP.items()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_folder_holds_exactly_our_two_code_files(number, folders, results):
    assert sorted(path.name for path in folders[number].glob("*.py")) == CODE_FILES


@pytest.mark.parametrize("number", [0, 1, 2])
@code_files
def test_code_is_saved_as_it_is(name, number, folders, results):
    assert (folders[number] / name).read_bytes() == (PACKAGE / name).read_bytes()


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM])
def test_installed_package_is_used_instead_of_the_folders_code(auto_class, folders):
    loaded = auto_class.from_pretrained(folders[0])
    assert type(loaded).__module__ == "hf_llama_repro.modeling_llama_repro"


def test_folder_saved_again_without_its_code_does_not_point_to_it(folders, tmp_path):
    # The installed package opened it, so that no code is saved along: `auto_map` would name files that are not there.
    AutoModelForCausalLM.from_pretrained(folders[0]).save_pretrained(tmp_path)
    named = json.loads((tmp_path / "config.json").read_text()).get("auto_map", {}).values()
    assert {reference.partition(".")[0] + ".py" for reference in named} <= {path.name for path in tmp_path.iterdir()}


def test_folder_saved_without_registering_has_no_code(tmp_path):
    random_model().save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert not list(tmp_path.glob("*.py"))


# What transformers' loader of remote code can follow.


def imported_packages(name: str) -> set[str]:
    """Top-level packages imported anywhere in the file; of a relative import, its first word with the dot."""
    packages = set()
    for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            packages.add("." * node.level + (node.module or "").partition(".")[0])
    return packages


@code_files
def test_code_imports_only_what_every_transformers_user_has(name):
    allowed = {"torch", "transformers", "huggingface_hub", ".configuration_llama_repro", *sys.stdlib_module_names}
    assert imported_packages(name) - allowed == set()


@code_files
def test_transformers_finds_the_same_imports_as_python(name):
    # Its loader reads text with regular expressions: a line of a docstring can look like an import.
    path = PACKAGE / name
    found = {*get_imports(path), *(f".{module}" for module in get_relative_imports(path))}
    assert found - set(sys.stdlib_module_names) == imported_packages(name) - set(sys.stdlib_module_names)


@code_files
def test_no_line_of_a_text_looks_like_an_import(name):
    texts = [
        node.value
        for node in ast.walk(ast.parse((PACKAGE / name).read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    lines = [line for text in texts for line in text.splitlines()]
    assert [line for line in lines if re.match(r"\s*(from\s+\.|import\s)", line)] == []

"""Import directions, console scripts, and the commands that README shows."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

tomllib = pytest.importorskip("tomllib")  # of Python 3.11
ROOT = Path(__file__).parent.parent
# Folders that are installed inside of hf_llama_repro, under another name than in the checkout.
FOLDERS = [name for name in ("conversion", "finetune", "pretrain") if (ROOT / name).is_dir()]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCRIPTS = PROJECT["project"]["scripts"]


def sources(*folders):
    return [str(path.relative_to(ROOT)) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path):
    """(level, module) of every import of a file; level 1 is a sibling."""
    found = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def wrong_imports(found):
    """A folder has two names (in the checkout, and installed): its files may use neither."""
    return [
        (level, module)
        for level, module in found
        if level > 1 or (level == 0 and (module.split(".")[0] in FOLDERS or module.split(".")[:2] in INSTALLED))
    ]


INSTALLED = [["hf_llama_repro", folder] for folder in FOLDERS]


@pytest.mark.parametrize("path", sources(*FOLDERS))
def test_siblings_are_imported_relatively_and_the_model_by_its_package(path):
    assert wrong_imports(imports(path)) == []


@pytest.mark.parametrize(
    "wrong", [(0, "conversion"), (0, "conversion.keys"), (0, "hf_llama_repro.conversion"), (2, "x")]
)
def test_wrong_imports_would_be_seen(wrong):
    assert wrong_imports([(0, "torch"), (0, "hf_llama_repro.errors"), (1, "keys"), wrong]) == [wrong]


@pytest.mark.parametrize("path", sources("hf_llama_repro"))
def test_the_model_imports_none_of_the_folders(path):
    assert not [module for _, module in imports(path) if module.split(".")[0] in FOLDERS]


def checkout_name(module):
    """hf_llama_repro.conversion.convert is conversion.convert in the checkout."""
    folders = PROJECT["tool"]["setuptools"]["package-dir"]
    for installed, folder in folders.items():
        if module.startswith(f"{installed}."):
            return folder + module.removeprefix(installed)
    return module


@pytest.mark.parametrize("script", SCRIPTS)
def test_console_script_points_at_a_function(script):
    module, _, function = SCRIPTS[script].partition(":")
    assert callable(getattr(importlib.import_module(checkout_name(module)), function))


@pytest.mark.parametrize("script", SCRIPTS)
def test_parser_bears_the_scripts_name(script):
    module = importlib.import_module(checkout_name(SCRIPTS[script].partition(":")[0]))
    assert module.build_parser().prog == script


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_package_is_installed(folder):
    setuptools = PROJECT["tool"]["setuptools"]
    assert f"hf_llama_repro.{folder}" in setuptools["packages"]
    assert setuptools["package-dir"][f"hf_llama_repro.{folder}"] == folder


def test_every_package_inside_of_the_model_is_installed():
    inside = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "hf_llama_repro").rglob("__init__.py")}
    assert {folder.replace("/", ".") for folder in inside} <= set(PROJECT["tool"]["setuptools"]["packages"])


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def documented_commands():
    """(module, arguments) of every line in a code block of README and docs/ that runs one of our commands.

    What `accelerate launch` is to run counts as well; its own arguments go to its own parser.
    """
    text = "\n".join(page.read_text() for page in PAGES)
    modules = {script: checkout_name(target.partition(":")[0]) for script, target in SCRIPTS.items()}
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if not line.startswith(("python -m ", "accelerate launch ", *modules)):
                continue
            words = shlex.split(line, comments=True)
            if words[0] == "accelerate":
                launched = launch_command_parser().parse_args(words[2:])
                words = ["python", "-m", launched.training_script, *launched.training_script_args]
            if words[0] == "python" and words[2].split(".")[0] in (*FOLDERS, "hf_llama_repro"):
                found.append((checkout_name(words[2]), tuple(words[3:])))
            elif words[0] in modules:
                found.append((modules[words[0]], tuple(words[1:])))
    return found


def test_both_directions_and_training_by_several_are_shown():
    shown = {module for module, _ in documented_commands()}
    assert {"conversion.convert", "conversion.export", "finetune.alpaca"} <= shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("script", sorted(set(re.findall(r"examples/\w+\.py", "".join(p.read_text() for p in PAGES)))))
def test_example_that_a_page_names_is_there(script):
    assert (ROOT / script).is_file()


@pytest.mark.parametrize(("module", "arguments"), documented_commands(), ids=str)
def test_documented_command_is_accepted(module, arguments):
    importlib.import_module(module).build_parser().parse_args(arguments)

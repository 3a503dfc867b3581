"""The launcher for programs without plug-ins, the entry point for vLLM, and what vLLM reads in the model's source."""

import ast
import inspect
import logging
import socket
import sys
import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest

from hf_llama_repro import LlamaReproConfig, LlamaReproForCausalLM, programs
from hf_llama_repro.modeling_llama_repro import LlamaReproAttention

ROOT = Path(__file__).parent.parent
NAME = "LlamaReproForCausalLM"


def exposed():
    """Our classes that the module `transformers` has, by name."""
    return {name: value for name, value in vars(sys.modules["transformers"]).items() if name.startswith("LlamaRepro")}


@pytest.fixture
def unexposed(monkeypatch):
    """transformers without our classes among its attributes, and again so afterwards."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    yield
    for name in exposed():
        delattr(sys.modules["transformers"], name)


@pytest.fixture
def scripts(monkeypatch):
    """Console scripts by name, in place of those of the environment."""
    found = {}

    def entry_points(*, group, name):
        assert group == "console_scripts"
        return [found[name]] if name in found else []

    monkeypatch.setattr(programs, "entry_points", entry_points)
    return found


def script(name, function):
    """An entry point that gives `function`."""
    module = ModuleType(f"program_{name}")
    module.main = function
    sys.modules[module.__name__] = module
    return EntryPoint(name, f"{module.__name__}:main", "console_scripts")


def test_a_program_finds_our_class_as_an_attribute_of_transformers(unexposed, scripts):
    assert not exposed()
    seen = []
    scripts["asks"] = script("asks", lambda: seen.append((exposed()[NAME], sys.argv)))
    assert not programs.main(["asks", "serve", "--port", "9", "FOLDER", "--help"])
    assert seen == [(LlamaReproForCausalLM, ["asks", "serve", "--port", "9", "FOLDER", "--help"])]


def test_a_program_ends_as_it_ends_by_itself(unexposed, scripts):
    scripts["fails"] = script("fails", lambda: 7)
    assert programs.main(["fails"]) == 7


@pytest.mark.parametrize(
    ("program", "remedy"),
    [("lm_eval", "hf-llama-repro[eval]"), ("transformers", "hf-llama-repro[serve]"), ("other", "environment of")],
)
def test_a_program_that_is_not_there_ends_in_one_line(scripts, capsys, program, remedy):
    assert programs.main([program]) == 2
    error = capsys.readouterr().err
    assert program in error
    assert remedy in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("version", ["0.4.9", "0.5.0"])
def test_a_version_outside_of_the_range_ends_in_one_line(scripts, capsys, monkeypatch, version):
    scripts["lm_eval"] = script("lm_eval", lambda: pytest.fail("was run"))
    monkeypatch.setattr(programs, "version", lambda name: version)
    assert programs.main(["lm_eval"]) == 2
    error = capsys.readouterr().err
    assert f"{version} is outside of >=0.4.13,<0.5" in error
    assert "pip install" in error
    assert error.count("\n") == 1


@pytest.fixture
def serve(unexposed, scripts, monkeypatch):
    """`hf-llama-run transformers serve` with these arguments; 5 where it came to be run."""
    scripts["transformers"] = script("transformers", lambda: 5)
    there = dict.fromkeys(programs.SERVING, True)
    monkeypatch.setattr(programs, "find_spec", there.get)
    return there, lambda *arguments: programs.main(["transformers", "serve", "FOLDER", *arguments])


@pytest.mark.parametrize("form", [["--port", "{}"], ["--port={}"]], ids=["space", "equals"])
def test_a_port_in_use_ends_in_one_line(serve, capsys, form):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = ["--host", "127.0.0.1", *(part.format(port) for part in form)]
        assert serve[1](*arguments) == 2
        error = capsys.readouterr().err
        assert f"port {port} of 127.0.0.1 cannot be had" in error
        assert error.count("\n") == 1
    assert serve[1](*arguments) == 5


def test_serving_without_its_packages_ends_in_one_line(serve, capsys):
    serve[0].pop("uvicorn")
    serve[0]["uvicorn"] = None
    assert serve[1]("--port", "0") == 2
    assert "needs uvicorn: pip install 'hf-llama-repro[serve]'" in capsys.readouterr().err


def test_help_of_serve_needs_no_packages(serve):
    serve[0].clear()
    assert serve[1]("--help") == 5


@pytest.fixture
def vllm(monkeypatch):
    """A vLLM that notes what is registered."""
    module = ModuleType("vllm")
    module.__version__ = "0.32.0+cpu"
    module.registered = {}

    class ModelRegistry:
        register_model = staticmethod(module.registered.__setitem__)

    module.ModelRegistry = ModelRegistry
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def test_the_entry_point_registers_the_architecture_that_folders_name(vllm, caplog):
    tomllib = pytest.importorskip("tomllib")
    plugins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    for name, target in plugins.items():
        EntryPoint(name, target, "vllm.general_plugins").load()()
    assert vllm.registered == {NAME: "vllm.model_executor.models.transformers:TransformersForCausalLM"}
    assert LlamaReproForCausalLM.__name__ == NAME
    assert not caplog.records


def test_registering_twice_is_harmless(vllm):
    programs.register_with_vllm()
    programs.register_with_vllm()
    assert list(vllm.registered) == [NAME]


def test_another_vllm_is_told_of_and_registered_with_all_the_same(vllm, caplog):
    vllm.__version__ = "0.40.1"
    with caplog.at_level(logging.WARNING):
        programs.register_with_vllm()
    assert "vLLM 0.40.1 is outside of >=0.32,<0.33" in caplog.text
    assert NAME in vllm.registered


def read_by_vllm(source):
    """The call of the attention interface as vLLM 0.32 finds it: by a name assigned from the lookup alone, once."""
    tree = ast.parse(textwrap.dedent(source))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            value = node.value.func if isinstance(node.value, ast.Call) else node.value
            if isinstance(value, ast.Attribute) and ast.unparse(value.value) == "ALL_ATTENTION_FUNCTIONS":
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {target.id for target in targets}
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]
    return calls[0] if len(calls) == 1 else None


def test_vllm_finds_the_attention_and_its_scale():
    call = read_by_vllm(inspect.getsource(LlamaReproAttention.forward))
    (scaling,) = (keyword.value for keyword in call.keywords if keyword.arg == "scaling")
    assert ast.unparse(scaling) == "self.scaling"
    config = LlamaReproConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
    attention = LlamaReproAttention(config, layer_idx=3)
    assert attention.scaling == 16**-0.5
    assert attention.layer_idx == 3
    assert attention.config is config


@pytest.mark.parametrize(
    "source",
    [
        "interface = FAST.get(name) or ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)\ninterface(self)",
        "interface = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)\ninterface(self)\ninterface(self)",
    ],
    ids=["assigned with something else", "called twice"],
)
def test_what_vllm_does_not_find_would_be_seen(source):
    assert read_by_vllm(source) is None

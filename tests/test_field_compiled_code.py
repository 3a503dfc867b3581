"""The compiled code for CPUs: which library is taken, what is refused, and what is raised where memory ends."""

import ast
import copy
import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from random_models import ARCHITECTURES, random_model, random_tokens, relative_difference, tiny_config
from transformers import DynamicCache

from hf_llama_repro import cpu_kernel, info, optimize
from hf_llama_repro.cpu_kernel import HAS_AMX, HAS_AVX2, HAS_AVX512_BF16, LIBRARIES, KernelError
from hf_llama_repro.modeling_llama_repro import CACHE

ROOT = Path(__file__).parent.parent
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
HUGE = 1 << 50  # values: more than a process has addresses for


@pytest.fixture
def fresh(monkeypatch):
    """The library is looked for anew, with what a test patches, and once more after it."""
    cached = [getattr(cpu_kernel, name) for name in ("load", "variant", "_opened", "available", "most_tokens")]

    def forget():
        for function in cached:
            function.cache_clear()

    forget()
    yield monkeypatch
    monkeypatch.undo()
    forget()


def chosen(monkeypatch, name: str) -> None:
    monkeypatch.setenv(cpu_kernel.SWITCH, name)
    try:
        assert cpu_kernel.variant() == name
    except KernelError as error:
        if "does not run it" not in str(error):
            raise
        pytest.skip(str(error))


# Each library that this processor runs.

every_library = pytest.mark.parametrize("name", LIBRARIES)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


@every_library
@dtypes
@pytest.mark.parametrize("int8", [False, True])
def test_field_every_library_decodes_as_pytorch(name, dtype, int8, fresh):
    chosen(fresh, name)
    model = random_model(tiny_config(**ARCHITECTURES["9/3"])).to(dtype)
    tokens = random_tokens(model.config, batch=1, seq=3)  # as many as take activations of 16 bits with 8-bit weights
    with torch.no_grad():
        for module in model.modules():
            if int8 and isinstance(module, torch.nn.Linear):  # to weights that 8 bits hold
                factor = module.weight.float().abs().amax(dim=1, keepdim=True) / 127
                module.weight.copy_((module.weight / factor).round() * factor)
        expected = copy.deepcopy(model).float()(tokens).logits
        logits = optimize(model, int8=int8)(input_ids=tokens).logits
    assert relative_difference(logits, expected) < (1e-3 if int8 and dtype == torch.float32 else TOLERANCE[dtype])


@every_library
@dtypes
def test_field_every_library_multiplies_and_attends_as_pytorch(name, dtype, fresh):
    chosen(fresh, name)
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 7):
        x, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((1, tokens, 83), (70, 83)))
        expected = F.linear(x.float(), weight.float())
        assert relative_difference(cpu_kernel.linear(x, weight, None), expected) < TOLERANCE[dtype]
    query, key, value = (torch.randn(2, heads, 37, 20, generator=generator).to(dtype) for heads in (9, 3, 3))
    expected = F.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), is_causal=True, enable_gqa=True, scale=0.2
    )
    output = cpu_kernel.attention(query, key, value, None, 0.2)
    assert relative_difference(output.transpose(1, 2), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("processor", "name", "tokens"),
    [
        (0, "generic", 48),
        (HAS_AVX2, "avx2", 48),
        (HAS_AVX2 | HAS_AVX512_BF16, "avx512_bf16", 48),
        (HAS_AVX2 | HAS_AVX512_BF16 | HAS_AMX, "avx512_bf16", 16),
    ],
)
def test_field_the_processors_features_choose_the_library(processor, name, tokens, fresh):
    fresh.setattr(cpu_kernel, "_file", lambda name: Path(__file__))  # all are built
    fresh.setattr(cpu_kernel, "_opened", lambda name: SimpleNamespace(llama_repro_processor=lambda: processor))
    assert cpu_kernel.variant() == name
    assert cpu_kernel.most_tokens() == tokens
    lacking = next((other for other, kind in LIBRARIES.items() if kind.needs & ~processor), None)
    if lacking:
        cpu_kernel.variant.cache_clear()
        fresh.setenv(cpu_kernel.SWITCH, lacking)
        with pytest.raises(KernelError, match=f"{lacking} in the environment: this processor does not run it"):
            cpu_kernel.variant()


def test_field_the_build_has_every_library_by_name():
    (assigned,) = (
        node.value
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LIBRARIES"
    )
    assert set(ast.literal_eval(assigned)) == {"generic"}
    text = (ROOT / "setup.py").read_text()
    assert all(f'LIBRARIES["{name}"]' in text for name in set(LIBRARIES) - {"generic"})


def test_field_info_says_which_compiled_code_is_used(fresh):
    assert LIBRARIES[cpu_kernel.variant()].description in info.integrations()["compiled CPU kernels"]
    cpu_kernel.variant.cache_clear()
    fresh.setenv(cpu_kernel.SWITCH, "generic")
    assert info.integrations()["compiled CPU kernels"].startswith("yes: for any ")


# Nothing is compiled where the package is used, and without the libraries PyTorch computes.


def test_field_a_forward_pass_runs_no_compiler(fresh, tmp_path):
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path))
    fresh.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail(f"a process was started: {args}"))
    model = random_model(tiny_config())
    tokens = random_tokens(model.config, batch=1, seq=8)
    with torch.no_grad():
        model(tokens)
        optimize(model)(input_ids=tokens)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ("on", "was not built when this package was installed: install a wheel"),
        ("off", "switched off by HF_LLAMA_REPRO_FAST=off"),
        ("fast", "is 'fast', which is none of on, off, avx512_bf16, avx2, generic"),
    ],
)
def test_field_without_compiled_code_the_model_computes_and_says_why(environment, message, fresh, tmp_path):
    model = random_model(tiny_config(eos_token_id=None))
    prompt = random_tokens(model.config, batch=1, seq=8)
    expected = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for function in (cpu_kernel.load, cpu_kernel.variant, cpu_kernel.available, cpu_kernel.most_tokens):
        function.cache_clear()
    warned = []
    fresh.setattr(cpu_kernel, "FOLDER", tmp_path)
    fresh.setattr(cpu_kernel.logger, "warning", lambda text, *values: warned.append(text % values))
    fresh.setenv(cpu_kernel.SWITCH, environment)
    with pytest.raises(KernelError, match=message):
        optimize(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)
    assert len(warned) == 1
    assert message in warned[0]
    line = info.integrations()["compiled CPU kernels"]
    assert line.startswith("no: ")
    assert message in line
    assert len(line) < 270  # in the report, beside its name


def build_without_compiler(folder: Path) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder / "aside"),
    ]
    environment = {**os.environ, "CC": "false", "CXX": "false"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_field_a_build_without_a_compiler_goes_on_and_leaves_no_older_library(tmp_path):
    older = tmp_path / "hf_llama_repro/kernel/generic.so"
    older.parent.mkdir(parents=True)
    older.write_bytes(b"of other sources")
    done = build_without_compiler(tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'building extension "hf_llama_repro.kernel.generic" failed' in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.so"))


# What does not fit is refused.


def test_field_a_damaged_library_is_named(fresh, tmp_path):
    (tmp_path / "generic.so").write_bytes(b"\x7fELF")
    fresh.setattr(cpu_kernel, "FOLDER", tmp_path)
    with pytest.raises(KernelError, match=r"generic\.so cannot be loaded \(.*\): install a wheel"):
        cpu_kernel.load()


def test_field_where_pytorch_hides_its_openmp_the_library_is_joined_with_it_all_the_same(fresh):
    seen, shown, load = [], [], ctypes.CDLL

    def hidden(file, mode=ctypes.DEFAULT_MODE):
        if mode == ctypes.RTLD_GLOBAL:
            shown.append(file)
        elif not shown:
            raise OSError("undefined symbol: GOMP_parallel")
        seen.append(file)
        return load(file, mode)

    fresh.setattr(ctypes, "CDLL", hidden)
    cpu_kernel.load()
    assert len(shown) == 1
    assert "omp" in shown[0]
    assert [Path(file).parent.name for file in seen[1:]] == ["kernel"] * 2  # the one that chooses, and the chosen


class LongerStep(ctypes.Structure):
    _fields_ = [*cpu_kernel.Step._fields_, ("more", ctypes.c_int64)]


@pytest.mark.parametrize("change", ["size", "meaning", "older than the check"])
def test_field_a_library_of_other_structures_is_refused(change, fresh):
    if change == "size":
        others = (LongerStep if kind is cpu_kernel.Step else kind for kind in cpu_kernel.STRUCTURES)
        fresh.setattr(cpu_kernel, "STRUCTURES", tuple(others))
    elif change == "meaning":
        fresh.setattr(cpu_kernel, "ABI", cpu_kernel.ABI + 1)
    else:
        fresh.setattr(ctypes, "CDLL", lambda *_: SimpleNamespace())
    with pytest.raises(KernelError, match=r"was built from other sources than .*cpu_kernel\.py"):
        cpu_kernel.load()
    assert not cpu_kernel.available()


# Where memory ends: an exception, and the process goes on. In the threads' own memory, and in what they share.


def forward(**sizes: int) -> None:
    """A model without layers, whose numbers nothing reads before the memory is there."""
    dimensions = {
        "hidden": 8,
        "heads": 1,
        "kv_heads": 1,
        "head_dim": 8,
        "intermediate": 8,
        "batch": 1,
        "seq": 1,
        "past": 0,
    }
    dimensions.update(sizes)
    fields = [{name for name, _ in structure._fields_} for structure in (cpu_kernel.Model, cpu_kernel.Step)]
    model, step = ({name: value for name, value in dimensions.items() if name in own} for own in fields)
    cpu_kernel.load().llama_repro_forward(
        ctypes.byref(cpu_kernel.Model(**model)), ctypes.byref(cpu_kernel.Step(threads=2, **step))
    )


def attention(**sizes: int) -> None:
    dimensions = {"batch": 1, "heads": 1, "kv_heads": 1, "seq": 1, "total": 1, "head_dim": 8, "threads": 2, **sizes}
    cpu_kernel.load().llama_repro_attention(ctypes.byref(cpu_kernel.Attention(**dimensions)))


def linear(tokens: int) -> None:
    cpu_kernel.load().llama_repro_linear(None, None, None, None, 8, 8, tokens, 0, 2)


EXHAUSTED = {
    "linear": lambda: linear(HUGE),
    "forward, shared": lambda: forward(past=HUGE),
    "forward, of a thread": lambda: forward(hidden=HUGE),
    "forward, beyond a vector": lambda: forward(hidden=1 << 62),
    "attention, shared": lambda: attention(total=HUGE),
    "attention, of a thread": lambda: attention(total=HUGE, head_dim=0),
}


@every_library
@pytest.mark.parametrize("case", EXHAUSTED)
def test_field_exhausted_memory_raises_and_the_next_call_computes(case, name, fresh):
    chosen(fresh, name)
    with pytest.raises(MemoryError, match=f"llama_repro_{case.partition(',')[0]} .*found no memory"):
        EXHAUSTED[case]()
    x, weight = torch.ones(1, 1, 8), torch.ones(4, 8)
    assert torch.equal(cpu_kernel.linear(x, weight, None), torch.full((1, 1, 4), 8.0))


def exhausted(*_: object) -> None:
    raise MemoryError


@pytest.mark.parametrize("past", [0, 5])
def test_field_exhausted_memory_leaves_the_cache_as_it_was(past, monkeypatch):
    model = optimize(random_model(tiny_config()))
    cache, tokens = DynamicCache(config=model.config), random_tokens(model.config, batch=1, seq=past + 1)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        if past:
            model(input_ids=tokens[:, :past], **{CACHE: cache})
        with monkeypatch.context() as patch:
            patch.setattr(cpu_kernel, "load", lambda: SimpleNamespace(llama_repro_forward=exhausted))
            with pytest.raises(MemoryError):
                model(input_ids=tokens[:, past:], **{CACHE: cache})
        assert cache.get_seq_length() == past
        logits = model(input_ids=tokens[:, past:], **{CACHE: cache}).logits
    assert relative_difference(logits[:, -1], expected[:, -1]) < TOLERANCE[torch.float32]


def test_field_any_other_failure_raises_too():
    with pytest.raises(RuntimeError, match="llama_repro_linear of the compiled CPU code failed with code 2"):
        cpu_kernel._raise_if_failed(2, cpu_kernel.load().llama_repro_linear, ())


# PyTorch's private functions are not called while a module is imported.


def private_calls_of_import(source: str) -> list[str]:
    """The calls of `torch.…._name` that run when the module does: outside of functions, but in their decorators."""
    found, waiting = [], list(ast.parse(source).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += [*node.decorator_list, node.args]
        elif not isinstance(node, ast.Lambda):
            waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.startswith("torch.") and any(part.startswith("_") for part in called.split(".")):
                found.append(called)
    return found


def test_field_no_import_calls_a_private_function_of_pytorch():
    for folder in ("hf_llama_repro", "conversion", "finetune", "pretrain"):
        for path in (ROOT / folder).rglob("*.py"):
            assert private_calls_of_import(path.read_text()) == [], path


def test_field_such_a_call_would_be_seen():
    assert private_calls_of_import("A = 16 if torch.cpu._is_amx_tile_supported() else 48") == [
        "torch.cpu._is_amx_tile_supported"
    ]
    assert (
        private_calls_of_import("class A:\n    b = [torch._C.c()]\n\n    def f(self, x=torch._d()): torch._e()") != []
    )
    assert private_calls_of_import("def f(): return torch.cpu._is_amx_tile_supported()\ng = lambda: torch._a()") == []

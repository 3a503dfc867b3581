"""The compiled code for decoding on a CPU: built by the machine's C++ compiler when first needed, then kept.

PyTorch multiplies one row with a matrix at a third of the speed of the memory; `kernel/` reads at all of it.
Where no compiler is, `load` says why, and the model computes with PyTorch alone.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging

from .errors import InputError

logger = logging.get_logger(__name__)

SOURCES = Path(__file__).with_name("kernel")
# Not -ffast-math: linked into a library it would make denormal numbers zero in all of the process.
FLAGS = [
    *("-std=gnu++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-w"),
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"),
]
COMPILERS = ("c++", "g++", "clang++")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # enum Dtype
FLOATS = (torch.float32, torch.bfloat16)
SWITCH = "HF_LLAMA_REPRO_FAST"
"""In the environment; `off`: the model computes by PyTorch alone, to the bit as stock Llama does."""


class KernelError(InputError):
    """The compiled code is not to be had; says why and what to do."""


class Linear(ctypes.Structure):
    """A weight matrix where it lies: see `struct Linear`."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


class Layer(ctypes.Structure):
    """See `struct Layer`."""

    _fields_ = [
        *((name, Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        ("input_norm", ctypes.c_void_p),
        ("post_attention_norm", ctypes.c_void_p),
    ]


class Model(ctypes.Structure):
    """See `struct Model`."""

    _fields_ = [
        ("layers", ctypes.POINTER(Layer)),
        ("norm", ctypes.c_void_p),
        ("head", Linear),
        *((name, ctypes.c_int64) for name in ("num_layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate")),
        ("eps", ctypes.c_float),
        ("scaling", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    ]


class Step(ctypes.Structure):
    """See `struct Step`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("hidden", "cos", "sin", "mask", "keys", "values", "logits")),
        *((name, ctypes.c_int64) for name in ("batch", "seq", "past", "capacity", "kept", "angles_batch")),
        ("threads", ctypes.c_int32),
    ]


class Attention(ctypes.Structure):
    """See `struct Attention`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "mask", "output")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "seq", "total", "head_dim")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("query", "key", "value", "mask")),
        ("scaling", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


_pointer, _number = ctypes.c_void_p, ctypes.c_int64
SIGNATURES = {
    "llama_repro_forward": [ctypes.POINTER(Model), ctypes.POINTER(Step)],
    # weight, bias, inputs, outputs, rows, columns, tokens, dtype, threads
    "llama_repro_linear": [_pointer] * 4 + [_number] * 3 + [ctypes.c_int32] * 2,
    "llama_repro_attention": [ctypes.POINTER(Attention)],
}


@functools.cache
def load() -> ctypes.CDLL:
    """The library, built if it is not there yet (6 s). `KernelError` says why there is none."""
    if switched_off():
        raise KernelError(f"the compiled CPU code is switched off by {SWITCH}=off in the environment: unset it")
    named = shlex.split(os.environ.get("CXX", ""))  # with arguments, as make takes it
    compiler = named or [name for name in COMPILERS if shutil.which(name)][:1]
    if platform.system() == "Windows" or not compiler or shutil.which(compiler[0]) is None:
        looked_for = " ".join(named) or ", ".join(COMPILERS)
        raise KernelError(
            f"no C++ compiler was found (looked for {looked_for}), which a CPU's full speed needs: install one "
            "(Debian, Ubuntu: apt install g++), or name one in CXX"
        )
    file = _built(compiler)
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        raise KernelError(f"{file} cannot be loaded ({error}): remove it, and it is built again") from error
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def switched_off() -> bool:
    return os.environ.get(SWITCH, "on") == "off"


@functools.cache
def available() -> bool:
    """Whether the compiled code is there; builds it. A failure is logged, once."""
    try:
        load()
    except KernelError as error:
        logger.warning("hf_llama_repro computes by PyTorch alone: %s", error)
        return False
    return True


def cache_folder() -> Path:
    """Where what was built is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_llama_repro"


def _built(compiler: list[str]) -> Path:
    """The library's file. Its name tells source, flags, compiler and processor: a home may be shared by machines."""
    version = _run([*compiler, "--version"]).splitlines()[0]
    parts = [
        *(file.read_text() for file in sorted(SOURCES.iterdir())),
        *FLAGS,
        version,
        platform.machine(),
        _processor(),
    ]
    name = f"cpu_kernel-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    folder = cache_folder()
    if (folder / name).is_file():
        return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            logger.warning_once("hf_llama_repro: compiling its code for this CPU, once (some 6 s)")
            _run([*compiler, *FLAGS, str(SOURCES / "kernel.cpp"), "-o", str(Path(aside) / name), "-lm"])
            with open(Path(aside) / name, "rb") as file:
                os.fsync(file.fileno())  # a library that a power cut made shorter kills the process that loads it
            os.replace(Path(aside) / name, folder / name)  # whole, whoever else is building it
    except OSError as error:
        raise KernelError(
            f"{folder} cannot be written ({error.strerror}): set XDG_CACHE_HOME to a folder that can"
        ) from error
    return folder / name


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError(
            f"the C++ compiler failed with exit code {done.returncode}: {' '.join(command)}\n"
            f"{done.stderr.strip()[:1000]}\nName another compiler in CXX"
        )
    return done.stdout


def _processor() -> str:
    """What -march=native depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else [platform.processor()]
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` of few rows (..., columns), fp32 or bf16; sums are fp32."""
    rows, columns = weight.shape
    x = x.contiguous()
    outputs = x.new_empty(*x.shape[:-1], rows)
    load().llama_repro_linear(
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x.data_ptr(),
        outputs.data_ptr(),
        rows,
        columns,
        x.numel() // columns,
        DTYPES[weight.dtype],
        torch.get_num_threads(),
    )
    return outputs


def attention(
    query: torch.Tensor,  # (batch, heads, seq, head_dim)
    key: torch.Tensor,  # (batch, kv_heads, total, head_dim)
    value: torch.Tensor,
    mask: torch.Tensor | None,  # bool, (batch, 1 or heads, seq, total); None: causal, and total is seq
    scaling: float,
) -> torch.Tensor:
    """softmax(QK^T * scaling) V, (batch, seq, heads, head_dim), of fp32 or bf16 tensors; head_dim is even."""
    batch, heads, seq, head_dim = query.shape
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    output = query.new_empty(batch, seq, heads, head_dim)
    if mask is not None:
        mask = mask.expand(batch, heads, seq, key.shape[2])
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    strides = [(_number * 3)(*x.stride()[:3]) if x is not None else (_number * 3)() for x in (query, key, value, mask)]
    work = Attention(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), None if mask is None else mask.data_ptr(),
        output.data_ptr(), batch, heads, key.shape[1], seq, key.shape[2], head_dim, *strides, scaling,
        DTYPES[query.dtype], torch.get_num_threads(),
    )  # fmt: skip
    load().llama_repro_attention(ctypes.byref(work))
    return output

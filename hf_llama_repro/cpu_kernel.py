"""The compiled code for decoding on a CPU: a library for each kind of processor, built with the package (`setup.py`).

PyTorch multiplies one row with a matrix at a third of the speed of the memory; `kernel/` reads at all of it.
Where none is, `load` says why, and the model computes with PyTorch alone.
"""

import ctypes
import functools
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from .errors import InputError

logger = logging.get_logger(__name__)

FOLDER = Path(__file__).with_name("kernel")
HAS_AVX2, HAS_AVX512_BF16, HAS_AMX = 1, 2, 4  # enum Processor


class Kind(NamedTuple):
    """Processors that a library is for."""

    needs: int  # of enum Processor
    description: str


# Name of the library -> for which processors; the first that is there and runs here is taken.
LIBRARIES = {
    "avx512_bf16": Kind(HAS_AVX512_BF16, "AVX-512 with bf16"),
    "avx2": Kind(HAS_AVX2, "AVX2"),
    "generic": Kind(0, f"any {platform.machine()}"),
}
ABI = 1
"""Raised, with that of `kernel.cpp`, by every change of what the structures or the arguments below mean."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # enum Dtype
FLOATS = (torch.float32, torch.bfloat16)
SWITCH = "HF_LLAMA_REPRO_FAST"
"""In the environment; `off`: the model computes by PyTorch alone, to the bit as stock Llama does. One of `LIBRARIES`:
that one is used."""
REBUILD = (
    "install a wheel for this platform; or a C++ compiler with OpenMP (Debian, Ubuntu: apt install g++), and then this "
    "package again (in a checkout: pip install -e .)"
)


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


STRUCTURES: tuple[type[ctypes.Structure], ...] = (Linear, Layer, Model, Step, Attention)
"""In the order in which `llama_repro_abi` tells their sizes."""
_pointer, _number = ctypes.c_void_p, ctypes.c_int64
SIGNATURES = {
    "llama_repro_forward": [ctypes.POINTER(Model), ctypes.POINTER(Step)],
    # weight, bias, inputs, outputs, rows, columns, tokens, dtype, threads
    "llama_repro_linear": [_pointer] * 4 + [_number] * 3 + [ctypes.c_int32] * 2,
    "llama_repro_attention": [ctypes.POINTER(Attention)],
}
NO_MEMORY = 1  # enum Outcome


@functools.cache
def load() -> ctypes.CDLL:
    """The library for this processor. `KernelError` says why there is none."""
    return _opened(variant())


@functools.cache
def variant() -> str:
    """Which of `LIBRARIES` is used: the first that was built and that the processor runs, or the one named."""
    wanted = os.environ.get(SWITCH, "on")
    if wanted == "off":
        raise KernelError(f"the compiled CPU code is switched off by {SWITCH}=off in the environment: unset it")
    if wanted not in ("on", *LIBRARIES):
        allowed = ", ".join(("on", "off", *LIBRARIES))
        raise KernelError(f"{SWITCH} in the environment is {wanted!r}, which is none of {allowed}: unset it")
    built = [name for name in LIBRARIES if _file(name).is_file()]
    if "generic" not in built:
        raise KernelError(f"the compiled CPU code was not built when this package was installed: {REBUILD}")
    processor = _opened("generic").llama_repro_processor()
    runs = [name for name in built if LIBRARIES[name].needs & processor == LIBRARIES[name].needs]
    if wanted not in ("on", *runs):
        why = (
            "this processor does not run it" if wanted in built else "it was not built when this package was installed"
        )
        raise KernelError(f"{SWITCH}={wanted} in the environment: {why}; here are {', '.join(runs)}")
    return runs[0] if wanted == "on" else wanted


def _file(name: str) -> Path:
    return FOLDER / f"{name}.so"


@functools.cache
def _opened(name: str) -> ctypes.CDLL:
    """A library whose structures are those of this file."""
    library = _linked(_file(name))
    for function_name, arguments in SIGNATURES.items():
        function: Any = getattr(library, function_name)
        function.argtypes, function.restype, function.errcheck = arguments, ctypes.c_int32, _raise_if_failed
    return library


def _linked(file: Path) -> ctypes.CDLL:
    """The library, joined with the OpenMP that is in this process: a second one would bring threads of its own."""
    errors = []
    for openmp in _openmp_runtimes():
        try:
            if openmp is not None:
                ctypes.CDLL(str(openmp), ctypes.RTLD_GLOBAL)
            library = ctypes.CDLL(str(file))
        except OSError as error:
            errors.append(str(error))
            if "symbol" not in errors[0]:  # nothing that an OpenMP would have
                break
            continue
        _refuse_other_structures(library, file)
        return library
    raise KernelError(f"{file} cannot be loaded ({errors[0]}): {REBUILD}")


def _openmp_runtimes() -> Iterator[str | Path | None]:
    """None: PyTorch has loaded one for all to see, as it does by itself. Else its own, or the system's."""
    yield None
    if platform.system() != "Windows":
        torch_folder = Path(torch.__file__).parent
        for folder in (torch_folder / "lib", torch_folder.with_name("torch.libs")):
            yield from sorted(folder.glob("lib[gi]*omp*.so*"))
        yield from ("libgomp.so.1", "libomp.so.5", "libomp.so")


def _refuse_other_structures(library: ctypes.CDLL, file: Path) -> None:
    own = [ABI, *map(ctypes.sizeof, STRUCTURES)]
    found = (_number * len(own))()
    try:
        library.llama_repro_abi(found)
    except AttributeError:
        found[0] = 0
    if list(found) != own:
        raise KernelError(
            f"{file} was built from other sources than {__file__} "
            f"(version and sizes of structures {list(found)}, not {own}): {REBUILD}"
        )


def _raise_if_failed(outcome: int, function: Any, arguments: tuple) -> None:
    if outcome == NO_MEMORY:
        raise MemoryError(f"{function.__name__} of the compiled CPU code found no memory for its intermediate results")
    if outcome:
        raise RuntimeError(f"{function.__name__} of the compiled CPU code failed with code {outcome}")


def switched_off() -> bool:
    return os.environ.get(SWITCH, "on") == "off"


@functools.cache
def available() -> bool:
    """Whether the compiled code is there. If it is not, why is logged, once."""
    try:
        load()
    except KernelError as error:
        logger.warning("hf_llama_repro computes by PyTorch alone: %s", error)
        return False
    return True


@functools.cache
def most_tokens() -> int:
    """Of a batch, up to which the compiled code is faster than PyTorch, which knows AMX; 0 where it is not there."""
    if not available():
        return 0
    return 16 if load().llama_repro_processor() & HAS_AMX else 48


def description() -> str:
    """Which compiled code is used, or why none is."""
    try:
        name = variant()
        load()
    except KernelError as error:
        return f"no: {error}"
    return f"yes: for {LIBRARIES[name].description} ({_file(name)})"


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

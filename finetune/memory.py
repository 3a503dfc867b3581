"""The memory of a training step, from running it on tensors without data.

The real model, with the real adapter and bitsandbytes' real layers, runs on the meta device: every operation has a
shape and no values. A dispatch mode notes when each storage is made and when it is let go of, and the peak and what
it consists of are read from that record. What a meta tensor cannot show is in three short tables below: questions to
the data, the attention that a device takes, and what kernels allocate inside. The reference is the same record of a
real run on a CPU (tests/test_plan.py), and resident memory (benchmarks/finetune_memory.py).
"""

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import bitsandbytes
import torch
import torch.nn.functional as F
from bitsandbytes.autograd import _functions as bitsandbytes_functions
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_llama_repro import LlamaReproConfig, LlamaReproForCausalLM, modeling_llama_repro
from hf_llama_repro.quiet import quiet

from .cpu_kernels import use_cpu_kernels
from .model import add_adapter, bits_and_bytes, enable_checkpointing
from .recipe import Recipe

Device = Literal["cuda", "cpu"]

CATEGORIES = {
    "weights": "the base, as it is kept",
    "adapter": "its weights",
    "gradients": "of what is trained",
    "optimizer": "AdamW's two moments",
    "activations": "kept from the forward pass for the backward pass",
    "logits": "and their gradient, of the rows in memory at once",
    "temporary": "made and let go of within a pass",
}


@dataclass
class _Storage:
    num_bytes: int
    made_in: int
    """Number of the phase."""
    let_go_in: int | None = None
    category: str | None = None


class StorageRecord(TorchDispatchMode):
    """Notes every storage of `device` that operations make, and when it is let go of."""

    def __init__(self, device: str, vocab_size: int | None = None, workspace: dict[Any, Callable] | None = None):
        super().__init__()
        self.device, self.vocab_size, self.workspace = device, vocab_size, workspace or {}
        self.phases = ["build"]
        self.storages: list[_Storage] = []
        self.events: list[int] = []  # the number of a storage; the second time it is let go of
        self._live: dict[int, int] = {}  # id of a storage object -> its number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        answer = ANSWERS.get(func) if self.device == "meta" else None
        output = answer(*args) if answer is not None and args[0].is_meta else func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device:
                self._note(tensor)
        if func in self.workspace:
            number = self._add(self.workspace[func](output, *args, **(kwargs or {})))
            self._let_go(number)
        return output

    def _note(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        if id(storage) in self._live:
            return self._live[id(storage)]
        number = self._add(storage.nbytes())
        if self.phases[-1] != "build" and tensor.ndim and tensor.shape[-1] == self.vocab_size:
            self.storages[number].category = "logits"
        self._live[id(storage)] = number
        weakref.finalize(storage, self._forget, id(storage)).atexit = False
        return number

    def _add(self, num_bytes: int) -> int:
        self.storages.append(_Storage(num_bytes, len(self.phases) - 1))
        self.events.append(len(self.storages) - 1)
        return len(self.storages) - 1

    def _forget(self, identity: int) -> None:
        self._let_go(self._live.pop(identity))

    def _let_go(self, number: int) -> None:
        self.storages[number].let_go_in = len(self.phases) - 1
        self.events.append(number)

    def tag(self, category: str, tensors: Iterator[torch.Tensor] | None = None) -> None:
        """Puts `tensors`, or everything that is alive and in no category, into a category."""
        numbers = list(self._live.values())
        if tensors is not None:
            numbers = [self._note(tensor) for tensor in tensors]
        for number in numbers:
            if tensors is not None or self.storages[number].category is None:
                self.storages[number].category = category

    def _category(self, storage: _Storage) -> str:
        if storage.category:
            return storage.category
        kept = storage.let_go_in != storage.made_in and self.phases[storage.made_in] == "forward pass"
        return "activations" if kept else "temporary"

    def read(self) -> "Memory":
        """The peak after the model was built."""
        now = dict.fromkeys(CATEGORIES, 0)
        largest, peak, moment, phase = now, dict(now), "build", 0
        peaks: dict[str, dict[str, int]] = {}
        alive: set[int] = set()
        for number in self.events:
            storage = self.storages[number]
            category = self._category(storage)
            if number in alive:
                alive.remove(number)
                now[category] -= storage.num_bytes
                continue
            alive.add(number)
            now[category] += storage.num_bytes
            phase = max(phase, storage.made_in)
            if self.phases[phase] == "build":
                largest = dict(now, temporary=0)
                continue
            largest = {name: max(largest[name], now[name]) for name in CATEGORIES}
            if sum(now.values()) > sum(peaks.get(self.phases[phase], {}).values()):
                peaks[self.phases[phase]] = dict(now)
            if sum(now.values()) > sum(peak.values()):
                peak, moment = dict(now), self.phases[phase]
        return Memory(at_peak=peak, largest=largest, moment="loss" if peak["logits"] else moment, peaks=peaks)


@dataclass(frozen=True)
class Memory:
    """Bytes by category: at the peak, and each at its own largest."""

    at_peak: dict[str, int]
    largest: dict[str, int]
    moment: str
    """Of the peak: forward pass, loss, backward pass or optimizer step."""
    peaks: dict[str, dict[str, int]] = field(default_factory=dict)
    """The same of each pass and of the optimizer's step."""

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())

    def divided(self, processes: int, whole: int) -> "Memory":
        """Of one process where FSDP divides the model; `whole`: bytes of layers that are put together at a time."""
        parts = {"weights", "adapter", "gradients", "optimizer"}

        def share(figures: dict[str, int], moment: str) -> dict[str, int]:
            steps = moment == "optimizer step"  # which works on parts, while nothing is put together
            divided = parts | ({"temporary"} if steps else set())
            shared = {name: -(-count // processes) if name in divided else count for name, count in figures.items()}
            return shared if steps else {**shared, "temporary": shared["temporary"] + whole}

        peaks = {moment: share(figures, moment) for moment, figures in self.peaks.items()}
        moment = max(peaks, key=lambda name: sum(peaks[name].values()))
        at_peak = peaks[moment]
        largest = {name: max(figures[name] for figures in peaks.values()) for name in self.largest}
        return Memory(at_peak, largest, moment="loss" if at_peak["logits"] else moment, peaks=peaks)


@dataclass(frozen=True)
class Trace:
    """A recipe's training on one device."""

    memory: Memory
    num_parameters: int
    """Of the base, whatever its quantization."""
    num_trained: int


# Questions to the data, and their answers: every label counts; the batch is no packing of several sequences.
ANSWERS: dict[Any, Callable] = {
    torch.ops.aten.nonzero.default: lambda tensor: tensor.new_empty((tensor.numel(), tensor.ndim), dtype=torch.long),
    torch.ops.aten._local_scalar_dense.default: lambda tensor: True,
}


def _quantize_bytes(output: Any, inputs: torch.Tensor, *_: Any, **__: Any) -> int:
    return 3 * inputs.numel()  # |A| in 16 bits and the comparison with the threshold, where outliers are looked for


def _scaled_mm_bytes(output: torch.Tensor, *_: Any, **__: Any) -> int:
    return output.numel() * (4 if output.dtype == torch.float16 else 6)  # int32, and fp16 before a cast to another


def _gemm_4bit_bytes(output: torch.Tensor, inputs: torch.Tensor, weight: Any, shape: Any, *_: Any, **named: Any) -> int:
    scales = named.get("absmax_8bit")
    weight_bytes = shape[0] * shape[1] * inputs.dtype.itemsize  # dequantized whole, for more than a few hundred rows
    return weight_bytes + (8 * scales.numel() if scales is not None else 0)


def _flash_backward_bytes(output: Any, grad: Any, query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> int:
    expanded = 2 * query.numel() * query.dtype.itemsize if key.shape[1] != query.shape[1] else 0
    return 4 * query.numel() + expanded  # dq is summed in fp32; dk and dv of each query head, before their group's sum


# What kernels allocate inside: bytes from the output and the arguments. Sources: bitsandbytes/backends/*/ops.py,
# aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp.
WORKSPACE: dict[str, dict[Any, Callable]] = {
    "cuda": {
        torch.ops.bitsandbytes.int8_vectorwise_quant.default: _quantize_bytes,
        torch.ops.bitsandbytes.int8_scaled_mm.default: _scaled_mm_bytes,
        torch.ops.bitsandbytes.gemm_4bit.default: _gemm_4bit_bytes,
        torch.ops.aten._scaled_dot_product_flash_attention_backward.default: _flash_backward_bytes,
    },
    "cpu": {torch.ops.bitsandbytes.gemm_4bit.default: _gemm_4bit_bytes},
}


class _OnDevice:
    """Linear layers and attention as the device runs them; a meta tensor takes neither autocast's casts nor its kernel.

    Autocast is on where torch.autocast("cpu") is on: checkpointing switches that for what it computes again.
    """

    def __init__(self, device: Device):
        self.device = device
        self.casts: dict[int, torch.Tensor] = {}  # as autocast keeps them, of trained weights
        self._linear, self._attention, self._clear = (
            F.linear,
            F.scaled_dot_product_attention,
            torch.clear_autocast_cache,
        )

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._linear(self._cast(x), self._cast(weight), None if bias is None else self._cast(bias))

    def attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        assert attn_mask is None, "collated batches carry no mask"
        query, key, value = self._cast(query), self._cast(key), self._cast(value)
        kernels, settings = torch.ops.aten, (dropout_p, is_causal)
        if self.device == "cpu":
            return kernels._scaled_dot_product_flash_attention_for_cpu(query, key, value, *settings)[0]
        if query.dtype != torch.float32:
            return kernels._scaled_dot_product_flash_attention(query, key, value, *settings)[0]
        if key.shape[1] == query.shape[1]:
            return kernels._scaled_dot_product_efficient_attention(query, key, value, None, True, *settings)[0]
        return self._attention(query, key, value, None, *settings, **kwargs)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype != torch.float32 or not torch.is_autocast_enabled("cpu"):
            return tensor
        dtype = torch.get_autocast_dtype("cpu")
        if not (tensor.requires_grad and tensor.is_leaf):
            return tensor.to(dtype)
        if id(tensor) not in self.casts:
            self.casts[id(tensor)] = tensor.to(dtype)
        return self.casts[id(tensor)]

    def clear(self) -> None:
        self.casts.clear()
        self._clear()


@contextlib.contextmanager
def as_on(device: Device) -> Iterator[None]:
    """Meta tensors take the ways of `device`. Where code asks for `tensor.device.type`, theirs is that of CUDA."""
    ours = _OnDevice(device)
    replaced: list[tuple[Any, str, Any]] = [
        (F, "linear", ours.linear),
        (F, "scaled_dot_product_attention", ours.attention),
        (torch, "clear_autocast_cache", ours.clear),
    ]
    if device == "cpu":
        replaced.append((bitsandbytes_functions, "MatMul8bitLt", bitsandbytes_functions.MatMul8bitFp))
    with contextlib.ExitStack() as stack:
        # bitsandbytes keeps a table of codes on the device that it first quantizes for: not on ours, after us.
        stack.enter_context(mock.patch.dict(bitsandbytes.functional.name2qmap, clear=True))
        for place, name, ours_is in replaced:
            stack.enter_context(mock.patch.object(place, name, ours_is))
        # Without the table, the plan for a CPU has CUDA's larger blocks of logits.
        sizes = modeling_llama_repro.LOGITS_AT_A_TIME
        if device == "cpu":
            stack.enter_context(mock.patch.dict(sizes, {"meta": sizes["cpu"]}))
        yield


def build(recipe: Recipe, config: LlamaReproConfig) -> nn.Module:
    """The base on the meta device: in the dtype that is trained, or quantized by bitsandbytes."""
    from transformers.quantizers import AutoHfQuantizer

    # As in load_base: fp32 for full fine-tuning, which computes under autocast.
    dtype = torch.float32 if recipe.method == "full" else compute_dtype(recipe)
    config.dtype, default = dtype, torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # Not from_config, which would divide the model under ZeRO 3: all processes would have to plan.
        with torch.device("meta"):
            model: Any = LlamaReproForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    settings = bits_and_bytes(recipe.quantization, dtype)
    if settings is not None:
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
        quantizer.preprocess_model(model, device_map=None, dtype=dtype)
        for module in model.modules():
            weight: Any = getattr(module, "weight", None)
            if isinstance(weight, bitsandbytes.nn.Int8Params | bitsandbytes.nn.Params4bit):
                module.weight = weight._quantize("meta")
            # A threshold keeps columns of the inputs, some tens out of thousands: which, only the data tell.
            if isinstance(module, bitsandbytes.nn.Linear8bitLt):
                module.state.threshold = 0.0
        quantizer.postprocess_model(model)
    return model


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """`auto` is what cards from 2020 on compute in."""
    return torch.bfloat16 if recipe.dtype == "auto" else getattr(torch, recipe.dtype)


def trace(
    recipe: Recipe,
    config: LlamaReproConfig,
    *,
    device: Device = "cuda",
    accumulates: bool = True,
    skip_logits: bool = True,
) -> Trace:
    """The recipe's training on batches of micro_batch_size x max_length tokens that all have a label.

    `accumulates`: an optimizer step has several forward passes, so that gradients are there during the later ones.
    `skip_logits`: the logits of all tokens are never in memory at once.
    """
    quiet()
    record = StorageRecord("meta", config.vocab_size, WORKSPACE[device])
    collecting = gc.isenabled()
    gc.disable()  # the record must not depend on when the collector happens to run
    try:
        with warnings.catch_warnings(), as_on(device), record:
            warnings.simplefilter("ignore")
            model: Any = build(recipe, config)
            record.tag("weights")
            if recipe.gradient_checkpointing:
                enable_checkpointing(model, recipe.quantization)
            if recipe.method == "lora":
                model = add_adapter(model, recipe)
                record.tag("adapter")
            if device == "cpu":
                use_cpu_kernels(model)
            train(model.train(), recipe, record, device=device, accumulates=accumulates, skip_logits=skip_logits)
        num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return Trace(record.read(), _num_parameters(config), num_trained)
    finally:
        if collecting:
            gc.enable()


def train(
    model: Any,
    recipe: Recipe,
    record: StorageRecord,
    *,
    device: Device,
    accumulates: bool,
    skip_logits: bool = True,
) -> None:
    """Two forward and backward passes with an optimizer step after each, as the Trainer does them.

    Where gradients accumulate, the second pass meets those of the first, as well as the optimizer's moments.
    """
    vocab_size = model.config.vocab_size
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dtype = compute_dtype(recipe)
    autocast = (recipe.method == "full" and dtype != torch.float32) or dtype == torch.float16
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, foreach=device == "cuda")
    tokens = torch.randint(vocab_size, (recipe.micro_batch_size, recipe.max_length), device=trained[0].device)
    labels = tokens.clone()
    record.tag("activations", iter((tokens, labels)))
    batch = {"input_ids": tokens, "labels": labels, "num_items_in_batch": labels.numel()}
    where = "cuda" if tokens.is_cuda else "cpu"  # meta tensors take the CPU's: see _OnDevice
    for _ in range(2):
        record.phases.append("forward pass")
        with torch.autocast(where, dtype, enabled=autocast):
            loss = model(**batch, use_cache=False, skip_logits=skip_logits).loss
        record.phases.append("backward pass")
        loss.backward()
        del loss
        record.tag("gradients", (p.grad for p in trained if p.grad is not None))
        record.phases.append("optimizer step")
        optimizer.step()
        states = (value for state in optimizer.state.values() for value in state.values())
        record.tag("optimizer", (value for value in states if torch.is_tensor(value) and value.ndim))
        if not accumulates:
            optimizer.zero_grad()


def _num_parameters(config: LlamaReproConfig) -> int:
    with torch.device("meta"):
        return LlamaReproForCausalLM(config).num_parameters()

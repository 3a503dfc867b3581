"""A PEFT LoRA adapter opened for reading, and fitted onto the tensors of a base.

Which tensors an adapter has to hold for a base is asked of PEFT itself, on a model that takes no memory; how a matrix
is scaled is written out here (peft/tuners/lora/layer.py, `LoraLayer.update_layer`), so that the two can be compared.
"""

import copy
import dataclasses
import math
import re
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_llama_repro.errors import CheckpointError

from .hugging_face import read_json, read_pytorch, read_safetensors
from .keys import DTYPES, EMBEDDING, OUTPUT
from .source import Source, StoredTensor, is_file

CONFIG_FILE = "adapter_config.json"
_WEIGHTS = {"adapter_model.safetensors": read_safetensors, "adapter_model.bin": read_pytorch}
_PREFIX = "base_model.model."
_REMEDY = "merge it with PEFT's merge_and_unload, or train plain LoRA"

# Fields that must have one of these values, where they are given.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    # Other beginnings (PiSSA, OLoRA, LoftQ, ...) change the base's own weights.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", None),
}
# Fields that say where the matrices are, how they are scaled, or how it was trained. Any other that is set stands for
# more than B A on top of a matrix (DoRA, biases, trained tokens, repeated layers, what PEFT will still invent).
_PLAIN = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "runtime_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version"),
    *("eva_config", "megatron_core", "qalora_group_size"),
}
_MATRIX = re.compile(r"base_model\.model\.(?P<module>.*)\.lora_(?P<embedding>embedding_)?(?P<letter>[AB])(\.weight)?")


class Pair(NamedTuple):
    """What is added to a matrix (out, in): scaling * b @ a."""

    a: StoredTensor
    """(r, in)"""
    b: StoredTensor
    """(out, r)"""
    scaling: float
    peft_scaling: float
    """The same as PEFT computes it."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A folder with adapter_config.json and its tensors, named as PEFT names them."""

    folder: Path
    fields: dict[str, Any]
    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]

    def scaling(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r), of a module of the base."""

        def by_pattern(pattern: str, default: str) -> float:
            # As peft.utils.other.get_pattern_key: the first pattern that matches the end of the name.
            patterns = (self.fields.get(pattern) or {}).items()
            return next(
                (value for key, value in patterns if re.match(rf"(.*\.)?({key})$", module)), self.fields[default]
            )

        rank, alpha = by_pattern("rank_pattern", "r"), by_pattern("alpha_pattern", "lora_alpha")
        return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def peft_config(self) -> Any:
        """PEFT's own configuration of it."""
        from peft import LoraConfig

        known = {field.name for field in dataclasses.fields(LoraConfig)}
        given = {name: value for name, value in self.fields.items() if name in known and value is not None}
        # The matrices are loaded: how they began does not matter, and some beginnings want data.
        return LoraConfig(**{**given, "task_type": None, "init_lora_weights": True, "inference_mode": True})


def open_adapter(folder: Path) -> Adapter:
    """Opens what PEFT saved. Raises `CheckpointError` when it is no plain LoRA adapter, damaged, or empty."""
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder} is no adapter: it has no {CONFIG_FILE}, which PEFT's save_pretrained writes")
    fields = read_json(folder / CONFIG_FILE)
    _check_fields(folder / CONFIG_FILE, fields)
    found = [(folder / name, read) for name, read in _WEIGHTS.items() if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder} has {CONFIG_FILE} but no weights: neither {' nor '.join(_WEIGHTS)}")
    path, read = found[0]
    tensors = read(path)
    if not tensors:
        raise CheckpointError(
            f"{path} holds no tensors ({path.stat().st_size:,} bytes): what was trained was not saved; "
            "save the adapter with model.save_pretrained, without replacing model.state_dict before"
        )
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}, not a 16- or 32-bit float")
        if bad := int((~tensor.read().isfinite()).sum()):
            raise CheckpointError(
                f"{path}: {name} holds {bad} NaN or infinite values: train it again, with a lower rate"
            )
    return Adapter(folder, fields, tensors, (folder / CONFIG_FILE, path))


def _check_fields(path: Path, fields: dict[str, Any]) -> None:
    for name, allowed in _ALLOWED.items():
        if (value := fields.get(name)) not in allowed:
            named = ", ".join(repr(value) for value in allowed if value is not None)
            raise CheckpointError(f"{path}: {name} = {value!r} cannot be merged here, only {named}: {_REMEDY}")
    if more := [name for name, value in fields.items() if value and name not in _PLAIN.union(_ALLOWED)]:
        named = ", ".join(f"{name} = {fields[name]!r}"[:100] for name in more)
        raise CheckpointError(f"{path}: {named} cannot be merged here, only matrices A and B: {_REMEDY}")
    for name, pattern, kind in (("r", "rank_pattern", int), ("lora_alpha", "alpha_pattern", int | float)):
        by_module = fields.get(pattern) or {}
        if not isinstance(by_module, dict):
            raise CheckpointError(f"{path}: {pattern} = {by_module!r} is no object of modules and numbers")
        for where, value in {name: fields.get(name), **by_module}.items():
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value <= sys.float_info.max:
                described = "whole number" if kind is int else "number"
                raise CheckpointError(f"{path}: {where} = {value!r} is not a positive {described}")


def find_base(adapter: Adapter) -> Path:
    """The folder that the adapter names as its base. Raises `CheckpointError` when it is not here."""
    named = adapter.fields.get("base_model_name_or_path")
    if not named or not isinstance(named, str):
        raise CheckpointError(f"{adapter.folder / CONFIG_FILE} names no base: name its folder by --base")
    for folder in (adapter.folder / named, Path(named)):
        if is_file(folder / "config.json"):
            return folder
    raise CheckpointError(
        f"{adapter.folder} was trained on {named}, which is no model's folder here: name that folder by --base"
    )


@dataclasses.dataclass(frozen=True)
class Fit:
    """What the adapter does to the tensors of a base."""

    pairs: dict[str, Pair]
    """Name of the base's tensor -> what is added."""
    replaced: dict[str, StoredTensor]
    """Name of the base's tensor -> what stands in its place (modules_to_save)."""
    asked: frozenset[str]
    """Names of the adapter's tensors that PEFT loads; it may hold copies of the base's beside them."""

    @property
    def changes_nothing(self) -> bool:
        """Whether every product B A is zero, as PEFT begins, and nothing is replaced."""
        trained = any(pair.a.read().any() and pair.b.read().any() for pair in self.pairs.values())
        return not trained and not self.replaced


def fit(adapter: Adapter, base: Source) -> Fit:
    """Lays the adapter onto the base. Raises `CheckpointError` where it was made for another one."""
    shapes, peft_scaling = _asked(adapter, base)
    copies = {
        f"{_PREFIX}{name.removesuffix('weight')}{layer}weight": name
        for name in (EMBEDDING, OUTPUT)
        for layer in ("", "base_layer.")
    }
    missing = sorted(shapes.keys() - adapter.tensors.keys())
    unknown = sorted(adapter.tensors.keys() - shapes.keys() - copies.keys())
    for names, what in ((missing, "lacks"), (unknown, "has")):
        if names:
            raise _another_base(adapter, f"it {what} {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}")
    for name, shape in shapes.items():
        if (found := adapter.tensors[name].shape) != shape:
            raise _another_base(adapter, f"{name} has shape {list(found)}, not {list(shape)}")
    for name in (adapter.tensors.keys() & copies.keys()) - shapes.keys():
        _check_copy(adapter, name, base.tensors.get(copies[name], base.tensors[EMBEDDING]))

    pairs: dict[str, Pair] = {}
    replaced: dict[str, StoredTensor] = {}
    for name in shapes:
        match = _MATRIX.fullmatch(name)
        if match is None:
            replaced[name.removeprefix(_PREFIX)] = adapter.tensors[name]
        elif match["letter"] == "A":
            module = match["module"]
            a, b = (adapter.tensors[name[: match.start("letter")] + letter + (match[4] or "")] for letter in "AB")
            # PEFT adds the transpose of B A to an embedding (vocab, hidden).
            a, b = (_transposed(b), _transposed(a)) if match["embedding"] else (a, b)
            pairs[f"{module}.weight"] = Pair(a, b, adapter.scaling(module), peft_scaling[module])
    if odd := sorted((pairs.keys() | replaced.keys()) - base.tensors.keys() - {OUTPUT}):
        raise CheckpointError(f"{adapter.folder} is trained on {odd[0]}, which cannot be merged here: {_REMEDY}")
    return Fit(pairs, replaced, frozenset(shapes))


def _asked(adapter: Adapter, base: Source) -> tuple[dict[str, tuple[int, ...]], dict[str, float]]:
    """Name -> shape of the tensors that PEFT wants for this base, and module -> scaling."""
    from peft import get_peft_model, get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    from hf_llama_repro import LlamaReproForCausalLM

    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = get_peft_model(
                LlamaReproForCausalLM(copy.deepcopy(base.config)), adapter.peft_config(), low_cpu_mem_usage=True
            )
            state = get_peft_model_state_dict(model, save_embedding_layers=False)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, re.error) as error:
        raise _another_base(adapter, " ".join(str(error).split())[:300]) from None
    scaling = {
        name.removeprefix(_PREFIX): module.scaling["default"]
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    return {name: tuple(tensor.shape) for name, tensor in state.items()}, scaling


def _another_base(adapter: Adapter, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{adapter.folder} is an adapter for another base: {reason}; name the base that it was trained on by --base"
    )


def _check_copy(adapter: Adapter, name: str, stored: StoredTensor) -> None:
    """PEFT saves embedding and output matrix beside LoRA matrices on them: they must be those of the base."""
    found = adapter.tensors[name]
    if found.shape != stored.shape:
        reason = f"{name} has shape {list(found.shape)}, the base's {list(stored.shape)}: another vocabulary"
        raise _another_base(adapter, reason)
    theirs, ours = found.read(), stored.read()
    # The base may have been loaded in another dtype for the training.
    if not (torch.equal(theirs.to(ours.dtype), ours) or torch.equal(ours.to(theirs.dtype), theirs)):
        raise _another_base(adapter, f"its {name} differs from the base's, and modules_to_save does not name it")


def _transposed(tensor: StoredTensor) -> StoredTensor:
    def read(stored: StoredTensor) -> torch.Tensor:
        return stored.read().t()

    return StoredTensor(tensor.shape[::-1], tensor.dtype, partial(read, tensor))

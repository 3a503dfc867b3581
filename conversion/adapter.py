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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_llama_repro import adapter_folder
from hf_llama_repro.adapter_folder import CONFIG_FILE, PREFIX, WITHOUT_EFFECT, check_finite, copy_of
from hf_llama_repro.errors import CheckpointError

from .hugging_face import read_pytorch, read_safetensors
from .keys import DTYPES, EMBEDDING, OUTPUT
from .source import Source, StoredTensor, is_file

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
# more than B A on top of a matrix (DoRA, biases, repeated layers, what PEFT will still invent).
_PLAIN = WITHOUT_EFFECT | {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "qalora_group_size"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *(
        "trainable_token_indices",
        "ensure_weight_tying",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "inference_mode",
    ),
}
_MATRIX = re.compile(r"base_model\.model\.(?P<module>.*)\.lora_(?P<embedding>embedding_)?(?P<letter>[AB])(\.weight)?")
_TOKENS = re.compile(r"base_model\.model\.(?P<module>.*)\.token_adapter\.trainable_tokens_delta")


class Pair(NamedTuple):
    """What is added to a matrix (out, in): scaling * b @ a."""

    a: StoredTensor
    """(r, in)"""
    b: StoredTensor
    """(out, r)"""
    scaling: float
    peft_scaling: float
    """The same as PEFT computes it."""


class Rows(NamedTuple):
    """Rows of a matrix that others stand in place of."""

    indices: tuple[int, ...]
    values: StoredTensor
    """(len(indices), in)"""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A folder with adapter_config.json and its tensors, named as PEFT names them."""

    folder: Path
    fields: dict[str, Any]
    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]
    notes: tuple[str, ...]
    """For people: what was read in another way than it is written."""

    @property
    def rows(self) -> int | None:
        """Rows of the embedding and output matrices that it holds; None where it holds neither."""
        return adapter_folder.stored_rows(self.files[1], {name: tensor.shape for name, tensor in self.tensors.items()})

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

        known = {field.name for field in dataclasses.fields(LoraConfig)} - WITHOUT_EFFECT
        given = {name: value for name, value in self.fields.items() if name in known and value is not None}
        # The matrices are loaded: how they began does not matter, and some beginnings want data.
        return LoraConfig(**{**given, "task_type": None, "init_lora_weights": True, "inference_mode": True})


def open_adapter(folder: Path) -> Adapter:
    """Opens what PEFT saved. Raises `CheckpointError` when it is no plain LoRA adapter, damaged, or empty."""
    _check_fields(folder / CONFIG_FILE, adapter_folder.read_fields(folder))
    notes: list[str] = []
    readers: dict[str, Callable] = {".safetensors": read_safetensors, ".bin": partial(read_pytorch, tell=notes.append)}
    opened = adapter_folder.open_folder(folder, readers, _equal)
    for name, tensor in opened.tensors.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{opened.path}: {name} is {tensor.dtype}, not a 16- or 32-bit float")
        check_finite(opened.path, name, tensor.read())
    return Adapter(folder, opened.fields, opened.tensors, (folder / CONFIG_FILE, opened.path), (*opened.notes, *notes))


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(one.read(), other.read())


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
    rows: dict[str, Rows]
    """Name of the base's tensor -> rows of it that others stand in place of (trainable_token_indices)."""
    asked: dict[str, StoredTensor]
    """The tensors that PEFT loads; the adapter may hold copies of the base's beside them."""
    notes: tuple[str, ...]
    """For people: what was decided."""
    keeps_ends_tied: bool
    """Whether embedding and output matrix of a tied base are changed alike; only the embedding is listed then."""

    @property
    def changed(self) -> set[str]:
        return {*self.pairs, *self.replaced, *self.rows}

    @property
    def changes_nothing(self) -> bool:
        """Whether every product B A is zero, as PEFT begins, and nothing is replaced."""
        trained = any(pair.a.read().any() and pair.b.read().any() for pair in self.pairs.values())
        return not trained and not self.replaced and not self.rows


class _Asked(NamedTuple):
    """What PEFT wants for a base."""

    shapes: dict[str, tuple[int, ...]]
    """Of the adapter's tensors."""
    scaling: dict[str, float]
    """Of each module with matrices A and B."""
    tokens: dict[str, tuple[int, ...]]
    """Module with trained rows -> which of its rows; of a tied model both ends."""


def extended(adapter: Adapter, base: Source) -> Source:
    """The base with the further rows of the adapter's embedding and output matrices, if it has any.

    Raises `CheckpointError` where the adapter holds only a part of what a larger vocabulary takes.
    """
    rows, before = adapter.rows, base.config.vocab_size
    if rows is None or rows <= before:
        return base
    is_tied = base.config.tie_word_embeddings
    adapter_folder.check_extension(adapter.folder, adapter.tensors, rows, before, is_tied=is_tied)
    config = copy.deepcopy(base.config)
    config.vocab_size = rows
    tensors = dict(base.tensors)
    # The longest name of a module's is that of the frozen matrix, where there is one beside the trained.
    held = {f"{copy_of(name)}.weight": name for name in sorted(adapter.tensors, key=len) if copy_of(name)}
    for name in tensors.keys() & {EMBEDDING, OUTPUT}:
        further = adapter.tensors[held.get(name) or held[OUTPUT]]
        shape = (rows, *tensors[name].shape[1:])
        tensors[name] = StoredTensor(shape, tensors[name].dtype, partial(_continued, tensors[name], further))
    note = adapter_folder.extension_note(rows, before)
    return dataclasses.replace(base, config=config, tensors=tensors, notes=(*base.notes, note))


def _continued(stored: StoredTensor, longer: StoredTensor) -> torch.Tensor:
    wide = torch.promote_types(stored.dtype, longer.dtype)
    return torch.cat([stored.read().to(wide), longer.read()[stored.shape[0] :].to(wide)])


def fit(adapter: Adapter, base: Source) -> Fit:
    """Lays the adapter onto the base. Raises `CheckpointError` where it was made for another one."""
    asked = _asked(adapter, base)
    _check_names(adapter, base, asked)
    for name in adapter.tensors.keys() - asked.shapes.keys():
        _check_copy(adapter, name, base)

    tensors, notes = _completed(adapter, base, asked)
    pairs: dict[str, Pair] = {}
    replaced: dict[str, StoredTensor] = {}
    for name in asked.shapes:
        match = _MATRIX.fullmatch(name)
        if match is None and not _TOKENS.fullmatch(name):
            replaced[name.removeprefix(PREFIX)] = tensors[name]
        elif match and match["letter"] == "A":
            module = match["module"]
            a, b = (tensors[name[: match.start("letter")] + letter + (match[4] or "")] for letter in "AB")
            # PEFT adds the transpose of B A to an embedding (vocab, hidden).
            a, b = (_transposed(b), _transposed(a)) if match["embedding"] else (a, b)
            pairs[f"{module}.weight"] = Pair(a, b, adapter.scaling(module), asked.scaling[module])
    rows = {f"{module}.weight": _rows(adapter, module, indices) for module, indices in asked.tokens.items()}
    fitted = Fit(pairs, replaced, rows, tensors, notes, keeps_ends_tied=False)
    if odd := sorted(fitted.changed - base.tensors.keys() - {OUTPUT}):
        raise CheckpointError(f"{adapter.folder} is trained on {odd[0]}, which cannot be merged here: {_REMEDY}")
    if base.config.tie_word_embeddings and _changes_ends_alike(fitted):
        for changes in (pairs, replaced, rows):
            changes.pop(OUTPUT, None)
        return dataclasses.replace(fitted, keeps_ends_tied=True)
    return fitted


def _completed(adapter: Adapter, base: Source, asked: _Asked) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """The tensors that PEFT loads; a saved embedding or output matrix has the rows that the base has besides."""
    tensors, notes = {name: adapter.tensors[name] for name in asked.shapes}, []
    for name, shape in asked.shapes.items():
        module, found = copy_of(name), tensors[name]
        if module and found.shape != shape:
            stored = base.tensors.get(f"{module}.weight", base.tensors[EMBEDDING])
            tensors[name] = StoredTensor(shape, found.dtype, partial(_continued, found, stored))
            notes.append(adapter_folder.completion_note(module, found.shape[0], shape[0]))
    return tensors, tuple(notes)


def _rows(adapter: Adapter, module: str, indices: tuple[int, ...]) -> Rows:
    """Those of an output matrix that is tied to the embedding are the embedding's."""
    name = f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"
    return Rows(indices, adapter.tensors.get(name) or adapter.tensors[name.replace("lm_head", "model.embed_tokens")])


def _changes_ends_alike(fitted: Fit) -> bool:
    """Whether embedding and output matrix of a tied base remain equal, as ensure_weight_tying has it."""

    def contents(name: str) -> list[StoredTensor | float | tuple[int, ...]]:
        found: list[Any] = [*fitted.pairs.get(name, ()), *fitted.rows.get(name, ())]
        return [*found, *filter(None, [fitted.replaced.get(name)])]

    one, other = contents(EMBEDDING), contents(OUTPUT)
    return len(one) == len(other) > 0 and all(
        _equal(a, b) if isinstance(a, StoredTensor) and isinstance(b, StoredTensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


def _asked(adapter: Adapter, base: Source) -> _Asked:
    """Asks PEFT by a model that takes no memory."""
    from peft import get_peft_model, get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    from hf_llama_repro import LlamaReproForCausalLM

    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = get_peft_model(
                LlamaReproForCausalLM(copy.deepcopy(base.config)), adapter.peft_config(), low_cpu_mem_usage=True
            )
            state = get_peft_model_state_dict(model, save_embedding_layers=False)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, IndexError, re.error) as error:
        raise _another_base(adapter, " ".join(str(error).split())[:300]) from None
    modules = {name.removeprefix(PREFIX): module for name, module in model.named_modules()}
    return _Asked(
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        scaling={name: module.scaling["default"] for name, module in modules.items() if isinstance(module, LoraLayer)},
        tokens={
            name.removesuffix(".token_adapter"): tuple(module.token_indices["default"])
            for name, module in modules.items()
            if isinstance(module, TrainableTokensLayer)
        },
    )


def _another_base(adapter: Adapter, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{adapter.folder} is an adapter for another base: {reason}; name the base that it was trained on by --base"
    )


def _check_names(adapter: Adapter, base: Source, asked: _Asked) -> None:
    """Raises `CheckpointError` where the adapter's tensors are not those that PEFT wants for the base."""
    found = adapter.tensors.keys()
    is_tied = base.config.tie_word_embeddings
    copies = {name for name in found if copy_of(name) or adapter_folder.repeated(name, is_tied) in found}
    missing, unknown = sorted(asked.shapes.keys() - found), sorted(found - asked.shapes.keys() - copies)
    if missing or unknown:
        parts = [
            f"it {what} {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"
            for names, what in ((missing, "lacks"), (unknown, "has"))
            if names
        ]
        raise _another_base(adapter, "; ".join(parts))
    for name, shape in asked.shapes.items():
        has = adapter.tensors[name].shape
        is_part = copy_of(name) and len(has) == 2 and has[1:] == shape[1:] and 0 < has[0] < shape[0]
        if has != shape and not is_part:
            raise _another_base(adapter, f"{name} has shape {list(has)}, not {list(shape)}")
    for module, indices in asked.tokens.items():
        if odd := [index for index in indices if not 0 <= index < base.config.vocab_size]:
            raise _another_base(adapter, f"trainable_token_indices names row {odd[0]} of {module}, which has none")


def _check_copy(adapter: Adapter, name: str, base: Source) -> None:
    """PEFT saves embedding and output matrix beside what is trained on them: they must be those of the base."""
    found, module = adapter.tensors[name], copy_of(name)
    if module is None:
        stored = adapter.tensors[str(adapter_folder.repeated(name, is_tied=True))]
    else:
        stored = base.tensors.get(f"{module}.weight", base.tensors[EMBEDDING])
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

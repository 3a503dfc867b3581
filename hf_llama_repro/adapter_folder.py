"""The folder of a PEFT adapter: its fields, its weights under the names that PEFT gives them, the adapter on a base."""

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from .errors import CheckpointError

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""The first one that is there counts, as in PEFT."""
PREFIX = "base_model.model."
EMBEDDING, OUTPUT = "model.embed_tokens", "lm_head"
# Fields of some version of PEFT that say how an adapter was begun, trained or held in memory, not what it computes.
# How it begins is judged by init_lora_weights; the configurations of single beginnings add nothing to that.
WITHOUT_EFFECT = frozenset(
    {
        *("merge_weights", "runtime_config", "megatron_core", "peft_version"),
        *("eva_config", "corda_config", "loftq_config", "lora_ga_config"),
    }
)
# Parts of a name that wrappers of a model leave in it: DDP, FSDP, activation checkpointing, torch.compile.
_WRAPPERS = frozenset({"module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
_WRAPPED = frozenset({"base_model", "model"})
# What follows these in a name is the adapter's, which PEFT leaves out of files.
_NAMED = re.compile(
    r"\.(?:lora_\w+|trainable_tokens_delta)\.(?!(?:weight|bias)$)(?P<adapter>[^.]+)(?=$|\.weight$|\.bias$)"
)
_SAVED = ".modules_to_save."
_COPY = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>{re.escape(EMBEDDING)}|{OUTPUT})\."
    r"(?:base_layer\.|original_module\.|token_adapter\.base_layer\.)?weight"
)
T = TypeVar("T")


@dataclass(frozen=True)
class AdapterFolder(Generic[T]):
    """What an adapter's folder holds; `tensors` are named as PEFT's save_pretrained names them."""

    folder: Path
    fields: dict[str, Any]
    tensors: dict[str, T]
    path: Path
    """The file of the tensors."""
    notes: tuple[str, ...]
    """For people: what was read in another way than it is written."""


def open_folder(
    folder: Path, readers: Mapping[str, Callable[[Path], dict[str, T]]], equal: Callable[[T, T], bool]
) -> AdapterFolder[T]:
    """Opens what PEFT saved. Raises `CheckpointError` where there is no adapter, or none that can be read.

    `readers`: suffix of a file -> what reads its tensors. `equal`: whether two tensors are the same.
    """
    fields = read_fields(folder)
    found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder} has {CONFIG_FILE} but no weights: neither {' nor '.join(WEIGHT_FILES)}")
    path, *others = found
    stored = readers[path.suffix](path)
    if not stored:
        raise CheckpointError(
            f"{path} holds no tensors ({path.stat().st_size:,} bytes): what was trained was not saved; "
            "save the adapter with model.save_pretrained, without replacing model.state_dict before"
        )
    tensors, notes = _as_peft_names(path, stored, equal)
    notes += tuple(f"{other.name} of the adapter is not read: {path.name} lies beside it" for other in others)
    return AdapterFolder(folder, fields, tensors, path, notes)


def read_fields(folder: Path) -> dict[str, Any]:
    """The fields of adapter_config.json. Raises `CheckpointError` where there are none."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is no adapter: it has no {CONFIG_FILE}, which PEFT's save_pretrained writes")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): download it again") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds a {type(fields).__name__}, not a JSON object")
    return fields


def _as_peft_names(
    path: Path, stored: dict[str, T], equal: Callable[[T, T], bool]
) -> tuple[dict[str, T], tuple[str, ...]]:
    """The tensors under PEFT's names, and a note where others were read."""
    bare = {name: _without_wrappers(name) for name in stored}
    adapters = {match["adapter"] for name in bare.values() if (match := _NAMED.search(name))}
    if len(adapters) > 1:
        raise CheckpointError(
            f"{path} holds several adapters ({', '.join(sorted(adapters))}): save the one that is wanted by "
            "model.save_pretrained(folder, selected_adapters=[name])"
        )
    tensors: dict[str, T] = {}
    origin: dict[str, str] = {}
    for name, tensor in stored.items():
        renamed = _without_adapter(bare[name], adapters | {"default"})
        # Beside a larger vocabulary PEFT writes modules_to_save twice, with and without that word in the name.
        if renamed in tensors and not equal(tensors[renamed], tensor):
            raise CheckpointError(
                f"{path}: {origin[renamed]} and {name} are one tensor with two values: remove the one that is not meant"
            )
        tensors[renamed], origin[renamed] = tensor, name
    odd = [name for name in stored if _SAVED not in name and name not in tensors]
    if not odd:
        return tensors, ()
    renamed = _without_adapter(bare[odd[0]], adapters | {"default"})
    return tensors, (f"{len(odd)} tensors of the adapter under names that PEFT does not write: {odd[0]} as {renamed}",)


def _without_wrappers(name: str) -> str:
    """The name from the root of a causal language model on, under PEFT's prefix; other names as they are."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts and parts[0] in _WRAPPED:
        parts.pop(0)
    if parts and parts[0] in ("layers", "embed_tokens", "norm"):
        parts.insert(0, "model")
    elif not parts or parts[0] != OUTPUT:
        return name
    return PREFIX + ".".join(parts)


def _without_adapter(name: str, adapters: Iterable[str]) -> str:
    if match := _NAMED.search(name):
        return name[: match.start("adapter") - 1] + name[match.end("adapter") :]
    module, saved, rest = name.partition(_SAVED)
    first, _, others = rest.partition(".")
    return f"{module}.{others if first in adapters else rest}" if saved else name


def copy_of(name: str) -> str | None:
    """The module of which a tensor may be a copy that PEFT saves beside what was trained: embedding or output."""
    match = _COPY.fullmatch(name)
    return match["module"] if match else None


def repeated(name: str, is_tied: bool) -> str | None:
    """The tensor of the embedding that PEFT writes again for the output matrix, where the two are tied."""
    rows = f"{PREFIX}{{}}.token_adapter.trainable_tokens_delta"
    return rows.format(EMBEDDING) if is_tied and name == rows.format(OUTPUT) else None


def stored_rows(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Rows of the embedding and output matrices that the adapter holds; None where it holds neither.

    Raises `CheckpointError` where they differ.
    """
    rows = {name: shape[0] for name, shape in shapes.items() if copy_of(name) and len(shape) == 2}
    if len(set(rows.values())) > 1:
        described = ", ".join(f"{name} has {count} rows" for name, count in sorted(rows.items()))
        raise CheckpointError(f"{path} holds matrices of different vocabularies: {described}")
    return next(iter(rows.values()), None)


def read_torch_adapter(folder: Path) -> AdapterFolder[Any]:
    """The adapter with its tensors in memory. Raises `CheckpointError` for what cannot be read or is not finite."""
    import torch
    from safetensors.torch import load_file

    def load_bin(path: Path) -> dict[str, Any]:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not all(
            isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized
            for value in content.values()
        ):
            raise CheckpointError(f"{path} holds no dictionary of tensors: it is no adapter that PEFT saved")
        return content

    def guarded(load: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
        def read(path: Path) -> dict[str, Any]:
            try:
                return load(path)
            except (CheckpointError, PermissionError):
                raise
            except Exception as error:  # the loaders raise whatever the damage leads to
                if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
                    raise CheckpointError(
                        f"{path} holds code that loading would execute ({code[1]}); it was refused and nothing was run"
                    ) from None
                reason = str(error).strip().partition("\n")[0][:200]
                raise CheckpointError(f"{path} is truncated or damaged ({reason}): download it again") from None

        return read

    opened = open_folder(folder, {".safetensors": guarded(load_file), ".bin": guarded(load_bin)}, torch.equal)
    for name, tensor in opened.tensors.items():
        check_finite(opened.path, name, tensor)
    return opened


def rows_of(adapter: Path) -> int:
    """Rows of the embedding and output matrices that an adapter holds; 0 where it holds neither."""
    opened = read_torch_adapter(adapter)
    return stored_rows(opened.path, {name: tuple(tensor.shape) for name, tensor in opened.tensors.items()}) or 0


def check_finite(path: Path, name: str, tensor: Any) -> None:
    if bad := int((~tensor.isfinite()).sum()):
        raise CheckpointError(f"{path}: {name} holds {bad} NaN or infinite values: train it again, with a lower rate")


def to_stderr(line: str) -> None:
    print(f"note: {line}", file=sys.stderr, flush=True)


def attach(base: Any, adapter: Path, *, tell: Callable[[str], None] = to_stderr) -> Any:
    """The base with a trained adapter. Raises `CheckpointError` for one that was made for another base.

    A base with a smaller vocabulary gets the further rows that the adapter holds. `tell` takes what was decided.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTuner

    opened = read_torch_adapter(adapter)
    for note in opened.notes:
        tell(note)
    try:
        config = _peft_config(opened)
        common = extend(base, opened)
        if common < base.config.vocab_size:
            tell(extension_note(base.config.vocab_size, common))
        matrices = {EMBEDDING: base.get_input_embeddings().weight, OUTPUT: base.get_output_embeddings().weight}
        model = get_peft_model(base, config)
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        is_tied = base.config.tie_word_embeddings
        beside = {name for name in opened.tensors.keys() - expected.keys() if copy_of(name) or repeated(name, is_tied)}
        trained = {name: tensor for name, tensor in opened.tensors.items() if name not in beside}
        if different := sorted(trained.keys() ^ expected.keys()):
            what = "has" if different[0] in trained else "lacks"
            others = f" and {len(different) - 1} others" if len(different) > 1 else ""
            raise _another_base(adapter, f"{opened.path} {what} {different[0]}{others}")
        for name in beside:
            module = copy_of(name)
            same = matrices[module] if module else opened.tensors[str(repeated(name, is_tied))]
            _check_copy(opened, name, same, common)
        _complete(trained, matrices, tell)
        set_peft_model_state_dict(model, trained)
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise _another_base(adapter, str(error).strip()[:300]) from None
    if not isinstance(model.base_model, BaseTuner):
        raise _not_layers(adapter, config)
    return model.eval()


def _complete(trained: dict[str, Any], matrices: dict[str, Any], tell: Callable[[str], None]) -> None:
    """Gives a saved embedding or output matrix the rows that the base has besides."""
    import torch

    for name, tensor in trained.items():
        module = copy_of(name)
        if module and tensor.ndim == 2 and 0 < len(tensor) < len(matrices[module]):
            further = matrices[module][len(tensor) :].detach().to(tensor)
            trained[name] = torch.cat([tensor, further])
            tell(completion_note(module, len(tensor), len(matrices[module])))


def completion_note(module: str, rows: int, of_base: int) -> str:
    return f"{module} of the adapter has {rows} rows, the base {of_base}: the others are the base's"


def _another_base(adapter: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{adapter} is no adapter for this base: {reason}")


def _peft_config(opened: AdapterFolder[Any]) -> Any:
    """PEFT's configuration of the adapter. Raises `CheckpointError` for a field that PEFT would ignore."""
    import dataclasses
    import warnings

    import peft
    from peft import PeftConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unknown fields, which are judged here
        config = PeftConfig.from_pretrained(str(opened.folder))
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise _not_layers(opened.folder, config)
    known = {field.name for field in dataclasses.fields(config)} | WITHOUT_EFFECT
    if unknown := [f"{name} = {value!r}"[:100] for name, value in opened.fields.items() if value and name not in known]:
        raise CheckpointError(
            f"{opened.folder / CONFIG_FILE}: {', '.join(unknown)} means nothing to PEFT {peft.__version__}: take the "
            "version of PEFT that wrote it, or remove the field if it changes nothing"
        )
    config.inference_mode = True
    return config


def _not_layers(adapter: Path, config: Any) -> CheckpointError:
    return CheckpointError(f"{adapter} is an adapter of the kind {config.peft_type}, which changes prompts, not layers")


def extend(base: Any, opened: AdapterFolder[Any]) -> int:
    """Gives the base the further rows of the adapter's embedding and output matrices; how many rows it had."""
    import torch

    shapes = {name: tuple(tensor.shape) for name, tensor in opened.tensors.items()}
    rows, before = stored_rows(opened.path, shapes), base.config.vocab_size
    if rows is None or rows <= before:
        return before
    check_extension(opened.folder, opened.tensors, rows, before, is_tied=base.config.tie_word_embeddings)
    base.resize_token_embeddings(rows, mean_resizing=False)
    matrices = {EMBEDDING: base.get_input_embeddings().weight, OUTPUT: base.get_output_embeddings().weight}
    with torch.no_grad():
        # The shortest name is that of the matrix itself, which may be trained; the frozen one counts, if it is there.
        for name in sorted(opened.tensors, key=len):
            if module := copy_of(name):
                matrices[module][before:] = opened.tensors[name][before:].to(matrices[module])
    return before


def _check_copy(opened: AdapterFolder[Any], name: str, weight: Any, common: int) -> None:
    """PEFT would load the copy into the base, whatever it holds."""
    import torch

    copy = opened.tensors[name]
    # The base may be loaded in a third dtype, beside that of its file and that of the training.
    formats = [torch.finfo(tensor.dtype) for tensor in (copy, weight)]
    rtol, atol = 2 * max(one.eps for one in formats), max(one.tiny * one.eps for one in formats)
    rows, same = copy[:common].float(), weight[:common].detach().cpu().float()
    if copy.shape != weight.shape or not torch.allclose(rows, same, rtol=rtol, atol=atol):
        raise _another_base(
            opened.folder,
            f"its {name} of shape {list(copy.shape)} is not the base's of {list(weight.shape)}, "
            "and modules_to_save does not name it",
        )


def extension_note(rows: int, before: int) -> str:
    return f"vocabulary of {rows} tokens: the base has {before}, the rows of the others are the adapter's"


def check_extension(folder: Path, names: Iterable[str], rows: int, before: int, *, is_tied: bool) -> None:
    """Raises `CheckpointError` where the adapter does not hold all that a base of `before` rows lacks."""
    held = {copy_of(name) for name in names} - {None}
    if lacking := [module for module in (EMBEDDING, OUTPUT) if module not in held and not (is_tied and held)]:
        raise CheckpointError(
            f"{folder} was trained with {rows} tokens, and the base has {before}: it does not hold the further rows "
            f"of {', '.join(lacking)}; name the base with {rows} rows that it was trained on"
        )

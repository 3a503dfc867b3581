"""Hugging Face folders of stock Llama or LlamaRepro: config.json and safetensors (or the older pytorch_model.bin)."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hf_llama_repro import LlamaReproConfig
from hf_llama_repro.configuration_llama_repro import ROPE_KEYS
from hf_llama_repro.errors import CheckpointError
from hf_llama_repro.llama_folder import MODEL_TYPES, architecture

from .keys import DTYPES, EMBEDDING, OUR_FREQUENCIES, OUTPUT, check_layers, check_names, our_shapes, plain_names
from .pth_file import load_tensors
from .source import CONFIG_ERRORS, Source, StoredTensor, check_downloaded, is_file, promoted
from .special_ids import without_foreign_padding

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_MAX_LABELS = 1_000_000


def open_hugging_face(folder: Path, *, dequantize: bool = False) -> Source:
    """Opens a Llama or LlamaRepro folder. Raises `CheckpointError` where config.json and weights disagree.

    `dequantize` opens what bitsandbytes quantized to 8 bits, too, in the dtype of its other tensors.
    """
    fields = read_json(folder / "config.json")
    model_type = fields.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(f"{folder} holds model_type {model_type!r}, not one of {', '.join(MODEL_TYPES)}")
    if quantization := fields.get("quantization_config"):
        described = quantization if isinstance(quantization, dict) else {"quant_method": quantization}
        if not (dequantize and described.get("load_in_8bit")):
            known = ", which is not bitsandbytes' int8" if dequantize else ""
            raise CheckpointError(
                f"{folder} is quantized ({described.get('quant_method')}){known}: "
                "convert the 16- or 32-bit weights that it was made from"
            )
    fields, changed = without_foreign_padding(fields)
    notes = [*changed]
    tensors, files = _tensors(folder, dequantize=bool(quantization), tell=notes.append)
    config = _config(folder / "config.json", fields, promoted(tensors.values()), tell=notes.append)
    check_layers(tensors, config, folder, "config.json")
    _check_output(folder, tensors, config)
    if config.tie_word_embeddings and {OUTPUT, EMBEDDING} <= set(tensors):
        # As transformers loads it: different matrices are not tied, whatever config.json says.
        if torch.equal(tensors[OUTPUT].read(), tensors[EMBEDDING].read()):
            del tensors[OUTPUT]
        else:
            config.tie_word_embeddings = False
            notes.append("output matrix differs from the embedding: not tied, though config.json says so")
    shapes = our_shapes(config)
    check_names(set(tensors), set(shapes), str(folder))
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(tensors[name].shape)}, but config.json asks for {list(shape)}"
            )
    generation = folder / "generation_config.json"
    return Source(
        description=f"Hugging Face folder ({model_type})",
        config=config,
        tensors={name: tensors[name] for name in shapes},
        tokenizer=folder if any((folder / name).is_file() for name in TOKENIZER_FILES) else None,
        files=dict.fromkeys([folder / "config.json", *files]),
        generation_config=read_json(generation) if generation.is_file() else {},
        notes=tuple(notes),
    )


def _check_output(folder: Path, tensors: dict[str, StoredTensor], config: LlamaReproConfig) -> None:
    """Raises `CheckpointError` for the two kinds of Llama folder that hold another model than a causal LM."""
    if adapters := [name for name in tensors if ".lora_" in name]:
        raise CheckpointError(
            f"{folder} holds LoRA matrices beside the weights ({len(adapters)}, such as {adapters[0]}): save the model "
            "after PEFT's merge_and_unload(), or the adapter alone, which hf-llama-merge takes"
        )
    if OUTPUT in tensors or config.tie_word_embeddings:
        return
    heads = [name for name in ("score.weight", "classifier.weight", "qa_outputs.weight") if name in tensors]
    raise CheckpointError(
        f"{folder} has no output matrix ({OUTPUT}), and config.json does not tie it to the embedding: "
        + (
            f"with {heads[0]} it is a classifier, which generates nothing"
            if heads
            else "it was saved from the base model (LlamaModel), without the head; save it from LlamaForCausalLM, or "
            'write "tie_word_embeddings": true into config.json if the model was trained so'
        )
    )


def _config(
    path: Path, fields: dict[str, Any], dtype: torch.dtype, tell: Callable[[str], None] = lambda note: None
) -> LlamaReproConfig:
    """The configuration; `dtype` is the weights', where it names none. `tell` is given a line on what has no effect."""
    given = architecture(fields)
    if odd := [name for name in given if name.startswith("__") or callable(getattr(LlamaReproConfig, name, None))]:
        raise CheckpointError(f"{path}: {odd[0]} is not a field of a configuration: remove it")
    named = fields.get("dtype") or fields.get("torch_dtype") or dtype
    if named not in DTYPES and named not in [str(dtype).removeprefix("torch.") for dtype in DTYPES]:
        raise CheckpointError(f"{path}: dtype = {named!r} is not a 16- or 32-bit float: convert the weights that are")
    labels = given.get("num_labels")
    if isinstance(labels, int) and labels > _MAX_LABELS:  # transformers makes a name for each
        raise CheckpointError(f"{path}: num_labels = {labels} is more than any model has: correct or remove it")
    for field in ("rope_scaling", "rope_parameters"):
        if isinstance(given.get(field), dict):
            given[field] = _known_rope(path, field, given[field], tell)
    try:
        return LlamaReproConfig(**{**given, "dtype": named})
    except CONFIG_ERRORS as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}: correct it there") from None


def _known_rope(path: Path, field: str, rope: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """Without the keys that have no effect in transformers either, which warns about them."""
    rope_type = rope.get("rope_type", rope.get("type"))
    if rope_type is None and rope.get("factor") is not None:
        raise CheckpointError(
            f"{path}: {field} says factor = {rope['factor']}, but not of which kind: "
            f'add "rope_type", one of {", ".join(ROPE_KEYS)}'
        )
    if not isinstance(rope_type, str | None) or (rope_type or "default") not in ROPE_KEYS:
        return rope  # refused with the configuration
    required, optional = ROPE_KEYS[rope_type or "default"]
    # partial_rotary_factor has an effect with every type.
    known = required | optional | {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unknown := [f"{name} = {value}"[:60] for name, value in rope.items() if name not in known]:
        tell(f"{field}: {', '.join(unknown)} left out: without effect on the type {rope_type or 'default'!r}")
    return {name: value for name, value in rope.items() if name in known}


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def _tensors(
    folder: Path, *, dequantize: bool, tell: Callable[[str], None]
) -> tuple[dict[str, StoredTensor], list[Path]]:
    """The tensors, and the files that they are in. `tell` is given a line on what was left out or read as another."""
    for index_name, single_name, load in (
        ("model.safetensors.index.json", "model.safetensors", read_safetensors),
        ("pytorch_model.bin.index.json", "pytorch_model.bin", partial(read_pytorch, tell=tell)),
    ):
        weight_map: dict[str, str] | None = None
        if (folder / single_name).is_file():  # as transformers chooses
            files = [single_name]
            if (folder / index_name).is_file():
                tell(f"weights of {single_name}, as transformers reads them: {index_name} left out")
        elif (folder / index_name).is_file():
            weight_map = _weight_map(folder / index_name)
            files = sorted(set(weight_map.values()))
        else:
            continue
        tensors = _plain(_read_files(folder, files, weight_map, index_name, load), tell)
        tensors = {name: tensor for name, tensor in tensors.items() if not OUR_FREQUENCIES.fullmatch(name)}
        if not tensors:
            raise CheckpointError(f"{folder} has no tensors in {', '.join(files) or index_name}: download it again")
        if dequantize:
            tensors = _dequantized(tensors)
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPES:
                raise CheckpointError(f"{folder}: {name} is {tensor.dtype}, not a 16- or 32-bit float: quantized?")
        return tensors, [folder / file for file in files]
    raise CheckpointError(f"{folder} has config.json but no weights: neither model.safetensors nor pytorch_model.bin")


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map of file names: download it again")
    return weight_map


def _read_files(
    folder: Path,
    files: list[str],
    weight_map: dict[str, str] | None,
    index_name: str,
    load: Callable[[Path], dict[str, StoredTensor]],
) -> dict[str, StoredTensor]:
    """The tensors of all files; where two hold one of the same name, the one that the index names."""
    if missing := [file for file in files if Path(file).name != file or not is_file(folder / file)]:
        raise CheckpointError(
            f"{folder / index_name} names {', '.join(missing[:5])}, which {'is' if len(missing) == 1 else 'are'} "
            f"not there ({len(missing)} of {len(files)} files): download what is missing"
        )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in load(folder / file).items():
            if weight_map is None or weight_map.get(name, file) == file:
                if name in tensors:
                    raise CheckpointError(
                        f"{folder}: {name} is in two files, and {index_name} does not say in which of them it counts"
                    )
                tensors[name] = tensor
    if absent := [name for name in weight_map or () if name not in tensors]:
        raise CheckpointError(
            f"{folder / index_name} names {absent[0]} in {(weight_map or {})[absent[0]]}, "
            f"which does not hold it ({len(absent)} such tensors): download both again"
        )
    return tensors


def _plain(tensors: dict[str, StoredTensor], tell: Callable[[str], None]) -> dict[str, StoredTensor]:
    """The tensors under the names of a causal LM, which a wrapper or a save of the base model alone has changed."""
    names = plain_names(tensors, EMBEDDING)
    if EMBEDDING not in names.values():
        base = {
            name: f"model.{plain}" for name, plain in plain_names(tensors, EMBEDDING.removeprefix("model.")).items()
        }
        names = base if EMBEDDING in base.values() else names
    if renamed := [name for name, plain in names.items() if name != plain]:
        tell(f"{renamed[0]} and {len(renamed) - 1} more tensors are read as {names[renamed[0]]} and so on")
    return {names[name]: tensor for name, tensor in tensors.items()}


def _dequantized(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """int8 matrices and the largest magnitude of each row (SCB) become the floats that bitsandbytes computes with."""
    scales = {name.removesuffix("SCB") + "weight": tensor for name, tensor in tensors.items() if name.endswith(".SCB")}
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith((".SCB", ".weight_format"))}
    dtype = promoted(tensor for name, tensor in kept.items() if name not in scales)

    def floats(stored: StoredTensor, scale: StoredTensor) -> torch.Tensor:
        # (out, in) times (out, 1)
        return stored.read().float() * scale.read().float()[:, None] / 127

    for name in scales.keys() & kept.keys():
        if kept[name].dtype == torch.int8:
            kept[name] = StoredTensor(kept[name].shape, dtype, partial(floats, kept[name], scales[name]))
    return kept


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    check_downloaded(path)
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}): download it again") from None
    tensors = {}
    for name in file.keys():  # noqa: SIM118 - not a mapping
        piece = file.get_slice(name)
        shape = tuple(piece.get_shape())
        # Reading no rows gives the dtype as torch names it.
        dtype = piece[:0].dtype if shape else file.get_tensor(name).dtype
        tensors[name] = StoredTensor(shape, dtype, partial(file.get_tensor, name))
    return tensors


def read_pytorch(path: Path, tell: Callable[[str], None] = lambda note: None) -> dict[str, StoredTensor]:
    rowwise = torch.contiguous_format
    return {
        # A copy in order of rows: tensors of one file may share storage, or be transposed views.
        name: StoredTensor(tuple(tensor.shape), tensor.dtype, partial(torch.clone, tensor, memory_format=rowwise))
        for name, tensor in load_tensors(path, tell).items()
    }

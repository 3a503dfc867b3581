"""Hugging Face folders of stock Llama or LlamaRepro: config.json and safetensors (or the older pytorch_model.bin)."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hf_llama_repro import LlamaReproConfig
from hf_llama_repro.errors import CheckpointError
from hf_llama_repro.llama_folder import MODEL_TYPES, architecture

from .keys import DTYPES, EMBEDDING, OUR_FREQUENCIES, OUTPUT, check_layers, check_names, our_shapes
from .source import CONFIG_ERRORS, Source, StoredTensor, is_file, promoted
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
    fields, notes = without_foreign_padding(fields)
    tensors, files = _tensors(folder, dequantize=bool(quantization))
    config = _config(folder / "config.json", fields, promoted(tensors.values()))
    check_layers(tensors, config, folder, "config.json")
    if config.tie_word_embeddings and {OUTPUT, EMBEDDING} <= set(tensors):
        # As transformers loads it: different matrices are not tied, whatever config.json says.
        if torch.equal(tensors[OUTPUT].read(), tensors[EMBEDDING].read()):
            del tensors[OUTPUT]
        else:
            config.tie_word_embeddings = False
            notes = (*notes, "output matrix differs from the embedding: not tied, though config.json says so")
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
        notes=notes,
    )


def _config(path: Path, fields: dict[str, Any], dtype: torch.dtype) -> LlamaReproConfig:
    """The configuration; `dtype` is the weights', where it names none."""
    given = architecture(fields)
    if odd := [name for name in given if name.startswith("__") or callable(getattr(LlamaReproConfig, name, None))]:
        raise CheckpointError(f"{path}: {odd[0]} is not a field of a configuration: download it again")
    named = fields.get("dtype") or fields.get("torch_dtype") or dtype
    if named not in DTYPES and named not in [str(dtype).removeprefix("torch.") for dtype in DTYPES]:
        raise CheckpointError(f"{path}: dtype = {named!r} is not a 16- or 32-bit float: download it again")
    labels = given.get("num_labels")
    if isinstance(labels, int) and labels > _MAX_LABELS:  # transformers makes a name for each
        raise CheckpointError(f"{path}: num_labels = {labels} is more than any model has: download it again")
    try:
        return LlamaReproConfig(**{**given, "dtype": named})
    except CONFIG_ERRORS as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}: download it again") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def _tensors(folder: Path, *, dequantize: bool) -> tuple[dict[str, StoredTensor], list[Path]]:
    """The tensors, and the files that they are in."""
    for index_name, single_name, load in (
        ("model.safetensors.index.json", "model.safetensors", read_safetensors),
        ("pytorch_model.bin.index.json", "pytorch_model.bin", read_pytorch),
    ):
        if (folder / index_name).is_file():
            weight_map = read_json(folder / index_name).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise CheckpointError(f"{folder / index_name} has no weight_map of file names: download it again")
            files = sorted(set(weight_map.values()))
        elif (folder / single_name).is_file():
            files = [single_name]
        else:
            continue
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            if Path(file).name != file or not is_file(folder / file):
                raise CheckpointError(f"{folder / index_name} names {file}, which is not there: download it")
            tensors.update(load(folder / file))
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


def read_pytorch(path: Path) -> dict[str, StoredTensor]:
    from .meta import load_shard

    rowwise = torch.contiguous_format
    return {
        # A copy in order of rows: tensors of one file may share storage, or be transposed views.
        name: StoredTensor(tuple(tensor.shape), tensor.dtype, partial(torch.clone, tensor, memory_format=rowwise))
        for name, tensor in load_shard(path).items()
    }

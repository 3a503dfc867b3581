"""Hugging Face folders of stock Llama or LlamaRepro: config.json and safetensors (or the older pytorch_model.bin)."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hf_llama_repro import LlamaReproConfig
from hf_llama_repro.errors import CheckpointError

from .keys import OUR_FREQUENCIES, OUTPUT, check_names, our_shapes
from .source import Source, StoredTensor

MODEL_TYPES = ("llama", "llama_repro")
# Fields that say how the folder is opened, not what the model is.
_NOT_ARCHITECTURE = ("architectures", "auto_map", "model_type", "transformers_version", "_name_or_path", "torch_dtype")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def open_hugging_face(folder: Path) -> Source:
    """Opens a Llama or LlamaRepro folder. Raises `CheckpointError` where config.json and weights disagree."""
    fields = read_json(folder / "config.json")
    model_type = fields.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(f"{folder} holds model_type {model_type!r}, not one of {', '.join(MODEL_TYPES)}")
    if "quantization_config" in fields:
        raise CheckpointError(
            f"{folder} is quantized ({fields['quantization_config'].get('quant_method', 'unknown method')}): "
            "convert the 16- or 32-bit weights that it was made from"
        )
    tensors = _tensors(folder)
    dtype = fields.get("dtype") or fields.get("torch_dtype") or _promoted(tensors)
    architecture = {name: value for name, value in fields.items() if name not in _NOT_ARCHITECTURE}
    try:
        config = LlamaReproConfig(**{**architecture, "dtype": dtype})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    if config.tie_word_embeddings:
        tensors.pop(OUTPUT, None)
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
        generation_config=read_json(generation) if generation.is_file() else {},
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    for index_name, single_name, load in (
        ("model.safetensors.index.json", "model.safetensors", _safetensors),
        ("pytorch_model.bin.index.json", "pytorch_model.bin", _pytorch),
    ):
        if (folder / index_name).is_file():
            files = sorted(set(read_json(folder / index_name).get("weight_map", {}).values()))
        elif (folder / single_name).is_file():
            files = [single_name]
        else:
            continue
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            if Path(file).name != file or not (folder / file).is_file():
                raise CheckpointError(f"{folder / index_name} names {file}, which is not there: download it")
            tensors.update(load(folder / file))
        return {name: tensor for name, tensor in tensors.items() if not OUR_FREQUENCIES.fullmatch(name)}
    raise CheckpointError(f"{folder} has config.json but no weights: neither model.safetensors nor pytorch_model.bin")


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}): download it again") from None
    tensors = {}
    for name in file.keys():  # noqa: SIM118 - not a mapping
        piece = file.get_slice(name)
        # Reading no rows gives the dtype as torch names it.
        dtype = piece[:0].dtype
        tensors[name] = StoredTensor(tuple(piece.get_shape()), dtype, lambda name=name: file.get_tensor(name))
    return tensors


def _pytorch(path: Path) -> dict[str, StoredTensor]:
    from .meta import load_shard

    return {
        name: StoredTensor(tuple(tensor.shape), tensor.dtype, tensor.clone) for name, tensor in load_shard(path).items()
    }


def _promoted(tensors: dict[str, StoredTensor]) -> torch.dtype:
    dtypes = [tensor.dtype for tensor in tensors.values()]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype

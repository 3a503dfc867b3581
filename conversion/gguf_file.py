"""GGUF files of llama.cpp, read with the `gguf` package; each tensor is dequantized to fp32 when it is read.

Names and meaning of the metadata: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#llm, and, for what a file
may leave out, llama.cpp, src/llama-model.cpp, `llama_model::load_hparams`.
"""

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_llama_repro import LlamaReproConfig
from hf_llama_repro.errors import CheckpointError

from .gguf_header import check_header
from .keys import check_layers, check_names, expand, our_shapes, to_half_split
from .source import CONFIG_ERRORS, Source, StoredTensor, is_file

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

# fmt: off
# Names without ".weight", which all of them end in.
_NAMES = {
    "token_embd":         "model.embed_tokens",
    "blk.{}.attn_q":      "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k":      "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v":      "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_gate":    "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_down":    "model.layers.{}.mlp.down_proj",
    "blk.{}.ffn_up":      "model.layers.{}.mlp.up_proj",
    "blk.{}.attn_norm":   "model.layers.{}.input_layernorm",
    "blk.{}.ffn_norm":    "model.layers.{}.post_attention_layernorm",
    "output_norm":        "model.norm",
    "output":             "lm_head",
}
# fmt: on
# Rotary frequencies of old files, which follow from the base, as in Meta's.
_FREQUENCIES = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")

# Metadata below "llama.": what must be there, and what may be, for which field of the configuration.
_NEEDED = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_HEAD_DIM = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_USED = {
    *_NEEDED,
    *_HEAD_DIM,
    "attention.head_count_kv",
    "vocab_size",
    "rope.freq_base",
    "rope.scale_linear",  # the older name of rope.scaling.factor
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
_WITHOUT_EFFECT = {"tensor_data_layout", "rope.scaling.finetuned"}
# What a LLaMA has not, and the values that say so.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "use_parallel_residual": (False,),
    "pooling_type": (0,),
    "nextn_predict_layers": (0,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
}
# GGUF's names of unquantized tensors -> dtype that holds them without loss.
_UNQUANTIZED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_HF_FOLDER = "convert the Hugging Face folder that it was made from"


def open_gguf(path: Path) -> Source:
    """Opens a GGUF file of LLaMA's architecture, or all parts of a split one, of which `path` is any.

    Raises `CheckpointError` for another architecture, a damaged file, or when the `gguf` package is missing.
    """
    paths, readers = _open_parts(path)
    path, metadata = paths[0], _metadata(paths[0], readers[0])
    found = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    if "rope_freqs.weight" in found:
        raise CheckpointError(
            f"{path} scales its rotary frequencies (rope_freqs.weight), as Llama 3.1 does, but does not say by which "
            f"rule: {_HF_FOLDER}"
        )
    names, unknown = _our_names(found)
    if unknown:
        raise CheckpointError(f"{path} holds tensors that LLaMA does not have: {', '.join(sorted(unknown)[:5])}")
    notes: list[str] = []
    config = _config(path, metadata, found, notes)
    _take_token_ids(config, readers[0], notes)
    check_layers(found, config, path, "its metadata")
    shapes = our_shapes(config)
    check_names(set(names), set(shapes), str(path))
    for name, shape in shapes.items():
        if (stored := _shape(names[name])) != shape:
            raise CheckpointError(f"{path}: {name} has shape {list(stored)}, its metadata say {list(shape)}")
    _check_types(path, names)
    matrices = {tensor.tensor_type.name for tensor in names.values() if len(tensor.shape) > 1}
    config.dtype = _UNQUANTIZED.get(matrices.pop(), torch.float32) if len(matrices) == 1 else torch.float32
    # llama.cpp turns neighbouring channels, as Meta does.
    heads = {ours: getattr(config, row.heads) for row, _, ours in expand(config) if row.heads is not None}
    if len(paths) > 1:
        notes.append(f"split file: all of its {len(paths)} parts read")
    return Source(
        description=f"GGUF file ({', '.join(sorted({tensor.tensor_type.name for tensor in names.values()}))})",
        config=config,
        tensors={name: _stored(names[name], config.dtype, heads.get(name)) for name in shapes},
        tokenizer=path if "tokenizer.ggml.model" in readers[0].fields else None,
        files=dict.fromkeys(paths),
        token_ids_from_tokenizer="tokenizer.ggml.model" in readers[0].fields,
        notes=tuple(notes),
    )


def _open_parts(path: Path) -> "tuple[list[Path], list[GGUFReader]]":
    """The file, or every part of a split one in order, the first of which has the metadata."""
    first = _read(path)
    count = _value(first, "split.count", 1)
    if count in (0, 1):
        return [path], [first]
    part = _PART.fullmatch(path.name)
    if part is None or int(part[3]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts of a split file, but is not named so: give it its name back, "
            f"NAME-00001-of-{count:05d}.gguf, beside the others, or join them with llama-gguf-split --merge"
        )
    paths = [path.with_name(f"{part[1]}-{number:05d}-of-{part[3]}.gguf") for number in range(1, count + 1)]
    if missing := [other.name for other in paths if not is_file(other)]:
        raise CheckpointError(
            f"{path} is one of {count} parts of a split file, and {', '.join(missing[:5])} "
            f"{'is' if len(missing) == 1 else 'are'} not beside it: download what is missing"
        )
    readers = [first if other == path else _read(other) for other in paths]
    for number, (other, reader) in enumerate(zip(paths, readers, strict=True)):
        if (_value(reader, "split.no", None), _value(reader, "split.count", None)) != (number, count):
            raise CheckpointError(f"{other} is not part {number + 1} of {count}, though its name says so: rename it")
    names = [tensor.name for reader in readers for tensor in reader.tensors]
    total = _value(readers[0], "split.tensors.count", len(names))
    if len(set(names)) != len(names) or total != len(names):
        raise CheckpointError(
            f"{paths[0]} and its other parts hold {len(names)} tensors, {len(set(names))} of them distinct, but should "
            f"hold {total}: they are not of one file"
        )
    return paths, readers


def _read(path: Path) -> "GGUFReader":
    try:
        from gguf import GGUFReader
    except ImportError:
        raise CheckpointError(f"{path} needs the package gguf: pip install 'hf-llama-repro[gguf]'") from None
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file: download it again")
    check_header(path)
    try:
        reader = GGUFReader(str(path))
    except Exception as error:  # the reader raises whatever the damage leads to
        raise CheckpointError(f"{path} is truncated or damaged ({error}): download it again") from None
    if sum(tensor.n_bytes for tensor in reader.tensors) > path.stat().st_size:
        raise CheckpointError(f"{path} is damaged (its tensors overlap): download it again")
    return reader


def _value(reader: "GGUFReader", name: str, default: Any) -> Any:
    return reader.fields[name].contents() if name in reader.fields else default


def _metadata(path: Path, reader: "GGUFReader") -> dict[str, Any]:
    """What stands below "llama.", all of it known and without what LLaMA does not compute."""
    try:
        architecture = reader.fields["general.architecture"].contents()
        kind = _value(reader, "general.type", "model")
        metadata = {
            name.removeprefix("llama."): _number(field.contents())
            for name, field in reader.fields.items()
            if name.startswith("llama.")
        }
    except Exception as error:  # as in `_read`
        raise CheckpointError(f"{path} is truncated or damaged ({error}): download it again") from None
    if architecture != "llama":
        raise CheckpointError(f"{path} holds the architecture {architecture!r}, not 'llama'")
    if kind != "model":
        raise CheckpointError(f"{path} holds no model, but one's {str(kind)[:40]} (general.type)")
    for name, value in metadata.items():
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            raise CheckpointError(
                f"{path} says llama.{name} = {str(value)[:40]}: not an architecture of LLaMA 1 or 2, "
                "and what it changes is not computed here"
            )
        if name not in {*_USED, *_WITHOUT_EFFECT, *_NEUTRAL}:
            raise CheckpointError(
                f"{path} says llama.{name[:60]} = {str(value)[:40]}, which is not known here and could change what is "
                f"computed: {_HF_FOLDER}"
            )
    if missing := [f"llama.{name}" for name in _NEEDED if name not in metadata]:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}, without which llama.cpp does not open it either: "
            "make it again with llama.cpp's convert_hf_to_gguf.py"
        )
    return metadata


def _number(value: Any) -> Any:
    """A value, or what is the same for every layer; a float as it was written: float32 made 9.99999974e-06 of 1e-5."""
    if isinstance(value, list) and value and all(each == value[0] for each in value):
        value = value[0]
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _our_names(found: "dict[str, ReaderTensor]") -> "tuple[dict[str, ReaderTensor], list[str]]":
    """The tensors by our names, and the names that are none of LLaMA's."""
    ours: dict[str, ReaderTensor] = {}
    unknown = []
    for name, tensor in found.items():
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
        pattern = "" if match is None else match[2] if match[1] is None else f"blk.{{}}.{match[2]}"
        if match is not None and pattern in _NAMES:
            ours[f"{_NAMES[pattern].format(match[1])}.weight"] = tensor
        elif not _FREQUENCIES.fullmatch(name):
            unknown.append(name)
    return ours, unknown


def _config(
    path: Path, metadata: dict[str, Any], found: "dict[str, ReaderTensor]", notes: list[str]
) -> LlamaReproConfig:
    fields: dict[str, Any] = {field: metadata[name] for name, field in _NEEDED.items()}
    fields["num_key_value_heads"] = metadata.get("attention.head_count_kv")
    if "token_embd.weight" not in found:
        raise CheckpointError(f"{path} has no token_embd.weight: it is not a whole model")
    rows = _shape(found["token_embd.weight"])[0]
    if (said := metadata.get("vocab_size", rows)) != rows:
        notes.append(f"vocabulary of {rows}, the rows of the embedding, though llama.vocab_size says {said}")
    widths = {name: metadata[name] for name in _HEAD_DIM if name in metadata}
    if len(set(map(str, widths.values()))) > 1:
        told = ", ".join(f"llama.{name} = {width}" for name, width in widths.items())
        raise CheckpointError(f"{path} says {told}: in LLaMA keys, values and what is rotated are equally wide")
    fields["head_dim"] = next(iter(widths.values()), None)
    if without := sorted(f"llama.{name}" for name in _WITHOUT_EFFECT & metadata.keys()):
        notes.append(f"{', '.join(without)} left out: without effect on what is computed")
    try:
        return LlamaReproConfig(
            **fields,
            vocab_size=rows,
            rope_parameters=_rope(path, metadata, notes),
            tie_word_embeddings="output.weight" not in found,
        )
    except CheckpointError:
        raise
    except CONFIG_ERRORS as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}: use another file of it") from None


def _take_token_ids(config: LlamaReproConfig, reader: "GGUFReader", notes: list[str]) -> None:
    """The special ids that the file's tokenizer names; they count where another tokenizer is not converted."""
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        index = _value(reader, f"tokenizer.ggml.{key}_token_id", None)
        if isinstance(index, int) and 0 <= index < config.vocab_size:
            setattr(config, name, index)
        elif index is not None:
            notes.append(f"tokenizer.ggml.{key}_token_id = {str(index)[:20]} left out: it is no row of the embedding")


def _rope(path: Path, metadata: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Rotary parameters by llama.cpp's rules: a factor without a type is linear, a type without a factor nothing."""
    theta = {"rope_theta": metadata.get("rope.freq_base", 10000.0)}
    kind = metadata.get("rope.scaling.type", "linear")
    factor = metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 0)) or 1.0
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError(
            f"{path} says llama.rope.scaling.type = {str(kind)[:40]}; known are none, linear and yarn: {_HF_FOLDER}"
        )
    if kind == "none" or factor == 1:
        if "rope.scaling.type" in metadata:
            notes.append(f"rotary embedding not scaled: type {kind}, factor {factor:g}")
        return {"rope_type": "default", **theta}
    if "rope.scaling.type" not in metadata:
        notes.append(f"rotary embedding scaled by {factor:g}, linearly, as llama.cpp does where no type is named")
    if kind == "linear":
        return {"rope_type": kind, "factor": factor, **theta}
    betas = {name: f"rope.scaling.yarn_{name}" for name in ("beta_fast", "beta_slow")}
    return {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": metadata.get(
            "rope.scaling.original_context_length", metadata["context_length"]
        ),
        **{name: metadata[key] for name, key in betas.items() if key in metadata},
        **theta,
    }


def _shape(tensor: "ReaderTensor") -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _check_types(path: Path, tensors: "dict[str, ReaderTensor]") -> None:
    """Before anything is written: the package knows no way back from some quantizations."""
    from gguf.quants import dequantize

    for tensor in {tensor.tensor_type: tensor for tensor in tensors.values()}.values():
        try:
            dequantize(tensor.data[:1], tensor.tensor_type)
        except Exception as error:  # also what the bytes of a damaged header lead to
            raise CheckpointError(
                f"{path} has weights that cannot be read ({tensor.tensor_type.name}: {error}): use another file of it"
            ) from None


def _stored(tensor: "ReaderTensor", dtype: torch.dtype, heads: int | None) -> StoredTensor:
    # llama.cpp keeps norms in fp32 beside 16-bit matrices; cast only where that loses nothing.
    if len(tensor.shape) == 1 and not torch.equal((values := _floats(tensor)).to(dtype).to(values.dtype), values):
        dtype = values.dtype
    return StoredTensor(_shape(tensor), dtype, partial(_in_our_order, tensor, dtype, heads))


def _in_our_order(tensor: "ReaderTensor", dtype: torch.dtype, heads: int | None) -> torch.Tensor:
    values = _floats(tensor).to(dtype)
    return values if heads is None else to_half_split(values, heads)


def _floats(tensor: "ReaderTensor") -> torch.Tensor:
    """The values in fp32."""
    from gguf.quants import dequantize

    # A copy of what is only mapped, which may not be written to.
    values = np.require(dequantize(tensor.data, tensor.tensor_type), requirements=["C", "W"])
    return torch.from_numpy(values).view(_shape(tensor))

"""GGUF files of llama.cpp, through transformers' own loader, which dequantizes them to fp32."""

import contextlib
import io
import re
import sys
from pathlib import Path

import torch

from hf_llama_repro import LlamaReproConfig
from hf_llama_repro.errors import CheckpointError

from .gguf_header import check_header
from .keys import check_layers, check_names, expand, our_shapes, to_half_split
from .source import CONFIG_ERRORS, Source, StoredTensor

# GGUF's names of unquantized tensors -> dtype that holds them without loss.
_UNQUANTIZED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# All that a LLaMA has (attn_rot_embd: rotary frequencies in old files), and metadata of what is not one;
# transformers' loader passes over both in silence.
_NAME = re.compile(
    r"(token_embd|output|output_norm|blk\.\d+\.(attn_(q|k|v|output|norm|rot_embd)|ffn_(gate|up|down|norm)))\.weight"
)
_NOT_LLAMA = ("llama.expert_count", "llama.rope.scaling.type", "llama.rope.scale_linear")


def open_gguf(path: Path) -> Source:
    """Opens a GGUF file of LLaMA's architecture; the whole model is held in memory in fp32.

    Raises `CheckpointError` for another architecture, a damaged file, or when the `gguf` package is missing.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise CheckpointError(f"{path} needs the package gguf: pip install 'hf-llama-repro[gguf]'") from None
    check_header(path)
    try:
        reader = GGUFReader(str(path))
        metadata = {name: field.contents() for name, field in reader.fields.items() if name.startswith("llama.")}
        architecture = reader.fields["general.architecture"].contents()
    except Exception as error:  # the reader raises whatever the damage leads to
        raise CheckpointError(f"{path} is truncated or damaged ({error}): download it again") from None
    if architecture != "llama":
        raise CheckpointError(f"{path} holds the architecture {architecture!r}, not 'llama'")
    if sum(tensor.n_bytes for tensor in reader.tensors) > path.stat().st_size:
        raise CheckpointError(f"{path} is damaged (its tensors overlap): download it again")
    names = {tensor.name for tensor in reader.tensors}
    if special := [name for name in _NOT_LLAMA if metadata.get(name) not in (None, 0, 1, "none")]:
        raise CheckpointError(f"{path} says {special[0]} = {metadata[special[0]]}: not an architecture of LLaMA 1 or 2")
    if "rope_freqs.weight" in names:
        raise CheckpointError(f"{path} scales its rotary frequencies (rope_freqs.weight), as Llama 3.1 does")
    if unknown := sorted(name for name in names if not _NAME.fullmatch(name)):
        raise CheckpointError(f"{path} holds tensors that LLaMA does not have: {', '.join(unknown[:5])}")

    vocab_size = next((int(tensor.shape[-1]) for tensor in reader.tensors if tensor.name == "token_embd.weight"), None)
    config = _config(path, vocab_size)
    check_layers(names, config, path, "its metadata")
    tensors = _load(path, config)
    types = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    dtype = _UNQUANTIZED.get(types.pop(), torch.float32) if len(types) == 1 else torch.float32
    config.dtype = dtype
    shapes = our_shapes(config)
    check_names(set(tensors), set(shapes), str(path))
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(tensors[name].shape)}, its metadata say {list(shape)}"
            )
    if "llama.attention.head_count_kv" not in metadata:
        # The loader then leaves Q and K in the interleaved order.
        for row, _, name in expand(config):
            if row.heads is not None:
                tensors[name] = to_half_split(tensors[name], getattr(config, row.heads))
    return Source(
        description=f"GGUF file ({', '.join(sorted({tensor.tensor_type.name for tensor in reader.tensors}))})",
        config=config,
        tensors={name: _stored(tensors[name], dtype) for name in shapes},
        tokenizer=path if "tokenizer.ggml.model" in reader.fields else None,
        files={path: None},
    )


def _stored(tensor: torch.Tensor, dtype: torch.dtype) -> StoredTensor:
    # llama.cpp keeps norms in fp32 beside 16-bit matrices; cast only where that loses nothing.
    if not torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
        dtype = tensor.dtype
    return StoredTensor(tuple(tensor.shape), dtype, lambda: tensor.to(dtype).clone())


def _config(path: Path, vocab_size: int | None) -> LlamaReproConfig:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        fields = load_gguf_checkpoint(str(path))["config"]
    except Exception as error:  # as above
        raise CheckpointError(f"{path} has metadata that cannot be read ({error}): download it again") from None
    fields = {name: value for name, value in fields.items() if name not in ("model_type", "_model_name_or_path")}
    # The loader counts the tokenizer's tokens, which may be fewer.
    fields["vocab_size"] = vocab_size or fields.get("vocab_size")
    try:
        # A float32 in the file: 9.999999747378752e-06 was written as 1e-5.
        for name in ("rms_norm_eps", "rope_theta"):
            if name in fields:
                fields[name] = float(str(torch.tensor(fields[name], dtype=torch.float32).numpy()))
        return LlamaReproConfig(**fields)
    except CONFIG_ERRORS as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}: download it again") from None


def _load(path: Path, config: LlamaReproConfig) -> dict[str, torch.Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # The loader's progress bar does not know whether anybody is watching.
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        try:
            with torch.device("meta"):
                skeleton = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "model_type": "llama"}))
            return load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=skeleton)["tensors"]
        except Exception as error:  # gguf knows no way back from some quantizations, and shapes may be damaged
            raise CheckpointError(f"{path} has weights that cannot be read ({error}): use another file of it") from None

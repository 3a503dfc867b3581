"""params.json of Meta's releases: the keys that are known, and which release, and so which context, they speak for.

Sources: Meta's reference implementations (facebookresearch/llama and codellama, `ModelArgs`), and the list of releases
in meta-llama/llama-models, `sku_list.py`.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from hf_llama_repro.errors import CheckpointError

from .keys import META_FREQUENCIES, META_FREQUENCIES_PER_LAYER

# Context in tokens that each generation was trained with; the files do not name it.
CONTEXT_LENGTH = {
    "LLaMA 1": 2048,
    "LLaMA 2": 4096,
    "Code Llama": 16384,
    "Code Llama 70B Python or Instruct": 4096,
    "Llama 3": 8192,
}
DEFAULT_THETA = 10000.0
_NEEDED = ("dim", "n_heads", "n_layers", "norm_eps")
# max_batch_size sizes the cache of Meta's loader, and says nothing of the model.
_OPTIONAL = (
    "n_kv_heads",
    "multiple_of",
    "ffn_dim_multiplier",
    "rope_theta",
    "head_dim",
    "max_seq_len",
    "max_batch_size",
)
_FRACTIONS = ("norm_eps", "ffn_dim_multiplier", "rope_theta")
_KNOWN = {*_NEEDED, *_OPTIONAL, "vocab_size", "use_scaled_rope"}
_MAX_NUMBER = 10**12
# Keys of releases that compute something else than LLaMA 1 and 2.
_FOREIGN = {
    r"quantization_args|lora_args": "the quantized Llama 3.2",
    r"rope_freq_base": "the quantized Llama Guard 3 1B",
    r"hidden_dim": "the pruned Llama Guard 3 1B, or of Mistral",
    r"vision_\w+": "Llama 3.2 with vision, or of Llama 4",
    r"moe_args|ffn_exp|nope_layer_interval|use_qk_norm|attn_\w+|attention_chunk_size|floor_scale|rope_\w+": "Llama 4",
    r"sliding_window|moe": "Mistral or Mixtral",
}
_OTHERS_FOLDER = "convert that release's Hugging Face folder, whose config.json says all of it"
# What only later releases say; the vocabulary of Llama 3 has 128,256 rows, and may have been enlarged.
_THETAS = {1e6: "Code Llama", 5e5: "Llama 3"}
_CODE_LLAMA_ROWS, _LLAMA_3_ROWS = 32016, 128_000


def read_params(path: Path) -> dict[str, Any]:
    """params.json as a dictionary without nulls.

    Raises `CheckpointError` for a file that is missing, empty, or not JSON, and for keys whose meaning is not known.
    """
    # A field with null counts as left out.
    params = {name: value for name, value in _read_object(path).items() if value is not None}
    if missing := set(_NEEDED) - set(params):
        raise CheckpointError(
            f"{path} lacks {', '.join(sorted(missing))}: it is not the params.json of a LLaMA checkpoint"
        )
    for name in (*_NEEDED, *_OPTIONAL):
        value = params.get(name, 1)
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _MAX_NUMBER
        if not number or not (isinstance(value, int) or name in _FRACTIONS):
            kind = "number" if name in _FRACTIONS else "whole number"
            raise CheckpointError(f"{path}: {name} = {str(value)[:40]!r} is not a positive {kind} of a sensible size")
    if params["dim"] % params["n_heads"] and "head_dim" not in params:
        raise CheckpointError(f"{path}: dim = {params['dim']} is not a multiple of n_heads = {params['n_heads']}")
    if params["n_heads"] % (params.get("n_kv_heads") or params["n_heads"]):
        raise CheckpointError(
            f"{path}: n_heads = {params['n_heads']} is not a multiple of n_kv_heads = {params['n_kv_heads']}"
        )
    _check_keys(path, params)
    return params


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: it comes with the consolidated.NN.pth files")
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 ({error}): download it again") from None
    if not text:
        raise CheckpointError(f"{path} is empty: download it again")
    if text.startswith("<"):
        raise CheckpointError(f"{path} is a web page, not JSON (an error of the download?): download it again")
    try:
        params = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again") from None
    if not isinstance(params, dict):
        raise CheckpointError(f"{path} holds a {type(params).__name__}, not a JSON object: download it again")
    return params


def _check_keys(path: Path, params: dict[str, Any]) -> None:
    """Every key is known, and says nothing that this converter does not compute."""
    if scaled := params.get("use_scaled_rope", False):
        raise CheckpointError(
            f"{path} says use_scaled_rope = {str(scaled)[:40]}, as Llama 3.1 and later do, but not by which factor: "
            f"{_OTHERS_FOLDER}"
        )
    for name in sorted(params.keys() - _KNOWN):
        shown = f"{path} says {name[:40]} = {str(params[name])[:40]}"
        for pattern, release in _FOREIGN.items():
            if re.fullmatch(pattern, name):
                raise CheckpointError(
                    f"{shown}, a key of {release}: such a model is not converted from Meta's files; {_OTHERS_FOLDER}"
                )
        raise CheckpointError(
            f"{shown}, a key that LLaMA's params.json does not have and that could change what is computed; "
            f"known are {', '.join(sorted(_KNOWN))}: remove it if it has no effect, and convert again"
        )


def check_rows(path: Path, params: dict[str, Any], rows: int) -> None:
    """Raises `CheckpointError` where params.json asks for another vocabulary than the embedding has rows for."""
    said = params.get("vocab_size", -1)
    if isinstance(said, bool) or said not in (-1, rows):
        raise CheckpointError(
            f"{path} says vocab_size = {str(said)[:40]}, but the embedding has {rows} rows: they are not of one "
            f"checkpoint, unless the embedding was resized afterwards; then write {rows} there"
        )
    if "rope_theta" not in params and rows >= _LLAMA_3_ROWS:
        raise CheckpointError(
            f"{path} says no rope_theta, but the embedding has {rows} rows, as Llama 3's, whose loader takes 500000: "
            'write "rope_theta": 500000.0 there'
        )


def ffn_size(dim: int, multiple_of: int, ffn_dim_multiplier: float | None = None) -> int:
    """Width of the SwiGLU by Meta's rule: two thirds of 4 dim, scaled, rounded up to a multiple."""
    size = int(2 * 4 * dim / 3)
    if ffn_dim_multiplier is not None:
        size = int(ffn_dim_multiplier * size)
    return multiple_of * ((size + multiple_of - 1) // multiple_of)


def context_length(params: dict[str, Any], names: Iterable[str], dtype: torch.dtype, rows: int) -> tuple[int, str]:
    """Context in tokens and why. The files name it nowhere, but LLaMA 1 and 2 differ in what they say around it.

    `names`: of the tensors in a shard; `rows`: of the embedding. Raises `CheckpointError` where they do not tell.
    """
    if "max_seq_len" in params:
        return params["max_seq_len"], "params.json says so"
    if foreign := foreign_signs(params, rows):
        releases = dict.fromkeys(release for _, release in foreign if release in CONTEXT_LENGTH)
        contexts = " or ".join(f"{CONTEXT_LENGTH[release]} ({release})" for release in releases)
        raise CheckpointError(
            f"the files do not tell the context: {' and '.join(sign for sign, _ in foreign)} "
            f"{'are' if len(foreign) > 1 else 'is'} not LLaMA 1's or 2's: say --context-length "
            + (contexts or "TOKENS, with which the model was trained (LLaMA 1: 2048, LLaMA 2: 4096)")
        )
    evidence = _evidence(params, names, dtype)
    versions = {version for version, _ in evidence}
    if len(versions) == 1:
        version = versions.pop()
        return CONTEXT_LENGTH[version], f"{version} ({', '.join(sign for _, sign in evidence)})"
    said = "; ".join(f"{sign} speaks for {version}" for version, sign in evidence) or "nothing in them differs"
    raise CheckpointError(
        f"the files do not tell LLaMA 1 from LLaMA 2 ({said}): say --context-length 2048 (LLaMA 1) or 4096 (LLaMA 2)"
    )


def foreign_signs(params: dict[str, Any], rows: int) -> list[tuple[str, str]]:
    """(what neither LLaMA 1 nor 2 has, the release that has it) for all that is seen."""
    signs = []
    if (theta := params.get("rope_theta", DEFAULT_THETA)) != DEFAULT_THETA:
        signs.append((f"rope_theta {theta:.15g}", _THETAS.get(theta, "")))
    if rows == _CODE_LLAMA_ROWS:
        # The two of 70B have LLaMA 2's theta and context.
        release = "Code Llama" if theta != DEFAULT_THETA else "Code Llama 70B Python or Instruct"
        signs.append((f"an embedding of {rows} rows", release))
    elif rows >= _LLAMA_3_ROWS:
        signs.append((f"an embedding of {rows} rows", "Llama 3"))
    if (multiplier := params.get("ffn_dim_multiplier", 1.3)) != 1.3:  # LLaMA 2 70B's
        signs.append((f"ffn_dim_multiplier {multiplier:.6g}", "Code Llama" if multiplier == 1 else ""))
    if (eps := params["norm_eps"]) not in (1e-5, 1e-6):
        signs.append((f"norm_eps {eps:.6g}", ""))
    return signs


def tells_context_length(params: dict[str, Any], dtype: torch.dtype, rows: int, length: int) -> bool:
    """Whether the context of an exported checkpoint is recognised without being written."""
    try:
        return context_length(params, (), dtype, rows)[0] == length
    except CheckpointError:
        return False


def _evidence(params: dict[str, Any], names: Iterable[str], dtype: torch.dtype) -> list[tuple[str, str]]:
    """(version, sign) for every sign; one that is certain stands alone."""
    if params.get("n_kv_heads", params["n_heads"]) != params["n_heads"] or params.get("ffn_dim_multiplier"):
        return [("LLaMA 2", "grouped-query attention or a feed-forward multiplier in params.json")]
    if any(META_FREQUENCIES_PER_LAYER.fullmatch(name) for name in names):
        return [("LLaMA 1", "rotary frequencies in every layer")]
    if any(META_FREQUENCIES.fullmatch(name) for name in names):
        return [("LLaMA 2", "rotary frequencies beside the layers")]
    evidence = []
    if dtype is torch.float16:
        evidence.append(("LLaMA 1", "float16 weights"))
    if dtype is torch.bfloat16:
        evidence.append(("LLaMA 2", "bfloat16 weights"))
    if params["norm_eps"] == 1e-6:
        evidence.append(("LLaMA 1", "norm_eps 1e-06"))
    # LLaMA 65B has been seen with 1e-5 as well, and LLaMA 2 has no model of its size.
    if params["norm_eps"] == 1e-5 and params["dim"] != 8192:
        evidence.append(("LLaMA 2", "norm_eps 1e-05"))
    return evidence

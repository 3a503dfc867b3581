"""The model that is evaluated: a Llama or LlamaRepro folder, with an adapter or without, on its plain paths."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..llama_folder import MODEL_TYPES
from ..paper.sizes import SIZES, Size


def check_folder(folder: Path) -> dict[str, Any]:
    """What config.json says. Raises `CheckpointError` where the folder is no model with a tokenizer."""
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        model_type = fields.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} is no model: {path} cannot be read ({error}); make such a folder with hf-llama-convert"
        ) from None
    if model_type not in MODEL_TYPES:
        raise CheckpointError(f"{path} says model_type {model_type!r}, not one of {MODEL_TYPES}")
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json: convert the model with its tokenizer (hf-llama-convert SOURCE TARGET "
            "--tokenizer tokenizer.model)"
        )
    return fields


def recognised(config: Any) -> Size | None:
    """The paper's size of this shape and context, or None."""
    shape = (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        config.max_position_embeddings,
    )
    for size in SIZES.values():
        if shape == (size.dim, size.num_layers, size.num_heads, size.num_kv_heads, size.ffn_dim, size.context):
            return size
    return None


@contextlib.contextmanager
def plain_paths(switch: bool = True) -> Iterator[None]:
    """Within it, models compute by PyTorch alone, to the bit as stock Llama does: scores compare to the last digit."""
    from transformers import AutoModelForCausalLM  # noqa: F401 - registers our classes, which fills the table

    from .. import modeling_llama_repro as modeling

    before = dict(modeling.FAST_PATHS)
    if switch:
        modeling.FAST_PATHS.clear()
    try:
        yield
    finally:
        modeling.FAST_PATHS.update(before)


def load(folder: Path, adapter: Path | None, *, dtype: str) -> tuple[Any, Any]:
    """The model on this machine's device, and its tokenizer. Raises `CheckpointError` where they cannot be opened."""
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..adapter_folder import attach, rows_of, to_stderr
    from ..token_ids import choose_tokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be opened: {str(error).strip()[:500]}") from None
    model = model.to(PartialState().device)
    if adapter is not None:
        tokenizer, note = choose_tokenizer(
            adapter,
            folder,
            tokenizer,
            load=AutoTokenizer.from_pretrained,
            rows=lambda: max(model.config.vocab_size, rows_of(adapter)),
        )
        if note:
            to_stderr(note)
        model = attach(model, adapter)
    return model.eval(), tokenizer

"""A trained adapter on its base."""

from pathlib import Path
from typing import Any

from .errors import CheckpointError


def attach(base: Any, adapter: Path) -> Any:
    """The base with a trained adapter. Raises `CheckpointError` for one that was made for another base."""
    from peft import PeftModel
    from safetensors import SafetensorError, safe_open

    path = adapter / "adapter_model.safetensors"
    try:
        with safe_open(path, "pt") as file:
            saved = set(file.keys())
        model = PeftModel.from_pretrained(base, adapter)
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{adapter} is no adapter for this base: {str(error).strip()[:300]}") from None
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTuner

    if not saved or (missing := set(get_peft_model_state_dict(model)) ^ saved):
        raise CheckpointError(
            f"{adapter} is no adapter for this base: {path} holds {len(saved)} tensors, "
            f"{len(missing) if saved else 'none'} of them without a counterpart"
        )
    if not isinstance(model.base_model, BaseTuner):
        kind = model.peft_config["default"].peft_type
        raise CheckpointError(f"{adapter} is an adapter of the kind {kind}, which changes prompts, not layers")
    return model

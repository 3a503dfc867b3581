"""What the config.json of a Llama or LlamaRepro folder says of the model."""

from typing import Any

MODEL_TYPES = ("llama", "llama_repro")
# Fields that say how the folder is opened, not what the model is.
_NOT_ARCHITECTURE = frozenset(
    {
        "architectures",
        "auto_map",
        "model_type",
        "quantization_config",
        "torch_dtype",
        "transformers_version",
        "_name_or_path",
    }
)


def architecture(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that `LlamaReproConfig` takes."""
    return {name: value for name, value in fields.items() if name not in _NOT_ARCHITECTURE}

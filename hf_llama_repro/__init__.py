"""LLaMA 1 and 2 for transformers: importing this makes `AutoModel*` and `pipeline` open `llama_repro` folders."""

import importlib
from typing import TYPE_CHECKING

from .registration import install
from .versions import report_untested

if TYPE_CHECKING:
    from .configuration_llama_repro import PAPER_SIZES, LlamaReproConfig
    from .modeling_llama_repro import (
        LlamaReproForCausalLM,
        LlamaReproForQuestionAnswering,
        LlamaReproForSequenceClassification,
        LlamaReproForTokenClassification,
        LlamaReproModel,
        LlamaReproPreTrainedModel,
    )
    from .prepared import optimize, restore

__version__ = "0.1.0"

# Loaded when first asked for, because they bring torch: public name -> module.
_MODULE_OF = {
    "PAPER_SIZES": "configuration_llama_repro",
    "LlamaReproConfig": "configuration_llama_repro",
    "LlamaReproForCausalLM": "modeling_llama_repro",
    "LlamaReproForQuestionAnswering": "modeling_llama_repro",
    "LlamaReproForSequenceClassification": "modeling_llama_repro",
    "LlamaReproForTokenClassification": "modeling_llama_repro",
    "LlamaReproModel": "modeling_llama_repro",
    "LlamaReproPreTrainedModel": "modeling_llama_repro",
    "optimize": "prepared",
    "restore": "prepared",
}

__all__ = [
    "PAPER_SIZES",
    "LlamaReproConfig",
    "LlamaReproForCausalLM",
    "LlamaReproForQuestionAnswering",
    "LlamaReproForSequenceClassification",
    "LlamaReproForTokenClassification",
    "LlamaReproModel",
    "LlamaReproPreTrainedModel",
    "optimize",
    "restore",
]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])


report_untested()
install()

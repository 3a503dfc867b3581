"""Makes transformers' Auto classes and PEFT know LlamaRepro, without importing either before somebody uses it.

Importing the Auto classes costs over a second (they bring torch), so that `import hf_llama_repro` registers at once
only what is loaded already, and the rest in the moment in which it is loaded: under both import orders, once.
"""

import importlib.abc
import importlib.util
import sys
import threading
from typing import Any

MODEL_TYPE = "llama_repro"


def _register_config() -> None:
    from transformers import AutoConfig

    from .configuration_llama_repro import LlamaReproConfig

    AutoConfig.register(MODEL_TYPE, LlamaReproConfig, exist_ok=True)


def _register_models() -> None:
    import transformers

    from . import modeling_llama_repro as modeling
    from .configuration_llama_repro import LlamaReproConfig
    from .cpu_kernel import switched_off
    from .fast_paths import FAST_PATHS

    if not switched_off():
        modeling.FAST_PATHS.update(FAST_PATHS)

    for auto_class, model_class in (
        ("AutoModel", modeling.LlamaReproModel),
        ("AutoModelForCausalLM", modeling.LlamaReproForCausalLM),
        ("AutoModelForSequenceClassification", modeling.LlamaReproForSequenceClassification),
        ("AutoModelForTokenClassification", modeling.LlamaReproForTokenClassification),
        ("AutoModelForQuestionAnswering", modeling.LlamaReproForQuestionAnswering),
    ):
        getattr(transformers, auto_class).register(LlamaReproConfig, model_class, exist_ok=True)


def _expose() -> None:
    from .programs import expose

    expose()


def _register_peft_targets() -> None:
    """Give LlamaRepro stock Llama's entry in each of PEFT's tables of default target modules."""
    import peft.utils.constants

    _register_in_tables(peft.utils.constants)


def _register_peft_attention() -> None:
    """Give LlamaRepro stock Llama's entry in the table of the attentions that take adaption prompts."""
    import peft.tuners.adaption_prompt.config

    _register_in_tables(peft.tuners.adaption_prompt.config)


def _register_in_tables(module: Any) -> None:
    for table in vars(module).values():
        if isinstance(table, dict) and "llama" in table:
            table.setdefault(MODEL_TYPE, table["llama"])


# What has to be loaded -> what to register then.
_PENDING = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
    "peft.utils.constants": _register_peft_targets,
    "peft.tuners.adaption_prompt.config": _register_peft_attention,
}


def expose_when_loaded() -> None:
    """Make our classes attributes of `transformers` as soon as that reads configurations, which name classes."""
    _PENDING["transformers.configuration_utils"] = _expose


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls `register_what_is_loaded` when the outermost import of transformers or PEFT is through.

    Not earlier: modules import each other in circles, and ours imports from some that may be half-way.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.lock = threading.Lock()  # several threads may import at once

    def find_spec(self, fullname, path=None, target=None):
        # Our own modules too: importing one of them first imports transformers while it is half-way itself.
        if not _PENDING or fullname.partition(".")[0] not in ("transformers", "peft", __package__):
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            if not hasattr(finder, "find_spec"):
                continue
            if (spec := finder.find_spec(fullname, path, target)) is not None:
                if spec.loader is not None:
                    self._count(spec.loader)
                return spec
        return None

    def _count(self, loader) -> None:
        exec_module = loader.exec_module

        def counted(module):
            with self.lock:
                self.depth += 1
            try:
                exec_module(module)
            finally:
                with self.lock:
                    self.depth -= 1
            if not self.depth:
                register_what_is_loaded()

        loader.exec_module = counted


def register_what_is_loaded() -> None:
    """Registers what is pending and whose module is loaded. Idempotent."""
    for module in [name for name in _PENDING if name in sys.modules]:
        # Taken out first: registering imports more of transformers, which comes back here.
        if (register := _PENDING.pop(module, None)) is not None:
            register()


def install() -> None:
    """Registers now what is loaded, and on import what is not."""
    register_what_is_loaded()
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())

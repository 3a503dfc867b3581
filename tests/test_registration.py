"""Importing hf_llama_repro is enough, whatever is imported before or after it, and costs next to nothing.

Every import order needs an interpreter of its own. One process loads what is slow and knows nothing of LlamaRepro
(torch, bitsandbytes), and forks once for each case.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from random_models import TOLERANCE, random_model, random_tokens, relative_difference

from hf_llama_repro import LlamaReproForCausalLM

ROOT = Path(__file__).parent.parent

ORDERS = {
    "before transformers": "import hf_llama_repro, transformers",
    "after transformers": "import transformers, hf_llama_repro",
    "before AutoModelForCausalLM": "import hf_llama_repro; from transformers import AutoModelForCausalLM",
    "after AutoModelForCausalLM": "from transformers import AutoModelForCausalLM; import hf_llama_repro",
    "after AutoConfig": "from transformers import AutoConfig; import hf_llama_repro",
    "after pipeline": "from transformers import pipeline; import hf_llama_repro",
    "before Trainer": "import hf_llama_repro; from transformers import Trainer",
    "before stock Llama": "import hf_llama_repro, transformers.models.llama.modeling_llama",
    "after stock Llama": "import transformers.models.llama.modeling_llama, hf_llama_repro",
    "before peft": "import hf_llama_repro, peft",
    "after peft": "import peft, hf_llama_repro",
    # The classes taken from the package before anything else has loaded transformers.
    "a class first": "from hf_llama_repro import LlamaReproForCausalLM",
    "the configuration first": "from hf_llama_repro import LlamaReproConfig",
    "the module first": "import hf_llama_repro.modeling_llama_repro",
    "reloaded before and after": """
        import importlib, hf_llama_repro
        importlib.reload(hf_llama_repro)
        from transformers import AutoModelForCausalLM
        importlib.reload(hf_llama_repro)
        importlib.reload(hf_llama_repro.registration)
        import peft
    """,
    # transformers itself does not survive being first imported by several threads.
    "by several threads": """
        import threading, transformers, hf_llama_repro
        failures = []
        def run(line):
            try:
                exec(line, {})
            except BaseException as error:
                failures.append((line, error))
        threads = [
            threading.Thread(target=run, args=(line,))
            for line in (
                "import peft",
                "from transformers import AutoModelForCausalLM",
                "from transformers import pipeline",
                "import transformers.models.llama.modeling_llama",
                "from hf_llama_repro import LlamaReproForCausalLM",
            )
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
    """,
}

CHECK = """
    import sys
    import transformers
    config = transformers.AutoConfig.for_model(
        "llama_repro", vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    for auto_class, model_class in {
        "AutoModel": "LlamaReproModel",
        "AutoModelForCausalLM": "LlamaReproForCausalLM",
        "AutoModelForSequenceClassification": "LlamaReproForSequenceClassification",
        "AutoModelForTokenClassification": "LlamaReproForTokenClassification",
        "AutoModelForQuestionAnswering": "LlamaReproForQuestionAnswering",
    }.items():
        model = getattr(transformers, auto_class).from_config(config)
        assert type(model).__name__ == model_class, (auto_class, type(model))
    if "peft" in sys.modules:
        from peft.utils import constants
        tables = [table for table in vars(constants).values() if isinstance(table, dict) and "llama" in table]
        assert tables
        assert all(table.get("llama_repro") == table["llama"] for table in tables)
"""

FORKS = """
import json, os, sys, traceback
from pathlib import Path
import accelerate, bitsandbytes, torch, torch._dynamo
assert not {"transformers", "peft", "hf_llama_repro"} & set(sys.modules)
cases, check, folder = json.load(sys.stdin)
for name, code in cases.items():
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    report = "passed"
    try:
        exec(code, {})
        exec(check, {})
    except BaseException:
        report = traceback.format_exc()
    Path(folder, name).write_text(report)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> Path:
    """A folder with one file per order: "passed", or the traceback."""
    folder = tmp_path_factory.mktemp("orders")
    cases = {name: textwrap.dedent(code) for name, code in ORDERS.items()}
    subprocess.run(
        [sys.executable, "-c", FORKS],
        input=json.dumps([cases, textwrap.dedent(CHECK), str(folder)]),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        check=True,
    )
    return folder


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_and_peft_know_llama_repro_when_it_is_imported(order, reports):
    assert (reports / order).read_text() == "passed"


def fresh_interpreter(code: str) -> str:
    """What `code` prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return finished.stdout.strip()


def test_importing_the_package_loads_none_of_the_slow_libraries():
    heavy = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "huggingface_hub", "numpy"}
    assert fresh_interpreter(f"import sys, hf_llama_repro; print({heavy} & set(sys.modules))") == "set()"


def test_importing_transformers_does_not_load_its_auto_classes():
    # Registering must not make `import transformers` slower than it is.
    code = "import sys, hf_llama_repro, transformers; print('torch' in sys.modules, 'peft' in sys.modules)"
    assert fresh_interpreter(code) == "False False"


def test_package_lists_what_it_offers():
    code = "import hf_llama_repro as package; print(set(package.__all__) - set(dir(package)))"
    assert fresh_interpreter(code) == "set()"


def test_unknown_name_is_an_attribute_error():
    code = "import hf_llama_repro\ntry: hf_llama_repro.Llama3\nexcept AttributeError as error: print(error)"
    assert fresh_interpreter(code) == "module 'hf_llama_repro' has no attribute 'Llama3'"


# Adapters.


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    random_model().save_pretrained(folder)
    return LlamaReproForCausalLM.from_pretrained(folder)


@pytest.fixture(params=["CAUSAL_LM", None], ids=["with task_type", "without task_type"])
def adapter(request, base_model, tmp_path):
    """A folder with a random adapter of `base_model`, and the adapted model."""
    config = LoraConfig(task_type=request.param, init_lora_weights=False)
    adapted = get_peft_model(LlamaReproForCausalLM.from_pretrained(base_model.name_or_path), config).eval()
    adapted.save_pretrained(tmp_path)
    return tmp_path, adapted


def same_logits(model, other) -> bool:
    tokens = random_tokens(other.config)
    return relative_difference(model(input_ids=tokens).logits, other(input_ids=tokens).logits) < TOLERANCE


def test_adapter_loads_onto_its_base_model(adapter, base_model):
    folder, adapted = adapter
    base = LlamaReproForCausalLM.from_pretrained(base_model.name_or_path)
    assert same_logits(PeftModel.from_pretrained(base, folder), adapted)


def test_adapter_loads_by_itself_where_peft_is_allowed_to_import_us(adapter):
    folder, adapted = adapter
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder, import_allowlist=["hf_llama_repro"])
    assert same_logits(loaded, adapted)


@pytest.mark.parametrize("adapter", ["CAUSAL_LM"], indirect=True)
def test_adapter_with_a_task_type_loads_by_itself(adapter):
    folder, adapted = adapter
    assert same_logits(AutoPeftModelForCausalLM.from_pretrained(folder), adapted)


@pytest.mark.parametrize("adapter", [None], indirect=True)
def test_adapter_without_a_task_type_is_refused_with_what_to_do(adapter):
    # PEFT's safeguard against adapters that name a malicious package, which we leave alone.
    folder, _ = adapter
    with pytest.raises(ValueError, match="import_allowlist="):
        AutoPeftModel.from_pretrained(folder)

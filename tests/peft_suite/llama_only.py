"""pytest plugin: of PEFT's tests those of Llama, in a folder in which ids of the Hub are names of folders.

Used by `run.py` only, in a process whose working folder is empty; SUITE_MODEL says which model the id stands for.
"""

import inspect
import json
import os
import re
from pathlib import Path

import torch
from tiny_models import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from hf_llama_repro import LlamaReproConfig, LlamaReproForCausalLM

MODEL_ID = "trl-internal-testing/tiny-random-LlamaForCausalLM"
# Tests that are not for one architecture name a single model, mostly this one: they hold for Llama as well.
ANY_MODEL_ID = "peft-internal-testing/tiny-random-OPTForCausalLM"
DATA_ID = "ybelkada/english_quotes_copy"
CLASSES = {"llama": (LlamaConfig, LlamaForCausalLM), "llama_repro": (LlamaReproConfig, LlamaReproForCausalLM)}
SIZES = {  # those of the model on the Hub, but for its vocabulary
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


def pytest_configure():
    for model_id in (MODEL_ID, ANY_MODEL_ID):
        write_model(Path(model_id))
    Path(DATA_ID).mkdir(parents=True)
    lines = (
        json.dumps({"quote": f"Be yourself; everyone else is taken, all {number} of them."}) for number in range(99)
    )
    Path(DATA_ID, "train.jsonl").write_text("\n".join(lines) + "\n")


def write_model(folder: Path):
    tokenizer = byte_tokenizer()
    config_class, model_class = CLASSES[os.environ["SUITE_MODEL"]]
    torch.manual_seed(0)
    model_class(config_class(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pytest_collection_modifyitems(config, items):
    """Keeps the tests that are called with Llama's name, and those of any model."""

    def is_of_llama(item) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if "model_id" in parameters:
            return parameters["model_id"] == MODEL_ID
        source = inspect.getsource(item.function)
        named = set(re.findall(r'"([\w-]+-internal-testing/[\w.-]+)"', source))
        return named <= {MODEL_ID, ANY_MODEL_ID} and "model.decoder" not in source  # a name of OPT's modules

    config.hook.pytest_deselected(items=[item for item in items if not is_of_llama(item)])
    items[:] = [item for item in items if is_of_llama(item)]

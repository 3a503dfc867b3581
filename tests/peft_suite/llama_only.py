"""pytest plugin: of PEFT's tests those of Llama, in a folder in which ids of the Hub are names of folders.

Used by `run.py` only, in a process whose working folder is empty; SUITE_MODEL says which model the id stands for.
"""

import inspect
import json
import os
from pathlib import Path

import torch
from tiny_models import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from hf_llama_repro import LlamaReproConfig, LlamaReproForCausalLM

MODEL_ID = "trl-internal-testing/tiny-random-LlamaForCausalLM"
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
    write_model(Path(MODEL_ID))
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
    """Keeps the tests that are called with Llama's name, or that name it themselves."""

    def is_of_llama(item) -> bool:
        if "model_id" in getattr(item, "callspec", item).__dict__.get("params", {}):
            return item.callspec.params["model_id"] == MODEL_ID
        return MODEL_ID in inspect.getsource(item.function)

    config.hook.pytest_deselected(items=[item for item in items if not is_of_llama(item)])
    items[:] = [item for item in items if is_of_llama(item)]

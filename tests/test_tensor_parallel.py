"""A model in slices: two processes under torchrun (gloo) compute what one computes, each with half of the weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_models import random_model, random_tokens, relative_difference, tiny_config
from tensor_parallel_worker import NEW_TOKENS, held_bytes
from transformers import AutoModelForCausalLM

from hf_llama_repro import LlamaReproConfig

ROOT = Path(__file__).parent.parent
# A sum over two slices is rounded otherwise than one over the whole.
TOLERANCE = 1e-5
PROCESSES = 2
HEADS = {
    "as-many": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "grouped": {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 4},
    "tied": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "biased": {"num_attention_heads": 8, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
}


def save(folder: Path, config: LlamaReproConfig, *, seed: int = 0) -> Path:
    random_model(config, seed=seed).save_pretrained(folder)
    return folder


def torchrun(results: Path, *folders: Path, processes: int = PROCESSES) -> subprocess.CompletedProcess[str]:
    results.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(ROOT / "tests" / "tensor_parallel_worker.py"), str(results), *map(str, folders)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def found(results: Path, name: str) -> list[dict]:
    return [torch.load(results / f"{name}-{rank}.pt") for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def sliced(tmp_path_factory):
    """The folders, and what two processes made of all of them."""
    folder = tmp_path_factory.mktemp("sliced")
    models = [save(folder / name, tiny_config(**fields)) for name, fields in HEADS.items()]
    result = torchrun(folder / "results", *models)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", HEADS)
def test_two_processes_compute_the_logits_of_one(sliced, name):
    model = AutoModelForCausalLM.from_pretrained(sliced / name).eval()
    tokens = random_tokens(model.config)
    with torch.no_grad():
        expected = model(tokens).logits
    generated = model.generate(tokens[:, :16], max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    for process in found(sliced / "results", name):
        assert relative_difference(process["logits"], expected) < TOLERANCE
        assert torch.equal(process["generated"], generated)


def test_another_model_has_other_logits(sliced):
    """Negative control of the comparison above."""
    other = random_model(tiny_config(**HEADS["grouped"]), seed=1)
    with torch.no_grad():
        logits = other(random_tokens(other.config)).logits
    assert relative_difference(found(sliced / "results", "grouped")[0]["logits"], logits) > 0.1


@pytest.mark.parametrize("name", HEADS)
def test_each_process_holds_half_of_the_weights(sliced, name):
    """Norms are whole in both; so is the embedding, a tenth of these models, in older versions of transformers."""
    whole = held_bytes(random_model(tiny_config(**HEADS[name])))
    for process in found(sliced / "results", name):
        assert 0.49 < process["held"] / whole < 0.57


def test_slices_are_not_prepared_as_if_they_were_whole(sliced):
    for process in found(sliced / "results", "grouped"):
        assert "is a DTensor: a slice (tp_plan)" in process["refused"]


def test_more_processes_than_kv_heads_are_refused(tmp_path):
    folder = save(tmp_path / "one-kv-head", tiny_config(num_attention_heads=4, num_key_value_heads=1))
    result = torchrun(tmp_path / "results", folder)
    assert result.returncode != 0
    assert "num_key_value_heads=1 does not divide among 2 processes" in result.stderr


@pytest.mark.slow
def test_memory_of_a_process_is_half_in_a_model_of_a_gigabyte(tmp_path):
    fields = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 5, "vocab_size": 2000}
    folder = tmp_path / "large"
    random_model(tiny_config(**fields, num_attention_heads=16, num_key_value_heads=4)).save_pretrained(folder)
    grown = {}
    for processes in (1, 2):
        result = torchrun(tmp_path / str(processes), folder, processes=processes)
        assert result.returncode == 0, result.stderr[-3000:]
        grown[processes] = torch.load(tmp_path / str(processes) / "large-0.pt")["grown"]
    print(f"memory of a process: {grown[1] / 1e9:.2f} GB of one, {grown[2] / 1e9:.2f} GB of two")
    assert 0.45 < grown[2] / grown[1] < 0.65

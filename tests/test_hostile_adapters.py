"""Searches through LoRA adapters: values and bytes of adapter_config.json, headers and tensors of their weights."""

import functools
import json

import pytest
import torch
from adapters import adapter_folder, base_folder
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from searches import (
    ENTRIES,
    JSON_BYTES,
    Search,
    assert_same,
    read_safetensors,
    search_bytes,
    search_json,
    searching,
    stock_says,
    tensors_of,
    write_safetensors,
)
from tensor_changes import IMPOSSIBLE, NAMES, changed, changes

from conversion.merge import merge


@pytest.fixture
def base(tmp_path):
    return base_folder(
        tmp_path / "base", vocab_size=16, hidden_size=4, intermediate_size=6, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip


@pytest.fixture
def adapter(tmp_path, base):
    return adapter_folder(tmp_path / "adapter", base, r=2, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def adapter_search(tmp_path, base, adapter):
    def holds(target):
        """W + scaling B A, by a formula of its own; all that the adapter does not name is the base's."""
        fields = json.loads((adapter / "adapter_config.json").read_text())
        bare = adapter / "adapter_model.bin"
        matrices = torch.load(bare, weights_only=True) if bare.exists() else stock_says(adapter)
        matrices = {name: torch.Tensor.detach(tensor).resolve_neg() for name, tensor in matrices.items()}
        expected = stock_says(base)
        found = tensors_of(target)
        for name in matrices:
            if "lora_A" in name:
                module = name.removeprefix("base_model.model.").replace("lora_A.", "")
                rank = len(matrices[name])
                scaling = fields["lora_alpha"] / (rank**0.5 if fields.get("use_rslora") else rank)
                product = matrices[name.replace("lora_A", "lora_B")].double() @ matrices[name].double()
                merged = expected[module].double() + scaling * product
                assert (found[module].double() - merged).abs().max() <= 1e-6 * merged.abs().max(), module
                expected[module] = found[module]
        assert_same(found, expected)

    return Search(tmp_path / "target", functools.partial(merge, adapter, base=base), holds)


def test_values_of_an_adapter_config_json(adapter, adapter_search):
    path = adapter / "adapter_config.json"
    fields = [*json.loads(path.read_text()), "corda_config", "to_dict", "__class__", "future"]
    odd = {"lora_alpha", "alpha_pattern", "rank_pattern"}  # their product is checked by hand below
    search_json(path, adapter_search, st.sampled_from([name for name in fields if name not in odd]))
    adapter_search.assert_both_kinds()


def test_bytes_of_an_adapter_config_json(adapter, adapter_search):
    path = adapter / "adapter_config.json"
    search_bytes(path, adapter_search, range(path.stat().st_size), replacement=JSON_BYTES)
    adapter_search.assert_both_kinds()


def test_header_of_an_adapters_weights(adapter, adapter_search):
    path = adapter / "adapter_model.safetensors"
    entries, data = read_safetensors(path)
    names = st.sampled_from([name for name in entries if name != "__metadata__"])

    @searching
    @given(st.dictionaries(names, ENTRIES, max_size=1), st.dictionaries(names, NAMES.map(str), max_size=1))
    def check(edits, renamed):
        spoilt = {renamed.get(name, name): entry | edits.get(name, {}) for name, entry in entries.items()}
        write_safetensors(path, spoilt, data)
        adapter_search.case()

    check()
    adapter_search.assert_both_kinds()


def test_tensors_of_an_adapter(adapter, adapter_search):
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()

    @searching
    @given(changes(list(tensors)))
    def check(edits):
        try:
            torch.save(changed(tensors, edits), adapter / "adapter_model.bin")
        except IMPOSSIBLE:
            return
        adapter_search.case()

    check()
    adapter_search.assert_both_kinds()

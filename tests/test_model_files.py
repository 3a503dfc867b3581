"""Saving, loading, resizing, adapting and quantizing leave the numbers as they are, or as near as stock Llama's."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from random_models import (
    TOLERANCE,
    random_model,
    random_tokens,
    randomize,
    relative_difference,
    stock_config,
    stock_twin,
    tiny_config,
)
from safetensors import safe_open
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from hf_llama_repro import LlamaReproForCausalLM, LlamaReproModel

tied_and_not = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@torch.no_grad()
def logits_of(model, tokens, **inputs):
    return model(tokens, **inputs).logits


@tied_and_not
def test_sharded_checkpoint_reloads_bit_for_bit(tied, tmp_path):
    model = random_model(tiny_config(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    loaded = LlamaReproForCausalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


ONE_LAYER_ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize(
    "device_map",
    ["auto", "cpu", {"": "disk"}, ONE_LAYER_ON_DISK],
    ids=["auto", "cpu", "all on disk", "one layer on disk"],
)
def test_device_map_does_not_change_logits(device_map, tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    loaded = LlamaReproForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "disk")
    tokens = random_tokens(model.config)
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))


def test_tied_checkpoint_has_no_output_matrix(tmp_path):
    random_model(tiny_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 -- not a dictionary


@tied_and_not
def test_headless_checkpoint_opens_with_a_head_and_back(tied, tmp_path):
    body = random_model(tiny_config(tie_word_embeddings=tied), LlamaReproModel)
    body.save_pretrained(tmp_path / "body")
    headed, info = LlamaReproForCausalLM.from_pretrained(tmp_path / "body", output_loading_info=True)
    headed.save_pretrained(tmp_path / "headed")
    again, info_again = LlamaReproModel.from_pretrained(tmp_path / "headed", output_loading_info=True)
    assert set(info["missing_keys"]) == (set() if tied else {"lm_head.weight"})
    assert not info["unexpected_keys"]
    assert not info_again["missing_keys"]
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in body.state_dict().items())


@tied_and_not
def test_stock_llamas_folder_opens_as_ours(tied, tmp_path):
    stock = LlamaForCausalLM(stock_config(tiny_config(tie_word_embeddings=tied))).eval()
    randomize(stock)
    stock.save_pretrained(tmp_path)
    loaded, info = LlamaReproForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    tokens = random_tokens(loaded.config)
    assert relative_difference(logits_of(loaded, tokens), logits_of(stock, tokens)) < TOLERANCE


@tied_and_not
@pytest.mark.parametrize("rows", [100, 192])
def test_resized_embeddings_keep_the_logits_of_kept_tokens(rows, tied):
    model = random_model(tiny_config(tie_word_embeddings=tied))
    tokens = random_tokens(model.config) % 100
    before = logits_of(model, tokens)
    model.resize_token_embeddings(rows)
    after = logits_of(model, tokens)
    kept = min(rows, 131)
    assert (after.shape[-1], model.config.vocab_size) == (rows, rows)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert relative_difference(after[..., :kept], before[..., :kept]) < TOLERANCE
    assert model(tokens, labels=tokens).loss.isfinite()


# PEFT and quantization.


def test_lora_without_target_modules_merges_into_the_same_logits():
    model = random_model()
    tokens = random_tokens(model.config)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    unmerged = logits_of(adapted, tokens)
    assert adapted.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    assert relative_difference(unmerged, logits_of(model, tokens)) > 100 * TOLERANCE
    assert relative_difference(logits_of(adapted.merge_and_unload(), tokens), unmerged) < TOLERANCE


def int8(model_class, folder):
    config = BitsAndBytesConfig(load_in_8bit=True)
    return model_class.from_pretrained(folder, quantization_config=config, device_map="cpu", dtype=torch.bfloat16)


def test_int8_model_is_stock_llama_in_int8(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path / "ours")
    stock_twin(model).save_pretrained(tmp_path / "stock")
    ours, stock = int8(LlamaReproForCausalLM, tmp_path / "ours"), int8(LlamaForCausalLM, tmp_path / "stock")
    linears = [type(module).__name__ for name, module in ours.named_modules() if name.endswith("_proj")]
    assert linears == ["Linear8bitLt"] * 14
    tokens = random_tokens(model.config)
    exact = logits_of(model, tokens)
    assert relative_difference(logits_of(ours, tokens), exact) < 1.25 * relative_difference(
        logits_of(stock, tokens), exact
    )


def test_model_prepared_for_kbit_training_has_the_loss_and_gradients_of_stock_llama(tmp_path):
    # The preparation casts norms, embedding and head to fp32 and leaves the int8 matrices.
    model = random_model()
    model.save_pretrained(tmp_path / "ours")
    stock_twin(model).save_pretrained(tmp_path / "stock")
    tokens, losses, gradients = random_tokens(model.config), [], []
    for model_class, folder in ((LlamaReproForCausalLM, "ours"), (LlamaForCausalLM, "stock")):
        prepared = prepare_model_for_kbit_training(int8(model_class, tmp_path / folder))
        torch.manual_seed(0)
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        trained = get_peft_model(prepared, lora)
        outputs = trained(tokens, labels=tokens)
        outputs.loss.backward()
        assert outputs.logits.dtype == torch.float32
        losses.append(outputs.loss)
        gradients.append([parameter.grad for parameter in trained.parameters() if parameter.requires_grad])
    assert relative_difference(*losses) < TOLERANCE
    assert max(relative_difference(*pair) for pair in zip(*gradients, strict=True)) < TOLERANCE


def test_with_fp32_norms_a_bf16_model_gives_the_bits_of_stock_llama():
    tokens = random_tokens(tiny_config(), batch=4, seq=128)
    logits = []
    model = random_model().to(torch.bfloat16)
    for each in (model, stock_twin(model)):
        for name, parameter in each.named_parameters():
            if "norm" in name:
                parameter.data = parameter.data.float()
        with torch.autocast("cpu", torch.bfloat16):
            logits.append(logits_of(each, tokens))
    assert torch.equal(*logits)

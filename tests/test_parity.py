"""The model's numbers are those of stock transformers' Llama, and those of the papers' mathematics."""

import copy

import pytest
import torch
from meta_reference import meta_hidden_states, meta_logits
from random_models import (
    ARCHITECTURES,
    BIASES,
    TOLERANCE,
    meta_hyperparameters,
    meta_weights,
    random_model,
    random_tokens,
    relative_difference,
    stock_config,
    stock_twin,
    tiny_config,
)
from transformers import LlamaForCausalLM

from hf_llama_repro import LlamaReproForCausalLM

# A mistake must be this far outside of the tolerance, or the tolerance would not mean much.
MARGIN = 100

CASES = {**ARCHITECTURES, "biases": BIASES}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}

cases = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
architectures = pytest.mark.parametrize("fields", ARCHITECTURES.values(), ids=ARCHITECTURES)
ropes = pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)


def pair(config, *, attn_implementation="sdpa"):
    model = random_model(config, attn_implementation=attn_implementation)
    return model, stock_twin(model)


# Against stock transformers.


@cases
def test_logits_are_those_of_stock_llama(fields):
    model, stock = pair(tiny_config(**fields))
    tokens = random_tokens(model.config)
    with torch.no_grad():
        assert relative_difference(model(tokens).logits, stock(tokens).logits) < TOLERANCE


@cases
def test_hidden_states_are_those_of_stock_llama(fields):
    model, stock = pair(tiny_config(**fields))
    tokens = random_tokens(model.config)
    with torch.no_grad():
        ours = model(tokens, output_hidden_states=True).hidden_states
        theirs = stock(tokens, output_hidden_states=True).hidden_states
    assert [relative_difference(*states) < TOLERANCE for states in zip(ours, theirs, strict=True)] == [True] * 3


@cases
def test_attentions_are_those_of_stock_llama(fields):
    model, stock = pair(tiny_config(**fields), attn_implementation="eager")
    tokens = random_tokens(model.config)
    with torch.no_grad():
        ours = model(tokens, output_attentions=True).attentions
        theirs = stock(tokens, output_attentions=True).attentions
    assert [relative_difference(*weights) < TOLERANCE for weights in zip(ours, theirs, strict=True)] == [True] * 2


@cases
def test_loss_and_every_gradient_are_those_of_stock_llama(fields):
    model, stock = pair(tiny_config(**fields))
    tokens = random_tokens(model.config)
    labels = tokens.masked_fill(random_tokens(model.config, seed=2) < 40, -100)
    losses = [each(tokens, labels=labels).loss for each in (model, stock)]
    for loss in losses:
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    differences = {
        name: relative_difference(parameter.grad, gradients.pop(name)) for name, parameter in model.named_parameters()
    }
    assert not gradients
    assert relative_difference(*losses) < TOLERANCE
    assert {name: value for name, value in differences.items() if not value < TOLERANCE} == {}


@ropes
def test_every_rope_type_is_that_of_stock_llama(rope):
    model, stock = pair(tiny_config(rope_parameters=rope))
    tokens = random_tokens(model.config)
    with torch.no_grad():
        assert relative_difference(model(tokens).logits, stock(tokens).logits) < TOLERANCE


@ropes
def test_positions_beyond_the_context_are_those_of_stock_llama(rope):
    model, stock = pair(tiny_config(rope_parameters=rope, max_position_embeddings=64))
    # Longer, then longer still, then short again: dynamic scaling grows and has to shrink back.
    for seq in (80, 120, 40):
        tokens = random_tokens(model.config, seq=seq)
        with torch.no_grad():
            assert relative_difference(model(tokens).logits, stock(tokens).logits) < TOLERANCE


def test_rope_types_differ_from_each_other():
    tokens = random_tokens(tiny_config())
    with torch.no_grad():
        logits = {
            name: random_model(tiny_config(rope_parameters=rope, max_position_embeddings=64))(tokens).logits
            for name, rope in ROPES.items()
        }
    for name in set(ROPES) - {"default"}:
        assert relative_difference(logits[name], logits["default"]) > MARGIN * TOLERANCE, name


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_left_padding_gives_the_logits_of_stock_llama(attn_implementation):
    model, stock = pair(tiny_config(), attn_implementation=attn_implementation)
    inputs = left_padded(model.config)
    with torch.no_grad():
        ours, theirs = model(**inputs).logits, stock(**inputs).logits
    counted = inputs["attention_mask"].bool()
    assert relative_difference(ours[counted], theirs[counted]) < TOLERANCE


def test_left_padding_does_not_change_logits():
    model = random_model()
    inputs = left_padded(model.config)
    with torch.no_grad():
        alone = model(inputs["input_ids"][1:, 17:]).logits
        assert relative_difference(model(**inputs).logits[1:, 17:], alone) < TOLERANCE


def left_padded(config):
    """Two rows of 80 tokens; the second begins with 17 that do not count."""
    tokens = random_tokens(config)
    mask = torch.ones_like(tokens)
    mask[1, :17] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_packed_sequences_do_not_see_each_other(attn_implementation):
    model = random_model(attn_implementation=attn_implementation)
    tokens = random_tokens(model.config, batch=1, seq=120)
    positions = torch.cat((torch.arange(50), torch.arange(70)))[None]
    with torch.no_grad():
        packed = model(tokens, position_ids=positions, use_cache=False).logits
        apart = torch.cat((model(tokens[:, :50]).logits, model(tokens[:, 50:]).logits), dim=1)
    assert relative_difference(packed, apart) < TOLERANCE


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_bit_for_bit_those_of_stock_llama(dtype, attn_implementation, plain_paths):
    model = random_model(attn_implementation=attn_implementation).to(dtype)
    tokens = random_tokens(model.config, batch=4, seq=128)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, stock_twin(model)(tokens).logits)


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_freshly_initialised_model_is_stock_llama(eps):
    # Activations of 0.02, next to which the norm's eps is largest.
    torch.manual_seed(0)
    model = LlamaReproForCausalLM(tiny_config(rms_norm_eps=eps)).eval()
    stock = stock_twin(model)
    tokens = random_tokens(model.config)
    with torch.no_grad():
        assert relative_difference(model(tokens).logits, stock(tokens).logits) < TOLERANCE


STOCK_MISTAKES = {
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "eps": {"rms_norm_eps": 1e-6},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
}


@pytest.mark.parametrize("fields", STOCK_MISTAKES.values(), ids=STOCK_MISTAKES)
def test_stock_llama_with_another_configuration_is_noticed(fields):
    model = random_model(tiny_config())
    other = LlamaForCausalLM(stock_config(tiny_config(**fields))).eval()
    other.load_state_dict(model.state_dict())
    tokens = random_tokens(model.config)
    with torch.no_grad():
        assert relative_difference(model(tokens).logits, other(tokens).logits) > MARGIN * TOLERANCE


# Against the papers' mathematics, in Meta's layout.


def right_weights(model):
    config = model.config
    return meta_weights(model, q_heads=config.num_attention_heads, k_heads=config.num_key_value_heads)


@architectures
def test_logits_are_those_of_the_papers(fields):
    model = random_model(tiny_config(**fields))
    tokens = random_tokens(model.config)
    with torch.no_grad():
        papers = meta_logits(right_weights(model), tokens, **meta_hyperparameters(model.config))
        assert relative_difference(model(tokens).logits, papers) < TOLERANCE


@architectures
def test_hidden_states_are_those_of_the_papers(fields):
    model = random_model(tiny_config(**fields))
    tokens = random_tokens(model.config)
    with torch.no_grad():
        papers = meta_hidden_states(right_weights(model), tokens, **meta_hyperparameters(model.config))
        ours = model(tokens, output_hidden_states=True).hidden_states
    assert [relative_difference(*states) < TOLERANCE for states in zip(ours, papers, strict=True)] == [True] * 3


def swapped(weights: dict[str, torch.Tensor], one: str, other: str) -> dict[str, torch.Tensor]:
    def rename(name):
        return name.replace(one, other) if one in name else name.replace(other, one)

    return {rename(name): tensor for name, tensor in weights.items()}


# 4 query heads, 2 K/V heads.
META_MISTAKES = {
    "K in the other order": lambda model: {"weights": meta_weights(model, q_heads=4, k_heads=None)},
    "K reordered by the number of query heads": lambda model: {"weights": meta_weights(model, q_heads=4, k_heads=4)},
    "norms swapped": lambda model: {"weights": swapped(right_weights(model), "attention_norm", "ffn_norm")},
    "gate and up swapped": lambda model: {"weights": swapped(right_weights(model), "w1", "w3")},
    "theta": lambda model: {"rope_theta": 5e5},
    "eps": lambda model: {"norm_eps": 1e-6},
}


@pytest.mark.parametrize("mistake", META_MISTAKES.values(), ids=META_MISTAKES)
def test_mistake_in_the_weights_or_numbers_of_the_papers_is_noticed(mistake):
    model = random_model()
    tokens = random_tokens(model.config)
    arguments = {"weights": right_weights(model), **meta_hyperparameters(model.config), **mistake(model)}
    with torch.no_grad():
        papers = meta_logits(tokens=tokens, **arguments)
        assert relative_difference(model(tokens).logits, papers) > MARGIN * TOLERANCE


# The rotary frequencies stay fp32.

LATE = torch.arange(4000, 4064)[None]
CASTS = {
    "to(bfloat16)": lambda model: model.to(torch.bfloat16),
    "bfloat16()": lambda model: model.bfloat16(),
    "half() and back": lambda model: model.half().float().to(torch.bfloat16),
    "deepcopy": lambda model: copy.deepcopy(model).to(torch.bfloat16),
    "float64": lambda model: model.double().to(torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_cast_model_keeps_exact_rotary_frequencies(cast):
    exact = random_model().model.rotary_emb.inv_freq.clone()
    rotary = cast(random_model()).model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32
    assert torch.equal(rotary.inv_freq, exact)
    assert torch.equal(rotary.original_inv_freq, exact)


def test_cast_model_equals_a_model_loaded_in_bf16_at_late_positions(tmp_path):
    model = random_model(tiny_config(max_position_embeddings=4096))
    model.save_pretrained(tmp_path)
    loaded = LlamaReproForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokens = random_tokens(model.config, batch=1, seq=64)
    with torch.no_grad():
        cast = model.to(torch.bfloat16)(tokens, position_ids=LATE).logits
        assert torch.equal(cast, loaded(tokens, position_ids=LATE).logits)


def test_model_moved_to_meta_and_emptied_has_exact_rotary_frequencies():
    # They are in no checkpoint, so nothing that fills the emptied model could bring them.
    model = random_model()
    exact = model.model.rotary_emb.inv_freq.clone()
    rotary = model.to("meta").to_empty(device="cpu").model.rotary_emb
    assert torch.equal(rotary.inv_freq, exact)
    assert torch.equal(rotary.original_inv_freq, exact)

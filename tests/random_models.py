"""Tiny models in which every parameter is random, and stock transformers' Llama with the same weights.

Freshly initialised norms are all ones and freshly initialised matrices nearly nothing: such a model cannot tell a
swapped norm, and hardly a wrong rotary embedding. Random ones can.
"""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_llama_repro import LlamaReproConfig, LlamaReproForCausalLM

# Largest difference over the largest magnitude of the reference, fp32: a few dozen roundings of 6e-8.
TOLERANCE = 1e-5

# Heads as Q/KV; the widths of 32/4 and of "wide heads" are not hidden_size / heads.
ARCHITECTURES = {
    "4/4": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4},
    "9/3": {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3},
    "32/4": {"hidden_size": 96, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 8},
    "8/1": {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 1},
    "wide heads": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20},
    "tied": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
}
BIASES = {"attention_bias": True, "mlp_bias": True}


def tiny_config(**fields) -> LlamaReproConfig:
    """Two layers, grouped K/V heads, an odd vocabulary; `fields` override."""
    defaults = {
        "vocab_size": 131,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
    }
    if "head_dim" not in fields and "num_attention_heads" in fields:
        defaults["head_dim"] = fields.get("hidden_size", 64) // fields["num_attention_heads"]
    return LlamaReproConfig(**{**defaults, **fields})


@torch.no_grad()
def randomize(model: torch.nn.Module, *, seed: int = 0) -> None:
    """Matrices randn / sqrt(fan_in), twice that for Q and K so that attention is not flat; vectors 1 + 0.3 randn."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            parameter.copy_(1 + 0.3 * noise)
        else:
            scale = 2 if "q_proj" in name or "k_proj" in name else 1
            parameter.copy_(scale * parameter.shape[1] ** -0.5 * noise)


def random_model(
    config: LlamaReproConfig | None = None,
    model_class: type[PreTrainedModel] = LlamaReproForCausalLM,
    *,
    attn_implementation: str = "sdpa",
    seed: int = 0,
):
    """A model in eval mode in which every parameter is random."""
    config = tiny_config() if config is None else config
    model = model_class._from_config(config, attn_implementation=attn_implementation)
    randomize(model, seed=seed)
    return model.eval()


def stock_config(config: LlamaReproConfig) -> LlamaConfig:
    """Stock Llama's configuration with the values of ours; stock Llama swallows what it does not know, so we look."""
    own = {"model_type", "architectures", "transformers_version", "rope_theta"}
    stock = LlamaConfig(**{key: value for key, value in config.to_dict().items() if key not in own})
    for key in ("num_key_value_heads", "head_dim", "rope_parameters", "rms_norm_eps", "attention_bias", "mlp_bias"):
        assert getattr(stock, key) == getattr(config, key), key
    return stock


def stock_twin(model: PreTrainedModel, stock_class: type[PreTrainedModel] = LlamaForCausalLM):
    """Stock transformers' Llama with the weights, the dtype and the attention of `model`."""
    twin = stock_class._from_config(
        stock_config(model.config), attn_implementation=model.config._attn_implementation, dtype=model.dtype
    )
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin.train(model.training)


def random_tokens(config: LlamaReproConfig, batch: int = 2, seq: int = 80, *, seed: int = 1) -> torch.Tensor:
    """Token ids (batch, seq) without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, config.vocab_size, (batch, seq), generator=generator)


def relative_difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference over the largest magnitude of the reference; NaN where one of them has a NaN."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    ours, reference = ours.detach().double(), reference.detach().double()
    return ((ours - reference).abs().max() / reference.abs().max()).item()


META_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "model.layers": "layers",
    "lm_head": "output",
}


def meta_weights(model: PreTrainedModel, *, q_heads: int, k_heads: int | None) -> dict[str, torch.Tensor]:
    """The weights named and ordered as Meta's, for `meta_reference`; `k_heads` None leaves K in our order.

    Ours pairs channel i of a head with i + half of them, Meta's pairs neighbours. Nothing of the converter is used.
    """

    def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
        return weight[torch.arange(weight.shape[0]).view(heads, 2, -1).transpose(1, 2).flatten()]

    weights = {}
    for name, tensor in model.state_dict().items():
        if "q_proj" in name:
            tensor = interleaved(tensor, q_heads)
        if "k_proj" in name and k_heads is not None:
            tensor = interleaved(tensor, k_heads)
        for ours, metas in META_NAMES.items():
            name = name.replace(ours, metas)
        weights[name] = tensor
    return weights


def meta_hyperparameters(config: LlamaReproConfig) -> dict[str, float]:
    return {
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
    }


def tiny_tokenizer(config: LlamaReproConfig) -> PreTrainedTokenizerFast:
    """One token for each word of "w3 w4 ...": word and id bear the same number."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, config.vocab_size)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )

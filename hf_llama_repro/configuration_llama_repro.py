"""Configuration of LLaMA 1 and 2: one typed field per architectural choice, and the papers' sizes by name.

Sources: LLaMA (arXiv 2302.13971, Table 2) and LLaMA 2 (arXiv 2307.09288, Table 1 and appendix A.2.1).
Field names are those of transformers, so that a stock Llama `config.json` reads as it is.
"""

from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig

# Per rotary type: keys that must be there besides `rope_type` and `rope_theta`, and keys that may be.
ROPE_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {"original_max_position_embeddings"}),
}

DEFAULT_ROPE_THETA = 10000.0

# Auto class -> file and class, for folders that carry this code. Not the other heads: they build their base model by
# AutoModel, which knows it only where the package is installed.
AUTO_MAP = {
    "AutoConfig": "configuration_llama_repro.LlamaReproConfig",
    "AutoModel": "modeling_llama_repro.LlamaReproModel",
    "AutoModelForCausalLM": "modeling_llama_repro.LlamaReproForCausalLM",
}

_LLAMA_1 = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "dtype": "float16"}
_LLAMA_2 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "dtype": "bfloat16"}
_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
_33B = {"hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60, "num_attention_heads": 52}
_65B = {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64}
_70B = {**_65B, "intermediate_size": 28672, "num_key_value_heads": 8}

PAPER_SIZES: dict[str, dict[str, Any]] = {
    "llama-7b": _7B | _LLAMA_1,
    "llama-13b": _13B | _LLAMA_1,
    "llama-33b": _33B | _LLAMA_1,
    "llama-65b": _65B | _LLAMA_1,
    "llama-2-7b": _7B | _LLAMA_2,
    "llama-2-13b": _13B | _LLAMA_2,
    "llama-2-70b": _70B | _LLAMA_2,
}


@strict
class LlamaReproConfig(PretrainedConfig):
    """A LLaMA architecture; the defaults are those of LLaMA 7B.

    Besides the fields, the older `rope_theta` and `rope_scaling` are read into `rope_parameters`, and `rope_theta` is
    written beside it, because older readers look for it at the top level and silently take 10000 when it is missing.

    Raises `ValueError` naming both values where two fields contradict each other.
    """

    model_type = "llama_repro"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    """Rows of the embedding; the tokenizer may know fewer."""
    hidden_size: int = 4096
    """Width of the residual stream."""
    intermediate_size: int = 11008
    """Width inside the SwiGLU."""
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    """Heads of K and V, each shared by `num_attention_heads / num_key_value_heads` query heads; default: one each."""
    head_dim: int | None = None
    """Width of one head; default: `hidden_size / num_attention_heads`."""
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    """Context length in tokens: 2048 for LLaMA 1, 4096 for LLaMA 2."""
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    """`rope_type` (default, linear, dynamic, yarn, llama3), `rope_theta`, and what the type needs."""
    tie_word_embeddings: bool = False
    """Whether the output matrix is the embedding."""
    attention_bias: bool = False
    attention_dropout: int | float = 0.0
    mlp_bias: bool = False
    initializer_range: float = 0.02
    """Standard deviation of new matrices."""
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self._exact_quotient("hidden_size", "num_attention_heads", remedy="set head_dim")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.pad_token_id == -1:  # the first Hugging Face folders of LLaMA 1 say "none" so
            self.pad_token_id = None
        self.rope_parameters = _merged_rope_parameters(
            self.rope_parameters, kwargs.pop("rope_scaling", None), kwargs.pop("rope_theta", None)
        )
        super().__post_init__(**kwargs)
        # `strict` checks again after this; here, so that a contradiction is a plain ValueError.
        self.validate_architecture()
        self.validate_rope()

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies: the one in `rope_parameters`."""
        return self.rope_parameters["rope_theta"]

    @rope_theta.setter
    def rope_theta(self, value: float):
        self.rope_parameters["rope_theta"] = value

    @classmethod
    def from_paper(cls, name: str, **kwargs) -> "LlamaReproConfig":
        """The configuration of one of the papers' models, such as "llama-13b" or "llama-2-70b"; `kwargs` override."""
        if name not in PAPER_SIZES:
            raise ValueError(f"no model named {name!r} in the papers; there are {', '.join(PAPER_SIZES)}")
        return cls(**{**PAPER_SIZES[name], **kwargs})

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; a stock Llama folder is one of ours, of which transformers' warning is no use."""
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if fields.get("model_type") == "llama":
            fields = {**fields, "model_type": cls.model_type}
        return fields, kwargs

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers; `auto_map` names the classes of AUTO_MAP, and no file that the folder does not hold.

        transformers would keep the map of the folder that was opened, without its files, and would name a causal LM
        under AutoModel, which `register_for_auto_class` has for its default.
        """
        before = getattr(self, "auto_map", None)
        if before:
            self.auto_map = _auto_map_of_folder(Path(save_directory), before)
            if not self.auto_map:
                del self.auto_map
        super().save_pretrained(save_directory, *args, **kwargs)
        if before:
            self.auto_map = before

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types, with `rope_theta` beside `rope_parameters` for older readers."""
        fields = super().to_dict()
        if fields.get("rope_parameters"):
            fields["rope_theta"] = self.rope_theta
        return fields

    # Methods named validate_* also run before a configuration is saved.
    def validate_architecture(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        self._exact_quotient("num_attention_heads", "num_key_value_heads", remedy="each K/V head serves whole groups")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs of channels")
        if self.rms_norm_eps <= 0:
            raise ValueError(f"rms_norm_eps={self.rms_norm_eps} must be positive")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id={self.pad_token_id} is outside of vocab_size={self.vocab_size}")

    def validate_slices(self):
        """Where transformers slices a model among processes (`tp_plan`), each of them holds whole K/V heads."""
        processes = getattr(getattr(self, "distributed_config", None), "tp_size", None) or 1
        if self.num_key_value_heads % processes:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide among {processes} processes: "
                "start a number of them that divides it"
            )

    def validate_rope(self):
        rope = self.rope_parameters
        rope_type = rope["rope_type"]
        if rope_type not in ROPE_KEYS:
            raise ValueError(f"rope_type={rope_type!r} is not one of {', '.join(ROPE_KEYS)}")
        required, optional = ROPE_KEYS[rope_type]
        given = set(rope) - {"rope_type", "type", "rope_theta"}
        if missing := required - given:
            raise ValueError(f"rope_type={rope_type!r} needs {sorted(missing)}, got rope_parameters={rope}")
        if unknown := given - required - optional:
            raise ValueError(f"rope_type={rope_type!r} does not know {sorted(unknown)}, got rope_parameters={rope}")
        if rope["rope_theta"] <= 0:
            raise ValueError(f"rope_theta={rope['rope_theta']} must be positive")
        if rope.get("factor", 1.0) < 1.0:
            raise ValueError(f"factor={rope['factor']} of rope_parameters must be at least 1")
        if rope_type == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
            raise ValueError(
                f"high_freq_factor={rope['high_freq_factor']} of rope_parameters must exceed "
                f"low_freq_factor={rope['low_freq_factor']}"
            )

    def _exact_quotient(self, dividend: str, divisor: str, *, remedy: str) -> int:
        whole, part = getattr(self, dividend), getattr(self, divisor)
        if part < 1 or whole % part:
            raise ValueError(f"{dividend}={whole} is not a multiple of {divisor}={part}: {remedy}")
        return whole // part


def _auto_map_of_folder(folder: Path, auto_map: dict[str, Any]) -> dict[str, Any]:
    """The entries whose code is in `folder` or on the Hub ("repository--file.Class"), ours as AUTO_MAP has them."""
    kept = {}
    for auto_class, reference in auto_map.items():
        # A tokenizer's is a pair, of which one may be None.
        names = [name for name in ([reference] if isinstance(reference, str) else reference) if name is not None]
        if all("--" in name for name in names):
            kept[auto_class] = reference
        elif all((folder / f"{name.partition('.')[0]}.py").is_file() for name in names):
            kept[auto_class] = AUTO_MAP.get(auto_class, reference)
    return kept


def _merged_rope_parameters(rope_parameters: dict | None, rope_scaling: dict | None, rope_theta: float | None) -> dict:
    """One `rope_parameters` from its three spellings; where two of them say different things, `ValueError`."""
    merged: dict[str, Any] = {}
    for spelling, given in (
        ("rope_parameters", rope_parameters),
        ("rope_scaling", rope_scaling),
        ("rope_theta", None if rope_theta is None else {"rope_theta": rope_theta}),
    ):
        given = dict(given or {})
        if "type" in given:  # the name of `rope_type` before transformers 4.43
            given.setdefault("rope_type", given["type"])
            del given["type"]
        if given.get("partial_rotary_factor") in (1, None):
            given.pop("partial_rotary_factor", None)
        for key, value in given.items():
            if merged.setdefault(key, value) != value:
                raise ValueError(f"{spelling} says {key}={value}, but rope_parameters says {key}={merged[key]}")
    return {"rope_type": "default", "rope_theta": DEFAULT_ROPE_THETA} | merged


__all__ = ["PAPER_SIZES", "LlamaReproConfig"]

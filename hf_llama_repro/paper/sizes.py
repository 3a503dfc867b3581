"""What the papers trained, on what, for how long: sizes, data mixture, pre-training runs, and what came between.

Sources: LLaMA (arXiv 2302.13971): Table 1 (mixture), Table 2 and section 2.3 (runs), section 2.4 and Table 15 (costs).
LLaMA 2 (arXiv 2307.09288): Table 1, section 2.2 (runs), Table 2 (costs). Shapes are `PAPER_SIZES` of the configuration.
"""

from dataclasses import dataclass

from ..configuration_llama_repro import PAPER_SIZES
from ..errors import InputError

VOCAB_SIZE = 32_000
"""Pieces of the tokenizer, SentencePiece BPE, the same in both papers: digits split, byte fallback."""

LLAMA_1, LLAMA_2 = "LLaMA", "LLaMA 2"


@dataclass(frozen=True)
class Size:
    """A released model. Widths in channels, context in tokens."""

    name: str
    """As `LlamaReproConfig.from_paper` takes it."""
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    """Width inside the SwiGLU."""
    context: int
    norm_eps: float
    """Of the paper; files of 65B with 1e-5 are seen, so that a conversion takes it from `params.json`."""
    dtype: str
    """Of the released files."""
    num_shards: int
    """Files `consolidated.NN.pth` of the release."""

    @property
    def family(self) -> str:
        return LLAMA_2 if self.name.startswith("llama-2-") else LLAMA_1

    @property
    def title(self) -> str:
        """As the papers' tables write it: "LLaMA 2 70B"."""
        return title(self.name)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


def title(name: str) -> str:
    """ "llama-2-34b" as "LLaMA 2 34B"; also of what was trained and not released."""
    family = LLAMA_2 if name.startswith("llama-2-") else LLAMA_1
    return f"{family} {name.rpartition('-')[2].upper()}"


_NUM_SHARDS = {
    "llama-7b": 1,
    "llama-13b": 2,
    "llama-33b": 4,
    "llama-65b": 8,
    "llama-2-7b": 1,
    "llama-2-13b": 2,
    "llama-2-70b": 8,
}

SIZES: dict[str, Size] = {
    name: Size(
        name=name,
        dim=shape["hidden_size"],
        num_layers=shape["num_hidden_layers"],
        num_heads=shape["num_attention_heads"],
        num_kv_heads=shape.get("num_key_value_heads", shape["num_attention_heads"]),
        ffn_dim=shape["intermediate_size"],
        context=shape["max_position_embeddings"],
        norm_eps=shape["rms_norm_eps"],
        dtype=shape["dtype"],
        num_shards=_NUM_SHARDS[name],
    )
    for name, shape in PAPER_SIZES.items()
}
"""LLaMA: Table 2; LLaMA 2: Table 1 and appendix A.2.1."""

_OTHER_NAMES = {
    "llama-30b": "the paper's 33B; its files say 30B: llama-33b",
    "llama-2-34b": "was trained and never released, and the paper gives no shape",
}


def size(name: str) -> Size:
    """The released model of this name. Raises `InputError` where there is none."""
    if name not in SIZES:
        hint = f" ({_OTHER_NAMES[name]})" if name in _OTHER_NAMES else ""
        raise InputError(f"no size named {name!r} in the papers{hint}; there are {', '.join(SIZES)}")
    return SIZES[name]


# Optimisation, the same for every run but the learning rate. LLaMA: section 2.3; LLaMA 2: section 2.2.
ADAM_BETAS = (0.9, 0.95)
ADAM_EPS: dict[str, float | None] = {LLAMA_1: None, LLAMA_2: 1e-5}
"""LLaMA does not state it."""
WEIGHT_DECAY = 0.1
GRADIENT_CLIPPING = 1.0
"""Largest norm of all gradients together."""
WARMUP_STEPS = 2_000
FINAL_FRACTION = 0.1
"""Of the peak, where the cosine ends."""
BATCH_TOKENS = 4_000_000
"""Both papers say "4M"; whether 4,194,304 is meant, they do not say."""


@dataclass(frozen=True)
class Run:
    """A pre-training."""

    tokens: int
    peak_learning_rate: float
    gpu_hours: int
    """Of A100-80GB."""
    energy_mwh: int | None = None
    carbon_tonnes: int | None = None
    """Of CO2 equivalent."""


RUNS: dict[str, Run] = {
    "llama-7b": Run(1_000_000_000_000, 3e-4, 82_432, 36, 14),
    "llama-13b": Run(1_000_000_000_000, 3e-4, 135_168, 59, 23),
    "llama-33b": Run(1_400_000_000_000, 1.5e-4, 530_432, 233, 90),
    "llama-65b": Run(1_400_000_000_000, 1.5e-4, 1_022_362, 449, 173),
    "llama-2-7b": Run(2_000_000_000_000, 3e-4, 184_320),
    "llama-2-13b": Run(2_000_000_000_000, 3e-4, 368_640),
    "llama-2-34b": Run(2_000_000_000_000, 1.5e-4, 1_038_336),
    "llama-2-70b": Run(2_000_000_000_000, 1.5e-4, 1_720_320),
}
"""LLaMA: Table 2 and Table 15; LLaMA 2: Tables 1 and 2. LLaMA 2 34B was not released."""

GPU = "A100-80GB"
GPU_FLOPS = 312e12
"""FLOP/s of an A100 in bf16 and fp16, NVIDIA's data sheet."""
TOKENS_PER_SECOND_PER_GPU = 380
"""Of LLaMA 65B on CLUSTER_GPUS; section 2.4. "About"."""
CLUSTER_GPUS = 2_048
CLUSTER_DAYS = 21
"""Of LLaMA 65B; section 2.4. "Approximately"."""


@dataclass(frozen=True)
class Source:
    """A part of the training data."""

    name: str
    share: float
    """Of the sampled tokens; 0.67 is 67 %."""
    epochs: float
    """Over the source, when 1.4T tokens are sampled."""
    disk_gb: int
    """Decimal."""


MIXTURE: tuple[Source, ...] = (
    Source("CommonCrawl", 0.67, 1.10, 3_300),
    Source("C4", 0.15, 1.06, 783),
    Source("GitHub", 0.045, 0.64, 328),
    Source("Wikipedia", 0.045, 2.45, 83),
    Source("Books", 0.045, 2.23, 85),
    Source("ArXiv", 0.025, 1.06, 92),
    Source("StackExchange", 0.02, 1.03, 78),
)
"""LLaMA, Table 1. LLaMA 2 says "a new mix of publicly available online data" and no more."""

MIXTURE_TOKENS = 1_400_000_000_000
"""To which the epochs of `MIXTURE` belong."""


@dataclass(frozen=True)
class Event:
    """Something that appeared between the papers."""

    date: str
    """ISO: the day on which the paper was submitted to arXiv, or the announcement was made where there is none."""
    name: str
    what: str
    source: str


TIMELINE: tuple[Event, ...] = (
    Event("2023-02-27", "LLaMA", "7B to 65B, weights for research", "arXiv 2302.13971"),
    Event("2023-03-13", "Alpaca", "7B on 52,002 instructions by text-davinci-003", "Stanford CRFM, announcement"),
    Event("2023-03-30", "Vicuna", "7B and 13B on shared ChatGPT dialogues", "LMSYS, announcement"),
    Event("2023-04-03", "Koala", "13B on dialogues from the web and open data", "Berkeley BAIR, announcement"),
    Event("2023-04-24", "WizardLM", "7B on instructions made harder step by step", "arXiv 2304.12244"),
    Event("2023-06-05", "Orca", "13B on explanations by GPT-4", "arXiv 2306.02707"),
    Event("2023-07-18", "LLaMA 2", "7B to 70B and chat models, weights for nearly all uses", "arXiv 2307.09288"),
)

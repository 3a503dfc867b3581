"""What follows from a size: parameters, FLOPs, time and cost, the cache, the learning rate.

Matrix products only, a multiplication and an addition are 2 FLOPs; a backward pass is twice a forward pass.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import InputError
from .sizes import (
    BATCH_TOKENS,
    FINAL_FRACTION,
    GPU_FLOPS,
    MIXTURE,
    VOCAB_SIZE,
    WARMUP_STEPS,
    Size,
    Source,
)

# LLaMA, section 6: what an A100 takes, the data centre's overhead, and the average of the US grid.
GPU_WATTS = 400
POWER_USAGE_EFFECTIVENESS = 1.1
CARBON_TONNES_PER_MWH = 0.385

SHARE_TOLERANCE = 1e-6
"""By which the shares of a mixture may miss 1: they are written with a few decimals."""


def _in_range(name: str, value: float, right: bool, allowed: str) -> None:
    if not right or not math.isfinite(value):
        raise InputError(f"{name}={value:g} is out of range: {allowed}")


def parameters(size: Size) -> dict[str, int]:
    """Number of parameters by part, of all layers; their sum is the model's. No biases, and nothing is tied."""
    kv_dim = size.num_kv_heads * size.head_dim
    return {
        "embedding": VOCAB_SIZE * size.dim,
        "attention q": size.num_layers * size.dim * size.dim,
        "attention k": size.num_layers * size.dim * kv_dim,
        "attention v": size.num_layers * size.dim * kv_dim,
        "attention o": size.num_layers * size.dim * size.dim,
        "feed-forward gate": size.num_layers * size.dim * size.ffn_dim,
        "feed-forward up": size.num_layers * size.dim * size.ffn_dim,
        "feed-forward down": size.num_layers * size.ffn_dim * size.dim,
        "norms": (2 * size.num_layers + 1) * size.dim,
        "output": VOCAB_SIZE * size.dim,
    }


def num_parameters(size: Size) -> int:
    """All of them, the separate output matrix included."""
    return sum(parameters(size).values())


def training_flops(num_parameters: float, tokens: float) -> float:
    """FLOPs of a training by the rule 6 N D: 2 forward and 4 backward, for each parameter and token."""
    _in_range("num_parameters", num_parameters, num_parameters > 0, "more than 0")
    _in_range("tokens", tokens, tokens > 0, "more than 0")
    return 6 * num_parameters * tokens


def layer_flops(size: Size, context: int, *, causal: bool = True) -> dict[str, int]:
    """FLOPs of one layer's forward pass over one sequence of `context` tokens, by product.

    `causal`: a token is multiplied with itself and those before it, `(context + 1) / 2` on average; else with all, as
    an attention without a kernel for it does.
    """
    _in_range("context", context, context >= 1, "at least 1 token")
    kv_dim = size.num_kv_heads * size.head_dim
    pairs = context * (context + 1) // 2 if causal else context * context
    return {
        "attention q": 2 * context * size.dim * size.dim,
        "attention k": 2 * context * size.dim * kv_dim,
        "attention v": 2 * context * size.dim * kv_dim,
        "attention scores": 2 * pairs * size.dim,
        "attention values": 2 * pairs * size.dim,
        "attention o": 2 * context * size.dim * size.dim,
        "feed-forward": 3 * 2 * context * size.dim * size.ffn_dim,
    }


def forward_flops(size: Size, context: int, *, causal: bool = True) -> int:
    """FLOPs of the model's forward pass over one sequence of `context` tokens. The embedding is looked up: none."""
    layer = sum(layer_flops(size, context, causal=causal).values())
    return size.num_layers * layer + 2 * context * size.dim * VOCAB_SIZE


def exact_training_flops(size: Size, tokens: float, context: int | None = None, *, causal: bool = True) -> float:
    """FLOPs of training on `tokens` in sequences of `context` (default: the size's own), attention included."""
    context = size.context if context is None else context
    _in_range("tokens", tokens, tokens > 0, "more than 0")
    return 3 * forward_flops(size, context, causal=causal) * tokens / context


@dataclass(frozen=True)
class Cost:
    """What a training takes."""

    days: float
    gpu_hours: float
    dollars: float


def cost(
    flops: float, *, num_gpus: int, utilisation: float, dollars_per_gpu_hour: float = 0.0, gpu_flops: float = GPU_FLOPS
) -> Cost:
    """Time and cost of `flops` on `num_gpus` that reach `utilisation` (0 to 1) of `gpu_flops` (FLOP/s) each."""
    _in_range("flops", flops, flops > 0, "more than 0")
    _in_range("num_gpus", num_gpus, num_gpus >= 1, "at least 1")
    _in_range("utilisation", utilisation, 0 < utilisation <= 1, "more than 0, at most 1 (0.5 is 50 %)")
    _in_range("dollars_per_gpu_hour", dollars_per_gpu_hour, dollars_per_gpu_hour >= 0, "at least 0")
    _in_range("gpu_flops", gpu_flops, gpu_flops > 0, "more than 0")
    gpu_hours = flops / (gpu_flops * utilisation) / 3600
    return Cost(gpu_hours / num_gpus / 24, gpu_hours, gpu_hours * dollars_per_gpu_hour)


def model_flops_utilisation(
    flops_per_token: float, tokens_per_second_per_gpu: float, gpu_flops: float = GPU_FLOPS
) -> float:
    """Share of a GPU's peak that a training uses, 0 to 1; what is computed twice counts once."""
    return flops_per_token * tokens_per_second_per_gpu / gpu_flops


def energy_mwh(gpu_hours: float) -> float:
    """Energy of a training as LLaMA's section 6 computes it."""
    return gpu_hours * GPU_WATTS * POWER_USAGE_EFFECTIVENESS / 1e6


def carbon_tonnes(gpu_hours: float) -> float:
    """CO2 equivalent of a training as LLaMA's section 6 computes it."""
    return energy_mwh(gpu_hours) * CARBON_TONNES_PER_MWH


def kv_cache_bytes(size: Size, *, grouped: bool = True, bytes_per_value: int = 2) -> int:
    """Bytes of K and V that one token leaves in the cache, all layers. `grouped=False`: as if each head had its own."""
    _in_range("bytes_per_value", bytes_per_value, bytes_per_value >= 1, "at least 1")
    heads = size.num_kv_heads if grouped else size.num_heads
    return 2 * size.num_layers * heads * size.head_dim * bytes_per_value


def num_steps(tokens: int, batch_tokens: int = BATCH_TOKENS) -> int:
    """Optimizer steps of a training, the last batch full or not."""
    _in_range("tokens", tokens, tokens >= 1, "at least 1")
    _in_range("batch_tokens", batch_tokens, batch_tokens >= 1, "at least 1")
    return math.ceil(tokens / batch_tokens)


def learning_rate(
    step: int,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int = WARMUP_STEPS,
    final_fraction: float = FINAL_FRACTION,
) -> float:
    """Learning rate after `step` of `total_steps`: from 0 in a line to the peak, then a cosine to 10 % of it."""
    _in_range("warmup_steps", warmup_steps, 0 <= warmup_steps < total_steps, f"0 to {total_steps - 1}")
    _in_range("step", step, 0 <= step <= total_steps, f"0 to {total_steps}")
    _in_range("peak", peak, peak > 0, "more than 0")
    _in_range("final_fraction", final_fraction, 0 <= final_fraction <= 1, "0 to 1")
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * (final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * progress)) / 2)


def tokens_by_source(tokens: float, mixture: Iterable[Source] = MIXTURE) -> dict[str, tuple[float, float]]:
    """Of each source: tokens sampled, and tokens that it holds by its epochs.

    Raises `InputError` for shares that do not add up to 1, and for a source that is empty or named twice.
    """
    _in_range("tokens", tokens, tokens > 0, "more than 0")
    mixture = tuple(mixture)
    total = math.fsum(source.share for source in mixture)
    if abs(total - 1) > SHARE_TOLERANCE:
        raise InputError(f"the shares of the mixture add up to {total:.6g}, not 1: {_shares(mixture)}")
    names = [source.name for source in mixture]
    for source in mixture:
        if names.count(source.name) > 1:
            raise InputError(f"the mixture names {source.name} {names.count(source.name)} times: give one share")
        if not (source.share > 0 and source.epochs > 0 and source.disk_gb > 0):
            raise InputError(
                f"the mixture's source {source.name} is empty (share {source.share:g}, epochs {source.epochs:g}, "
                f"{source.disk_gb:g} GB): each must be more than 0; leave out what is not used"
            )
    return {source.name: (source.share * tokens, source.share * tokens / source.epochs) for source in mixture}


def _shares(mixture: tuple[Source, ...]) -> str:
    return ", ".join(f"{source.name} {source.share:g}" for source in mixture) or "it names no source"

"""What a run costs before it is begun: parameters, FLOPs, days, money, memory; and the learning rate's course."""

import math
import time
from typing import TYPE_CHECKING

from hf_llama_repro import LlamaReproConfig
from hf_llama_repro.errors import InputError
from hf_llama_repro.paper import learning_rate

from .prepared import token_count
from .recipe import Recipe

if TYPE_CHECKING:
    import torch

# Dense bf16 FLOP/s of a card, as its maker states them, by what its name contains.
PEAKS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
# Weights, gradients and AdamW's two moments, in fp32.
STATE_BYTES = 16
# Of a model without a paper's name, because the defaults are those of 7B.
_SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def model_config(recipe: Recipe, vocab_size: int) -> LlamaReproConfig:
    """The recipe's model. Raises `InputError` for fields that do not exist or contradict each other."""
    fields = dict(recipe.model)
    paper = fields.pop("paper", None)
    known = list(LlamaReproConfig.__annotations__)
    if unknown := sorted(set(map(str, fields)) - set(known)):
        raise InputError(f"model: unknown key {unknown[0]!r}; there are paper, {', '.join(known)}")
    for name, value in fields.items():
        parts = list(value.values()) if isinstance(value, dict) else [value]
        if any(isinstance(part, dict | list) for part in parts):
            raise InputError(f"model: {name} must be one value, or for rope_parameters names with one value each")
    if paper is None and (missing := [name for name in _SHAPE if name not in fields]):
        raise InputError(f"model names neither a paper's size (paper: llama-7b) nor {', '.join(missing)}: add them")
    given = {"dtype": "float32", **fields, "vocab_size": vocab_size, "max_position_embeddings": recipe.context_length}
    try:
        return LlamaReproConfig(**given) if paper is None else LlamaReproConfig.from_paper(paper, **given)
    except (ValueError, TypeError) as error:
        raise InputError(f"model: {error}") from None


def matrix_parameters(config: LlamaReproConfig) -> int:
    """Parameters that a token is multiplied by: all but the norms and the embedding, which is looked up."""
    hidden = config.hidden_size
    heads, kv_heads = (
        (number or 0) * (config.head_dim or 0) for number in (config.num_attention_heads, config.num_key_value_heads)
    )
    layer = 2 * hidden * heads + 2 * hidden * kv_heads + 3 * hidden * config.intermediate_size
    return config.num_hidden_layers * layer + config.vocab_size * hidden


def num_parameters(config: LlamaReproConfig) -> int:
    """All of the model's parameters."""
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return matrix_parameters(config) + embedding + norms


def flops_per_token(config: LlamaReproConfig, context_length: int) -> float:
    """FLOPs of forward and backward pass for a token, without what is computed again.

    6 for each parameter of a matrix, and attention's 12 * layers * heads * head_dim * context (PaLM, arXiv 2204.02311,
    appendix B).
    """
    width = config.num_attention_heads * (config.head_dim or 0)
    return 6 * matrix_parameters(config) + 12 * config.num_hidden_layers * width * context_length


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Of the optimizer step `step`, counted from 1. A run that is shorter than its warm-up only rises."""
    return learning_rate(
        step,
        peak=recipe.learning_rate,
        total_steps=max(recipe.num_steps, recipe.warmup_steps + 1),
        warmup_steps=recipe.warmup_steps,
        final_fraction=recipe.final_lr_ratio,
    )


def peak_flops(device: "torch.device", dtype: "torch.dtype") -> float:
    """FLOP/s that the device has at best: by its name, or measured by a product of matrices; NaN for a card unknown."""
    import torch

    if device.type == "cuda":
        return next((peak for name, peak in PEAKS.items() if name in torch.cuda.get_device_name(device)), math.nan)
    size = 1024
    matrix = torch.randn(size, size, device=device).to(dtype)
    best = math.inf
    for _ in range(40):  # half a second: other programs may run meanwhile
        begin = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def plan_lines(recipe: Recipe) -> list[str]:
    """The plan for people. Raises `InputError` for a card that is not known."""
    config = model_config(recipe, recipe.vocab_size)
    tokens = recipe.num_steps * recipe.batch_tokens
    flops = flops_per_token(config, recipe.context_length) * tokens
    parameters = num_parameters(config)
    rates = ", ".join(
        f"{learning_rate_at(step, recipe):.2e} at {step:,}"
        for step in dict.fromkeys([1, recipe.warmup_steps or 1, max(1, recipe.num_steps // 2), recipe.num_steps])
    )
    return [
        f"model       {parameters:,} parameters, {tokens / parameters:.1f} tokens for each",
        f"tokens      {tokens:,} in {recipe.num_steps:,} steps of {recipe.batch_tokens:,} "
        f"({recipe.num_rows:,} rows of {recipe.context_length:,})",
        f"rate        {rates}",
        f"compute     {flops:.3g} FLOPs; 6 N D is {6.0 * parameters * tokens:.3g}",
        *_cost(recipe, flops),
        f"memory      {parameters * STATE_BYTES / recipe.gpus / 1e9:.3g} GB for each of {recipe.gpus:,} "
        f"processes under sharding=fsdp2, {parameters * STATE_BYTES / 1e9:.3g} GB without: weights, gradients and "
        "optimizer in fp32, besides activations",
        *(_source_line(recipe, index, tokens) for index in range(len(recipe.sources))),
    ]


def _cost(recipe: Recipe, flops: float) -> list[str]:
    if not recipe.gpu:
        import torch

        peak = peak_flops(torch.device("cpu"), torch.bfloat16 if recipe.dtype != "float32" else torch.float32)
        minutes = flops / (peak * recipe.utilisation) / 60
        return [
            f"time        {minutes:.0f} minutes on this processor: {peak / 1e9:.0f} GFLOP/s measured now, "
            f"{recipe.utilisation:.0%} of it used"
        ]
    peak = next((peak for name, peak in PEAKS.items() if name in recipe.gpu), math.nan)
    if math.isnan(peak):
        raise InputError(f"gpu={recipe.gpu} is not known: name one of {', '.join(PEAKS)}, or none")
    hours = flops / (peak * recipe.utilisation) / 3600
    speed = recipe.num_steps * recipe.batch_tokens / hours / 3600
    money = f", {hours * recipe.gpu_price:,.0f} USD at {recipe.gpu_price:g} an hour" if recipe.gpu_price else ""
    return [
        f"time        {hours / recipe.gpus / 24:.1f} days on {recipe.gpus:,} {recipe.gpu}: {peak / 1e12:.0f} TFLOP/s "
        f"each, {recipe.utilisation:.1%} of it used, {speed:,.0f} tokens/s each",
        f"cost        {hours:,.0f} GPU-hours{money}",
    ]


def _source_line(recipe: Recipe, index: int, tokens: int) -> str:
    source = recipe.sources[index]
    held = token_count(recipe, source)
    held, said = (held, "prepared") if held else (source.expected_tokens, "expected")
    drawn = source.share * tokens
    epochs = f"{drawn / held:.2f} epochs of {held:.4g} {said}" if held else "epochs not known before it is prepared"
    return f"source      {source.name}: {source.share:.1%}, {drawn:.4g} tokens, {epochs}"

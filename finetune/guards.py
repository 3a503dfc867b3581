"""What keeps a run from failing silently: checks before the first step, at every step, and of everything saved."""

import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_llama_repro.errors import InputError, TrainingStoppedError

from .encoding import IGNORED, Example
from .processes import uses_deepspeed
from .recipe import Recipe

# Losses of so many optimizer steps that are equal to the last bit: two may be, where the first learning rate is 0.
EQUAL_LOSSES = 3
PROBE_TOKENS = 64


class Preflight(NamedTuple):
    """What one forward and backward pass showed."""

    loss: float
    num_gradients: int
    """Tensors that are trained, all with finite gradients."""
    tokens: int
    seconds: float


def check_labels(examples: list[Example], labels: torch.Tensor) -> None:
    """Raises `InputError` where a batch lost supervised tokens that its records have: EOS masked as padding."""
    expected = sum(label != IGNORED for example in examples for label in example.labels)
    if (found := int((labels != IGNORED).sum())) != expected:
        raise InputError(
            f"{found} tokens of a batch are supervised and not {expected}: where padding is told by its id and the pad "
            "token is EOS, EOS is masked as well and the model never learns to stop; "
            "use a collator that tells padding by position"
        )


def adapter_size(config: Any, recipe: Recipe) -> int:
    """Parameters of the recipe's adapter: rank times inputs and outputs of each layer that it is on.

    4,194,304 for 7B with rank 8 on q_proj and v_proj, as published (alpaca-lora).
    """
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim
    inputs_and_outputs = {
        "q_proj": hidden + heads,
        "k_proj": hidden + kv_heads,
        "v_proj": hidden + kv_heads,
        "o_proj": heads + hidden,
        "gate_proj": hidden + config.intermediate_size,
        "up_proj": hidden + config.intermediate_size,
        "down_proj": config.intermediate_size + hidden,
    }
    in_layers = sum(inputs_and_outputs.get(name, 0) for name in recipe.lora_targets) * config.num_hidden_layers
    return recipe.lora_r * (in_layers + ("lm_head" in recipe.lora_targets) * (hidden + config.vocab_size))


def check_trained(model: Any, recipe: Recipe) -> int:
    """Number of parameters that are trained. Raises `TrainingStoppedError` where it is not what the recipe asks for."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    expected = adapter_size(model.config, recipe) if recipe.method == "lora" else total
    if trained != expected:
        raise TrainingStoppedError(
            f"{trained:,} parameters are trained, and the recipe asks for {expected:,}: "
            f"method={recipe.method}, lora_r={recipe.lora_r}, lora_targets={', '.join(recipe.lora_targets)}"
        )
    return trained


def check_eos(model: Any, eos: int) -> None:
    """Raises `InputError` where the model cannot say EOS: no row of the output matrix, or one that was never trained.

    An adapter on other layers cannot mend that, and the model would never stop.
    """
    rows = model.get_output_embeddings().weight
    remedy = "take a base and a tokenizer that belong together, or one whose EOS was trained"
    if eos >= len(rows):
        raise InputError(f"the tokenizer's EOS has id {eos}, and the model has {len(rows)} tokens: {remedy}")
    if not rows[eos].any():
        raise InputError(f"the output matrix holds only zeros for EOS (id {eos}), so that it cannot be said: {remedy}")


def preflight(model: Any, batch: dict[str, torch.Tensor]) -> Preflight:
    """One forward and backward pass in training mode; parameters, gradients and random state are left as they were.

    Raises `TrainingStoppedError` where the loss or a gradient is not finite, where a tensor gets no gradient, or where
    gradients are 0 after an evaluation.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise TrainingStoppedError("nothing is trained: no parameter wants a gradient")
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    was_training = model.training
    start = time.perf_counter()
    with torch.random.fork_rng(devices):
        loss = _gradients(model, batch, trained, "the first forward and backward pass")
    seconds = time.perf_counter() - start
    # Again after a pass as evaluation makes it: some 4-bit layers learn nothing from then on.
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices):
        model(input_ids=batch["input_ids"][:1, :PROBE_TOKENS], use_cache=False)
    with torch.random.fork_rng(devices):
        _gradients(model, {name: tensor[-1:] for name, tensor in batch.items()}, trained, "a pass after an evaluation")
    model.train(was_training)
    return Preflight(loss, len(trained), batch["input_ids"].numel(), seconds)


def _gradients(model: Any, batch: dict[str, torch.Tensor], trained: dict[str, torch.Tensor], when: str) -> float:
    """The loss; checks the gradients and removes them."""
    model.train()
    loss = model(**batch, use_cache=False, skip_logits=True).loss
    if not math.isfinite(loss.item()):
        raise TrainingStoppedError(f"{when} gives the loss {loss.item()}: {_ADVICE_NONFINITE}")
    loss.backward()
    problems = []
    for name, parameter in trained.items():
        if parameter.grad is None:
            problems.append(f"{name} gets none")
        elif not parameter.grad.isfinite().all():
            problems.append(f"{name} gets one that is not finite")
    moved = any(parameter.grad is not None and parameter.grad.any() for parameter in trained.values())
    model.zero_grad()
    if problems:
        raise TrainingStoppedError(
            f"{when}: of {len(trained)} trained tensors {len(problems)} get no gradient that can be used "
            f"({'; '.join(problems[:3])}): {_ADVICE_NONFINITE}"
        )
    if not moved:
        raise TrainingStoppedError(f"{when}: every gradient is exactly 0: {_ADVICE_ZERO}")
    return loss.item()


_ADVICE_NONFINITE = (
    "set dtype to bfloat16 or float32 (float16 overflows on some cards), or lower learning_rate; "
    "check the base with hf-llama-generate"
)
_ADVICE_ZERO = (
    "nothing would be learnt; on this device use quantization int8 or none, and gradient checkpointing needs inputs "
    "that want gradients"
)


class Watch:
    """Looks at every loss as it comes."""

    def __init__(self) -> None:
        self._step = -1
        self._sum = 0.0
        self._last: list[float] = []

    def loss(self, loss: torch.Tensor, step: int, checkpoint: Path | None) -> None:
        """Raises `TrainingStoppedError` for a loss that is not finite, or the same over EQUAL_LOSSES steps."""
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingStoppedError(
                f"the loss is {value} at step {step + 1}: {_ADVICE_NONFINITE}; {_last_good(checkpoint)}"
            )
        if step != self._step:
            self._last = [*self._last, self._sum][-EQUAL_LOSSES:] if self._step >= 0 else []
            self._step, self._sum = step, 0.0
            if len(self._last) == EQUAL_LOSSES and len(set(self._last)) == 1:
                raise TrainingStoppedError(
                    f"the loss is {self._last[0]} over {EQUAL_LOSSES} steps, exactly: {_ADVICE_ZERO}; "
                    f"{_last_good(checkpoint)}"
                )
        self._sum += value


def _last_good(checkpoint: Path | None) -> str:
    return f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was saved yet"


class GradientWatch(TrainerCallback):
    """Looks at the gradients of every optimizer step, and at what the steps before made of the parameters."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if uses_deepspeed():  # which has taken the step by then
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm: Any = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        # Of divided gradients it is the norm of this process's parts, until they are put together.
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._check(norm.item(), state.global_step + 1, scaled=args.fp16)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if uses_deepspeed() and "grad_norm" in (logs or {}):
            self._check(float(logs["grad_norm"]), state.global_step, scaled=args.fp16)

    def _check(self, norm: float, step: int, *, scaled: bool) -> None:
        if norm == 0:
            raise TrainingStoppedError(f"every gradient is exactly 0 at step {step}: {_ADVICE_ZERO}")
        # Under gradient scaling an overflow is in order: the scaler skips that step.
        if not math.isfinite(norm) and not scaled:
            raise TrainingStoppedError(f"the gradients are not finite at step {step}: {_ADVICE_NONFINITE}")


def check_saved_adapter(model: PeftModel, folder: Path) -> None:
    """Reads an adapter back from the disk. Raises `TrainingStoppedError` where it is not what is in memory.

    It must hold every tensor of the adapter bit for bit, and give the same logits when it is loaded.
    """
    check_saved_tensors(get_peft_model_state_dict(model), folder)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        difference = _logit_difference(model, folder)
    if difference != 0:
        raise TrainingStoppedError(
            f"the adapter in {folder} gives other logits than the one in memory (largest difference {difference:.3g})"
        )


def check_saved_part(model: PeftModel, gathered: dict[str, torch.Tensor], folder: Path) -> None:
    """The same for a model that is divided among processes, whose trained tensors were `gathered`: without logits.

    That the adapter's rank, scale and layers are the model's takes their place.
    """
    check_saved_tensors(get_peft_model_state_dict(model, state_dict=gathered), folder)
    config: Any = model.active_peft_config
    saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for name in ("r", "lora_alpha", "target_modules"):
        expected, found = getattr(config, name), saved.get(name)
        if (sorted(found) != sorted(expected)) if name == "target_modules" else found != expected:
            raise TrainingStoppedError(f"{folder}/adapter_config.json says {name} {found}, and not {expected}")


def check_saved_tensors(expected: dict[str, torch.Tensor], folder: Path) -> None:
    """Raises `TrainingStoppedError` where an adapter's file does not hold these tensors bit for bit, and no others."""
    path = folder / "adapter_model.safetensors"
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TrainingStoppedError(f"the adapter that was saved cannot be read back: {path}: {error}") from None
    differing = [
        name for name in expected if name not in saved or not torch.equal(saved[name], expected[name].detach().cpu())
    ]
    if not expected or differing or set(saved) - set(expected):
        raise TrainingStoppedError(
            f"the adapter that was saved is not the one that was trained: {path} holds {len(saved)} tensors, "
            f"{len(differing)} of the {len(expected)} in memory are missing or differ"
        )


@torch.no_grad()
def _logit_difference(model: PeftModel, folder: Path) -> float:
    """Largest difference between the logits of the adapter in memory and of the one on the disk."""
    trained = model.active_adapter
    was_training = model.training
    model.eval()
    tokens = torch.arange(1, PROBE_TOKENS + 1, device=model.device)[None] % model.config.vocab_size
    in_memory = model(input_ids=tokens, use_cache=False).logits
    model.load_adapter(folder, "read_back")
    model.set_adapter("read_back")
    read_back = model(input_ids=tokens, use_cache=False).logits
    model.set_adapter(trained)
    model.delete_adapter("read_back")
    model.train(was_training)
    return (in_memory - read_back).abs().max().item()

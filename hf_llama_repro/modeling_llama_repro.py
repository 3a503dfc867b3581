"""LLaMA 1 and 2, top to bottom against the papers: norm, rotary embedding, SwiGLU, attention, layer, model, heads.

Sources: LLaMA (arXiv 2302.13971, section 2.2), LLaMA 2 (arXiv 2307.09288, section 2.2), RMSNorm (arXiv 1910.07467),
SwiGLU (arXiv 2002.05202), RoPE (arXiv 2104.09864), grouped-query attention (arXiv 2305.13245).
Module and parameter names are those of transformers' Llama, so that its state dict loads as it is.

Shapes: batch, seq (new tokens), total (cached and new tokens), heads (of Q), kv_heads, head_dim.
"""

from collections.abc import Callable
from itertools import islice
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_llama_repro import AUTO_MAP, LlamaReproConfig

# What the installed package adds for speed (`fast_paths`): an operation, by name, or an attention function -> what is
# called in place of the plain way, which is all there is where this file lies beside a checkpoint.
FAST_PATHS: dict[str | Callable, Callable] = {}


def linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return module(x): of an nn.Linear, or of what took its place."""
    output = FAST_PATHS["linear"](module, x) if "linear" in FAST_PATHS else None
    return module(x) if output is None else output


def append(
    cache: Cache, key: torch.Tensor, value: torch.Tensor, layer_idx: int, kwargs: TransformersKwargs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append keys and values (batch, kv_heads, seq, head_dim) to a layer of the cache, and return all of both."""
    both = FAST_PATHS["append"](cache, key, value, layer_idx) if "append" in FAST_PATHS else None
    return cache.update(key, value, layer_idx, kwargs=kwargs) if both is None else both


# The argument and output field of the key/value cache: `cache` from transformers 5.24 on, `past_key_values` before.
# A forward takes either name under every version, and passes on the version's own.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__annotations__ else "past_key_values"

# Tensors that may arrive beside a forward's own arguments: what the loss reads, packed sequences, and what continuous
# batching tells its attention function.
EXTRA_TENSORS = {
    *TransformersKwargs.__annotations__,
    *("shift_labels", "block_table", "read_index", "write_index", "logits_indices", "logits_processor_args"),
    *("max_seqlen_q", "max_seqlen_k"),
}
BUILT_IN_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention", "paged|")


def either_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Return the cache under whichever of its two names it was given.

    Both are given where PEFT brings a learned prefix beside the cache of `generate`: the first step begins with the
    prefix, later ones go on with the cache that it has become. Raises ValueError for two that have nothing in common.
    """
    if cache is None or past_key_values is None or cache is past_key_values:
        return past_key_values if cache is None else cache
    length = past_key_values.get_seq_length()
    if not cache.get_seq_length():
        return past_key_values if length else cache
    begun: Any = cache.layers[0]
    prefix: Any = past_key_values.layers[0]
    if length and not torch.equal(begun.keys[:, :, :length], prefix.keys):
        raise ValueError("give the key/value cache once: as `cache` or by its older name `past_key_values`")
    return cache


def refuse_unknown(kwargs: dict, attn_implementation: str) -> None:
    """Raise TypeError for a cache or tensors under a name that no code reads: the result would be another one.

    An attention function that is not transformers' own may read any name.
    """
    if not attn_implementation.startswith(BUILT_IN_ATTENTION):
        return
    for name in kwargs.keys() - EXTRA_TENSORS:
        if holds_tensors(kwargs[name]):
            raise TypeError(
                f"forward() got `{name}`, which LLaMA does not know: a cache is given as `cache` or "
                "`past_key_values`; leave out what the model has no use for"
            )


def holds_tensors(value: object) -> bool:
    """Whether a keyword argument is or contains tensors or a cache."""
    if isinstance(value, dict):
        value = list(value.values())
    return (
        any(map(holds_tensors, value)) if isinstance(value, list | tuple) else isinstance(value, Cache | torch.Tensor)
    )


class LlamaReproRMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; x / rms(x) is computed in fp32 whatever the dtype of x."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.float()
        # In this order, step by step, every bit is that of stock Llama; F.rms_norm rounds elsewhere.
        mean_square = (x * x).mean(dim=-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(mean_square + self.eps)).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class LlamaReproRotaryEmbedding(nn.Module):
    """cos and sin of position times frequency: pair i of a head turns by position * theta^(-2i / head_dim).

    The two halves of a head are paired, channel i with channel i + head_dim / 2; Meta pairs neighbours.
    The conversion reorders the rows of Q and K from one convention to the other, which leaves every score as it was.
    """

    inv_freq: torch.Tensor  # (head_dim / 2,), fp32
    original_inv_freq: torch.Tensor

    def __init__(self, config: LlamaReproConfig, device=None):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        inv_freq, self.attention_scaling = self._rope_init_fn()(config, device)
        # Not saved: `_init_weights` of PreTrainedModel computes both again after a load.
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: LlamaReproConfig, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """The frequencies of RoPE (section 3.2.2), (head_dim / 2,), and the factor on cos and sin, 1."""
        channel = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device)
        return 1.0 / config.rope_parameters["rope_theta"] ** (channel / config.head_dim), 1.0

    def _apply(self, fn, recurse=True):
        # model.to(torch.bfloat16) would round the frequencies: at position 4000 an angle would be off by radians.
        # to_empty() from the meta device would leave garbage, and no checkpoint brings them.
        exact = self.inv_freq, self.original_inv_freq
        super()._apply(fn, recurse)
        if exact[0].is_meta and not self.inv_freq.is_meta:
            inv_freq, _ = self._rope_init_fn()(self.config, self.inv_freq.device)
            exact = inv_freq, inv_freq.clone()
        self.inv_freq, self.original_inv_freq = (table.to(self.inv_freq.device) for table in exact)
        return self

    def _rope_init_fn(self) -> Callable:
        return ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)

    @dynamic_rope_update  # recomputes inv_freq for rope types that depend on the length
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each (batch, seq, head_dim), computed in fp32 and cast to the dtype of x."""
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1).to(x.dtype), torch.cat((sin, sin), dim=-1).to(x.dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (x[i], x[i + head_dim / 2]) of x (batch, seq, heads, head_dim); cos and sin broadcast to it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class LlamaReproMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaReproConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(self.down_proj, self.act_fn(linear(self.gate_proj, x)) * linear(self.up_proj, x))


def eager_attention_forward(
    module: "LlamaReproAttention",
    query: torch.Tensor,  # (batch, heads, seq, head_dim)
    key: torch.Tensor,  # (batch, kv_heads, total, head_dim)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(QK^T * scaling + mask) V (batch, seq, heads, head_dim) and the weights (batch, heads, seq, total)."""
    # Query head h reads K/V head h // groups.
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class LlamaReproAttention(nn.Module):
    """Causal self-attention with rotary positions.

    `heads / kv_heads` neighbouring query heads share one head of K and V (6 query heads here):
        kv_heads 6 (multi-head)     q 0 1 2 3 4 5   reads kv 0 1 2 3 4 5
        kv_heads 2 (grouped-query)  q 0 1 2 3 4 5   reads kv 0 0 0 1 1 1
        kv_heads 1 (multi-query)    q 0 1 2 3 4 5   reads kv 0 0 0 0 0 0
    """

    def __init__(self, config: LlamaReproConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # -1 and not the number of heads: under tensor parallelism this process holds a slice of them.
        heads_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = linear(self.q_proj, hidden_states).view(heads_shape)  # (batch, seq, heads, head_dim)
        key = linear(self.k_proj, hidden_states).view(heads_shape)  # (batch, seq, kv_heads, head_dim)
        value = linear(self.v_proj, hidden_states).view(heads_shape).transpose(1, 2)  # (batch, kv_heads, seq, head_dim)

        # Turned before the transposition: element-wise operations are faster while the memory is in order.
        cos, sin = position_embeddings
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # (batch, seq, 1, head_dim)
        query = apply_rotary(query, cos, sin).transpose(1, 2)
        key = apply_rotary(key, cos, sin).transpose(1, 2)
        cache = either_cache(cache, past_key_values)
        if isinstance(cache, Cache) or (cache is not None and CACHE == "cache"):
            key, value = append(cache, key, value, self.layer_idx, kwargs)  # (batch, kv_heads, total, head_dim)
        elif cache is not None:  # before 5.24 the attention functions append to a paged cache
            kwargs["cache"] = cache

        implementation = self.config._attn_implementation
        # vLLM reads this source: a name that holds what get_interface gives, alone, and is called once.
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attention_interface = FAST_PATHS.get(attention_interface, attention_interface)
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return linear(self.o_proj, attn_output.reshape(*hidden_states.shape[:-1], -1)), attn_weights


class LlamaReproDecoderLayer(GradientCheckpointingLayer):
    """Attention and SwiGLU, each behind its norm and added to the residual stream."""

    def __init__(self, config: LlamaReproConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LlamaReproAttention(config, layer_idx)
        self.mlp = LlamaReproMLP(config)
        self.input_layernorm = LlamaReproRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaReproRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attn_output, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LlamaReproPreTrainedModel(PreTrainedModel):
    """What every LlamaRepro model declares to transformers."""

    config: LlamaReproConfig
    config_class = LlamaReproConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaReproDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": LlamaReproDecoderLayer,
        "attentions": LlamaReproAttention,
    }

    def save_pretrained(self, save_directory: str | PathLike, *args, **kwargs):
        """As in transformers; where the code is saved along, `auto_map` is AUTO_MAP.

        transformers would name the saved class only, but vLLM opens a causal LM by AutoModel.
        """
        if self._auto_class is not None:
            self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)


class LlamaReproModel(LlamaReproPreTrainedModel):
    """Token ids to the hidden states after the last norm."""

    def __init__(self, config: LlamaReproConfig):
        super().__init__(config)
        config.validate_slices()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [LlamaReproDecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = LlamaReproRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaReproRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """`last_hidden_state` (batch, seq, hidden_size) for `input_ids` or `inputs_embeds`, exactly one of them."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds: exactly one of them")
        refuse_unknown(kwargs, self.config._attn_implementation)
        cache = either_cache(cache, past_key_values)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            num_cached = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + num_cached

        named: dict[str, Any] = {CACHE: cache}
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **named,
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)

        hidden_states = inputs_embeds
        for layer in islice(self.layers, self.config.num_hidden_layers):
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                **named,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **named)


# Logits in memory at a time, in values, where the loss is taken and where the output matrix is applied: what a CPU's
# cache holds, and some tens of MB; elsewhere, few kernel launches.
LOGITS_AT_A_TIME = {"cpu": (1 << 19, 1 << 23), "cuda": (1 << 25, 1 << 26)}


def rows_at_a_time(device: torch.device, vocab_size: int, *, with_head: bool) -> int:
    """Rows of logits that are taken together."""
    values = LOGITS_AT_A_TIME.get(device.type, LOGITS_AT_A_TIME["cuda"])[with_head]
    return max(1, values // vocab_size)


class SummedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(logits)[target] over the rows of (rows, vocab_size) whose target is not `ignore_index`.

    In fp32, a few rows at a time: a log_softmax of all would hold three more matrices of the size of the logits, which
    are the largest tensors of a training step. The second output, log sum exp of each row, is for the backward pass.
    """

    @staticmethod
    def _blocks(logits: torch.Tensor, *others: torch.Tensor):
        rows = rows_at_a_time(logits.device, logits.shape[-1], with_head=False)
        return zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True)

    @staticmethod
    def forward(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, torch.Tensor]:
        losses, normalizers = [], []
        for block, target in SummedCrossEntropy._blocks(logits, targets):
            block, ignored = block.float(), target == ignore_index
            normalizers.append(block.logsumexp(dim=-1))
            chosen = block.gather(-1, target.masked_fill(ignored, 0)[:, None])[:, 0]
            losses.append((normalizers[-1] - chosen).masked_fill(ignored, 0).sum())
        return torch.stack(losses).sum(), torch.cat(normalizers)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, targets, ctx.ignore_index = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(logits, targets, output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: torch.Tensor, _) -> tuple[torch.Tensor, None, None]:
        logits, targets, normalizers = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for block, target, normalizer, grad_block in SummedCrossEntropy._blocks(logits, targets, normalizers, grad):
            ignored = target == ctx.ignore_index
            softmax = (block.float() - normalizer[:, None]).exp_()
            softmax.scatter_add_(-1, target.masked_fill(ignored, 0)[:, None], softmax.new_full((len(target), 1), -1.0))
            grad_block.copy_(softmax.mul_(grad_loss).masked_fill_(ignored[:, None], 0))
        return grad, None, None


class HeadAndCrossEntropy(torch.autograd.Function):
    """SummedCrossEntropy of lm_head(hidden_states), (rows, hidden_size), with the logits of a few rows at a time.

    The gradients are taken in the forward pass, while a block's logits are at hand; the backward pass scales them.
    """

    @staticmethod
    def forward(ctx, lm_head: nn.Linear, targets: torch.Tensor, hidden_states: torch.Tensor, *parameters: torch.Tensor):
        rows = rows_at_a_time(hidden_states.device, lm_head.out_features, with_head=True)
        wanted = ctx.needs_input_grad[2:]
        hidden_states = hidden_states.detach().requires_grad_(wanted[0])
        learnt = [tensor for tensor, learns in zip((hidden_states, *parameters), wanted, strict=True) if learns]
        grads = [torch.zeros_like(tensor, dtype=torch.float) for tensor in learnt]
        loss = torch.zeros((), device=hidden_states.device)
        for start in range(0, len(targets), rows):
            with torch.set_grad_enabled(bool(learnt)):
                logits = lm_head(hidden_states[start : start + rows])
                block_loss, _ = SummedCrossEntropy.apply(logits, targets[start : start + rows], -100)
            for grad, block_grad in zip(grads, torch.autograd.grad(block_loss, learnt) if learnt else (), strict=True):
                grad += block_grad
            loss += block_loss.detach()
        ctx.save_for_backward(*(grad.to(tensor.dtype) for grad, tensor in zip(grads, learnt, strict=True)))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: torch.Tensor):
        grads = iter(ctx.saved_tensors)
        return None, None, *(next(grads) * grad_loss if learns else None for learns in ctx.needs_input_grad[2:])


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    lm_head: nn.Linear | None = None,
    **kwargs,
) -> torch.Tensor:
    """Mean cross-entropy of the next token: what transformers' ForCausalLMLoss gives, with less memory and time.

    `num_items_in_batch` is the divisor in place of the number of labels that count; `shift_labels` are labels that are
    in their place already. With `lm_head`, `logits` are the hidden states before it: it is applied to the positions
    whose label counts, and the logits of all are never in memory at once.
    """
    if torch.compiler.is_compiling():  # the compiler fuses by itself what is taken apart by hand here
        logits = logits if lm_head is None else lm_head(logits)
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    rows, targets = logits.reshape(-1, logits.shape[-1]), shift_labels.reshape(-1).to(logits.device)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum()
    if lm_head is None:
        loss, _ = SummedCrossEntropy.apply(rows, targets, ignore_index)
    else:
        counted = (targets != ignore_index).nonzero().squeeze(-1)
        # Up to a multiple of 32, by rows that do not count: libraries keep kernels and memory for each shape they meet.
        padding = -len(counted) % 32
        chosen, counted = targets[counted], F.pad(counted, (0, padding))
        chosen = F.pad(chosen, (0, padding), value=-100)
        loss = HeadAndCrossEntropy.apply(lm_head, chosen, rows[counted], *lm_head.parameters())
    return loss / torch.as_tensor(num_items_in_batch, device=loss.device)  # some trainers give an int


class LlamaReproForCausalLM(LlamaReproPreTrainedModel, GenerationMixin):
    """The language model: the base model and the output matrix."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LlamaReproConfig):
        super().__init__(config)
        self.model = LlamaReproModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Logits (batch, seq, vocab_size), and the loss when `labels` are given (-100: not counted).

        `logits_to_keep`: of how many last positions (0: of all), or the indices of those positions, to compute logits.
        `skip_logits`: the loss alone, in less memory and time; the output's logits are None.
        """
        cache = either_cache(cache, past_key_values)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,  # whatever the config says: `can_return_tuple` looks after that
            **kwargs,
        )
        logits = loss = None
        if skip_logits:
            hidden_states = outputs.last_hidden_state
            loss = causal_lm_loss(hidden_states, labels, self.config.vocab_size, lm_head=self.lm_head, **kwargs)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = linear(self.lm_head, outputs.last_hidden_state[:, kept])
        if labels is not None and not skip_logits:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )


class LlamaReproForSequenceClassification(GenericForSequenceClassification, LlamaReproPreTrainedModel):
    """One score per label, read at the last token that is not padding."""


class LlamaReproForTokenClassification(GenericForTokenClassification, LlamaReproPreTrainedModel):
    """One score per label for every token."""


class LlamaReproForQuestionAnswering(GenericForQuestionAnswering, LlamaReproPreTrainedModel):
    """Scores of every token as the start and as the end of the answer."""

    base_model_prefix = "transformer"  # the name that stock Llama's checkpoints with this head use


__all__ = [
    "LlamaReproForCausalLM",
    "LlamaReproForQuestionAnswering",
    "LlamaReproForSequenceClassification",
    "LlamaReproForTokenClassification",
    "LlamaReproModel",
    "LlamaReproPreTrainedModel",
]

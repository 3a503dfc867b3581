"""What the compiled forward pass relies on in a model: checked before it is packed, and compared on every call."""

import ctypes
from operator import is_, itemgetter
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import modeling_llama_repro as modeling
from .errors import InputError

CLASSES = (
    modeling.LlamaReproForCausalLM,
    modeling.LlamaReproModel,
    modeling.LlamaReproDecoderLayer,
    modeling.LlamaReproAttention,
    modeling.LlamaReproMLP,
    modeling.LlamaReproRMSNorm,
    modeling.LlamaReproRotaryEmbedding,
    nn.Embedding,
    nn.Linear,
    nn.ModuleList,
    type(ACT2FN["silu"]),
)
METHODS = [(kind.forward, kind.__call__) for kind in CLASSES]
"""As the compiled code knows them; a program may replace them for all models."""

ROLES = {
    "model": modeling.LlamaReproModel,
    "embed_tokens": nn.Embedding,
    "layers": nn.ModuleList,
    "self_attn": modeling.LlamaReproAttention,
    "mlp": modeling.LlamaReproMLP,
    "act_fn": type(ACT2FN["silu"]),
    "input_layernorm": modeling.LlamaReproRMSNorm,
    "post_attention_layernorm": modeling.LlamaReproRMSNorm,
    "norm": modeling.LlamaReproRMSNorm,
    "rotary_emb": modeling.LlamaReproRotaryEmbedding,
}
"""Attribute -> the class that the compiled code stands for; other names are layers (by number) or linear."""

ATTRIBUTES = {
    modeling.LlamaReproRMSNorm: itemgetter("eps"),
    modeling.LlamaReproAttention: itemgetter("layer_idx", "head_dim", "scaling", "num_key_value_groups", "is_causal"),
}
"""What the layers read of themselves, beside weights."""


def refuse_unknown_modules(model: nn.Module) -> None:
    """Raise InputError for a module that is not of the class that the compiled code computes."""
    if type(model).forward is not modeling.LlamaReproForCausalLM.forward:
        raise InputError(f"optimize takes a LlamaReproForCausalLM, and {type(model).__name__} has a forward of its own")
    for name, module in list(model.named_modules())[1:]:
        parent, _, role = name.rpartition(".")
        expected = modeling.LlamaReproDecoderLayer if parent == "model.layers" else ROLES.get(role, nn.Linear)
        if hasattr(module, "base_layer"):
            raise InputError(
                f"{name} is a {type(module).__name__}: merge the adapter first (model = model.merge_and_unload()); not "
                "merged, it runs on the ordinary path"
            )
        if type(module) is not expected and not (expected is nn.Linear and _is_8_bit(module)):
            raise InputError(
                f"{name} is a {type(module).__module__}.{type(module).__name__}, and the compiled code knows "
                f"{expected.__name__} there: such a model runs on the ordinary path"
            )
    if [(kind.forward, kind.__call__) for kind in CLASSES] != METHODS:
        raise InputError("a class of the model got another forward: such a model runs on the ordinary path")


def _is_8_bit(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Linear8bitLt" and kind.__module__.startswith("bitsandbytes.")


def refuse_other_shapes(model: Any) -> None:
    """Raise InputError where the layers do not fit together as those of one LLaMA, all of one size."""
    config = model.config
    layers, base = list(model.model.layers), model.model
    attention = [layer.self_attn for layer in layers]
    hidden, inner = base.embed_tokens.weight.shape[1], layers[0].mlp.gate_proj.weight.shape[0] if layers else 0
    queries, keys = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim)
    linear = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    linear |= {"o_proj": (hidden, queries), "gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
    linear |= {"down_proj": (hidden, inner), "lm_head": (None, hidden), "embed_tokens": (None, hidden)}
    for name, parameter in model.named_parameters():
        *_, owner, kind = name.split(".")
        expected = linear.get(owner, (hidden,))[: 1 if kind == "bias" else 2]
        if any(size not in (None, wanted) for size, wanted in zip(expected, parameter.shape, strict=False)) or (
            len(expected) != parameter.dim()
        ):
            raise InputError(f"{name} has the shape {tuple(parameter.shape)}, which the config does not say")
        if not parameter.is_contiguous():
            raise InputError(f"{name} is not contiguous in memory, as the compiled code reads it: use .contiguous()")
    expected_attention = [
        (index, config.head_dim, config.head_dim**-0.5, queries // max(keys, 1), True) for index in range(len(layers))
    ]
    own_attention = [ATTRIBUTES[modeling.LlamaReproAttention](vars(module)) for module in attention]
    if len(layers) != config.num_hidden_layers or own_attention != expected_attention:
        raise InputError(
            f"the model has {len(layers)} layers with attention of (number, head_dim, scaling, groups, causal) "
            f"{own_attention[:1]} …, which config.json does not say"
        )
    if len({module.eps for module in model.modules() if type(module) is modeling.LlamaReproRMSNorm}) > 1:
        raise InputError("the norms of the model have different eps")


def refuse_what_watches(model: nn.Module) -> None:
    """Raise InputError for hooks, an attention function of the user's, and outputs: the compiled code has none."""
    for name, module in list(model.named_modules())[1:]:
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # transformers' own wait for the ordinary path.
        foreign = [hook for hook in hooks if getattr(hook, "__module__", None) != "transformers.utils.output_capturing"]
        if foreign or not vars(module).keys().isdisjoint(("forward", "_compiled_call_impl")):
            raise InputError(f"{name} has hooks or a forward of its own")
    config: Any = model.config
    if not _attention(model)[2]:
        raise InputError(f"the attention is {config._attn_implementation}")
    if config.output_attentions or config.output_hidden_states or not config.return_dict:
        raise InputError("the config asks for attention weights, for hidden states or for a tuple")


def _attention(model: Any) -> tuple[str, Any, bool]:
    """Return the name of the attention, its function, and whether it computes what the compiled code does."""
    name = model.config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    known = name.startswith(modeling.BUILT_IN_ATTENTION) and (name != "sdpa" or function is sdpa_attention_forward)
    return name, function, known


class Int8Weight:
    """A matrix rounded to 8 bits with a factor for each row, and how it is seen that its source has changed.

    An edit through `.data` leaves no trace but the numbers: the largest is looked at on every call, one or more of each
    row before a prompt.
    """

    def __init__(self, source: torch.Tensor):
        weight = source.detach()
        self.source, self.pointer, self.version = source, source.data_ptr(), version_of(source)
        sizes = weight.abs()
        largest = int(sizes.argmax())
        integer = ctypes.c_int32 if weight.element_size() == 4 else ctypes.c_int16
        self.word = integer.from_address(self.pointer + largest * weight.element_size())
        self.value = self.word.value
        bits = weight.view(torch.int32 if weight.element_size() == 4 else torch.int16).view(-1)
        self.sample = bits[:: max(min(weight.shape) - 1, 1)]  # a step of less than a row, in another column each time
        self.sampled = self.sample.clone()
        self.factor = sizes.amax(dim=1).float() / 127
        parts = zip(weight.split(1024), self.factor.split(1024), strict=True)  # fp32 numbers of a part at a time
        self.weight = torch.cat([_rounded(part, factor) for part, factor in parts])

    def is_current(self) -> bool:
        return (
            (self.source.data_ptr(), version_of(self.source)) == (self.pointer, self.version)
            and self.word.value == self.value
            and torch.equal(self.sample, self.sampled)
        )


def _rounded(weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return rows in multiples of their factor, -127 to 127; a row of zeros stays one."""
    return (weight.float() / factor.clamp(min=torch.finfo(torch.float).tiny)[:, None]).round().to(torch.int8)


def version_of(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class ModelState:
    """Everything that decides what the ordinary pass computes, as it was; `is_current` compares it with what is.

    Flat lists, which the interpreter walks in C; each object is touched once, because after a step, which reads all
    weights, none of them is in the processor's cache.
    """

    def __init__(self, model: nn.Module):
        self.model, self.config = model, model.config
        self.settings, self.settings_then = vars(model.config), dict(vars(model.config))
        self.attention = _attention(model)
        self.modules = list(model.modules())
        self.types = [*map(type, self.modules)]
        inner = self.modules[1:]  # the model's own hooks are called around its `forward`
        self.children = [module._modules for module in self.modules if module._modules]
        self.children_then = [child for children in self.children for child in children.values()]
        self.hooks = [
            hooks for module in inner for hooks in (module._forward_hooks, module._forward_pre_hooks) if hooks
        ]
        self.num_hooks = [*map(len, self.hooks)]
        self.last_handle = RemovableHandle.next_id  # counts the hooks of the process
        self.attributes = [*map(vars, inner)]  # a `forward` of an instance is one attribute more
        self.sizes = [*map(len, self.attributes)]
        self.read = [
            (get, [vars(module) for module in inner if type(module) is kind]) for kind, get in ATTRIBUTES.items()
        ]
        self.read_then = self._read()
        self.named = [module._parameters for module in self.modules if module._parameters]
        self.parameters = [each for parameters in self.named for each in parameters.values()]
        self.tensors = [each for each in self.parameters if each is not None]
        self.matrices = [tensor for tensor in self.tensors if tensor.dim() > 1]
        self.pointers = [*map(torch.Tensor.data_ptr, self.tensors)]
        self.numels = [*map(torch.Tensor.numel, self.tensors)]
        self.is_contiguous = all(map(torch.Tensor.is_contiguous, self.matrices))

    def is_current(self) -> bool:
        parameters = [each for parameters in self.named for each in parameters.values()]
        return (
            RemovableHandle.next_id == self.last_handle
            and self.model.config is self.config
            and self.settings == self.settings_then
            and ALL_ATTENTION_FUNCTIONS.get(self.attention[0]) is self.attention[1]
            and [*map(len, self.hooks)] == self.num_hooks
            and [*map(type, self.modules)] == self.types
            and [child for children in self.children for child in children.values()] == self.children_then
            and [*map(len, self.attributes)] == self.sizes
            and len(parameters) == len(self.parameters)
            and all(map(is_, parameters, self.parameters))
            and [*map(torch.Tensor.data_ptr, self.tensors)] == self.pointers
            and [*map(torch.Tensor.numel, self.tensors)] == self.numels
            and all(map(torch.Tensor.is_contiguous, self.matrices)) == self.is_contiguous
            and self._read() == self.read_then
        )

    def _read(self) -> list[Any]:
        return [
            *([*map(get, attributes)] for get, attributes in self.read),
            [(kind.forward, kind.__call__) for kind in CLASSES],
        ]

"""A model prepared for inference: `optimize(model)` before `generate`, `restore(model)` to undo.

On a CPU the forward pass over a few new tokens (decoding, with any batch, mask and cache length) is one call of
compiled code, which reads each weight once, where PyTorch keeps it; nothing is copied or compiled for a shape. Longer
inputs, and whatever the compiled code does not know, take the model's ordinary path over the same weights and cache.
On a CUDA device `generate` is told to use its static cache, which compiles the decoding step with CUDA graphs.
"""

import copy
import ctypes
import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from . import cpu_kernel
from .errors import InputError
from .fast_paths import KVBuffer, buffer_of, layers_of, must_run_eagerly
from .model_state import (
    Int8Weight,
    ModelState,
    refuse_other_shapes,
    refuse_unknown_modules,
    refuse_what_watches,
)
from .modeling_llama_repro import CACHE, LlamaReproForCausalLM, either_cache

logger = logging.get_logger(__name__)

CACHE_BEFORE = "_cache_implementation_before_optimize"
ADAPTERS = "merge the adapter first (model = model.merge_and_unload()); not merged, it runs on the ordinary path"

WITHOUT_EFFECT = {
    "labels": (None,),
    "skip_logits": (False, None),
    "output_attentions": (False, None),
    "output_hidden_states": (False, None),
    "return_dict": (True, None),
}
"""Other arguments of `forward`, and the values that change nothing in what it returns."""


def optimize(model: LlamaReproForCausalLM, *, int8: bool = False) -> LlamaReproForCausalLM:
    """Prepares a model for inference, in place, and returns it.

    `int8`: decodes with weights rounded to 8 bits, a factor for each row (the head's too); they are held beside the
    model's own, which prompts are read with and which are saved. A model that was loaded in 8 bits by bitsandbytes is
    decoded with those as they are. `InputError` says what cannot be prepared.
    """
    _refuse_what_cannot_be_prepared(model)
    if model.device.type == "cuda":
        if int8:
            raise InputError(
                "int8=True is for a CPU: on CUDA load the model with BitsAndBytesConfig(load_in_8bit=True)"
            )
        model.__dict__.setdefault(CACHE_BEFORE, model.generation_config.cache_implementation)
        model.generation_config.cache_implementation = "static"
        return model
    cpu_kernel.load()
    model.forward = Prepared(model, int8=int8)
    return model


def restore(model: LlamaReproForCausalLM) -> LlamaReproForCausalLM:
    """Undoes `optimize`, in place, and returns the model; one that was not prepared stays as it is."""
    if isinstance(model.__dict__.get("forward"), Prepared):
        del model.__dict__["forward"]
    if CACHE_BEFORE in model.__dict__:
        model.generation_config.cache_implementation = model.__dict__.pop(CACHE_BEFORE)
    return model


def _refuse_what_cannot_be_prepared(model: Any) -> None:
    if hasattr(model, "peft_config"):
        raise InputError(f"optimize takes no model with adapters: {ADAPTERS}")
    if not isinstance(model, LlamaReproForCausalLM):
        raise InputError(f"optimize takes a LlamaReproForCausalLM, not a {type(model).__name__}")
    if model.config.hidden_act != "silu":
        raise InputError(f"optimize knows the activation silu only, not {model.config.hidden_act!r}")
    refuse_unknown_modules(model)
    for name, parameter in model.named_parameters():
        if is_traceable_wrapper_subclass(parameter):  # what its address holds is not the matrix
            raise InputError(
                f"optimize takes whole weights, and {name} is a {type(parameter).__name__}: a slice (tp_plan) or a "
                "quantized form runs on the ordinary path"
            )
    if model.training:
        raise InputError("optimize prepares for inference, and the model is in training mode: call model.eval() first")
    devices = {parameter.device.type for parameter in model.parameters()}
    if len(devices) > 1 or devices - {"cpu", "cuda"}:
        raise InputError(
            f"optimize takes a model on one CPU or CUDA device; its weights are on {', '.join(sorted(devices))}"
        )
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if devices == {"cpu"} and (len(dtypes) > 1 or dtypes - set(cpu_kernel.FLOATS)):
        names = ", ".join(sorted(map(str, dtypes)))
        raise InputError(
            f"on a CPU optimize takes a model of torch.float32 or of torch.bfloat16, not of {names}: model.to(…) first"
        )
    refuse_other_shapes(model)


class Prepared:
    """In place of `model.forward`: the compiled code where it applies, else the model's own.

    It applies while the model is what it was when its weights were packed, which every call looks at.
    """

    def __init__(self, model: LlamaReproForCausalLM, *, int8: bool):
        self.model, self.int8 = model, int8
        self.__signature__ = inspect.signature(type(model).forward.__get__(model))  # `generate` reads it
        parameters = self.__signature__.parameters.values()
        self._names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
        self._state: ModelState | None = None
        self._reason: str | None = None  # why the ordinary path is taken
        self._prompt_seen = False  # by the present cache
        self._struct: cpu_kernel.Model | None = None
        self._alive: list[Any] = []  # what the structure points to
        self._int8: dict[nn.Module, Int8Weight] = {}
        self._words: list[Any] = []  # of each of these the largest number, where it lies
        self._values: list[int] = []
        self._tracked: list[torch.Tensor] = []  # what the compiled code has in another form
        self._versions: list[int] = []

    def __deepcopy__(self, memo: dict) -> "Prepared":
        return Prepared(copy.deepcopy(self.model, memo), int8=self.int8)

    def __reduce__(self):
        raise InputError("a prepared model cannot be pickled: restore(model) first")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            raise InputError("this model is prepared for inference: hf_llama_repro.restore(model) before training")
        named = dict(zip(self._names, args, strict=False))
        # Too many arguments, or one given twice, are for the ordinary forward to refuse.
        fits = len(named) == len(args) and named.keys().isdisjoint(kwargs)
        output = self._few_tokens(**named, **kwargs) if fits else None
        if output is not None:
            return output
        self._prompt_seen = False
        return type(self.model).forward(self.model, *args, **kwargs)

    def _few_tokens(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Any = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | None:
        """Return the output, or None where the ordinary path is to be taken."""
        model = self.model
        given = input_ids if inputs_embeds is None else inputs_embeds
        if (
            must_run_eagerly()
            or nn_module._has_any_global_hook()
            or type(given) not in (torch.Tensor, nn.Parameter)
            or (input_ids is not None and inputs_embeds is not None)
            or given.dim() != (2 if inputs_embeds is None else 3)
            or not 0 < given.shape[0] * given.shape[1] <= cpu_kernel.most_tokens()
            or not isinstance(logits_to_keep, int)
            or logits_to_keep < 0
            or not all(any(value is each for each in WITHOUT_EFFECT.get(name, ())) for name, value in others.items())
        ):
            return None
        cache = either_cache(cache, past_key_values)
        if cache is None and (model.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=model.config)
        layers = layers_of(cache, model.config.num_hidden_layers)
        if not layers:
            return None
        past, (batch, seq) = layers[0].get_seq_length(), given.shape[:2]
        if attention_mask is not None and tuple(attention_mask.shape) != (batch, past + seq):
            return None
        if position_ids is not None and tuple(position_ids.shape) not in ((1, seq), (batch, seq)):
            return None
        if not self._is_packed(past > 0):
            return None
        assert self._struct is not None
        embeddings = model.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if embeddings.dtype != model.model.norm.weight.dtype or embeddings.shape[2] != self._struct.hidden:
            return None
        kept = min(logits_to_keep or seq, seq)
        shape = (batch, self._struct.kv_heads, seq, self._struct.head_dim)
        buffer = buffer_of(layers, past, shape, embeddings)
        if buffer is None:
            return None
        logits = self._run(embeddings, attention_mask, position_ids, buffer, kept)
        buffer.extend(layers, seq)  # not before: a call that raised leaves the cache as it was
        named: dict[str, Any] = {CACHE: cache}
        return CausalLMOutputWithPast(logits=logits, **named)

    def _run(
        self,
        embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        buffer: KVBuffer,
        kept: int,
    ) -> torch.Tensor:
        """Return the logits (batch, kept, vocab_size); keys and values are written behind those of the buffer."""
        model, struct = self.model, self._struct
        assert struct is not None
        batch, seq, _ = embeddings.shape
        past = buffer.length
        if position_ids is None:
            position_ids = torch.arange(past, past + seq)[None]
        hidden = embeddings.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        cos, sin = (
            table[..., : struct.head_dim // 2].contiguous() for table in model.model.rotary_emb(hidden, position_ids)
        )
        mask = None if attention_mask is None or attention_mask.all() else attention_mask.to(torch.bool).contiguous()
        places = ctypes.c_void_p * struct.num_layers
        keys, values = places(*buffer.pointers[::2]), places(*buffer.pointers[1::2])
        logits = embeddings.new_empty(batch, kept, struct.head.rows)
        step = cpu_kernel.Step(
            hidden=hidden.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            mask=None if mask is None else mask.data_ptr(),
            keys=ctypes.addressof(keys),
            values=ctypes.addressof(values),
            logits=logits.data_ptr(),
            batch=batch,
            seq=seq,
            past=past,
            capacity=buffer.capacity,
            kept=kept,
            angles_batch=cos.shape[0],
            threads=torch.get_num_threads(),
        )
        cpu_kernel.load().llama_repro_forward(ctypes.byref(struct), ctypes.byref(step))
        return logits

    def _is_packed(self, prompt_seen: bool) -> bool:
        """Return whether the compiled code has the weights as they are; packs them where the model has changed."""
        if (
            self._state is None
            or not self._state.is_current()
            or [tensor._version for tensor in self._tracked] != self._versions
            or [word.value for word in self._words] != self._values
            or not ((prompt_seen and self._prompt_seen) or all(weight.is_current() for weight in self._int8.values()))
        ):
            self._pack()
        self._prompt_seen = True
        return self._reason is None

    def _pack(self) -> None:
        """Describe the weights to the compiled code, or keep the reason for the ordinary path."""
        before = self._int8
        self._state, self._struct, self._alive, self._tracked, self._int8 = ModelState(self.model), None, [], [], {}
        try:
            _refuse_what_cannot_be_prepared(self.model)
            refuse_what_watches(self.model)
            self._struct, self._reason = self._described(before), None
        except InputError as error:
            self._reason, self._tracked, self._int8 = str(error), [], before
            logger.warning_once(f"a model prepared by optimize takes its ordinary path: {error}")
        self._tracked = [tensor for tensor in self._tracked if not tensor.is_inference()]  # those count no versions
        self._versions = [tensor._version for tensor in self._tracked]
        self._words = [weight.word for weight in self._int8.values()]
        self._values = [weight.value for weight in self._int8.values()]

    def _described(self, before: dict[nn.Module, Int8Weight]) -> cpu_kernel.Model:
        base, config = self.model.model, self.model.config
        layers = (cpu_kernel.Layer * config.num_hidden_layers)()
        for into, layer in zip(layers, base.layers, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            for name in ("q", "k", "v", "o"):
                setattr(into, name, self._linear(getattr(attention, f"{name}_proj"), before))
            for name in ("gate", "up", "down"):
                setattr(into, name, self._linear(getattr(mlp, f"{name}_proj"), before))
            into.input_norm = self._pointer(layer.input_layernorm.weight)
            into.post_attention_norm = self._pointer(layer.post_attention_layernorm.weight)
        self._alive.append(layers)
        return cpu_kernel.Model(
            layers=layers, norm=self._pointer(base.norm.weight), head=self._linear(self.model.lm_head, before),
            num_layers=len(layers), hidden=base.embed_tokens.weight.shape[1], heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads, head_dim=config.head_dim, intermediate=layers[0].gate.rows,
            eps=base.norm.eps, scaling=config.head_dim**-0.5, dtype=cpu_kernel.DTYPES[self.model.dtype],
        )  # fmt: skip

    def _linear(self, module: nn.Linear, before: dict[nn.Module, Int8Weight]) -> cpu_kernel.Linear:
        weight: Any = module.weight.detach()
        factor: Any = None
        if weight.dtype == torch.int8:  # bitsandbytes': a row's largest magnitude is 127
            held: Any = module
            scale = held.weight.SCB if held.weight.SCB is not None else held.state.SCB
            self._tracked.append(scale)
            factor = scale.float() / 127
        elif self.int8:
            packed = before.get(module)
            if packed is None or packed.source is not module.weight or not packed.is_current():
                packed = Int8Weight(module.weight)
            self._int8[module] = packed
            self._tracked.append(module.weight)
            weight, factor = packed.weight, packed.factor
        return cpu_kernel.Linear(
            weight=self._pointer(weight),
            factor=None if factor is None else self._pointer(factor),
            bias=None if module.bias is None else self._pointer(module.bias),
            rows=weight.shape[0],
            columns=weight.shape[1],
            dtype=cpu_kernel.DTYPES[weight.dtype],
        )

    def _pointer(self, tensor: torch.Tensor) -> int:
        tensor = tensor.detach()
        self._alive.append(tensor)
        return tensor.data_ptr()

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
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from . import cpu_kernel
from .errors import InputError
from .fast_paths import CacheLayerWithRoom, give_room, observed
from .modeling_llama_repro import CACHE, LlamaReproForCausalLM, either_cache

CACHE_BEFORE = "_cache_implementation_before_optimize"

IGNORED = {"return_dict", "use_cache", "cache_position"}
"""Arguments of `forward` that change nothing in what the compiled code computes."""


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
    adapters = "merge the adapter first (model = model.merge_and_unload()); not merged, it runs on the ordinary path"
    if hasattr(model, "peft_config"):
        raise InputError(f"optimize takes no model with adapters: {adapters}")
    if not isinstance(model, LlamaReproForCausalLM):
        raise InputError(f"optimize takes a LlamaReproForCausalLM, not a {type(model).__name__}")
    for name, module in model.named_modules():
        if name.endswith(("_proj", "lm_head")) and not isinstance(module, nn.Linear):
            raise InputError(f"{name} is a {type(module).__name__}: {adapters}")
    for name, parameter in model.named_parameters():
        if is_traceable_wrapper_subclass(parameter):  # what its address holds is not the matrix
            raise InputError(
                f"optimize takes whole weights, and {name} is a {type(parameter).__name__}: a slice (tp_plan) or a "
                "quantized form runs on the ordinary path"
            )
    if model.training:
        raise InputError("optimize prepares for inference, and the model is in training mode: call model.eval() first")
    if model.config.hidden_act != "silu":
        raise InputError(f"optimize knows the activation silu only, not {model.config.hidden_act!r}")
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


class Prepared:
    """In place of `model.forward`: the compiled code where it applies, else the model's own."""

    def __init__(self, model: LlamaReproForCausalLM, *, int8: bool):
        self.model, self.int8 = model, int8
        self.__signature__ = inspect.signature(type(model).forward.__get__(model))  # `generate` reads it
        self._weights: tuple[Any, ...] = ()
        self._looked = self._is_hooked = False
        self._struct: cpu_kernel.Model | None = None
        self._alive: list[Any] = []  # what the structure points to

    def __deepcopy__(self, memo: dict) -> "Prepared":
        return Prepared(copy.deepcopy(self.model, memo), int8=self.int8)

    def __reduce__(self):
        raise InputError("a prepared model cannot be pickled: restore(model) first")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            raise InputError("this model is prepared for inference: hf_llama_repro.restore(model) before training")
        output = self._few_tokens(**kwargs) if not args else None
        if output is not None:
            return output
        self._looked = False
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
        """The output, or None where the ordinary path is to be taken."""
        model = self.model
        given = input_ids if inputs_embeds is None else inputs_embeds
        if (
            observed()
            or given is None
            or (input_ids is not None and inputs_embeds is not None)
            or not 0 < given.shape[0] * given.shape[1] <= cpu_kernel.most_tokens()
            or not isinstance(logits_to_keep, int)
            or model.config.output_attentions
            or model.config.output_hidden_states
            or others.get("return_dict", model.config.return_dict) is False
            or any(value is not None for name, value in others.items() if name not in IGNORED and value is not False)
        ):
            return None
        cache = either_cache(cache, past_key_values)
        if cache is None and (model.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=model.config)
        give_room(cache)
        if type(cache) is not DynamicCache or not cache.layers:
            return None
        if any(type(layer) is not CacheLayerWithRoom for layer in cache.layers):
            return None
        past, (batch, seq) = cache.get_seq_length(), given.shape[:2]
        if attention_mask is not None and tuple(attention_mask.shape) != (batch, past + seq):
            return None
        if not (past and self._looked):  # once for a prompt
            self._look_at_weights()
            self._looked = True
        if self._is_hooked:
            return None
        embeddings = model.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if embeddings.dtype != model.dtype:
            return None
        kept = min(logits_to_keep or seq, seq)
        logits = self._run(embeddings, attention_mask, position_ids, cache, past, kept)
        named: dict[str, Any] = {CACHE: cache}
        return CausalLMOutputWithPast(logits=logits, **named)

    def _run(
        self,
        embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: DynamicCache,
        past: int,
        kept: int,
    ) -> torch.Tensor:
        """The logits (batch, kept, vocab_size); keys and values are appended to the cache."""
        model, config = self.model, self.model.config
        batch, seq, _ = embeddings.shape
        if position_ids is None:
            position_ids = torch.arange(past, past + seq)[None]
        hidden = embeddings.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        cos, sin = (
            table[..., : config.head_dim // 2].contiguous() for table in model.model.rotary_emb(hidden, position_ids)
        )
        mask = None if attention_mask is None or attention_mask.all() else attention_mask.to(torch.uint8).contiguous()
        shape = (batch, config.num_key_value_heads, seq, config.head_dim)
        layers: Any = cache.layers
        rooms = [layer.extend(shape, embeddings) for layer in layers]
        keys = (ctypes.c_void_p * len(rooms))(*(room.keys.data_ptr() for room in rooms))
        values = (ctypes.c_void_p * len(rooms))(*(room.values.data_ptr() for room in rooms))
        logits = embeddings.new_empty(batch, kept, config.vocab_size)
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
            capacity=rooms[0].capacity,
            kept=kept,
            angles_batch=cos.shape[0],
            threads=torch.get_num_threads(),
        )
        cpu_kernel.load().llama_repro_forward(ctypes.byref(self._struct), ctypes.byref(step))
        return logits

    def _look_at_weights(self) -> None:
        """Describes the weights to the compiled code, again if they were replaced or changed since."""
        self._is_hooked = any(_has_hooks(module) for module in self.model.modules() if module is not self.model)
        weights = tuple((tensor.data_ptr(), tensor._version) for tensor in self.model.parameters())
        if self._struct is None or weights != self._weights:
            _refuse_what_cannot_be_prepared(self.model)
            self._alive = []
            self._struct = self._described()
            self._weights = weights

    def _described(self) -> cpu_kernel.Model:
        model, config = self.model, self.model.config
        layers = (cpu_kernel.Layer * config.num_hidden_layers)()
        for into, layer in zip(layers, model.model.layers, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            for name in ("q", "k", "v", "o"):
                setattr(into, name, self._linear(getattr(attention, f"{name}_proj")))
            for name in ("gate", "up", "down"):
                setattr(into, name, self._linear(getattr(mlp, f"{name}_proj")))
            into.input_norm = self._pointer(layer.input_layernorm.weight)
            into.post_attention_norm = self._pointer(layer.post_attention_layernorm.weight)
        self._alive.append(layers)
        return cpu_kernel.Model(
            layers=layers, norm=self._pointer(model.model.norm.weight), head=self._linear(model.lm_head),
            num_layers=config.num_hidden_layers, hidden=config.hidden_size, heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads, head_dim=config.head_dim, intermediate=config.intermediate_size,
            eps=config.rms_norm_eps, scaling=config.head_dim**-0.5, dtype=cpu_kernel.DTYPES[model.dtype],
        )  # fmt: skip

    def _linear(self, module: nn.Linear) -> cpu_kernel.Linear:
        weight: Any = module.weight.detach()
        factor: Any = None
        if weight.dtype == torch.int8:  # bitsandbytes': a row's largest magnitude is 127
            held: Any = module
            factor = (held.weight.SCB if held.weight.SCB is not None else held.state.SCB).float() / 127
        elif self.int8:
            factor = weight.abs().amax(dim=1).float() / 127
            parts = zip(weight.split(1024), factor.split(1024), strict=True)  # fp32 numbers of a part at a time
            weight = torch.cat([_rounded(part, scale) for part, scale in parts])
        return cpu_kernel.Linear(
            weight=self._pointer(weight),
            factor=None if factor is None else self._pointer(factor),
            bias=None if module.bias is None else self._pointer(module.bias),
            rows=weight.shape[0],
            columns=weight.shape[1],
            dtype=cpu_kernel.DTYPES[weight.dtype],
        )

    def _pointer(self, tensor: torch.Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._alive.append(tensor)
        return tensor.data_ptr()


def _has_hooks(module: nn.Module) -> bool:
    """Whether something waits for this module to be called; transformers' own hooks wait for the ordinary path."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    own = "transformers.utils.output_capturing"
    return "forward" in module.__dict__ or any(getattr(hook, "__module__", None) != own for hook in hooks)


def _rounded(weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Rows in multiples of their factor, -127 to 127; a row of zeros stays one."""
    return (weight.float() / factor.clamp(min=torch.finfo(torch.float).tiny)[:, None]).round().to(torch.int8)

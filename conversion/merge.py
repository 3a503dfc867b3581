"""Merges a LoRA adapter into the 16- or 32-bit base that it was trained on, one tensor at a time.

python -m conversion.merge ADAPTER TARGET
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llama_repro.command import add_version, run
from hf_llama_repro.errors import CheckpointError

from .convert import DTYPES, Conversion, new_folder

# torch and transformers are imported where they are used, so that --help answers at once.
if TYPE_CHECKING:
    import torch

    from .adapter import Adapter, Fit, Pair
    from .source import Source, StoredTensor

# What hf-llama-finetune leaves beside an adapter, and hf-llama-generate reads beside a model.
TEMPLATE_FILE = "prompt_template.json"
LOGITS_UP_TO = 2_000_000_000
"""Parameters of a model that is also run as a whole, in float32: 8 GB of memory, first the one, then the other."""
NUM_TOKENS = 64
# How far logits may be from those of base and adapter: as far again as PEFT's own merge, rounded to the same dtype, and
# for the order of summation a few dozen roundings of 6e-8, relative to the largest. A fixed limit would be too strict
# for one model and too lax for the next: how rounding to 16 bits grows through the layers depends on the weights. The
# weights themselves are held to their last bit before.
ROUNDING_TIMES, SUMMATION = 2, 1e-5
LARGE_SHARE = 0.25
"""Of what the adapter does to the logits, done to them by rounding: more than that is told."""
ROWS_AT_ONCE = 1024
"""Rows of a matrix checked together, which bounds the memory of their float64 copies."""


@dataclass(frozen=True)
class Merge:
    """What `merge` made."""

    conversion: Conversion
    adapter: str
    """One line on the adapter."""
    checks: tuple[str, ...]
    warning: str
    """What a person should know before using it, if there is something."""

    def lines(self) -> list[str]:
        """What a person wants to know of it."""
        source, *decided, written = self.conversion.lines()
        checks = [f"checked    {check}" for check in self.checks]
        warning = [f"WARNING    {self.warning}"] if self.warning else []
        return [source, f"adapter    {self.adapter}", *decided, *checks, *warning, written]


def merge(
    adapter: Path,
    target: Path,
    *,
    base: Path | None = None,
    model_type: str = "llama_repro",
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    force: bool = False,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Merge:
    """Writes `target` from a base and a LoRA adapter for it, whole, checked, or not at all.

    `base`: the folder of the base, where adapter_config.json does not name it. `model_type`, `dtype`,
    `max_shard_size` and `tell` as in `convert`. `force` merges an int8 base and an adapter that was never trained.
    Raises `CheckpointError`; base and adapter are never changed.
    """
    import torch

    from .adapter import find_base, fit, open_adapter
    from .model_card import made_by, model_card
    from .target import check_target, parse_size

    max_shard_bytes = parse_size(max_shard_size)
    check_target(target, adapter, overwrite=overwrite)
    with _quietly():
        opened = open_adapter(adapter)
        base = base or find_base(opened)
        source = _open_base(base, force=force)
        fitted = fit(opened, source)
        if fitted.changes_nothing and not force:
            raise CheckpointError(
                f"{adapter} was never trained: every product of its matrices is zero, so that a merge would change "
                "nothing; train it, or merge it all the same with --force"
            )
        cast = None if dtype == "auto" else getattr(torch, dtype)
        merged = merged_source(source, opened, fitted)
        with new_folder(
            merged,
            target,
            sources=(base, adapter),
            model_type=model_type,
            dtype=cast,
            max_shard_bytes=max_shard_bytes,
            allow_nonfinite=False,
            overwrite=overwrite,
            tell=tell,
        ) as (folder, conversion):
            if (adapter / TEMPLATE_FILE).is_file():
                (folder / TEMPLATE_FILE).write_bytes((adapter / TEMPLATE_FILE).read_bytes())
            conversion = replace(conversion, weights=_weights_line(fitted, merged, cast))
            checks, warning = check(folder, base, source, opened, fitted)
            result = Merge(conversion, f"{adapter}: {_adapter_line(fitted)}", checks, warning)
            made = (
                f"Merged {made_by('hf-llama-merge')} from the base `{base.name}` ({source.description}) "
                f"and the adapter `{adapter.name}`: {_adapter_line(fitted)}."
            )
            card = model_card(conversion, made, model_type, [*result.checks, *filter(None, [result.warning])])
            (folder / "README.md").write_text(card, encoding="utf-8")
    return result


def _open_base(base: Path, *, force: bool) -> "Source":
    from .adapter import CONFIG_FILE
    from .hugging_face import open_hugging_face, read_json

    if not (base / "config.json").is_file():
        raise CheckpointError(
            f"{base} is no Hugging Face folder (no config.json): make one of it with hf-llama-convert"
        )
    if (base / CONFIG_FILE).is_file():
        raise CheckpointError(f"{base} holds an adapter beside the base: name a folder of the base alone by --base")
    quantized = bool(read_json(base / "config.json").get("quantization_config"))
    if quantized and not force:
        raise CheckpointError(
            f"{base} is quantized: merging into int8 costs about 1.9 % of the logits, into the 16- or 32-bit weights "
            "6e-7; name the folder that it was made from by --base, or merge into what int8 left with --force"
        )
    source = open_hugging_face(base, dequantize=quantized)
    if not quantized:
        return source
    return replace(source, notes=(*source.notes, "the base is quantized to int8: merged into what that left of it"))


def merged_source(base: "Source", adapter: "Adapter", fitted: "Fit") -> "Source":
    """The base with the adapter on it; each tensor is computed when it is read, in float32."""
    from .keys import EMBEDDING, OUTPUT, our_shapes
    from .source import StoredTensor

    tensors, notes, config = dict(base.tensors), base.notes, base.config
    changed = fitted.pairs.keys() | fitted.replaced.keys()
    if config.tie_word_embeddings and (apart := sorted(changed & {EMBEDDING, OUTPUT})):
        # As in training, where PEFT changes the one and leaves the other as it was.
        tensors[OUTPUT] = tensors[EMBEDDING]
        config.tie_word_embeddings = False
        notes = (
            *notes,
            f"embedding and output matrix are one in the base: untied, as the adapter has {', '.join(apart)}",
        )
    for name, pair in fitted.pairs.items():
        stored = tensors[name]
        tensors[name] = StoredTensor(stored.shape, stored.dtype, partial(_sum, stored, pair))
    for name, tensor in fitted.replaced.items():
        tensors[name] = StoredTensor(tensor.shape, tensors[name].dtype, tensor.read)
    tokenizer, note = _tokenizer(adapter, base)
    return replace(
        base,
        tensors={name: tensors[name] for name in our_shapes(config)},
        tokenizer=tokenizer,
        files={**base.files, **dict.fromkeys(adapter.files)},
        notes=(*notes, note) if note else notes,
    )


def _sum(stored: "StoredTensor", pair: "Pair") -> "torch.Tensor":
    import torch

    weight = stored.read()
    # Not in 16 bits: what is added may be smaller than a step of them.
    return weight.to(torch.promote_types(weight.dtype, torch.float32)) + delta(pair)


def delta(pair: "Pair") -> "torch.Tensor":
    """scaling * B A (out, in), in float32."""
    return pair.scaling * (pair.b.read().float() @ pair.a.read().float())


def _tokenizer(adapter: "Adapter", base: "Source") -> tuple[Path | None, str]:
    """The adapter's if it has one that fits, for the training may have added a token; and what was decided."""
    from tokenizers import Tokenizer

    file = adapter.folder / "tokenizer.json"
    if not file.is_file():
        return base.tokenizer, ""
    try:
        tokens = max(Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True).values(), default=-1) + 1
    except Exception as error:  # tokenizers raises nothing more special
        raise CheckpointError(
            f"{file} is no tokenizer that can be read ({error}): remove it, or bring it again"
        ) from None
    if tokens > base.config.vocab_size:
        return (
            base.tokenizer,
            f"tokenizer of the base: the adapter's has {tokens} tokens, the model {base.config.vocab_size}",
        )
    return adapter.folder, "tokenizer of the adapter"


def _adapter_line(fitted: "Fit") -> str:
    def span(values: set[Any]) -> str:
        return " to ".join(f"{value:.4g}" for value in sorted({min(values), max(values)}))

    pairs = fitted.pairs
    parts = []
    if pairs:
        modules = sorted({name.split(".")[-2] for name in pairs})
        parts += [
            f"LoRA of rank {span({pair.a.shape[0] for pair in pairs.values()})}",
            f"scaling {span({pair.scaling for pair in pairs.values()})}",
            f"{len(pairs)} matrices ({', '.join(modules)})",
        ]
    if fitted.replaced:
        parts.append(f"{len(fitted.replaced)} tensors in place of the base's ({', '.join(sorted(fitted.replaced))})")
    return ", ".join(parts)


def _weights_line(fitted: "Fit", merged: "Source", cast: "torch.dtype | None") -> str:
    num_others = len(merged.tensors) - len(fitted.pairs) - len(fitted.replaced)
    others = "bit for bit those of the base" if cast is None else f"cast to {str(cast).removeprefix('torch.')}"
    replaced = f", {len(fitted.replaced)} tensors taken from the adapter" if fitted.replaced else ""
    return f"{len(fitted.pairs)} matrices summed in float32 and rounded once{replaced}, the other {num_others} {others}"


def check(folder: Path, base: Path, source: "Source", adapter: "Adapter", fitted: "Fit") -> tuple[tuple[str, ...], str]:
    """What was found equal, in words, and a warning. Raises `CheckpointError` where `folder` is not their sum."""
    import torch

    from .hugging_face import open_hugging_face

    written = open_hugging_face(folder).tensors
    for name, tensor in written.items():
        _check_tensor(name, tensor, source, fitted)
    tensors = (
        f"all {len(written)} tensors read back: {len(fitted.pairs)} are W + scaling B A of float64 "
        "to half a unit in the last place, the others what they were"
    )
    num_parameters = sum(tensor.num_bytes // tensor.dtype.itemsize for tensor in written.values())
    if num_parameters >= LOGITS_UP_TO:
        return (tensors, f"logits were not computed: not with {LOGITS_UP_TO:.0e} parameters and more"), ""
    coarsest = max((tensor.dtype for tensor in written.values()), key=lambda dtype: torch.finfo(dtype).eps)
    logits, warning = _check_logits(folder, base, adapter, fitted, coarsest)
    return (tensors, logits), warning


def _check_tensor(name: str, written: "StoredTensor", source: "Source", fitted: "Fit") -> None:
    """Holds a tensor to the last bit of what it should be, computed another way and with PEFT's own scaling."""
    import torch

    from .keys import EMBEDDING

    pair, stored = (
        fitted.pairs.get(name),
        fitted.replaced.get(name, source.tensors.get(name, source.tensors[EMBEDDING])),
    )
    found, origin = written.read(), stored.read()
    if pair is None and origin.dtype == found.dtype:
        if not torch.equal(found, origin):
            raise _wrong(f"{name} is not the base's")
        return
    information = torch.finfo(found.dtype)
    for start in range(0, len(found), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        expected = origin[rows].double()
        # Half a unit in the last place, also of numbers too small for the format's exponent.
        slack = torch.full_like(expected, information.tiny * information.eps)
        if pair is not None:
            a, b = pair.a.read().double(), pair.b.read()[rows].double()
            # The sum of r products was formed in float32.
            terms = expected.abs() + pair.peft_scaling * (b.abs() @ a.abs())
            slack += (len(a) + 2) * torch.finfo(torch.float32).eps * terms
            expected = expected + pair.peft_scaling * (b @ a)  # (rows, r) @ (r, in)
        difference = (found[rows].double() - expected).abs()
        if not bool((difference <= expected.abs() * information.eps / 2 + slack).all()):
            raise _wrong(f"{name} is off by {difference.max():.1e}, more than one rounding to {found.dtype} explains")


def _check_logits(folder: Path, base: Path, adapter: "Adapter", fitted: "Fit", dtype: "torch.dtype") -> tuple[str, str]:
    import torch
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(merged.config.vocab_size, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = merged(ids).logits
        del merged
        expected, without, rounded = _reference_logits(base, adapter, fitted, ids, dtype)
    scale = expected.abs().max()
    difference, moved, rounding = ((logits - expected).abs().max() for logits in (found, without, rounded))
    allowed = ROUNDING_TIMES * rounding + SUMMATION * scale
    if not difference <= allowed:
        raise _wrong(f"logits of up to {scale:.1e} differ by {difference:.1e}, and rounding explains {allowed:.1e}")
    line = (
        f"logits of {NUM_TOKENS} random tokens in float32 against base + adapter not merged: largest difference "
        f"{difference:.1e}, {difference / scale:.1e} relative (PEFT's merge, rounded alike: {rounding:.1e}); "
        f"the adapter moves them by {moved:.1e}"
    )
    if difference <= LARGE_SHARE * moved:
        return line, ""
    return line, (
        f"rounding changes the logits {difference / moved:.0%} as much as the adapter does, which adds little more to "
        "the weights than their dtype resolves: train it longer, or merge with --dtype float32"
    )


def _reference_logits(
    base: Path, adapter: "Adapter", fitted: "Fit", ids: "torch.Tensor", dtype: "torch.dtype"
) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    """Logits of the base with PEFT's adapter on it, without it, and with what PEFT would merge, rounded to `dtype`."""
    import torch
    from peft import get_peft_model, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if getattr(model, "is_quantized", False):
        model = model.dequantize().float()
    peft_model = get_peft_model(model, adapter.peft_config())
    # Not the copies of the base's matrices, which may have been rounded.
    set_peft_model_state_dict(peft_model, {name: adapter.tensors[name].read() for name in fitted.asked})
    peft_model.eval()
    with_adapter = peft_model(ids).logits
    with peft_model.disable_adapter():
        without = peft_model(ids).logits
    layers: list[Any] = [module for module in peft_model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        # A new parameter: embedding and output matrix may share theirs.
        merged = torch.nn.Parameter(layer.get_base_layer().weight + layer.get_delta_weight("default"))
        layer.get_base_layer().weight = merged
        layer.scaling["default"] = 0
    for parameter in peft_model.parameters():
        parameter.copy_(parameter.to(dtype))
    return with_adapter, without, peft_model(ids).logits


def _wrong(what: str) -> CheckpointError:
    return CheckpointError(
        f"the merged model is not base and adapter: {what}; nothing was written. This is a fault of hf-llama-merge, "
        "not of the files: please report it, and merge with PEFT's merge_and_unload"
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what PEFT, bitsandbytes and transformers tell their developers."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(level)
            if bars:
                transformers_logging.enable_progress_bar()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-llama-merge",
        description="Merge a LoRA adapter into its base: a folder that from_pretrained and pipeline open.",
        epilog="The target appears under its name only when it is whole. Exit code 2: the message says what to mend.",
    )
    parser.add_argument("adapter", type=Path, help="folder with adapter_config.json and adapter_model.safetensors")
    parser.add_argument("target", type=Path, help="folder to make")
    parser.add_argument(
        "--base", type=Path, metavar="FOLDER", help="16- or 32-bit base; default: as the adapter names it"
    )
    parser.add_argument(
        "--as",
        dest="model_type",
        choices=("llama_repro", "llama"),
        default="llama_repro",
        help="classes that open it: ours (default), or stock transformers' Llama",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto (default): the base's")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file of weights (default: 5GB)")
    parser.add_argument("--force", action="store_true", help="merge into an int8 base, or what was never trained")
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET if it is a checkpoint")
    add_version(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run(lambda: print("\n".join(merge(**vars(arguments), tell=print).lines())))


if __name__ == "__main__":
    sys.exit(main())

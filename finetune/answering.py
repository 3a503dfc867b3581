"""What answers: a base, an adapter if there is one, and the way in which the two were trained to be asked."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llama_repro.adapter_folder import attach, read_fields, rows_of, to_stderr
from hf_llama_repro.errors import CheckpointError, InputError
from hf_llama_repro.local_path import input_path
from hf_llama_repro.token_ids import choose_tokenizer

# torch and transformers are imported where they are used, so that --help answers at once.
if TYPE_CHECKING:
    from .decoding import Answer, Prompts, Sampling
    from .template import Turn

SAMPLING_FLAGS = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What a command that answers takes: model, adapter, template, sampling, quantization, dtype."""
    parser.add_argument("model", type=input_path, help="folder of a base or of a merged model")
    parser.add_argument("--adapter", type=input_path, metavar="FOLDER", help="trained adapter for it")
    parser.add_argument("--template", metavar="NAME", help="default: the one that lies with the adapter or model")
    parser.add_argument("--quantization", choices=("none", "int8", "nf4"), default="none", help="of the base")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")


def sampling_of(arguments: argparse.Namespace) -> "Sampling":
    """The sampling that the flags name."""
    from .decoding import Sampling

    given = {name: getattr(arguments, name) for name in SAMPLING_FLAGS if hasattr(arguments, name)}
    return Sampling(**given)


def find_template(model: Path, adapter: Path | None, name: str | None) -> str | Path | None:
    """The template named, or the one that lies with the adapter or the model, if there is one."""
    from .template import FILE_NAME

    if name is not None:
        return name
    for folder in (adapter, model):
        if folder is not None and (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
    return None


def open_tokenizer(model: Path, adapter: Path | None) -> Any:
    """The tokenizer of the model, or of an adapter with a larger vocabulary.

    Raises `CheckpointError` where the adapter was trained with other token ids than the model has.
    """
    from .model import load_tokenizer, read_config

    tokenizer = load_tokenizer(model)
    if adapter is None:
        return tokenizer
    chosen, note = choose_tokenizer(
        adapter,
        model,
        tokenizer,
        load=load_tokenizer,
        rows=lambda: max(read_config(model).vocab_size, rows_of(adapter)),
    )
    if note:
        to_stderr(note)
    return chosen


def check_folder(model: Path) -> None:
    """Raises `CheckpointError` where there is no folder: what is missing in one is said by what looks for it."""
    if not model.is_dir():
        raise CheckpointError(f"there is no folder {model}: name one that hf-llama-convert or hf-llama-merge wrote")


class InstructionPrompts:
    """Asks by a template of the training."""

    def __init__(self, encoder: Any):
        from .decoding import byte_tokens

        self.encoder = encoder
        self.byte_tokens = byte_tokens(encoder.tokenizer.backend_tokenizer)
        self.ends = frozenset({encoder.eos})
        self.takes_system = bool(encoder.template.system)
        self.takes_turns = bool(encoder.template.next_prompt)

    def ids(self, turns: "tuple[Turn, ...]", system: str) -> list[int]:
        from .records import Record

        return self.encoder.prompt(Record("the question", turns, system))

    def text(self, prompt: list[int], tokens: list[int]) -> str:
        return self.encoder.continuation(prompt, tokens)


def load_answering(model: Path, adapter: Path | None, *, quantization: str = "none", dtype: Any = "auto") -> Any:
    """The model, and the adapter if there is one, ready to generate. Raises `CheckpointError` where they do not fit."""
    from accelerate import PartialState

    from .model import choose_compute, load_base, read_config
    from .recipe import Recipe

    if adapter is not None:
        read_fields(adapter)  # before minutes of loading
    device = PartialState().device
    compute = choose_compute(Recipe(dtype=dtype), device)
    config = read_config(model)
    refuse_what_does_not_fit(model, weight_bytes(config, compute.dtype, quantization), free_memory(device), device)
    try:
        base: Any = load_base(model, dtype=compute.dtype, device=device, quantization=quantization)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or is_out_of_memory(error):
            raise InputError(f"{model} does not fit into the memory of this {device.type}. {SMALLER}") from None
        raise
    base.eval()
    if adapter is not None:
        return attach(base, adapter).eval()
    if device.type == "cpu" and quantization != "nf4":
        prepare(base)
    return base


def prepare(base: Any) -> None:
    """Makes decoding on a CPU faster where that can be had; the rest of the models answer as they are."""
    from hf_llama_repro import cpu_kernel, optimize

    if cpu_kernel.available():
        try:
            optimize(base)
        except InputError:  # an activation, a dtype or layers that the compiled code does not know
            return


SMALLER = "Take --quantization int8 or nf4, close other programs, or take a smaller model or a larger machine"


def weight_bytes(config: Any, dtype: Any, quantization: str) -> int:
    """What the weights take; bitsandbytes quantizes the linear layers of the blocks."""
    import torch

    from hf_llama_repro import LlamaReproForCausalLM

    with torch.device("meta"):
        model = LlamaReproForCausalLM(config)
    bytes_of = {"int8": 1.0, "nf4": 0.53, "none": dtype.itemsize}  # nf4: and a factor for 64 numbers
    total = 0.0
    for name, parameter in model.named_parameters():
        total += parameter.numel() * (bytes_of[quantization] if "_proj.weight" in name else dtype.itemsize)
    return int(total)


def free_memory(device: Any) -> int:
    """Bytes that can be had on the device."""
    import psutil
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def refuse_what_does_not_fit(model: Path, needed: int, free: int, device: Any) -> None:
    """Before minutes of loading, and before the system ends the process for want of memory."""
    if needed > free:
        raise InputError(
            f"{model} does not fit: its weights take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on this "
            f"{device.type}. {SMALLER}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch says, in one of its ways, that memory is used up."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error)


def ask(
    prompts: "Prompts",
    turns: "tuple[Turn, ...]",
    system: str,
    sampling: "Sampling",
    *,
    context: int,
    with_adapter: bool = True,
) -> "Answer":
    """The answer to the last of the turns, not begun. Raises `InputError` for what does not fit into the context."""
    from .decoding import Answer

    prompt = prompts.ids(turns, system)
    if len(prompt) >= context:
        raise InputError(f"the question takes {len(prompt)} tokens of a context of {context}: shorten it")
    return Answer(prompts, prompt, sampling, with_adapter=with_adapter)

"""Answers an instruction as the model was trained to be asked, token by token, and stops where it stops.

python -m finetune.generate MODEL [--adapter ADAPTER] --instruction "..." [--input "..."]
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from hf_llama_repro.adapter_folder import attach
from hf_llama_repro.command import add_version, run
from hf_llama_repro.errors import InputError

from .quiet import quiet


def find_template(model: Path, adapter: Path | None, name: str | None) -> str | Path:
    """The template named, or the one that lies with the adapter or the model; alpaca where there is none."""
    from .template import FILE_NAME

    if name is not None:
        return name
    for folder in (adapter, model):
        if folder is not None and (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
    return "alpaca"


def load_answering(model: Path, adapter: Path | None, *, quantization: str = "none", dtype: Any = "auto") -> Any:
    """The model, and the adapter if there is one, ready to generate. Raises `CheckpointError` where they do not fit."""
    from accelerate import PartialState

    from .model import choose_compute, load_base
    from .recipe import Recipe

    compute = choose_compute(Recipe(dtype=dtype), PartialState().device)
    base: Any = load_base(model, dtype=compute.dtype, device=compute.device, quantization=quantization)
    if adapter is not None:
        base = attach(base, adapter)
    base.config.use_cache = True
    return base.eval()


def generate(model: Any, encoder: Any, turns: Any, *, system: str = "", streamer: Any = None, **sampling: Any) -> str:
    """The model's answer to the last of the turns, whose own response is not looked at."""
    import torch

    from .records import Record

    prompt = encoder.prompt(Record("the question", tuple(turns), system))
    context = model.config.max_position_embeddings
    if len(prompt) >= context:
        raise InputError(f"the question takes {len(prompt)} tokens of a context of {context}: shorten it")
    ids = torch.tensor([prompt], device=model.device)
    settings = {"max_new_tokens": 512, "do_sample": False, **sampling}
    settings["max_new_tokens"] = min(settings["max_new_tokens"], context - len(prompt))
    if not settings["do_sample"]:
        settings |= {"temperature": None, "top_p": None, "top_k": None}
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        eos_token_id=encoder.eos,
        pad_token_id=encoder.eos,
        streamer=streamer,
        **settings,
    )[0, len(prompt) :].tolist()
    if output and output[-1] == encoder.eos:
        output.pop()
    return encoder.continuation(prompt, output)


class Stream:
    """Prints an answer as it comes: decoded after its prompt, so that no space is lost or invented."""

    def __init__(self, encoder: Any):
        self.encoder, self.shown = encoder, ""
        self.prompt: list[int] | None = None
        self.answer: list[int] = []

    def put(self, ids: Any) -> None:
        if self.prompt is None:
            self.prompt = ids.flatten().tolist()
            return
        self.answer += [token for token in ids.flatten().tolist() if token != self.encoder.eos]
        text = self.encoder.continuation(self.prompt, self.answer)
        # The bytes of a character may come one by one; incomplete, it reads as U+FFFD.
        if not text.endswith("\ufffd"):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text

    def end(self) -> None:
        print(flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-llama-generate", description="Answer an instruction, asked by the template of the training."
    )
    parser.add_argument("model", type=Path, help="folder of a base or of a merged model")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="trained adapter for it")
    parser.add_argument("--instruction", required=True, metavar="TEXT")
    parser.add_argument("--input", default="", metavar="TEXT", help="what the instruction is about")
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt, where the template has one")
    parser.add_argument("--template", metavar="NAME", help="default: the one that lies with the adapter or model")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest that make up this share")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--quantization", choices=("none", "int8", "nf4"), default="none", help="of the base")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add_version(parser)
    return parser


def answer(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from transformers import set_seed

    from .encoding import Encoder
    from .model import load_tokenizer
    from .template import Turn, load_template

    for name, right in (
        ("max_new_tokens", arguments.max_new_tokens >= 1),
        ("temperature", arguments.temperature >= 0),
        ("top_p", 0 < arguments.top_p <= 1),
    ):
        if not right:
            raise InputError(f"{name}={getattr(arguments, name)} is out of range")
    template = load_template(find_template(arguments.model, arguments.adapter, arguments.template))
    encoder = Encoder(load_tokenizer(arguments.model), template)
    model = load_answering(
        arguments.model, arguments.adapter, quantization=arguments.quantization, dtype=arguments.dtype
    )
    set_seed(arguments.seed)
    sampling = {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p}
    generate(
        model,
        encoder,
        [Turn(arguments.instruction, arguments.input, "")],
        system=arguments.system,
        streamer=Stream(encoder),
        max_new_tokens=arguments.max_new_tokens,
        **(sampling if arguments.temperature else {}),
    )


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    quiet()
    return run(lambda: answer(arguments), interrupted="the answer is not complete")


if __name__ == "__main__":
    sys.exit(main())

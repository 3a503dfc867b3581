"""Answers an instruction as the model was trained to be asked, token by token, and stops where it stops.

python -m finetune.generate MODEL [--adapter ADAPTER] --instruction "..." [--input "..."]
"""

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hf_llama_repro.command import Parser, add_version, run

from .answering import (
    InstructionPrompts,
    add_model_flags,
    ask,
    check_folder,
    find_template,
    load_answering,
    open_tokenizer,
    sampling_of,
)

if TYPE_CHECKING:
    from .decoding import Answer


def pieces(model: Any, answer: "Answer") -> Iterator[str]:
    """Makes the answer, and gives its text as it comes."""
    shown = ""
    while answer.end is None:
        answer.step(model)
        text = answer.text
        yield text[len(shown) :]
        shown = text


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hf-llama-generate", description="Answer an instruction, asked by the template of the training."
    )
    add_model_flags(parser)
    parser.add_argument("--instruction", required=True, metavar="TEXT")
    parser.add_argument("--input", default="", metavar="TEXT", help="what the instruction is about")
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt, where the template has one")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest that make up this share")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    add_version(parser)
    return parser


def answer(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from .encoding import Encoder
    from .template import Turn, load_template

    check_folder(arguments.model)
    sampling = sampling_of(arguments)
    template = load_template(find_template(arguments.model, arguments.adapter, arguments.template) or "alpaca")
    prompts = InstructionPrompts(Encoder(open_tokenizer(arguments.model, arguments.adapter), template))
    model = load_answering(
        arguments.model, arguments.adapter, quantization=arguments.quantization, dtype=arguments.dtype
    )
    turns = (Turn(arguments.instruction, arguments.input, ""),)
    context = model.config.max_position_embeddings
    for piece in pieces(model, ask(prompts, turns, arguments.system, sampling, context=context)):
        print(piece, end="", flush=True)
    print()


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run(lambda: answer(arguments), interrupted="the answer is not complete")


if __name__ == "__main__":
    sys.exit(main())

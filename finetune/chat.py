"""A page in the browser, or a conversation in the terminal, to talk to a model.

python -m finetune.chat MODEL [--adapter ADAPTER] [--port 7860]
python -m finetune.chat MODEL [--adapter ADAPTER] --terminal
"""

import argparse
import sys

from hf_llama_repro.command import Parser, add_version, run

from .answering import add_model_flags


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="hf-llama-chat", description="Talk to a model, in the browser or in the terminal.")
    add_model_flags(parser)
    parser.add_argument("--terminal", action="store_true", help="talk here instead of in the browser")
    parser.add_argument("--port", type=int, default=7860, help="of the page (default 7860); 0: any that is free")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address of the page (default: this machine only; 0.0.0.0: everybody)"
    )
    parser.add_argument(
        "--mode", choices=("auto", "instruction", "chat"), default="auto", help="single instructions or conversations"
    )
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--temperature", type=float, help="default: the model's own; 0: always the likeliest token")
    parser.add_argument("--top-p", type=float, help="sample among the likeliest that make up this share")
    parser.add_argument("--seed", type=int, help="of the sampling (default: another one for each answer)")
    parser.add_argument("--at-once", type=int, default=4, metavar="N", help="answers made at the same time (default 4)")
    add_version(parser)
    return parser


def chat(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    if arguments.terminal:
        from .chat_terminal import talk

        return talk(arguments)
    from .chat_page import serve

    serve(arguments)


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run(lambda: chat(arguments), interrupted="the conversation is over")


if __name__ == "__main__":
    sys.exit(main())

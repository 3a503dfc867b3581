"""Makes a folder for AutoTokenizer out of a SentencePiece model alone: for a model that is yet to be trained.

python -m conversion.tokenizer_folder TOKENIZER.model TARGET --context-length 2048
"""

import argparse
import shutil
import sys
from pathlib import Path

from hf_llama_repro.command import run
from hf_llama_repro.errors import CheckpointError
from hf_llama_repro.outputs import obstacle

from .tokenizer import convert_tokenizer


def write_tokenizer(source: Path, target: Path, *, context_length: int) -> str:
    """Writes `target`, whole or not at all; one line for humans comes back. Raises `CheckpointError`."""
    if target.exists():
        raise CheckpointError(f"{target} exists: choose another name, or remove it")
    if (reason := obstacle(target.parent)) is not None:
        raise CheckpointError(f"{target} could not be written ({reason})")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        line = convert_tokenizer(source, partial, vocab_size=sys.maxsize, context_length=context_length)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return line.partition("; the embedding has")[0]  # there is no embedding


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conversion.tokenizer_folder",
        description="Make a folder for AutoTokenizer of a SentencePiece model, with SentencePiece's ids.",
    )
    parser.add_argument("source", type=Path, help="tokenizer.model")
    parser.add_argument("target", type=Path, help="folder to make")
    parser.add_argument("--context-length", type=int, required=True, metavar="N", help="tokens, for model_max_length")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run(
        lambda: print(write_tokenizer(arguments.source, arguments.target, context_length=arguments.context_length))
    )


if __name__ == "__main__":
    sys.exit(main())

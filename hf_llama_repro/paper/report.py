"""The command: prints the papers' tables, or one size's figures, and writes docs/paper.md with its pictures.

python -m hf_llama_repro.paper
python -m hf_llama_repro.paper llama-65b --gpus 2048 --utilisation 0.47 --price 2
python -m hf_llama_repro.paper --page docs
"""

import argparse
import json
from pathlib import Path

from ..command import run
from ..errors import InputError
from ..outputs import check_output_file, check_output_folder, write_output

DEFAULT_GPUS = 2_048
DEFAULT_UTILISATION = 0.47
"""Of LLaMA 65B, by the paper's tokens per second, with attention counted."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hf_llama_repro.paper",
        description="Print the tables of the LLaMA papers, or what follows for one size.",
    )
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help="llama-7b, llama-2-70b ...; default: every table")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="length of a sequence; default: the size's own")
    parser.add_argument("--gpus", type=int, metavar="N", help=f"A100s; default: {DEFAULT_GPUS}")
    parser.add_argument(
        "--utilisation",
        type=float,
        metavar="SHARE",
        help=f"of an A100's 312 TFLOP/s, 0 to 1; default: {DEFAULT_UTILISATION}",
    )
    parser.add_argument("--price", type=float, metavar="DOLLARS", help="of a GPU-hour")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every table there as well")
    parser.add_argument(
        "--page", type=Path, metavar="FOLDER", help="write paper.md and its pictures there (matplotlib)"
    )
    return parser


def report(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from . import tables
    from .sizes import size

    check_output_file("--json", arguments.json)
    if arguments.page is not None:
        check_output_folder("--page", arguments.page)
    of_a_size = {name: getattr(arguments, name) for name in ("context", "gpus", "utilisation", "price")}
    given = [f"--{name}" for name, value in of_a_size.items() if value is not None]
    if given and not arguments.sizes:
        raise InputError(f"{', '.join(given)} says something of a size: name one, such as llama-65b")
    chosen = [size(name) for name in arguments.sizes]
    shown = []
    for one in chosen:
        shown += tables.of_one_size(
            one,
            context=one.context if arguments.context is None else arguments.context,
            num_gpus=DEFAULT_GPUS if arguments.gpus is None else arguments.gpus,
            utilisation=DEFAULT_UTILISATION if arguments.utilisation is None else arguments.utilisation,
            dollars_per_gpu_hour=arguments.price,
        )
    print("\n\n".join(table.text() for table in shown or tables.every_table()))
    if arguments.json is not None:
        write_output("--json", arguments.json, json.dumps(tables.content(), indent=2, ensure_ascii=False) + "\n")
    if arguments.page is not None:
        from .page import write_page

        try:
            written = write_page(arguments.page)
        except OSError as error:
            raise InputError(f"--page {arguments.page} cannot be written: {error}") from None
        print(f"\nwrote {', '.join(str(path) for path in written)}")


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run(lambda: report(arguments))

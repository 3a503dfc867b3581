"""How a command of this package ends: 0, or 2 with one message, never a traceback for what the user can mend.

The exit codes mean the same in every command (docs/README.md lists them).
"""

import argparse
import signal
import sys
import traceback
from collections.abc import Callable

from . import __version__
from .errors import InputError

DONE, ANSWER_IS_NO, BAD_INPUT, PARTIAL = range(4)
OUR_FAULT = 70
"""EX_SOFTWARE of sysexits.h; Python's own code for an exception is 1, which is an answer here."""
INTERRUPTED = 130

_MAX_MESSAGE = 5000
"""Characters; a damaged file may name something at any length."""


def add_version(parser: argparse.ArgumentParser) -> None:
    """`--version`, which says what a report of a problem needs first."""
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")


def run(work: Callable[[], object], *, interrupted: str = "nothing was written") -> int:
    """The exit code of `work`: the number that it returns, else `DONE`; after an `InputError`, the error's own.

    The text of an `InputError` is printed. Any other exception is printed with its traceback, for a report.
    `interrupted`: what an interruption leaves, for the message.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # Ends like Ctrl-C, so that what is half-written is removed.
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        code = work()
    except (InputError, PermissionError) as error:
        print(f"error: {_printable(str(error))}", file=sys.stderr)
        return getattr(error, "exit_code", BAD_INPUT)
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        print("error: this is a fault of hf-llama-repro, not of the input: please report it", file=sys.stderr)
        return OUR_FAULT
    finally:
        signal.signal(signal.SIGTERM, before)
    return code if isinstance(code, int) else DONE


def _printable(text: str) -> str:
    """Without what would steer the terminal: names that a message quotes are those of a file."""
    shown = text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + " …"
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in shown
    )

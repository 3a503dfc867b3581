"""How a command of this package ends: 0, or 2 with one message, never a traceback for what the user can mend."""

import argparse
import signal
import sys
from collections.abc import Callable

from . import __version__
from .errors import InputError

_MAX_MESSAGE = 5000
"""Characters; a damaged file may name something at any length."""


def add_version(parser: argparse.ArgumentParser) -> None:
    """`--version`, which says what a report of a problem needs first."""
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")


def run(work: Callable[[], object], *, interrupted: str = "nothing was written") -> int:
    """The exit code of `work`: 0; 2 after an `InputError`, whose text is printed; 130 when it was interrupted.

    `interrupted`: what an interruption leaves, for the message.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # Ends like Ctrl-C, so that what is half-written is removed.
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        work()
    except (InputError, PermissionError) as error:
        print(f"error: {_printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _printable(text: str) -> str:
    """Without what would steer the terminal: names that a message quotes are those of a file."""
    shown = text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + " …"
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in shown
    )

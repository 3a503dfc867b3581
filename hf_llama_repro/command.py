"""Flags and exit codes of the commands: 0, or 2 with one message, never a traceback for bad input.

The exit codes mean the same in every command (docs/README.md lists them).
"""

import argparse
import contextlib
import difflib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from . import __version__
from .errors import InputError
from .quiet import quiet

DONE, ANSWER_IS_NO, BAD_INPUT, PARTIAL = range(4)
OUR_FAULT = 70
"""EX_SOFTWARE of sysexits.h; Python's own code for an exception is 1, which is an answer here."""
INTERRUPTED = 130

_MAX_MESSAGE = 5000
"""Characters; a damaged file may name something at any length."""


class Parser(argparse.ArgumentParser):
    """Ends in one line for a wrong flag, which names the nearest one that exists.

    argparse would print the usage first, which is thirty lines where a recipe's keys are flags, and would report a
    mistyped required flag as missing.
    """

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        self._refuse_unknown(given)
        return super().parse_args(given, namespace)

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {_printable(message)} ({self.prog} --help lists the flags)\n")

    def _refuse_unknown(self, given: list[str]) -> None:
        known = list(self._option_string_actions)
        others_follow = any(action.nargs == argparse.REMAINDER for action in self._actions)
        for argument in given:
            name = argument.partition("=")[0]
            if argument == "--" or (others_follow and not argument.startswith("-")):
                return
            # argparse takes what holds a space for a value, and so it does a negative number.
            is_flag = name.startswith("--") or (name.startswith("-") and name[1:2].isalpha() and len(name) > 2)
            if not is_flag or " " in name or any(flag.startswith(name) for flag in known):
                continue
            words = {flag.lstrip("-").replace("_", "-"): flag for flag in reversed(known)}
            near = difflib.get_close_matches(name.lstrip("-").replace("_", "-"), words, n=1, cutoff=0.6)
            self.error(f"unknown flag {name}" + (f"; do you mean {words[near[0]]}?" if near else ""))


def add_version(parser: argparse.ArgumentParser) -> None:
    """`--version`, which says what a report of a problem needs first."""
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")


def run(work: Callable[[], object], *, interrupted: str = "nothing was written", quietly: bool = True) -> int:
    """The exit code of `work`: the number that it returns, else `DONE`; after an `InputError`, the error's own.

    The text of an `InputError` is printed. Any other exception is printed with its traceback, for a report.
    `interrupted`: what an interruption leaves, for the message. `quietly`: without what libraries tell developers.
    """
    if quietly:
        quiet()

    try:
        with _sigterm_as_interrupt():
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
    return code if isinstance(code, int) else DONE


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Lets SIGTERM end the work like Ctrl-C, so that what is half-written is removed.

    Python lets only the main thread of a process have handlers: in another one the caller's stay as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        # None: a handler that was not installed from Python, which cannot be put back from here.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _printable(text: str) -> str:
    """Without what would steer the terminal: names that a message quotes are those of a file."""
    shown = text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + " …"
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in shown
    )

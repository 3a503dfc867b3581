"""How a command of this package ends: 0, or 2 with one message, never a traceback for what the user can mend."""

import signal
import sys
from collections.abc import Callable

from hf_llama_repro.errors import CheckpointError


def run(work: Callable[[], object]) -> int:
    """The exit code of `work`: 0; 2 after a `CheckpointError`, whose text is printed; 130 when it was interrupted."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # Ends like Ctrl-C, so that what is half-written is removed.
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        work()
    except (CheckpointError, PermissionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0

"""The errors that a user of this package is meant to read."""

import errno


class InputError(ValueError):
    """Something handed in is not what it should be: says what, where, what is allowed, and the remedy.

    Commands print its text as one message and exit with `exit_code`; in Python it is raised as it is.
    """

    exit_code = 2


class CheckpointError(InputError):
    """What is wrong is a checkpoint: weights, configuration, tokenizer or adapter, read or about to be written."""


class NotItsSourceError(CheckpointError):
    """What was converted is not the source that it was made of."""

    exit_code = 1


class TrainingStoppedError(InputError):
    """The run was stopped, because to go on would waste time or destroy what was learnt."""


def failed_write(error: BaseException) -> str | None:
    """Why writing failed, if that is what happened: each library that writes has an exception of its own for it."""
    from safetensors import SafetensorError

    if isinstance(error, InputError):
        return None
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return "no space left on the disk"
    if "inline_container" in str(error) or "PytorchStreamWriter" in str(error):  # torch does not say why
        return "no space left on the disk, or a limit on the size of files"
    # tokenizers raises a bare Exception with Rust's text.
    known = isinstance(error, OSError | SafetensorError) or "(os error" in str(error)
    return str(error) if known else None

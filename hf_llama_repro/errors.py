"""The errors that a user of this package is meant to read."""


class InputError(ValueError):
    """Something handed in is not what it should be: says what, where, what is allowed, and the remedy.

    Commands print its text as one message and exit with code 2; in Python it is raised as it is.
    """


class CheckpointError(InputError):
    """What is wrong is a checkpoint: weights, configuration, tokenizer or adapter, read or about to be written."""

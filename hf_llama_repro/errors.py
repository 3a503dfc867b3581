"""The one error that a user of this package is meant to read."""


class CheckpointError(ValueError):
    """Something handed in is not what it should be: says what, where, what is allowed, and the remedy.

    Commands print its text as one message and exit with code 2; in Python it is raised as it is.
    """

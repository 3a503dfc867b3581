"""Files and folders that a command is told to write: looked at before its work begins, not after it."""

import os
from pathlib import Path

from .errors import InputError


def check_output_file(flag: str, path: Path | None) -> None:
    """Raises `InputError` where the file that `flag` names cannot be written. None: the flag was not given."""
    if path is None:
        return
    if os.path.isdir(path):
        raise InputError(f"{flag} {path} is a folder: name a file in it")
    if not os.path.isdir(path.parent):  # Path.is_dir raises where a name is too long
        raise InputError(
            f"{flag} {path} cannot be written: there is no folder {path.parent}; make it, or name another file"
        )
    try:
        if os.path.lexists(path):
            path.open("ab").close()
        else:
            path.open("xb").close()
            path.unlink()
    except (OSError, ValueError) as error:
        raise _unwritable(flag, path, error) from None


def check_output_folder(flag: str, path: Path) -> None:
    """Raises `InputError` where the folder that `flag` names can be neither made nor written in. Makes nothing."""
    if (reason := obstacle(path)) is not None:
        raise InputError(f"{flag} {path} cannot be written: {reason}")


def obstacle(folder: Path) -> str | None:
    """Why nothing can be written in a folder that is there or is yet to be made; None where it can."""
    place = folder.absolute()
    try:
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            return f"{place} is not a folder"
        return None if os.access(place, os.W_OK | os.X_OK) else f"no permission to write in {place}"
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)


def write_output(flag: str, path: Path, text: str) -> None:
    """Writes the file that `flag` names. Raises `InputError` where that fails: a full disk."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(flag, path, error) from None


def _unwritable(flag: str, path: Path, error: Exception) -> InputError:
    return InputError(f"{flag} {path} cannot be written: {getattr(error, 'strerror', None) or error}")

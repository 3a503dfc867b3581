"""Renames that survive a power cut: first what takes a name is brought to the disk, afterwards the name."""

import errno
import os
from pathlib import Path

# Windows opens no folders, and brings renames to the disk itself.
_FOLDERS_OPEN = os.name != "nt"
_NOT_POSSIBLE = (errno.EINVAL, errno.ENOTSUP)
"""How file systems of other machines answer that have no such thing for folders."""


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    if path.is_dir() and not _FOLDERS_OPEN:
        return
    # A file that is only read cannot be brought to the disk on Windows.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or _FOLDERS_OPEN else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_POSSIBLE:
            raise
    finally:
        os.close(descriptor)


def rename(aside: Path, target: Path) -> None:
    """Gives a file, or a folder with all that is in it, the name `target`, which a file may bear but no folder."""
    for path in (*aside.rglob("*"), aside) if aside.is_dir() else (aside,):
        if not path.is_symlink():
            sync(path)
    (aside.rename if aside.is_dir() else aside.replace)(target)
    sync(target.parent)

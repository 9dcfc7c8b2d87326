"""Opening the files of a recording's folder: regular files only, and no links.

A folder may come from somebody else, and what is written in it must not end in a file that lies elsewhere.

    fresh       a new file in the place of whatever has its name; the name goes, not what it leads to
    in_place    a file that is written where it is; one that has a second name, maybe elsewhere, is refused too
    readable    a file that is only read

All are closed when another program is started (Python's default), and none waits for a pipe that nobody writes to.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from trajrec.errors import DamagedRunError

_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_MODE = 0o666  # less what the user's umask takes away


def fresh(path: Path) -> int:
    """Descriptor of a new, empty file, for reading and writing."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, _MODE)


def in_place(path: Path, flags: int = 0) -> int:
    """Descriptor of a file for reading and writing; with os.O_CREAT in `flags` it is made where it is missing.

    Raises:
        DamagedRunError: it is a link, no regular file, or has another name.
    """
    return _checked(path, os.O_RDWR | flags, most_names=1)


def readable(path: Path) -> int:
    """Descriptor of a file for reading.

    Raises:
        DamagedRunError: it is a link, or no regular file.
    """
    return _checked(path, os.O_RDONLY, most_names=None)


def read(path: Path) -> bytes:
    """All that is in a file.

    Raises:
        DamagedRunError: it is a link, or no regular file.
    """
    with open(readable(path), "rb") as file:
        return file.read()


def kind(path: Path) -> str:
    """What has a name, in a word: "file", "folder", "link", "other"; "" where nothing has."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return ""
    return (
        "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "link" if stat.S_ISLNK(mode) else "other"
    )


def _checked(path: Path, flags: int, most_names: int | None) -> int:
    if not hasattr(os, "O_NOFOLLOW") and kind(path) == "link":  # pragma: no cover  (Windows)
        raise refusal(path, "it is a link")
    try:
        fd = os.open(path, flags | _FLAGS, _MODE)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise refusal(path, "it is a link, or no file") from error
        raise
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode) and (most_names is None or found.st_nlink <= most_names):
        return fd
    os.close(fd)
    raise refusal(path, "it has a second name" if stat.S_ISREG(found.st_mode) else "it is no regular file")


def refusal(path: Path, why: str) -> DamagedRunError:
    """The error for a file of a recording that is none."""
    return DamagedRunError(
        f"{path}: a file of its own was expected in the recording's folder, but {why}, so writing there could change "
        "a file elsewhere. Nothing was changed; put a copy of the file in its place, or remove it."
    )

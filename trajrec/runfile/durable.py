"""Files that are on the disk whole, or not at all; and what it looks like when there is no room for them."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def durable(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what is written there becomes `path` whole and synced, or not at all."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        yield tmp
        sync(tmp)
        tmp.replace(path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file or a folder's list of names is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that there is no room; a limit on the size of files says so, too."""
    full = (errno.ENOSPC, errno.EDQUOT), ("No space left", "quota exceeded")
    return _says(error, *full) or is_file_too_large(error)


def is_file_too_large(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is a limit on the size of files (`ulimit -f`): waiting does not help."""
    return _says(error, (errno.EFBIG,), ("File too large",))


def _says(error: BaseException | None, numbers: tuple[int, ...], words: tuple[str, ...]) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in numbers or any(word in str(error) for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False

"""Files that are on the disk whole, or not at all."""

from __future__ import annotations

import contextlib
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

"""One recorder an output: a lock on a file in the recording's folder.

`flock` belongs to the open file, so the writer process, which inherits it, goes on holding it while it drains
the ring of a recorder that was killed; the kernel drops it with the last holder. Where there is no flock, the
lock is the process id in the file, and is void once that process is gone.

Who only looks takes a shared lock for that moment, so that lookers do not meet one another, and who takes the lock
tries again for a moment, so that no looker keeps it away.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from trajrec.errors import DamagedRunError, RecorderBusyError
from trajrec.runfile import files

try:
    import fcntl
except ImportError:  # pragma: no cover  (Windows)
    fcntl = None  # type: ignore[assignment]

_TRIES = 25
_NAP = 0.02


class Lock:
    """A held lock; `release` or the end of all holders frees it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = _acquire(path)
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Gives the lock back."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def holder(path: Path) -> int | None:
    """Process id of whoever holds the lock, or None if nobody does."""
    try:
        fd = files.readable(path)
    except (OSError, DamagedRunError):
        return None
    try:
        text = os.pread(fd, 20, 0)
        return (int(text) if text.isdigit() else 0) if _is_held(fd, text, shared=True) else None
    finally:
        os.close(fd)


def _acquire(path: Path) -> int:
    while True:
        fd = files.in_place(path, os.O_CREAT)
        text = os.pread(fd, 20, 0)
        if not _obtain(fd, text):
            os.close(fd)
            raise RecorderBusyError(
                f"{path.parent} is being recorded by process {text.decode() or 'unknown'}. "
                "Wait for it to end, or record to another file."
            )
        if _same(fd, path):
            return fd
        os.close(fd)  # its folder was packed and removed between open and lock


def _obtain(fd: int, text: bytes) -> bool:
    """Whether the lock could be had; whoever only looks is gone at one of the next tries."""
    for attempt in range(_TRIES):
        if not _is_held(fd, text):
            return True
        if attempt < _TRIES - 1:
            time.sleep(_NAP)
    return False


def _is_held(fd: int, text: bytes, shared: bool = False) -> bool:
    if fcntl is None:  # pragma: no cover
        return text.isdigit() and int(text) != os.getpid() and _alive(int(text))
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _same(fd: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(fd), path.lstat())
    return False


def _alive(pid: int) -> bool:  # pragma: no cover
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True

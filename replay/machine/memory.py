"""Memory for a replay: how much there is, and keeping it between steps.

Every step allocates and frees the same tensors. By default glibc gives large ones back to the system each time, and the
page faults of getting them again take up to a fifth of a replay (a quarter in a virtual machine). While a replay runs,
freed memory is kept for the next step; at the end it is given back, and before it begins what went before has left.
Tensors of 32 MB and more, as of models with 8 million weights, are given back all the same: kept, they would lie
scattered between others, a quarter more at 10 million weights. Elsewhere than on Linux with glibc nothing is done.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

# Numbers of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGE = 32 << 20
_SHARE = 4
_FALLBACK = 1 << 30
_depth = 0


def budget(memory: int | None, device: torch.device) -> int:
    """The bytes that a replay may take on its device: as asked, or a quarter of what is free."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free()
    return memory or max(_FALLBACK, free // _SHARE)


def _free() -> int:
    """Bytes of memory that the system has to give, or that the control group leaves; 0 where neither is known."""
    try:
        found = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return found
    return found if limit == "max" else max(0, min(found, int(limit) - used))


@contextmanager
def kept() -> Iterator[None]:
    """Inside, memory that is freed stays with the process; may be nested."""
    global _depth
    library = _glibc()
    if library is None:
        yield
        return
    _depth += 1
    if _depth == 1:
        library.malloc_trim(0)
        library.mallopt(_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            _give_back(library)


def _give_back(library: ctypes.CDLL) -> None:
    # glibc would have come to these thresholds by itself, had it not been told any.
    library.mallopt(_MMAP_THRESHOLD, _LARGE)
    library.mallopt(_TRIM_THRESHOLD, 64 << 20)
    library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libc.so.6")
        library.gnu_get_libc_version  # noqa: B018
    except (OSError, AttributeError):
        return None
    return library

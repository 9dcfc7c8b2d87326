"""CRC-32, the one of zlib, by the fastest implementation there is: a step's weights are summed in the training thread.

`zlib-ng` uses the processor's carry-less multiplication, which zlib does without; where it has no build, zlib does. (So
does ISA-L, but it leaves the wide registers in use, and whatever runs next is slower for it.)
"""

from typing import Any

try:
    from zlib_ng.zlib_ng import crc32
except ImportError:
    from zlib import crc32


def copy_crc32(to: Any, source: Any, crc: int = 0, /) -> int:
    """Copies bytes from one contiguous buffer to another of the same size.

    Returns:
        The CRC-32 of the copy, begun with `crc`.
    """
    if memoryview(source).nbytes:
        memoryview(to).cast("B")[:] = memoryview(source).cast("B")
    return crc32(to, crc)


__all__ = ["copy_crc32", "crc32"]

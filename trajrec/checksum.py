"""CRC-32, the one of zlib, by the fastest implementation there is: a step's weights are summed in the training thread.

`zlib-ng` uses the processor's carry-less multiplication, which zlib does without; where it has no build, zlib does. (So
does ISA-L, but it leaves the wide registers in use, and whatever runs next is slower for it.)
"""

from functools import lru_cache
from typing import Any

try:
    from zlib_ng.zlib_ng import crc32, crc32_combine
except ImportError:
    from zlib import crc32

    def crc32_combine(first: int, second: int, size: int, /) -> int:
        """The CRC-32 of two pieces put together, from those of the pieces; `size` is that of the second, in bytes.

        Zeros behind the first one multiply its remainder by x^(8 size), and the second one is added to that. A CRC-32
        of zeros begun with another differs from that begun with 0 by just this product: the inversions cancel.
        """
        return second ^ _zeros(first, size) ^ _zeros(0, size)

    @lru_cache(8)
    def _zeros(crc: int, size: int) -> int:
        while size:
            crc, size = crc32(_ZEROS[:size], crc), size - min(size, len(_ZEROS))
        return crc

    _ZEROS = memoryview(bytes(1 << 16))


def copy_crc32(to: Any, source: Any, crc: int = 0, /) -> int:
    """Copies bytes from one contiguous buffer to another of the same size.

    Returns:
        The CRC-32 of the copy, begun with `crc`.
    """
    if memoryview(source).nbytes:
        memoryview(to).cast("B")[:] = memoryview(source).cast("B")
    return crc32(to, crc)


__all__ = ["copy_crc32", "crc32", "crc32_combine"]

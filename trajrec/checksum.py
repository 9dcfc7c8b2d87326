"""CRC-32, the one of zlib, by the fastest implementation there is: a step's weights are summed in the training thread.

`zlib-ng` uses the processor's carry-less multiplication, which zlib does without; where it has no build, zlib does. (So
does ISA-L, but it leaves the wide registers in use, and whatever runs next is slower for it.)
"""

try:
    from zlib_ng.zlib_ng import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]

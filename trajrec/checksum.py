"""CRC-32, the one of zlib, by the fastest implementation there is: a step's weights are summed in the training thread.

`isal` uses the processor's carry-less multiplication, which zlib does without; where `isal` has no build, zlib does.
"""

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]

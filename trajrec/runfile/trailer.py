"""A checksum of a whole file, in 24 bytes behind its end: no damaged byte goes unseen, not even in unused space.

    "TRAJSUM1" | uint64 length of the file before the trailer | uint32 CRC-32 of it | uint32 CRC-32 of these 20 bytes

HDF5 ignores what lies behind the end that its superblock names, so the file stays readable by any HDF5 program; one
that writes to it destroys the trailer, and `trajrec verify` says so.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO

from trajrec.checksum import crc32

MAGIC = b"TRAJSUM1"
_BODY = struct.Struct("<8sQI")
SIZE = _BODY.size + 4
_PIECE = 1 << 20


def append(path: Path) -> None:
    """Puts a trailer behind a file."""
    with path.open("r+b") as file:
        crc, length = _crc32(file, None)
        body = _BODY.pack(MAGIC, length, crc)
        file.write(body + struct.pack("<I", crc32(body)))


def fault(path: Path) -> str | None:
    """What is wrong with a file according to its trailer, or None."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - SIZE))
        trailer = file.read(SIZE)
        body, crc = trailer[:-4], trailer[-4:]
        if len(trailer) < SIZE or trailer[:8] != MAGIC or struct.pack("<I", crc32(body)) != crc:
            return "the checksum at its end is missing: it was cut off, or written to by another program"
        _, length, expected = _BODY.unpack(body)
        if length != size - SIZE:
            return f"{length + SIZE} bytes were expected, found {size}"
        file.seek(0)
        found, _ = _crc32(file, length)
        return None if found == expected else "at least one byte has changed since it was written"


def _crc32(file: IO[bytes], length: int | None) -> tuple[int, int]:
    crc = done = 0
    while data := file.read(_PIECE if length is None else min(_PIECE, length - done)):
        crc = crc32(data, crc)
        done += len(data)
    return crc, done

"""A checksum of a whole file, in 24 bytes behind its end: no damaged byte goes unseen, not even in unused space.

    "TRAJSUM1" | uint64 length of the file before the trailer | uint32 CRC-32 of it | uint32 CRC-32 of these 20 bytes

HDF5 ignores what lies behind the end that its superblock names, so the file stays readable by any HDF5 program; one
that writes to it destroys the trailer, and `trajrec verify` says so.
"""

from __future__ import annotations

import struct
from io import FileIO
from pathlib import Path

from trajrec.checksum import crc32
from trajrec.runfile import files

MAGIC = b"TRAJSUM1"
_BODY = struct.Struct("<8sQI")
SIZE = _BODY.size + 4
_PIECE = 1 << 18


def append(path: Path) -> None:
    """Puts a trailer behind a file."""
    with open(files.in_place(path), "r+b", buffering=0) as file:
        length = file.seek(0, 2)
        file.seek(0)
        file.write(trailer(length, _crc32(file, length)))


def trailer(length: int, crc: int) -> bytes:
    """The trailer of a file of `length` bytes with this CRC-32."""
    body = _BODY.pack(MAGIC, length, crc)
    return body + struct.pack("<I", crc32(body))


def fault(path: Path) -> str | None:
    """What is wrong with a file according to its trailer, or None."""
    with path.open("rb", buffering=0) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - SIZE))
        found = file.read(SIZE)
        body = found[:-4]
        if not _is_trailer(found):
            return "the checksum at its end is missing: it was cut off, or written to by another program"
        _, length, expected = _BODY.unpack(body)
        if length != size - SIZE:
            return f"{length + SIZE} bytes were expected, found {size}"
        file.seek(0)
        return None if _crc32(file, length) == expected else "at least one byte has changed since it was written"


def is_there(path: Path) -> bool:
    """Whether a file ends with a trailer of its length; what is in the file is not looked at."""
    with path.open("rb", buffering=0) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - SIZE))
        found = file.read(SIZE)
    return _is_trailer(found) and _BODY.unpack(found[:-4])[1] == size - SIZE


def _is_trailer(found: bytes) -> bool:
    whole = len(found) == SIZE and found[:8] == MAGIC
    return whole and struct.pack("<I", crc32(found[:-4])) == found[-4:]


def _crc32(file: FileIO, length: int) -> int:
    """The CRC-32 of the next `length` bytes, through one small buffer that stays in the processor's cache."""
    buffer, crc = memoryview(bytearray(_PIECE)), 0
    while length and (count := file.readinto(buffer[: min(_PIECE, length)])):
        crc = crc32(buffer[:count], crc)
        length -= count
    return crc

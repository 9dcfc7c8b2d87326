"""How large everything in a recording is: integers only, worked out once from P and the dtype.

Rows lie in chunks of R steps x C values. Many steps a chunk compress well (neighbouring steps share their high
bytes), but every row that is read decodes R rows, so R shrinks until R rows fit 64 MB. C makes a chunk about
512 kB and divides the row evenly, because a padded last chunk is stored in full when there is no compression.

A segment is what the writer seals at once: whole chunk rows, about 32 MB. The ring holds two segments, so that
training fills one while the other is sealed; its size on disk and in the page cache is `ring_bytes`, about 64 MB for
small models, and never more than 128 MB or four rows, whichever is larger, plus the arena for the step records.

Letters: P values in a row, R rows and C values in a chunk.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass

CHUNK_ROWS = 32
CHUNK_BYTES = 512 * 1024
CHUNK_ROW_BYTES = 64 * 1024**2
PAGE = 4096

_STRUCT = struct.Struct("<7q")


@dataclass(frozen=True, slots=True)
class Limits:
    """How large the parts of a recording get; tests have them small.

    Attributes:
        segment_bytes: rows of a segment, about.
        segment_rows: most steps of a segment.
        arena_bytes: room for the encoded records of the ring's entries.
        input_bytes: of raw inputs at a time; then training waits for the writer.
    """

    segment_bytes: int = 32 * 1024**2
    segment_rows: int = 1024
    arena_bytes: int = 16 * 1024**2
    input_bytes: int = 256 * 1024**2


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of the chunks, segments and ring of one recording.

    Attributes:
        row_length: P, or 0 where rows of single steps are not kept.
        itemsize: bytes of a value.
        chunk_rows: R.
        chunk_columns: C.
        segment_rows: entries the writer seals at once, a multiple of R.
        slots: entries the ring holds, a multiple of `segment_rows`.
        arena_bytes: room for the encoded records of the ring's entries.
    """

    row_length: int
    itemsize: int
    chunk_rows: int
    chunk_columns: int
    segment_rows: int
    slots: int
    arena_bytes: int

    @property
    def row_bytes(self) -> int:
        """Size of a row in the ring."""
        return self.row_length * self.itemsize

    @property
    def segment_bytes(self) -> int:
        """Size of a segment's rows before compression."""
        return self.segment_rows * self.row_bytes

    def to_bytes(self) -> bytes:
        """The seven integers as they stand in the ring's header."""
        return _STRUCT.pack(*astuple(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> Geometry:
        """The geometry from `to_bytes`'s value.

        Raises:
            ValueError: a ring cannot have these sizes.
        """
        geometry = cls(*_STRUCT.unpack(data))
        sizes = astuple(geometry)
        if min(sizes) < 0 or max(sizes) >= 2**48 or 0 in sizes[1:]:
            raise ValueError(f"a ring cannot have the sizes {', '.join(map(str, sizes))}")
        return geometry


GEOMETRY_BYTES = _STRUCT.size


def chunk_shape(row_length: int, itemsize: int) -> tuple[int, int]:
    """R and C for rows of P values: R a power of two up to 32, a chunk about 512 kB."""
    rows = CHUNK_ROWS
    while rows > 1 and rows * row_length * itemsize > CHUNK_ROW_BYTES:
        rows //= 2
    target = max(1, CHUNK_BYTES // (rows * itemsize))
    pieces = -(-row_length // target)
    return rows, -(-row_length // pieces)


def geometry_for(row_length: int, itemsize: int, keep_rows: bool, limits: Limits = LIMITS) -> Geometry:
    """The geometry of a recording of rows of P values; `keep_rows=False` records step data only."""
    rows, columns = chunk_shape(row_length, itemsize)
    if not keep_rows:
        return Geometry(0, itemsize, rows, columns, limits.segment_rows, 2 * limits.segment_rows, limits.arena_bytes)
    chunk_row = rows * row_length * itemsize
    segment = rows * max(1, min(limits.segment_bytes // chunk_row, limits.segment_rows // rows))
    return Geometry(row_length, itemsize, rows, columns, segment, max(2 * segment, 4), limits.arena_bytes)

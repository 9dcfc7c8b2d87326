"""The memory-mapped ring between the training process and the writer process.

The training thread copies each step into the ring and goes on; the writer seals entries into segments and frees
their slots. The ring is a file, so what was copied outlives the death of either process: the kernel owns it. It is
allocated before it is mapped (`allocate`), because touching a hole on a full disk would kill the process (SIGBUS).

Entry e (the record and row of step e) lies in slot e % slots and is published in three moves:

    seq[slot] := 0;  copy the row and the record;  seq[slot] := e + 1

A reader takes entry e only if seq is e + 1, the CRC-32 of the record (seeded with e + 1, so that no other entry's
record passes) and that of the row fit, so neither a half-made copy nor a page that a power cut kept from an
earlier lap is ever used. Processors that reorder stores are covered by the same checks.

Records have no fixed size (ids, generator states), so they go into an arena that is used in circles. Absolute
offsets only grow; a record that does not fit before the arena's end starts at its beginning. One too large for the
arena goes to a file of its own (`Folder.overflow`).

    page 0      magic, geometry and first entry with their CRC-32; from byte 2048 eight control words (uint64)
    slots       64 bytes each: seq, arena offset, length, CRC-32 of the record, padding (uint64)
    arena       records
    rows        slots x P values, without gaps: rows of neighbouring slots are one array
"""

from __future__ import annotations

import mmap
import os
import struct
from enum import IntEnum
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trajrec.checksum import crc32
from trajrec.errors import DamagedRunError
from trajrec.records import Row, StepRecord
from trajrec.runfile import files
from trajrec.runfile.format.arrays import write_pieces
from trajrec.runfile.format.codec import decode, encode
from trajrec.runfile.format.geometry import GEOMETRY_BYTES, PAGE, Geometry

MAGIC = b"TRAJRNG1"
_CONTROL = 2048
_SLOT_WORDS = 8
_OVERFLOW = 1 << 63
_LAST = 2**62  # no step has a number like this
_DTYPES = {np.dtype(name).str.encode(): np.dtype(name) for name in ("<f4", "<f8")}
_HEAD = struct.Struct(f"<8s{GEOMETRY_BYTES}sq8s")


class Control(IntEnum):
    """The control words. The training process writes all but the first two."""

    TAIL = 0  # first entry that is not sealed; the slots of earlier ones are free
    STATUS = 1  # Status of the writer
    FLUSH = 2  # seal everything below this entry now
    FINISH = 3  # Finish
    GAP_FIRST = 4  # steps that went unrecorded (0: none)
    GAP_LAST = 5


EXIT_DISK_FULL = 28  # of a process that changes a recording


class Status(IntEnum):
    """What the writer last said of itself."""

    STARTING = 0
    RUNNING = 1
    DISK_FULL = 2
    FAILED = 3  # died of something unforeseen: another one may do better
    DONE = 4
    FILE_TOO_LARGE = 5  # a limit on the size of files: there is no waiting for more room
    DAMAGED = 6  # what it was to seal or to pack is not what was recorded
    BLOCKED = 7  # something else has the name of the packed file


class Finish(IntEnum):
    """What the writer is to do once everything is sealed."""

    NO = 0
    COMPLETE = 1
    RECOVERED = 2
    HAND_OVER = 3  # seal, and leave the folder to another writer


def allocate(path: Path, size: int) -> FileIO:
    """A new file whose every byte has its place on the disk; what had its name stays whole for whoever has mapped it.

    Raises:
        OSError: no room (ENOSPC); the file is removed.
    """
    file = FileIO(files.fresh(path), "r+")
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            for start in range(0, size, 1 << 20):
                file.write(bytes(min(1 << 20, size - start)))
    except OSError:
        file.close()
        path.unlink(missing_ok=True)
        raise
    return file


def ring_bytes(geometry: Geometry) -> int:
    """Size of the ring's file."""
    return _rows_at(geometry) + geometry.slots * geometry.row_bytes


def _rows_at(geometry: Geometry) -> int:
    size = PAGE + geometry.slots * _SLOT_WORDS * 8 + geometry.arena_bytes
    return -(-size // PAGE) * PAGE


class Ring:
    """An open ring; `create` makes one, `Ring(path)` opens what is there.

    Attributes:
        geometry: sizes.
        first: entry that the ring began with.
        dtype: of the rows.
    """

    def __init__(self, path: Path, writable: bool = False) -> None:
        self.path = path
        with open(files.in_place(path) if writable else files.readable(path), "r+b" if writable else "rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.geometry, self.first, self.dtype = _parse(file.read(_HEAD.size + 4), size, path)
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self._map = mmap.mmap(file.fileno(), ring_bytes(self.geometry), access=access)
        geometry = self.geometry
        self._arena = PAGE + geometry.slots * _SLOT_WORDS * 8
        view = memoryview(self._map)  # reading and writing a word is twice as fast as with numpy
        self._control = view[_CONTROL : _CONTROL + 8 * len(Control)].cast("Q")
        self._slots = view[PAGE : self._arena].cast("Q")
        count = geometry.slots * geometry.row_length
        self._rows = np.frombuffer(self._map, self.dtype, count, _rows_at(geometry)).reshape(geometry.slots, -1)
        self._arena_head = 0
        self._row = list(self._rows) if geometry.row_length else [None] * geometry.slots
        # Up to where there was room when the tail was last looked at: the tail only moves on.
        self._free_until = self._arena_until = 0

    def touch(self) -> None:
        """Brings every page into memory, so that no step of the training has to wait for that."""
        pages = np.frombuffer(self._map, np.uint8)[::PAGE]
        pages |= 0

    # ---- control words

    def get(self, word: Control) -> int:
        """A control word."""
        return self._control[word]

    def set(self, word: Control, value: int) -> None:
        """Sets a control word."""
        self._control[word] = value

    def gaps(self) -> tuple[tuple[int, int], ...]:
        """First and last step that went unrecorded, if any did."""
        first, last = self.get(Control.GAP_FIRST), self.get(Control.GAP_LAST)
        return ((first, last if first <= last < _LAST else first),) if 0 < first < _LAST else ()

    # ---- the training process

    def has_slot(self, entry: int) -> bool:
        """Whether the slot of the next entry is free."""
        if entry >= self._free_until:
            self._free_until = self.get(Control.TAIL) + self.geometry.slots
        return entry < self._free_until

    def open_slot(self, entry: int) -> Row | None:
        """The row of an entry to be filled [P]; None where the ring keeps no rows. Its slot must be free."""
        slot = entry % len(self._row)
        self._slots[slot * _SLOT_WORDS] = 0
        return self._row[slot]

    def publish(self, record: StepRecord) -> bool:
        """Publishes the opened slot with its record; False if the arena has no room yet."""
        data, entry = encode(record), record.step
        if len(data) > self.geometry.arena_bytes // 2:
            return self._publish_overflow(entry, data)
        place = self._place(entry, len(data))
        if place is None:
            return False
        start = self._arena + place % self.geometry.arena_bytes
        self._map[start : start + len(data)] = data
        self._enter(entry, place, len(data), data)
        self._arena_head = place + len(data)
        return True

    def pending_bytes(self, entry: int) -> int:
        """Bytes of rows and records of the entries before `entry` that are not sealed."""
        tail = self.get(Control.TAIL)
        if tail >= entry:
            return 0
        records = self._arena_head - self._slots[self._word(tail) + 1]
        return records + (entry - tail) * self.geometry.row_bytes

    def _place(self, entry: int, size: int) -> int | None:
        """Absolute arena offset for a record, or None if unsealed records are in the way."""
        arena, place = self.geometry.arena_bytes, self._arena_head
        if place % arena + size > arena:
            place = -(-place // arena) * arena
        if place + size > self._arena_until:
            tail = self.get(Control.TAIL)
            oldest = place if tail >= entry else self._slots[self._word(tail) + 1]
            self._arena_until = oldest + arena
        return place if place + size <= self._arena_until else None

    def _publish_overflow(self, entry: int, data: bytes) -> bool:
        write_pieces(overflow_path(self.path.parent, entry), [data])
        self._enter(entry, self._arena_head, len(data) | _OVERFLOW, data)
        return True

    def _enter(self, entry: int, place: int, length: int, data: bytes) -> None:
        slots, word = self._slots, self._word(entry)
        slots[word + 1], slots[word + 2] = place, length
        slots[word + 3] = crc32(data, (entry + 1) & 0xFFFFFFFF)
        slots[word] = entry + 1

    def _word(self, entry: int) -> int:
        return entry % self.geometry.slots * _SLOT_WORDS

    # ---- the writer, and readers

    def published(self, entry: int) -> bool:
        """Whether an entry is in the ring."""
        return self._slots[self._word(entry)] == entry + 1

    def head(self, start: int) -> int:
        """The first entry from `start` on that is not in the ring."""
        stop = start + self.geometry.slots
        while start < stop and self.published(start):
            start += 1
        return start

    def record(self, entry: int) -> StepRecord | None:
        """The record of an entry, or None if it is not, or not intact, in the ring; the row is not looked at."""
        word = self._word(entry)
        seq, place, length, crc = self._slots[word : word + 4]
        if seq != entry + 1:
            return None
        data = self._data(entry, place, length)
        if data is None or crc32(data, (entry + 1) & 0xFFFFFFFF) != crc or not self.published(entry):
            return None
        try:
            record = decode(data)
        except ValueError:
            return None
        return record if record.step == entry else None

    def record_crc32(self, entry: int) -> int:
        """The CRC-32 of an intact entry's encoded record."""
        word = self._word(entry)
        return crc32(self._data(entry, *self._slots[word + 1 : word + 3]) or b"")

    def _data(self, entry: int, place: int, length: int) -> bytes | None:
        if length & _OVERFLOW:
            path = overflow_path(self.path.parent, entry)
            return files.read(path) if path.is_file() else None
        arena = self.geometry.arena_bytes
        if place % arena + length > arena:
            return None
        start = self._arena + place % arena
        return self._map[start : start + length]

    def rows(self, first: int, stop: int) -> Row:
        """Rows of entries [first, stop) [n, P]: a view where they are neighbours in the ring, a copy elsewhere."""
        slots = self.geometry.slots
        start, count = first % slots, stop - first
        if start + count <= slots:
            return self._rows[start : start + count]
        return np.concatenate([self._rows[start:], self._rows[: start + count - slots]])

    def intact(self, entry: int) -> StepRecord | None:
        """The record of an entry whose record and row both pass their checks, or None."""
        record = self.record(entry)
        if record is None or not self.geometry.row_length:
            return record
        fits = crc32(self.rows(entry, entry + 1).data) == record.crc32
        return record if fits and self.published(entry) else None


def create(path: Path, geometry: Geometry, first: int, dtype: npt.DTypeLike) -> Ring:
    """A new ring whose first entry is `first`.

    Raises:
        OSError: no room (ENOSPC).
    """
    name = np.dtype(dtype).str.encode()
    head = _HEAD.pack(MAGIC, geometry.to_bytes(), first, name)
    with allocate(path, ring_bytes(geometry)) as file:
        file.seek(0)
        file.write(head + struct.pack("<I", crc32(head)))
    ring = Ring(path, writable=True)
    ring.touch()
    ring.set(Control.TAIL, first)
    return ring


def overflow_path(folder: Path, entry: int) -> Path:
    """File of a record that is too large for the arena."""
    return folder / f"record-{entry:010d}.bin"


def _parse(start: bytes, size: int, path: Path) -> tuple[Geometry, int, np.dtype[np.generic]]:
    head, crc = start[: _HEAD.size], start[_HEAD.size :]
    if len(head) < _HEAD.size or crc != struct.pack("<I", crc32(head)):
        raise DamagedRunError(f"{path}: the ring's header is damaged; unsealed steps cannot be read from it.")
    _, packed, first, name = _HEAD.unpack(head)
    try:
        geometry, dtype = Geometry.from_bytes(packed), _DTYPES[name.rstrip(b"\0")]
    except (ValueError, KeyError) as error:
        raise DamagedRunError(f"{path}: the ring's header makes no sense ({error}).") from None
    if dtype.itemsize != geometry.itemsize or not 0 <= first < _LAST:
        raise DamagedRunError(f"{path}: the ring's header makes no sense (it begins at {first}, with {dtype}).")
    if size < ring_bytes(geometry):
        raise DamagedRunError(
            f"{path}: a ring of {ring_bytes(geometry)} bytes was expected, found {size}; it was truncated."
        )
    return geometry, first, dtype

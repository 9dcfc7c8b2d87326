"""Writing past the page cache, where the system can.

Rows are written once and not read soon. To copy them into the page cache costs more than all else that the writer does
with them, and pushes out what the training reads from the disk. Writes that go past it (`O_DIRECT`) want places, sizes
and memory aligned to the blocks of the disk: so bytes are gathered in an aligned buffer, from which whole blocks go to
the disk. What is less than a block, at both ends, goes through the page cache, and so does everything where the file
system refuses.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from pathlib import Path
from types import TracebackType

from trajrec.checksum import copy_crc32

BLOCK = 4096
BUFFER_BYTES = 1 << 20


class Uncached:
    """Writes bytes one behind the other, from a place in a file on; they are in the file when it is left.

    Args:
        path: of the file.
        fd: a descriptor to write to it through the page cache.
        start: place of the first byte.
    """

    def __init__(self, path: Path, fd: int, start: int) -> None:
        self._fd = self._direct = fd
        if hasattr(os, "O_DIRECT"):
            with contextlib.suppress(OSError):
                self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
        self._buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))
        self._first = self._end = start % BLOCK  # what is in the buffer; its beginning is a block's
        self._place = start - self._first

    def __enter__(self) -> Uncached:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            if self._direct != self._fd:
                os.close(self._direct)

    def write(self, data: memoryview) -> int:
        """Writes bytes behind those before.

        Returns:
            The CRC-32 of what goes into the file.

        Raises:
            OSError: of the system; any part of it may have been written.
        """
        crc = 0
        while data:
            count = min(len(data), BUFFER_BYTES - self._end)
            crc = copy_crc32(self._buffer[self._end : self._end + count], data[:count], crc)
            self._end, data = self._end + count, data[count:]
            if self._end == BUFFER_BYTES:
                self._flush()
        return crc

    def _flush(self) -> None:
        first, end = -(-self._first // BLOCK) * BLOCK, self._end // BLOCK * BLOCK
        if first < end:
            self._out(self._fd, self._first, first)
            self._out_whole(first, end)
            self._first = end
        self._out(self._fd, self._first, self._end)
        self._place, self._first, self._end = self._place + BUFFER_BYTES, 0, 0

    def _out_whole(self, first: int, end: int) -> None:
        """Writes whole blocks, through the page cache where the file system says that it cannot do without."""
        try:
            self._out(self._direct, first, end)
        except OSError as error:
            if error.errno != errno.EINVAL or self._direct == self._fd:
                raise
            os.close(self._direct)
            self._direct = self._fd
            self._out(self._fd, first, end)

    def _out(self, fd: int, first: int, end: int) -> None:
        while first < end:
            first += os.pwrite(fd, self._buffer[first:end], self._place + first)

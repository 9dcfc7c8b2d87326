"""The rows of an uncompressed recording: one plain file that grows, and in the end becomes the packed file.

    4096 bytes, reserved | row of step 0 | row of step 1 | ...        little-endian, without gaps

Sealing appends rows to it; packing puts the head of an HDF5 file before them and the rest of it behind them (`wrap`),
so that every row is written once. Which rows count is said by the segments: what lies behind the last row that one of
them names is of no meaning, nobody reads it, and the next writer cuts it off. The same holds of the head until the file
is renamed, so packing may be cut off at any moment and begin again.

Rows are written and read at their places, with no position kept in between, so several readers may share a file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path

from trajrec.checksum import crc32, crc32_combine
from trajrec.records import Row
from trajrec.runfile import files
from trajrec.runfile.format import trailer

HEAD_BYTES = 4096
BLOCK_BYTES = 4 * 1024**2
BLOCK_ROWS = 1024
PIECE_BYTES = 1 << 19


@dataclass(frozen=True, slots=True)
class RowFile:
    """A file of rows, as whoever writes it sees it.

    Attributes:
        path: of the file.
        row_bytes: size of a row.
    """

    path: Path
    row_bytes: int

    def place(self, step: int) -> int:
        """Where the row of a step begins."""
        return HEAD_BYTES + step * self.row_bytes

    def cut(self, stop: int) -> None:
        """Cuts off what lies behind the rows before `stop`."""
        with _opened(self.path) as fd:
            if os.fstat(fd).st_size > self.place(stop):
                os.ftruncate(fd, self.place(stop))

    def write(self, first: int, blocks: Iterable[Row]) -> None:
        """Writes blocks of rows [n, P] in their places from step `first` on, and syncs them."""
        with _opened(self.path) as fd:
            at = self.place(first)
            for block in blocks:
                data = block.astype(block.dtype.newbyteorder("<"), order="C", copy=False).data.cast("B")
                _write_at(fd, data, at)
                at += len(data)
            os.fsync(fd)

    def has(self, stop: int) -> bool:
        """Whether the file is long enough for the rows before `stop`."""
        return self.path.exists() and self.path.stat().st_size >= self.place(stop)

    @contextlib.contextmanager
    def restored(self, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Cuts the file back to its present length if what is done meanwhile fails, unless that holds then."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            yield
        except BaseException:
            if not unless():
                with contextlib.suppress(FileNotFoundError), self._open() as file:
                    file.truncate(size)
            raise

    def _open(self) -> BufferedRandom:
        return open(files.in_place(self.path), "r+b")

    def wrap(self, skeleton: Path, crc32s: Iterable[int], stop: int) -> None:
        """Makes the file an HDF5 file: everything but the rows comes from `skeleton`, which lacks only them.

        Args:
            skeleton: an HDF5 file of the same length, with nothing where the rows are.
            crc32s: of the rows before `stop`, from which that of the whole file follows without reading them.
            stop: the step after the last.
        """
        end = self.place(stop)
        with self.restored(), skeleton.open("rb") as source, self._open() as file:
            head = source.read(HEAD_BYTES)
            crc = crc32(head)
            for of_row in crc32s:
                crc = crc32_combine(crc, int(of_row), self.row_bytes)
            source.seek(end)
            file.truncate(end)
            file.seek(end)
            while piece := source.read(PIECE_BYTES):
                crc = crc32(piece, crc)
                file.write(piece)
            file.write(trailer.trailer(file.tell(), crc))
            file.seek(0)
            file.write(head)
            file.flush()
            os.fsync(file.fileno())


class SharedRows:
    """A file of rows, opened for reading when it is first needed, and until it is closed or forgotten."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None
        self._closed = False

    def fileno(self) -> int:
        """Its descriptor.

        Raises:
            ValueError: it was closed.
        """
        if self._closed:
            raise ValueError("it is closed")
        if self._fd is None:
            self._fd = files.readable(self.path)
        return self._fd

    def close(self) -> None:
        """Closes the file."""
        if self._fd is not None and not self._closed:
            os.close(self._fd)
        self._closed = True

    def __del__(self) -> None:
        self.close()


def read_at(fd: int, start: int, out: Row) -> None:
    """Fills `out` with the bytes from `start` on.

    Raises:
        OSError: the file ends before.
    """
    view = out.data.cast("B")
    while view:
        count = os.preadv(fd, [view], start)
        if not count:
            raise OSError(f"it ends {len(view)} bytes too early")
        view, start = view[count:], start + count


def rows_at_once(row_bytes: int) -> int:
    """How many rows are best read together."""
    return max(1, min(BLOCK_ROWS, BLOCK_BYTES // max(1, row_bytes)))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The file, with its head, which takes up its room from the beginning."""
    fd = files.in_place(path, os.O_CREAT)
    try:
        if os.fstat(fd).st_size < HEAD_BYTES:
            _write_at(fd, memoryview(bytes(HEAD_BYTES)), 0)
        yield fd
    finally:
        os.close(fd)


def _write_at(fd: int, data: memoryview, start: int) -> None:
    """Writes in small pieces: of a large one, what the kernel copies has left the processor's cache on its way."""
    while data:
        count = os.pwrite(fd, data[:PIECE_BYTES], start)
        data, start = data[count:], start + count

"""The files of a recording in order, a few of them open at a time.

A long run of a large model has thousands of segments while it is being recorded; a process may not have that many
files open.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock

from trajrec.errors import DamagedRunError
from trajrec.records import RunSpec
from trajrec.runfile.folder import Segment
from trajrec.runfile.format.rowfile import SharedRows
from trajrec.runfile.reader.stored import StoredRun

OPEN_FILES = 8


class Pieces:
    """Consecutive files, each holding steps [first, stop).

    Args:
        segments: the files.
        rows: of the folder that they are in, where rows of segments without any are.
        spec: of the run that they must all belong to; None: that is not asked.
    """

    def __init__(self, segments: Sequence[Segment], rows: Path | None = None, spec: RunSpec | None = None) -> None:
        self.segments = tuple(segments)
        self._spec = spec
        self._rows = None if rows is None else SharedRows(rows)
        self._firsts = [segment.first for segment in segments]
        self._open: OrderedDict[int, StoredRun] = OrderedDict()
        self._lock = Lock()
        self._check()

    def _check(self) -> None:
        for before, after in zip(self.segments, self.segments[1:], strict=False):
            if before.stop != after.first:
                raise DamagedRunError(
                    f"{after.path.parent}: steps {before.stop} to {after.first - 1} are missing. A segment was "
                    "deleted or renamed; put it back, or delete the later ones to use the recording up to there."
                )

    @property
    def stop(self) -> int:
        """The step after the last."""
        return self.segments[-1].stop if self.segments else 0

    def at(self, step: int) -> StoredRun:
        """The open file that holds a step."""
        return self.open(bisect_right(self._firsts, step) - 1)

    def open(self, index: int) -> StoredRun:
        """The open file of a segment."""
        with self._lock:
            if index not in self._open:
                self._open[index] = _checked(self.segments[index], self._rows, self._spec)
                if len(self._open) > OPEN_FILES:
                    self._open.popitem(last=False)[1].close()
            self._open.move_to_end(index)
            return self._open[index]

    def __iter__(self) -> Iterator[StoredRun]:
        return (self.open(index) for index in range(len(self.segments)))

    def close(self) -> None:
        """Closes all files."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()
            if self._rows is not None:
                self._rows.close()


def _checked(segment: Segment, rows: SharedRows | None, spec: RunSpec | None) -> StoredRun:
    stored = StoredRun(segment.path, rows)
    if spec is not None and not stored.spec().is_like(spec):
        stored.close()
        raise DamagedRunError(
            f"{segment.path}: it belongs to another run, or to another model, than the manifest says."
        )
    if (stored.first, stored.stop) != (segment.first, segment.stop):
        stored.close()
        raise DamagedRunError(
            f"{segment.path}: its name says steps {segment.first} to {segment.stop - 1}, "
            f"it holds {stored.first} to {stored.stop - 1}."
        )
    return stored

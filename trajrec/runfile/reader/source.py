"""Where a run's data are at the moment: a packed file, or a folder with segments, ring and raw keyframes.

A run may be opened while it is being recorded. A `Source` is a snapshot: it knows the steps that were there when it was
taken, and where each of them lay. Meanwhile the writer seals ring entries into segments and in the end packs the
folder into one file; whoever finds something gone (`MovedError`) takes a new snapshot and looks again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trajrec.errors import DamagedRunError, NotARunError, RunFileError
from trajrec.records import MOST_GROUPS, Inputs, Keyframe, Row, RunSpec, StepRecord
from trajrec.runfile.folder import SUFFIX, Folder, Segment
from trajrec.runfile.format.arrays import has_inputs, read_inputs, read_keyframe
from trajrec.runfile.format.table import StepTable, table_of
from trajrec.runfile.lock import holder
from trajrec.runfile.reader.segments import Pieces
from trajrec.runfile.reader.soundness import sound_keyframe, sound_table
from trajrec.runfile.reader.stored import StoredRun
from trajrec.runfile.ring import Ring

TABLE_STEPS = 1024


class MovedError(Exception):
    """What was looked for is no longer where the snapshot says."""


class PackedSource:
    """A packed run file.

    Attributes:
        spec: of the run; `state`, `gaps` and `resumed` as the file says.
        stop: the step after the last.
        has_rows: whether rows of single steps are kept.
        keyframes: steps that have a keyframe.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = StoredRun(path)
        head = self._file.head
        if head.first != 0 or self._file.entries == 0:
            self._file.close()
            raise NotARunError(f"{path} is a single segment of a recording. Open the folder {path.parent} instead.")
        self.spec: RunSpec = self._file.spec()
        self.state, self.gaps, self.resumed = head.state, head.gaps, head.resumed
        self.stop = self._file.stop
        self.has_rows = self._file.has_rows
        self.compression = head.compression
        try:
            self.keyframes = self._file.keyframe_steps()
        except DamagedRunError:
            self._file.close()
            raise

    def size(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size

    def block(self, step: int) -> tuple[int, int]:
        """Steps [first, stop) whose rows are best read together with that of `step`."""
        return self._file.block(step)

    def rows(self, first: int, stop: int) -> Row:
        """Rows of steps [first, stop) [n, P], which lie in one block; not checked."""
        return self._file.rows(first, stop)

    def table(self, step: int) -> StepTable:
        """Records of a stretch of steps around `step`."""
        first = step - step % TABLE_STEPS
        return self._file.table(first, min(first + TABLE_STEPS, self.stop))

    def keyframe(self, step: int, only: str | None = None) -> Keyframe:
        """A keyframe; with `only`, just the array of that path."""
        return self._file.keyframe(step, only)

    def inputs(self, step: int) -> Inputs:
        """The inputs of a step."""
        return self._file.inputs(step)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class FolderSource:
    """A folder that is being recorded, or was left by a recorder that was killed. Attributes: see PackedSource."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        folder.check_readable()
        manifest = folder.read_manifest()
        self.path = folder.path
        self.spec = manifest.spec
        self.resumed = manifest.resumed
        self.compression = manifest.compression
        self.has_rows = manifest.keep == "steps"
        self.state = "recovered" if holder(folder.lock) is None else "recording"
        self._pieces, self._ring, self._tail = _pieces_and_ring(folder, self.spec)
        self.stop = self._pieces.stop + (len(self._tail) if self._tail is not None else 0)
        if self.stop == 0:
            self.close()
            raise NotARunError(f"{folder.path}: nothing is recorded yet.")
        self.gaps = self._ring.gaps() if self._ring else ()
        self.keyframes = tuple(step for step in folder.keyframes() if step < self.stop)

    def size(self) -> int:
        """Bytes on disk."""
        return self._folder.size()

    def block(self, step: int) -> tuple[int, int]:
        """Steps [first, stop) whose rows are best read together with that of `step`."""
        if step < self._pieces.stop:
            return self._piece(step).block(step)
        rows = self._ring.geometry.chunk_rows if self._ring else 1
        first = max(step - step % rows, self._pieces.stop)
        return first, min(step - step % rows + rows, self.stop)

    def rows(self, first: int, stop: int) -> Row:
        """Rows of steps [first, stop) [n, P], which lie in one block; not checked."""
        if first < self._pieces.stop:
            return self._sealed_rows(first, stop)
        assert self._ring is not None
        rows = np.array(self._ring.rows(first, stop))
        if not all(self._ring.published(step) for step in range(first, stop)):
            raise MovedError
        return rows

    def _sealed_rows(self, first: int, stop: int) -> Row:
        piece = self._piece(first)
        try:
            return piece.rows(first, stop)
        except DamagedRunError as error:
            if piece.path.exists() and piece.rows_path.exists():
                raise
            raise MovedError from error

    def table(self, step: int) -> StepTable:
        """Records of a stretch of steps around `step`."""
        if step >= self._pieces.stop:
            assert self._tail is not None
            return self._tail
        piece = self._piece(step)
        first = step - (step - piece.first) % TABLE_STEPS
        return piece.table(first, min(first + TABLE_STEPS, piece.stop))

    def _piece(self, step: int) -> StoredRun:
        try:
            return self._pieces.at(step)
        except NotARunError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise MovedError from error
            raise

    def keyframe(self, step: int, only: str | None = None) -> Keyframe:
        """A keyframe; with `only`, just the array of that path."""
        path = self._folder.keyframe(step)
        try:
            return sound_keyframe(read_keyframe(path, only), step, self.spec, path, only)
        except FileNotFoundError as error:
            raise MovedError from error

    def inputs(self, step: int) -> Inputs:
        """The inputs of a step."""
        if step < self._pieces.stop:
            return self._piece(step).inputs(step)
        try:
            return read_inputs(self._folder.inputs(step))
        except FileNotFoundError as error:
            raise MovedError from error

    def close(self) -> None:
        """Closes the files."""
        self._pieces.close()


Source = PackedSource | FolderSource


def find(path: Path) -> Source:
    """The recording at a path: a packed file, a folder, or the output whose folder is there.

    Raises:
        NotARunError, DamagedRunError, NewerFormatError: as they say.
    """
    folder = Folder(path) if path.name.endswith(SUFFIX) else Folder.of(path)
    while True:
        before = _what_is_there(folder)
        try:
            if before[0]:
                return PackedSource(folder.output)
            if before[1]:
                return FolderSource(folder)
            return FolderSource(Folder(path)) if path.is_dir() else PackedSource(path)
        except (MovedError, RunFileError):
            if _what_is_there(folder) == before:
                raise
            # It was packed, and its folder removed, while we looked.


def _what_is_there(folder: Folder) -> tuple[bool, bool]:
    return folder.output.is_file(), folder.path.is_dir()


def _present(segments: list[Segment]) -> list[Segment]:
    if segments and segments[0].first != 0:
        raise DamagedRunError(f"{segments[0].path.parent}: the segments before step {segments[0].first} are missing.")
    return segments


def _pieces_and_ring(folder: Folder, spec: RunSpec) -> tuple[Pieces, Ring | None, StepTable | None]:
    """The sealed segments, the ring, and the records that follow in it."""
    while True:
        pieces = Pieces(_present(folder.segments()), folder.rows, spec)
        ring, tail = _ring_table(folder, spec, pieces.stop)
        segments = folder.segments()
        if spec.inputs != "store" or not segments or segments[-1].stop == pieces.stop:
            return pieces, ring, tail
        pieces.close()  # raw inputs went into a segment while we looked for them


def _ring_table(folder: Folder, spec: RunSpec, first: int) -> tuple[Ring | None, StepTable | None]:
    """The ring, and the records of its intact entries from `first` on."""
    try:
        ring = Ring(folder.ring)
    except (OSError, ValueError, DamagedRunError):
        return None, None  # the sealed segments stand without it
    records: list[StepRecord] = []
    while len(records) < ring.geometry.slots and (record := ring.intact(first + len(records))) is not None:
        if not has_inputs(folder.inputs(record.step), spec, record.step):
            break
        records.append(record)
    return ring, _sound_tail(ring, records, spec) if records else None


def _sound_tail(ring: Ring, records: list[StepRecord], spec: RunSpec) -> StepTable:
    """The table of records in the ring.

    Raises:
        DamagedRunError: they, or the rows of the ring, are not of this run.
    """
    if ring.geometry.row_length not in (0, spec.row_length) or ring.dtype.name != spec.dtype:
        raise DamagedRunError(
            f"{ring.path}: the ring has rows of {ring.geometry.row_length} values in {ring.dtype}, "
            f"{spec.row_length} in {spec.dtype} were expected."
        )
    if len({record.hyper.shape[1] for record in records}) > 1 or max(len(r.hyper) for r in records) > MOST_GROUPS:
        raise DamagedRunError(f"{ring.path}: the hyperparameters of its steps are not those of this run.")
    return sound_table(table_of(records), spec, ring.path)

"""From ring to segment, and from segments to one packed file.

Sealing takes entries [first, stop) out of the ring, checks them and writes them as a segment that appears under its
name only when it is on the disk. The inputs of a step, where they are recorded, belong to its entry: they go into the
same segment, and an entry whose inputs did not survive a power cut is not intact. Without compression the rows go into
the folder's row file first, and are synced before the segment that speaks of them appears.

Packing puts segments one behind the other: chunks are copied as they are stored where a segment begins on a multiple of
R (it nearly always does); rows are decoded and written again elsewhere. Rows of a row file stay where they are: all
else becomes an HDF5 file with a hole in their place, and is put around them (`RowFile.wrap`).

Only the writer process imports this module: it writes HDF5. Files are not closed when something fails, because
closing after an I/O error crashes the HDF5 library; the process ends instead (see writer.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import h5py
import numpy as np

from trajrec.errors import DamagedRunError, OutputExistsError
from trajrec.records import Row, StepRecord
from trajrec.runfile import layout, trailer
from trajrec.runfile.columns import Columns, ColumnSizes
from trajrec.runfile.folder import Folder, Manifest, durable, sync
from trajrec.runfile.geometry import CHUNK_ROWS, chunk_shape
from trajrec.runfile.keyfile import has_inputs, read_inputs, read_keyframe
from trajrec.runfile.layout import Head
from trajrec.runfile.pieces import Pieces
from trajrec.runfile.ring import Ring
from trajrec.runfile.rowfile import HEAD_BYTES, PIECE_BYTES, RowFile
from trajrec.runfile.stored import StoredRun
from trajrec.runfile.table import table_of
from trajrec.runfile.verify import check_made

_ENTRIES = 4096


def seal(folder: Folder, manifest: Manifest, ring: Ring, first: int, stop: int) -> int:
    """Seals entries [first, stop) of the ring, as far as they are intact, and returns where it stopped."""
    with _undone(folder, manifest, first):
        records: list[StepRecord] = []
        intact = _intact(folder, manifest, ring, first, stop)
        if manifest.plain_rows:
            row_file(folder, manifest).write(first, _rows_of(intact, ring, first, records))
        else:
            records.extend(intact)
        if not records:
            return first
        stop = first + len(records)
        _write_segment(folder, manifest, ring, records)
    folder.drop_sealed(stop)
    return stop


def _write_segment(folder: Folder, manifest: Manifest, ring: Ring, records: Sequence[StepRecord]) -> None:
    first, stop = records[0].step, records[-1].step + 1
    table = table_of(records, [ring.record_crc32(entry) for entry in range(first, stop)])
    with durable(folder.segment(first, stop)) as tmp:
        inside = ring.geometry.row_length and not manifest.plain_rows
        head = _head(manifest, "recording", first)
        file = layout.begin(tmp, head, manifest.spec, len(records) if inside else 0, cache=0)
        if inside:
            layout.write_rows(file, _blocks(ring, first, stop))
        columns = Columns(file, ColumnSizes.of(table), table.hyper.shape[1:], manifest.compression)
        columns.append(table)
        _take_in_inputs(file, folder, manifest, range(first, stop))
        file.close()
        trailer.append(tmp)


def row_file(folder: Folder, manifest: Manifest) -> RowFile:
    """The folder's row file."""
    spec = manifest.spec
    return RowFile(folder.rows, spec.row_length * np.dtype(spec.dtype).itemsize)


def _undone(folder: Folder, manifest: Manifest, first: int) -> AbstractContextManager[None]:
    """Takes back what was appended to the row file, if there is one, where its segment does not appear after all."""
    if not manifest.plain_rows:
        return nullcontext()
    return row_file(folder, manifest).restored(unless=lambda: any(s.first == first for s in folder.segments()))


def _intact(folder: Folder, manifest: Manifest, ring: Ring, first: int, stop: int) -> Iterator[StepRecord]:
    stored = manifest.spec.inputs == "store"
    for entry in range(first, stop):
        record = ring.intact(entry)
        if record is None or (stored and not has_inputs(folder.inputs(entry), manifest.spec, entry)):
            return
        yield record


def _take_in_inputs(file: h5py.File, folder: Folder, manifest: Manifest, steps: range) -> None:
    if manifest.spec.inputs != "store":
        return
    for step in steps[steps.start == 0 :]:
        arrays = read_inputs(folder.inputs(step)).arrays
        layout.write_arrays(file, layout.inputs_name(step), arrays, manifest.compression)


def _rows_of(intact: Iterator[StepRecord], ring: Ring, first: int, records: list[StepRecord]) -> Iterator[Row]:
    """The rows of intact entries from `first` on, which `records` is given meanwhile.

    A few at a time: checking has brought them near to the processor.
    """
    few = max(1, PIECE_BYTES // max(1, ring.geometry.row_bytes))
    start = first
    for record in intact:
        records.append(record)
        if record.step + 1 - start == few:
            yield ring.rows(start, record.step + 1)
            start = record.step + 1
    if start < first + len(records):
        yield ring.rows(start, first + len(records))


def _blocks(ring: Ring, first: int, stop: int) -> Iterator[Row]:
    rows = ring.geometry.chunk_rows
    for start in range(first, stop, rows):
        yield ring.rows(start, min(start + rows, stop))


def _head(manifest: Manifest, state: str, first: int, gaps: Sequence[tuple[int, int]] = ()) -> Head:
    spec = manifest.spec
    chunks = None if manifest.plain_rows else chunk_shape(spec.row_length, np.dtype(spec.dtype).itemsize)
    return Head(state, first, manifest.keep, manifest.compression, chunks, tuple(gaps), manifest.resumed)


def pack(folder: Folder, manifest: Manifest, state: str, gaps: Sequence[tuple[int, int]]) -> Path:
    """Packs the sealed segments and keyframes of a folder into its output; the folder can be removed then.

    Raises:
        DamagedRunError: steps are missing, or do not match their checksums; the folder stays.
        OutputExistsError: something has the output's name; the folder stays.
    """
    _check_free(folder)
    pieces = Pieces(folder.segments(), folder.rows)
    if not pieces.segments or pieces.segments[0].first != 0:
        raise DamagedRunError(f"{folder.path}: nothing to pack: its first steps were not recorded, or are missing.")
    tmp, count = folder.path / "packed.h5.tmp", pieces.stop if manifest.keep == "steps" else 0
    with _removed_on_failure(tmp):
        file = layout.begin(tmp, _head(manifest, state, 0, gaps), manifest.spec, count)
        around = manifest.plain_rows and file["weights"].id.get_offset() == HEAD_BYTES
        if count and not around:
            _copy_rows(file["weights"], pieces, 0, pieces.stop)
        _copy_steps(file, folder, manifest, pieces, 0, pieces.stop)
        _fold_keyframes(file, folder, pieces.stop)
        crc32s = file["steps/crc32"][:] if around else ()
        file.close()
        if around:
            row_file(folder, manifest).wrap(tmp, crc32s, pieces.stop)
        else:
            trailer.append(tmp)
            sync(tmp)
        pieces.close()
        made = folder.rows if around else tmp
        check_made(made, folder.path)
        _check_free(folder)
        made.replace(folder.output)
    sync(folder.output.parent)
    return folder.output


def _check_free(folder: Folder) -> None:
    if os.path.lexists(folder.output):
        raise OutputExistsError(
            f"{folder.output} has appeared while {folder.path} was recorded, and was left as it is. Move it away, then "
            f"run `trajrec pack {folder.path}`."
        )


@contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def copy_segment(folder: Folder, manifest: Manifest, pieces: Pieces, first: int, stop: int) -> None:
    """Makes a segment of steps [first, stop) out of others; rows only where the manifest keeps them."""
    inside = manifest.keep == "steps" and not manifest.plain_rows
    with durable(folder.segment(first, stop)) as tmp:
        head = _head(manifest, "recording", first)
        file = layout.begin(tmp, head, manifest.spec, stop - first if inside else 0)
        if inside:
            _copy_rows(file["weights"], pieces, first, stop)
        _copy_steps(file, folder, manifest, pieces, first, stop)
        file.close()
        trailer.append(tmp)


def _gather_rows(rows: RowFile, piece: StoredRun, first: int, stop: int) -> None:
    """Brings rows that are elsewhere into the row file.

    Raises:
        DamagedRunError: the row file lacks rows that should be there.
    """
    if not piece.in_folder:
        with rows.restored():
            rows.write(first, _read_in_blocks(piece, first, stop))
    elif not rows.has(stop):
        raise DamagedRunError(f"{rows.path}: rows before step {stop} are missing; the file was cut off.")


def _read_in_blocks(piece: StoredRun, first: int, stop: int) -> Iterator[Row]:
    while first < stop:
        end = min(piece.block(first)[1], stop)
        yield piece.rows(first, end)
        first = end


def _copy_rows(weights: h5py.Dataset, pieces: Pieces, first: int, stop: int) -> None:
    rows = weights.chunks[0] if weights.chunks else CHUNK_ROWS
    for start in range(first, stop, rows):
        end, source = min(start + rows, stop), pieces.at(start)
        if weights.chunks and source.head.chunks == weights.chunks and source.block(start) == (start, end):
            for column, mask, data in source.raw_chunks(start):
                weights.id.write_direct_chunk((start - first, column), data, mask)
        else:
            weights[start - first : end - first] = _gather(pieces, start, end)


def _gather(pieces: Pieces, first: int, stop: int) -> Row:
    parts = []
    while first < stop:
        source = pieces.at(first)
        parts.append(source.rows(first, min(stop, source.stop)))
        first = min(stop, source.stop)
    return np.concatenate(parts)


def _copy_steps(file: h5py.File, folder: Folder, manifest: Manifest, pieces: Pieces, first: int, stop: int) -> None:
    """Copies /steps and /batches, and /inputs where they are stored; rows that belong into the row file go there."""
    clips = [(k, max(s.first, first), min(s.stop, stop)) for k, s in enumerate(pieces.segments)]
    clips = [(k, a, b) for k, a, b in clips if a < b]
    sizes, shapes = [], []
    for k, a, b in clips:
        piece = pieces.open(k)
        if manifest.plain_rows:
            _gather_rows(row_file(folder, manifest), piece, a, b)
        sizes.append(piece.column_sizes(a, b))
        shapes.append(piece.hyper_shape)
    columns = Columns(file, ColumnSizes.total(sizes), max(shapes), manifest.compression)
    for k, a, b in clips:
        sound = _is_sound(pieces.open(k))
        for start in range(a, b, _ENTRIES):
            columns.append(pieces.open(k).table(start, min(start + _ENTRIES, b), sound))
    if manifest.spec.inputs == "store":
        for step in range(max(first, 1), stop):
            pieces.at(step).copy_inputs(step, file)


def _is_sound(piece: StoredRun) -> bool:
    """Whether the checksum of a whole file says so: without rows inside, a short way to check all records."""
    return (piece.in_folder or not piece.has_rows) and trailer.fault(piece.path) is None


def _fold_keyframes(file: h5py.File, folder: Folder, stop: int) -> None:
    """Keyframes stay as they are: compressing them would save a tenth and be most of the work."""
    last: dict[str, tuple[str, bytes]] = {}
    for step, path in folder.keyframes().items():
        if step >= stop:
            continue
        try:
            keyframe = read_keyframe(path)
        except DamagedRunError:
            continue  # power was cut before it was synced; the steps between can still be recomputed
        layout.write_arrays(file, layout.keyframe_name(step), keyframe.arrays, "none", last)

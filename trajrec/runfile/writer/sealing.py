"""Sealing: entries of the ring become a segment.

Sealing takes entries [first, stop) out of the ring, checks them and writes them as a segment that appears under its
name only when it is on the disk. The inputs of a step, where they are recorded, belong to its entry: they go into the
same segment, and an entry whose inputs did not survive a power cut is not intact. Without compression the rows go into
the folder's row file first, and are synced before the segment that speaks of them appears.

Only the writer process imports this module: it writes HDF5. Files are not closed when something fails, because
closing after an I/O error crashes the HDF5 library; the process ends instead (see loop.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import h5py
import numpy as np

from trajrec.records import Row, StepRecord
from trajrec.runfile.durable import durable
from trajrec.runfile.folder import Folder
from trajrec.runfile.format import layout, trailer
from trajrec.runfile.format.arrays import has_inputs, read_inputs
from trajrec.runfile.format.geometry import chunk_shape
from trajrec.runfile.format.layout import Head
from trajrec.runfile.format.rowfile import PIECE_BYTES, RowFile
from trajrec.runfile.format.table import table_of
from trajrec.runfile.manifest import Manifest
from trajrec.runfile.ring import Ring
from trajrec.runfile.writer.steps import StepColumns, sizes_of


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
        head = head_of(manifest, "recording", first)
        file = layout.begin(tmp, head, manifest.spec, len(records) if inside else 0, cache=0)
        if inside:
            layout.write_rows(file, _blocks(ring, first, stop))
        StepColumns(file, sizes_of(table), table["hyper"].shape[1:], manifest.compression).append(table)
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


def head_of(manifest: Manifest, state: str, first: int, gaps: Sequence[tuple[int, int]] = ()) -> Head:
    """The head of a segment, or of a packed run, that begins with step `first`."""
    spec = manifest.spec
    chunks = None if manifest.plain_rows else chunk_shape(spec.row_length, np.dtype(spec.dtype).itemsize)
    return Head(state, first, manifest.keep, manifest.compression, chunks, tuple(gaps), manifest.resumed)

"""Packing: the segments of a folder become one HDF5 file, chunk by chunk as they are.

Packing puts segments one behind the other: chunks are copied as they are stored where a segment begins on a multiple of
R (it nearly always does); rows are decoded and written again elsewhere. Rows of a row file stay where they are: all
else becomes an HDF5 file with a hole in their place, and is put around them (`RowFile.wrap`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from trajrec.errors import DamagedRunError, OutputExistsError
from trajrec.records import Row
from trajrec.runfile.durable import durable, sync
from trajrec.runfile.folder import Folder
from trajrec.runfile.format import layout, trailer
from trajrec.runfile.format.arrays import read_keyframe
from trajrec.runfile.format.geometry import CHUNK_ROWS
from trajrec.runfile.format.rowfile import HEAD_BYTES, RowFile
from trajrec.runfile.manifest import Manifest
from trajrec.runfile.reader.segments import Pieces
from trajrec.runfile.reader.stored import StoredRun
from trajrec.runfile.reader.verify import check_made
from trajrec.runfile.writer.sealing import head_of, row_file
from trajrec.runfile.writer.steps import StepColumns, total

_ENTRIES = 4096


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
        file = layout.begin(tmp, head_of(manifest, state, 0, gaps), manifest.spec, count)
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
    manifest = replace(manifest, spec=manifest.spec.until(stop - 1))
    inside = manifest.keep == "steps" and not manifest.plain_rows
    with durable(folder.segment(first, stop)) as tmp:
        head = head_of(manifest, "recording", first)
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
    """Copies rows; those of an earlier stretch end with zeros, which nobody reads."""
    rows = weights.chunks[0] if weights.chunks else CHUNK_ROWS
    for start in range(first, stop, rows):
        end, source = min(start + rows, stop), pieces.at(start)
        alike = source.row_length == weights.shape[1] and source.head.chunks == weights.chunks
        if weights.chunks and alike and source.block(start) == (start, end):
            for column, mask, data in source.raw_chunks(start):
                weights.id.write_direct_chunk((start - first, column), data, mask)
        else:
            weights[start - first : end - first] = _gather(pieces, start, end, weights.shape[1])


def _gather(pieces: Pieces, first: int, stop: int, length: int) -> Row:
    parts = []
    while first < stop:
        source = pieces.at(first)
        rows = source.rows(first, min(stop, source.stop))[:, :length]
        parts.append(np.pad(rows, ((0, 0), (0, length - rows.shape[1]))) if rows.shape[1] < length else rows)
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
    columns = StepColumns(file, total(sizes), max(shapes), manifest.compression)
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

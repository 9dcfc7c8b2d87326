"""The HDF5 layout of a run: the only module that knows its names. docs/format.md describes it byte by byte.

A segment and a packed run are laid out alike. Entry k of every dataset belongs to step first + k; entry 0 of a run
is step 0, the weights before training, so that `weights[t]` and `steps/loss[t]` of a packed run are those of step t.

    attributes    format, version, created, state, first, keep, gaps, resumed
    /spec         one JSON attribute for every field of RunSpec
    /weights      (n, P) in chunks (R, C), or in one piece where there is no compression; (0, P) where rows of single
                  steps are not kept, and in segments whose rows are in a file of their own (rowfile.py)
    /steps        step, epoch, loss, time, crc32, record_crc32 (n); hyper (n, G, H)
    /batches      ids, weights, rng, parts, digests, changes: flat; NAME_offsets (n + 1)
    /keyframes    the step as ten digits: the keyframe's arrays by their paths, each with its CRC-32 (packed runs)
    /inputs       the same of the inputs of every step from 1 on, where the spec says that they are stored

What finds a damaged byte: the file format's own checksums for structure and attributes (hence libver v110 and
strings of fixed length), the CRC-32 of its step for a row, that of the record for the columns, an attribute for an
array of a keyframe, and behind the end of the file a CRC-32 of all of it (trailer.py). The columns have Fletcher-32
too, so that any HDF5 program finds damage; by itself it passes a sector of zeros.
Files are only ever written whole under another name, synced and renamed; none is opened again for writing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import numpy.typing as npt

from trajrec.checksum import crc32
from trajrec.records import Row, RunSpec
from trajrec.runfile.rowfile import HEAD_BYTES
from trajrec.runfile.table import PLAIN, RAGGED, StepTable, widened

FORMAT = "trajrec"
VERSION = "1.0"
LIBVER = ("v110", "v110")
STEP_DIGITS = 10
COLUMN_CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Head:
    """What a file says of itself, besides the spec.

    Attributes:
        state: "recording" (a segment), "complete" or "recovered".
        first: step of entry 0.
        keep: "steps", or "keyframes" where rows of single steps are not kept.
        compression: "zstd" or "none".
        chunks: (R, C) of /weights; None where it lies in one piece.
        gaps: first and last step of stretches that went unrecorded.
        resumed: steps that a recording was taken up again at.
    """

    state: str
    first: int
    keep: str
    compression: str
    chunks: tuple[int, int] | None
    gaps: tuple[tuple[int, int], ...] = ()
    resumed: tuple[int, ...] = ()


def filters(compression: str) -> dict[str, Any]:
    """The filters of /weights, as arguments of `create_dataset`."""
    return {} if compression == "none" else {"shuffle": True, "compression": hdf5plugin.Zstd(clevel=1)}


def begin(path: Path, head: Head, spec: RunSpec, rows: int, cache: int | None = None) -> h5py.File:
    """A new file with its attributes, its spec and /weights [rows, P]; `cache` is the chunk cache in bytes.

    /weights comes first: where it lies in one piece, it then begins at `HEAD_BYTES`, like the rows of a row file.
    """
    file = h5py.File(path, "w", libver=LIBVER, locking=False, rdcc_nbytes=cache, **_alignment(head, rows))
    _create_weights(file, head, spec, rows)
    for name, value in _attributes(head, spec).items():
        file.attrs[name] = np.bytes_(value)
    file.attrs["first"] = np.int64(head.first)
    file.create_group("keyframes")  # always there, so that one that cannot be found is a fault
    if spec.inputs == "store":
        file.create_group("inputs")
    group = file.create_group("spec")
    for name, value in spec.to_json().items():
        group.attrs[name] = np.bytes_(json.dumps(value))
    return file


def _alignment(head: Head, rows: int) -> dict[str, int]:
    """Whatever is larger begins on a multiple of `HEAD_BYTES`, where /weights lies in one piece."""
    return {} if head.chunks or not rows else {"alignment_threshold": HEAD_BYTES, "alignment_interval": HEAD_BYTES}


def _create_weights(file: h5py.File, head: Head, spec: RunSpec, rows: int) -> None:
    shape, dtype = (rows, spec.row_length), np.dtype(spec.dtype).newbyteorder("<")
    if head.chunks:
        options = filters(head.compression)
        file.create_dataset("weights", shape, dtype, maxshape=(None, shape[1]), chunks=head.chunks, **options)
        return
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.CONTIGUOUS)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_obj_track_times(False)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)  # a place in the file, and nothing written there
    kind, space = h5py.h5t.py_create(dtype), h5py.h5s.create_simple(shape)
    h5py.h5d.create(file.id, b"weights", kind, space, plan)


def _attributes(head: Head, spec: RunSpec) -> dict[str, str]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "created": spec.created,
        "state": head.state,
        "keep": head.keep,
        "gaps": json.dumps(head.gaps),
        "resumed": json.dumps(head.resumed),
    }


def write_rows(file: h5py.File, blocks: Iterable[Row]) -> None:
    """Fills /weights with blocks of R rows (the last may be shorter)."""
    weights, at = file["weights"], 0
    for block in blocks:
        weights[at : at + len(block)] = block
        at += len(block)


@dataclass(frozen=True, slots=True)
class ColumnSizes:
    """How long the columns are: n entries, and the flat lengths of the ragged ones."""

    entries: int
    ids: int = 0
    weights: int = 0
    rng: int = 0
    parts: int = 0
    digests: int = 0
    changes: int = 0

    @classmethod
    def total(cls, tables: Iterable[ColumnSizes]) -> ColumnSizes:
        """The sizes of tables put one after the other."""
        sizes = list(tables)
        return cls(*(sum(getattr(s, name) for s in sizes) for name in ("entries", *RAGGED)))


def create_columns(file: h5py.File, sizes: ColumnSizes, hyper: tuple[int, ...], compression: str) -> None:
    """Creates /steps and /batches at their full length."""
    options = {"fletcher32": True, **filters(compression)}
    for name in ("step", *PLAIN):
        shape = (sizes.entries, *hyper) if name == "hyper" else (sizes.entries,)
        _column(file, f"steps/{name}", shape, PLAIN.get(name, "<i8"), options)
    for name, dtype in RAGGED.items():
        _column(file, f"batches/{name}", (getattr(sizes, name),), dtype, options)
        _column(file, f"batches/{name}_offsets", (sizes.entries + 1,), "<i8", options)


def _column(file: h5py.File, name: str, shape: tuple[int, ...], dtype: str, options: Mapping[str, Any]) -> None:
    if 0 in shape:
        file.create_dataset(name, shape, dtype)
        return
    entry = int(np.prod(shape[1:], dtype=np.int64)) * np.dtype(dtype).itemsize
    length = min(shape[0], max(1, COLUMN_CHUNK_BYTES // entry))
    file.create_dataset(name, shape, dtype, chunks=(length, *shape[1:]), **options)


def write_columns(file: h5py.File, table: StepTable, at: ColumnSizes) -> None:
    """Writes a table into the columns, behind the entries and values that `at` counts."""
    stop = at.entries + len(table)
    _put(file["steps/step"], at.entries, np.arange(table.first, table.first + len(table)))
    for name in PLAIN:
        dataset, values = file[f"steps/{name}"], getattr(table, name)
        _put(dataset, at.entries, widened(values, dataset.shape[1]) if name == "hyper" else values)
    for name in RAGGED:
        base = getattr(at, name)
        _put(file[f"batches/{name}"], base, getattr(table, name))
        offsets = getattr(table, f"{name}_offsets") + base
        file[f"batches/{name}_offsets"][at.entries : stop + 1] = offsets


def _put(dataset: h5py.Dataset, at: int, values: npt.NDArray[Any]) -> None:
    if values.size:
        dataset[at : at + len(values)] = values


def column_sizes(table: StepTable) -> ColumnSizes:
    """The sizes of a table's columns."""
    return ColumnSizes(len(table), *(getattr(table, name).size for name in RAGGED))


def keyframe_name(step: int) -> str:
    """Path of a keyframe's group."""
    return f"keyframes/{step:0{STEP_DIGITS}d}"


def inputs_name(step: int) -> str:
    """Path of the group of a step's inputs."""
    return f"inputs/{step:0{STEP_DIGITS}d}"


def write_arrays(file: h5py.File, name: str, arrays: Mapping[str, npt.NDArray[Any]], compression: str) -> None:
    """Stores the arrays of a keyframe or of inputs in a group, each with its CRC-32 as an attribute."""
    group = file.require_group(name)
    for name, array in arrays.items():
        value = np.asarray(array, order="C")
        options: dict[str, Any] = {}
        if value.nbytes > COLUMN_CHUNK_BYTES and compression != "none":
            options = {"chunks": _array_chunk(value), **filters(compression)}
        dataset = group.create_dataset(name, data=value, **options)
        dataset.attrs["crc32"] = np.uint32(crc32(value.data))


def _array_chunk(value: npt.NDArray[Any]) -> tuple[int, ...]:
    """About 512 kB: whole trailing dimensions while they fit, then a piece of the next, then ones."""
    room, shape = max(1, 512 * 1024 // value.itemsize), []
    for length in reversed(value.shape):
        shape.append(min(length, room))
        room = max(1, room // length)
    return tuple(reversed(shape))

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
import numpy as np
import numpy.typing as npt

from trajrec.checksum import crc32
from trajrec.records import Row, RunSpec
from trajrec.runfile.format import hdf5
from trajrec.runfile.format.rowfile import HEAD_BYTES

FORMAT = "trajrec"
VERSION = "1.0"
LIBVER = ("v110", "v110")
STEP_DIGITS = 10
ARRAY_BYTES = 64 * 1024  # up to which arrays of keyframes are not worth compressing


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


def check_head(head: Head) -> None:
    """Checks that a file can be of that kind.

    Raises:
        ValueError: it cannot.
    """
    if head.state not in ("recording", "complete", "recovered") or head.keep not in ("steps", "keyframes"):
        raise ValueError(f"state {head.state!r:.40} and keep {head.keep!r:.40} are not known")
    if any(not 0 <= a <= b for a, b in head.gaps) or min(head.resumed, default=0) < 0:
        raise ValueError("gaps and resumptions should be steps, in order")


def begin(path: Path, head: Head, spec: RunSpec, rows: int, cache: int | None = None) -> h5py.File:
    """A new file with its attributes, its spec and /weights [rows, P]; `cache` is the chunk cache in bytes.

    /weights comes first: where it lies in one piece, it then begins at `HEAD_BYTES`, like the rows of a row file.
    """
    path.unlink(missing_ok=True)
    file = h5py.File(path, "x", libver=LIBVER, locking=False, rdcc_nbytes=cache, **_alignment(head, rows))
    shape, dtype = (rows, spec.row_length), np.dtype(spec.dtype).newbyteorder("<")
    hdf5.create(file, "weights", shape, dtype, _weights_plan(head), grows=head.chunks is not None)
    for name, value in _attributes(head, spec).items():
        hdf5.write_attribute(file.id, name, np.bytes_(value))
    hdf5.write_attribute(file.id, "first", np.int64(head.first))
    file.create_group("keyframes")  # always there, so that one that cannot be found is a fault
    if spec.inputs == "store":
        file.create_group("inputs")
    group = file.create_group("spec")
    for name, value in spec.to_json().items():
        hdf5.write_attribute(group.id, name, np.bytes_(json.dumps(value)))
    return file


def _alignment(head: Head, rows: int) -> dict[str, int]:
    """Whatever is larger begins on a multiple of `HEAD_BYTES`, where /weights lies in one piece."""
    return {} if head.chunks or not rows else {"alignment_threshold": HEAD_BYTES, "alignment_interval": HEAD_BYTES}


def _weights_plan(head: Head) -> Any:
    return hdf5.plan(head.chunks, head.compression) if head.chunks else hdf5.in_one_piece()


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


def keyframe_name(step: int) -> str:
    """Path of a keyframe's group."""
    return f"keyframes/{step:0{STEP_DIGITS}d}"


def inputs_name(step: int) -> str:
    """Path of the group of a step's inputs."""
    return f"inputs/{step:0{STEP_DIGITS}d}"


def write_arrays(
    file: h5py.File,
    name: str,
    arrays: Mapping[str, npt.NDArray[Any]],
    compression: str,
    last: dict[str, tuple[str, bytes]] | None = None,
) -> None:
    """Stores the arrays of a keyframe or of inputs in a group, each with its CRC-32 as an attribute.

    `last` knows where small arrays were stored last: one that is the same again is linked to.
    """
    if not arrays:
        file.create_group(name)
    for path, array in arrays.items():
        value = np.asarray(array, order="C")
        if last is not None and value.nbytes <= ARRAY_BYTES:
            identity, place = _identity(value), last.get(path)
            if place is not None and place[1] == identity:
                hdf5.link(file, place[0], f"{name}/{path}")
                continue
            last[path] = f"{name}/{path}", identity
        large = value.nbytes > ARRAY_BYTES and compression != "none"
        plan = hdf5.plan(_array_chunk(value), compression) if large else hdf5.plan()
        dataset = hdf5.create(file, f"{name}/{path}", value.shape, value.dtype, plan)
        hdf5.write(dataset, value)
        hdf5.write_attribute(dataset, "crc32", np.uint32(crc32(value.data)))


def _identity(value: npt.NDArray[Any]) -> bytes:
    """All that an array is."""
    return f"{value.dtype.str}{value.shape}".encode() + value.tobytes()


def _array_chunk(value: npt.NDArray[Any]) -> tuple[int, ...]:
    """About 512 kB: whole trailing dimensions while they fit, then a piece of the next, then ones."""
    room, shape = max(1, 512 * 1024 // value.itemsize), []
    for length in reversed(value.shape):
        shape.append(min(length, room))
        room = max(1, room // length)
    return tuple(reversed(shape))

"""A keyframe or the inputs of a step as a raw file, written by the training process without HDF5.

It is folded into the run file later.

    "TRAJKEY1" | uint32 length of the header | uint32 CRC-32 of the header | header | arrays

The header is JSON: {"step": t, "arrays": [[path, dtype, shape, start, bytes, CRC-32], ...]}, maybe with spaces behind
it, with starts counted from the end of the header. Arrays are C-contiguous and little-endian, of booleans and numbers
only. A file is written under another name and renamed, so one that has its name is whole, unless power was cut: the
writer fsyncs keyframes later, and takes inputs into its next segment; the checksums tell.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trajrec.checksum import crc32
from trajrec.errors import DamagedRunError
from trajrec.records import Inputs, Keyframe, LiveKeyframe, Parts, RunSpec
from trajrec.runfile import files
from trajrec.typed import typed

MAGIC = b"TRAJKEY1"
_HEAD = struct.Struct("<8sII")

_Arrays = dict[str, npt.NDArray[Any]]
_Entry = tuple[str, str, tuple[int, ...], int, int, int]
_DTYPE = re.compile(r"[<|][biufc][0-9]{1,2}")
Piece = bytes | memoryview


@dataclass(frozen=True, slots=True)
class _Header:
    """The header; an entry is path, dtype, shape, start, bytes and CRC-32 of an array."""

    step: int
    arrays: tuple[tuple[str, str, tuple[int, ...], int, int, int], ...]


def write_arrays(path: Path, value: Keyframe | Inputs) -> int:
    """Writes the arrays of a step (not synced) and returns the file's size in bytes.

    Raises:
        OSError: no room (ENOSPC); no half file is left.
        TypeError: an array of objects.
    """
    return write_pieces(path, pieces_of(value))


def pieces_of(value: LiveKeyframe | Inputs) -> list[Piece]:
    """What the file of a step consists of: its head and the arrays, where they are.

    Raises:
        TypeError: an array of objects.
    """
    arrays = _parts_of(value)
    bodies = [[part.data.cast("B") for part in parts if part.size] for parts in arrays.values()]
    sums = [reduce(lambda crc, part: crc32(part, crc), parts, 0) for parts in bodies]
    return [_head(value.step, arrays, sums), *chain(*bodies)]


def write_pieces(path: Path, pieces: Sequence[Piece]) -> int:
    """Writes a file (not synced) whole or not at all, and returns its size in bytes.

    Raises:
        OSError: no room (ENOSPC); no half file is left.
    """
    part = path.with_suffix(".part")
    try:
        fd = files.fresh(part)
        try:
            for piece in pieces:
                _write(fd, piece)
        finally:
            os.close(fd)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    return sum(len(piece) for piece in pieces)


def read_keyframe(path: Path, only: str | None = None) -> Keyframe:
    """The keyframe in a file; with `only`, just the array of that path.

    Raises:
        DamagedRunError: truncated, or a checksum does not match.
    """
    return Keyframe(*_read(path, "this keyframe is", only))


def read_inputs(path: Path) -> Inputs:
    """The inputs in a file.

    Raises:
        DamagedRunError: truncated, or a checksum does not match.
    """
    return Inputs(*_read(path, "these inputs are", None))


def has_inputs(path: Path, spec: RunSpec, step: int) -> bool:
    """Whether the inputs of a step are in a file and intact, or none are recorded."""
    if spec.inputs != "store" or step == 0:
        return True
    try:
        read_inputs(path)
    except (FileNotFoundError, DamagedRunError):
        return False
    return True


def _read(path: Path, what: str, only: str | None) -> tuple[int, _Arrays]:
    try:
        data = files.read(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedRunError(f"{path}: {what} damaged ({error.strerror}).") from error
    try:
        head, start = _parse(data)
        return head.step, {e[0]: _array(data, start, e) for e in head.arrays if only in (None, e[0])}
    except (ValueError, RecursionError, struct.error) as error:
        raise DamagedRunError(f"{path}: {what} damaged ({error}).") from error


def _plain(name: str, value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array = np.asarray(value, order="C")
    if array.dtype.kind not in "biufc":
        raise TypeError(f"arrays of numbers can be kept; {name} has dtype {array.dtype}")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _parts_of(value: LiveKeyframe | Inputs) -> dict[str, list[npt.NDArray[Any]]]:
    parts = {name: array.parts if isinstance(array, Parts) else [array] for name, array in value.arrays.items()}
    return {name: [_plain(name, part) for part in found] for name, found in parts.items()}


def _head(step: int, arrays: dict[str, list[npt.NDArray[Any]]], sums: Sequence[int]) -> bytes:
    """The file up to the arrays."""
    entries, start = [], 0
    for (name, parts), crc in zip(arrays.items(), sums, strict=True):
        shape = parts[0].shape if len(parts) == 1 else (sum(part.size for part in parts),)
        length = sum(part.nbytes for part in parts)
        entries.append([name, parts[0].dtype.str, shape, start, length, crc])
        start += length
    body = json.dumps({"step": step, "arrays": entries}).encode()
    return _HEAD.pack(MAGIC, len(body), crc32(body)) + body


def _write(fd: int, piece: Piece) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(fd, view) :]


def _parse(data: bytes | memoryview) -> tuple[_Header, int]:
    magic, length, crc = _HEAD.unpack_from(data)
    body = bytes(data[_HEAD.size : _HEAD.size + length])
    if magic != MAGIC or crc32(body) != crc:
        raise ValueError("its header does not match its checksum")
    return typed(_Header, json.loads(body)), _HEAD.size + length


def _array(data: bytes | memoryview, start: int, entry: _Entry) -> npt.NDArray[Any]:
    name, dtype, shape, offset, size, crc = entry
    if not _DTYPE.fullmatch(dtype) or min(offset, size, *shape) < 0:
        raise ValueError(f"array {name!r:.40} of {dtype!r:.40} and shape {list(shape)} is none")
    part = memoryview(data)[start + offset : start + offset + size]
    if len(part) != size or crc32(part) != crc:
        raise ValueError(f"array {name!r:.40} does not match its checksum")
    return np.frombuffer(part, np.dtype(dtype)).reshape(shape)

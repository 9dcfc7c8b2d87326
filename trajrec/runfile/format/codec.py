"""A step's record as bytes, for the ring: a fixed head, then the arrays one after the other.

    int64 step, int64 epoch, float64 loss, float64 time, uint32 crc32, uint32 G, uint32 H, uint32 has_weights,
    int64 B, int64 rng length | hyper float64 [G, H] | ids int64 [B] | weights float64 [B], if any | rng
    and only where one of them is there: int64 A, int64 digests, int64 length of changes | parts int64 [A] |
    digests int64 | changes

All little-endian. The training thread pays for `encode`, so there is no JSON and no dictionary here.
"""

from __future__ import annotations

import struct
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from trajrec.records import NO_IDS, IntArray, StepRecord

_HEAD = struct.Struct("<qqddIIIIqq")
_REST = struct.Struct("<qqq")
_FLOAT = np.dtype("<f8")
_INT = np.dtype("<i8")
_LITTLE = sys.byteorder == "little"


def encode(record: StepRecord) -> bytes:
    """The record as bytes."""
    hyper, ids, weights = record.hyper, record.ids, record.weights
    groups, names = hyper.shape
    head = _HEAD.pack(
        record.step,
        record.epoch,
        record.loss,
        record.time,
        record.crc32,
        groups,
        names,
        weights is not None,
        len(ids),
        len(record.rng),
    )
    given = b"" if weights is None else _buffer(weights)
    return b"".join((head, _buffer(hyper), _buffer(ids), given, record.rng, _encode_rest(record)))


def _buffer(array: npt.NDArray[Any]) -> Any:
    """The array as its bytes are stored: one after the other, little-endian."""
    return np.ascontiguousarray(array) if _LITTLE else array.astype(array.dtype.newbyteorder("<"), order="C")


def _encode_rest(record: StepRecord) -> bytes:
    parts, digests, changes = record.parts, record.digests, record.changes
    if not (len(parts) or len(digests) or changes):
        return b""
    return b"".join((_REST.pack(len(parts), len(digests), len(changes)), _buffer(parts), _buffer(digests), changes))


def decode(data: bytes) -> StepRecord:
    """The record from `encode`'s bytes; the arrays are read-only views of them.

    Raises:
        ValueError: the lengths do not fit.
    """
    if len(data) < _HEAD.size:
        raise ValueError(f"a step's record has at least {_HEAD.size} bytes, found {len(data)}")
    step, epoch, loss, time, crc32, groups, names, weighted, batch, rng_size = _HEAD.unpack_from(data)
    sizes = (8 * groups * names, 8 * batch, 8 * batch * bool(weighted), rng_size)
    pieces, rest = _cut(data, _HEAD.size, sizes)
    parts, digests, changes = _decode_rest(rest)
    hyper = np.frombuffer(pieces[0], _FLOAT).reshape(groups, names)
    weights = np.frombuffer(pieces[2], _FLOAT) if weighted else None
    ids = np.frombuffer(pieces[1], _INT)
    return StepRecord(step, epoch, loss, time, crc32, hyper, ids, weights, pieces[3], parts, digests, changes)


def _decode_rest(data: bytes) -> tuple[IntArray, IntArray, bytes]:
    if not data:
        return NO_IDS, NO_IDS, b""
    if len(data) < _REST.size:
        raise ValueError(f"a step's record ends with {len(data)} bytes that mean nothing")
    parts, digests, changes = _REST.unpack_from(data)
    found, rest = _cut(data, _REST.size, (8 * parts, 8 * digests, changes))
    if rest:
        raise ValueError(f"a step's record has {len(rest)} bytes too many")
    return np.frombuffer(found[0], _INT), np.frombuffer(found[1], _INT), found[2]


def _cut(data: bytes, start: int, sizes: tuple[int, ...]) -> tuple[list[bytes], bytes]:
    """Pieces of these sizes, and what is left."""
    if min(sizes) < 0 or start + sum(sizes) > len(data):
        raise ValueError(f"a step's record of {start + sum(sizes)} bytes was announced, found {len(data)}")
    pieces = []
    for size in sizes:
        pieces.append(data[start : start + size])
        start += size
    return pieces, data[start:]

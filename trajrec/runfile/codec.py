"""A step's record as bytes, for the ring: a fixed head, then the arrays one after the other.

    int64 step, int64 epoch, float64 loss, float64 time, uint32 crc32, uint32 G, uint32 H, uint32 has_weights,
    int64 B, int64 rng length | hyper float64 [G, H] | ids int64 [B] | weights float64 [B], if any | rng

All little-endian. The training thread pays for `encode`, so there is no JSON and no dictionary here.
"""

from __future__ import annotations

import struct

import numpy as np

from trajrec.records import StepRecord

_HEAD = struct.Struct("<qqddIIIIqq")
_FLOAT = np.dtype("<f8")
_INT = np.dtype("<i8")


def encode(record: StepRecord) -> bytes:
    """The record as bytes."""
    hyper = np.ascontiguousarray(record.hyper, dtype=_FLOAT)
    ids = np.ascontiguousarray(record.ids, dtype=_INT)
    weights = b"" if record.weights is None else np.ascontiguousarray(record.weights, dtype=_FLOAT).tobytes()
    groups, names = hyper.shape
    head = _HEAD.pack(
        record.step,
        record.epoch,
        record.loss,
        record.time,
        record.crc32,
        groups,
        names,
        record.weights is not None,
        ids.size,
        len(record.rng),
    )
    return b"".join((head, hyper.tobytes(), ids.tobytes(), weights, record.rng))


def decode(data: bytes) -> StepRecord:
    """The record from `encode`'s bytes; the arrays are read-only views of them.

    Raises:
        ValueError: the lengths do not fit.
    """
    if len(data) < _HEAD.size:
        raise ValueError(f"a step's record has at least {_HEAD.size} bytes, found {len(data)}")
    step, epoch, loss, time, crc32, groups, names, weighted, batch, rng_size = _HEAD.unpack_from(data)
    sizes = (8 * groups * names, 8 * batch, 8 * batch * bool(weighted), rng_size)
    if min(sizes) < 0 or _HEAD.size + sum(sizes) != len(data):
        raise ValueError(f"a step's record of {_HEAD.size + sum(sizes)} bytes was announced, found {len(data)}")
    parts, start = [], _HEAD.size
    for size in sizes:
        parts.append(data[start : start + size])
        start += size
    hyper = np.frombuffer(parts[0], _FLOAT).reshape(groups, names)
    weights = np.frombuffer(parts[2], _FLOAT) if weighted else None
    return StepRecord(step, epoch, loss, time, crc32, hyper, np.frombuffer(parts[1], _INT), weights, parts[3])

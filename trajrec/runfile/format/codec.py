"""A step's record as bytes, for the ring: a fixed head, then the arrays one after the other.

    int64 step, int64 epoch, float64 loss, float64 time, uint32 crc32, uint32 G, uint32 H, uint32 has_weights,
    int64 B, int64 rng length | hyper float64 [G, H] | ids int64 [B] | weights float64 [B], if any | rng
    and only where one of them is there: int64 A, int64 digests, int64 length of changes | parts int64 [A] |
    digests int64 | changes

All little-endian. The columns of every later addition (`Column.since`) follow in the same way: their lengths, then
their values, up to the last addition of which the step has any.

The training thread pays for `encode`, so there is no JSON and no dictionary here.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from trajrec.records import StepRecord
from trajrec.runfile.format.columns import COLUMNS, GRIDS, NUMBERS, RAGGED, Array, Column

_FORMATS = {"<i8": "q", "<f8": "d", "<u4": "I"}
_LITTLE = sys.byteorder == "little"
_FIRST = tuple(c for c in RAGGED if not c.since)
_LIKE = tuple(c for c in _FIRST if c.like is not None)
_COUNTED = tuple(c for c in _FIRST if c.like is None)
_LATER = tuple(tuple(c for c in RAGGED if c.since == addition) for addition in range(1, COLUMNS[-1].since + 1))


def _values_of(columns: Sequence[Column]) -> Callable[[StepRecord], tuple[Any, ...]]:
    """What gives a record's values of columns."""
    names = [c.name for c in columns]
    return attrgetter(*names) if len(names) > 1 else lambda record: (getattr(record, names[0]),)


class _Block:
    """Columns whose values follow one another; the lengths stand before them."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = columns
        self.lengths = struct.Struct(f"<{len(columns)}q")
        self.values_of = _values_of(columns)
        self._dtypes = [np.dtype(c.dtype) for c in columns]

    def cut(self, data: bytes, start: int, counts: Sequence[int]) -> tuple[list[Array], int]:
        """The values that begin at `start`, and where they end."""
        end = start + sum([dtype.itemsize * count for dtype, count in zip(self._dtypes, counts, strict=True)])
        if min(counts) < 0 or end > len(data):
            raise ValueError(f"a step's record of {end} bytes was announced, found {len(data)}")
        arrays = []
        for dtype, count in zip(self._dtypes, counts, strict=True):
            arrays.append(np.frombuffer(data, dtype, count, start))
            start += dtype.itemsize * count
        return arrays, end


_HEAD = struct.Struct(
    "<q" + "".join(_FORMATS[c.dtype] for c in NUMBERS) + "II" * len(GRIDS) + "I" * len(_LIKE) + "q" * len(_COUNTED)
)
_FIRST_BLOCK = _Block((*GRIDS, *_FIRST))
_LATER_BLOCKS = [_Block(columns) for columns in _LATER]
_numbers, _grids, _like, _counted = map(_values_of, (NUMBERS, GRIDS, _LIKE, _COUNTED))
# Where the lengths of the first block stand in the head, behind the numbers.
_SHAPES, _FLAGS = 1 + len(NUMBERS), 1 + len(NUMBERS) + 2 * len(GRIDS)
_COUNTS = _FLAGS + len(_LIKE)
_PLACES = [
    (_FLAGS + _LIKE.index(c), _COUNTS + [o.name for o in _COUNTED].index(str(c.like)))
    if c.like is not None
    else (_COUNTS + _COUNTED.index(c),) * 2
    for c in _FIRST
]


def encode(record: StepRecord) -> bytes:
    """The record as bytes."""
    shapes = [length for grid in _grids(record) for length in grid.shape]
    flags = [value is not None for value in _like(record)]
    head = _HEAD.pack(record.step, *_numbers(record), *shapes, *flags, *map(len, _counted(record)))
    return b"".join((head, *map(_buffer, _FIRST_BLOCK.values_of(record)), *_encode_later(record)))


def _buffer(value: Any) -> Any:
    """An array as its bytes are stored: one after the other, little-endian."""
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value) if _LITTLE else value.astype(value.dtype.newbyteorder("<"), order="C")
    return b"" if value is None else value


def _encode_later(record: StepRecord) -> list[Any]:
    blocks: list[Any] = []
    last = 0
    for block in _LATER_BLOCKS:
        values = block.values_of(record)
        sizes = [*map(len, values)]
        blocks += [block.lengths.pack(*sizes), *map(_buffer, values)]
        if any(sizes):
            last = len(blocks)
    return blocks[:last]


def decode(data: bytes) -> StepRecord:
    """The record from `encode`'s bytes; the arrays are read-only views of them.

    Raises:
        ValueError: the lengths do not fit.
    """
    if len(data) < _HEAD.size:
        raise ValueError(f"a step's record has at least {_HEAD.size} bytes, found {len(data)}")
    head = _HEAD.unpack_from(data)
    shapes = [head[at : at + 2] for at in range(_SHAPES, _FLAGS, 2)]
    counts = [head[count] if head[flag] else 0 for flag, count in _PLACES]
    arrays, end = _FIRST_BLOCK.cut(data, _HEAD.size, [*(a * b for a, b in shapes), *counts])
    values: list[Any] = [grid.reshape(shape) for grid, shape in zip(arrays, shapes, strict=False)]
    for column, array, (flag, _) in zip(_FIRST, arrays[len(GRIDS) :], _PLACES, strict=True):
        values.append(array if column.like is not None and head[flag] else column.value(array))
    return StepRecord(*head[:_SHAPES], *values, *_decode_later(data, end))


def _decode_later(data: bytes, start: int) -> list[Any]:
    values: list[Any] = []
    for block in _LATER_BLOCKS:
        if start == len(data):
            values += [c.value(c.nothing) for c in block.columns]
            continue
        if len(data) - start < block.lengths.size:
            raise ValueError(f"a step's record ends with {len(data) - start} bytes that mean nothing")
        arrays, start = block.cut(data, start + block.lengths.size, block.lengths.unpack_from(data, start))
        values += [c.value(array) for c, array in zip(block.columns, arrays, strict=True)]
    if start < len(data):
        raise ValueError(f"a step's record has {len(data) - start} bytes too many")
    return values

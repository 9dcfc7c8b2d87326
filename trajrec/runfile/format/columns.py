"""The per-step columns of a recording, in one list: what all else that knows a column goes by.

A column is a field of `StepRecord`, and they have the same order. Each is one of

    a number      one a step: /steps/NAME (n)
    a grid        [G, H] a step: /steps/NAME (n, G, H)
    ragged        any number of values a step: /batches/NAME, flat, with /batches/NAME_offsets (n + 1)

From it follow the encoded record (codec.py), tables of records (table.py), the datasets of a file (written by
writer/steps.py, read by reader/stored.py) and what `trajrec verify` looks at.

To add one, give `StepRecord` a field with a default, and this list a ragged column with the next `since`: files from
before are read as if it were empty, and records in which it is empty are encoded as they were before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Column:
    """One value, or any number of them, of every step.

    Attributes:
        name: of the field of `StepRecord`, and of the dataset.
        dtype: as stored.
        is_grid: whether a step has [G, H] of them.
        ragged: whether a step has any number of them.
        like: the column of which there are as many of these, or none, which a record says with None.
        is_bytes: whether a record has them as bytes.
        since: which addition to the first version of the format brought it; those since 0 were there from the start.
    """

    name: str
    dtype: str
    is_grid: bool = False
    ragged: bool = False
    like: str | None = None
    is_bytes: bool = False
    since: int = 0

    @property
    def path(self) -> str:
        """Of the dataset."""
        return f"{'batches' if self.ragged else 'steps'}/{self.name}"

    @property
    def offsets(self) -> str:
        """The name of a ragged column's offsets."""
        return f"{self.name}_offsets"

    @property
    def nothing(self) -> Array:
        """No value of a ragged column."""
        return np.empty(0, self.dtype)

    def array(self, value: Any) -> Array:
        """What a record has, as a flat array of a ragged column."""
        if value is None:
            return self.nothing
        return np.frombuffer(value, self.dtype) if self.is_bytes else np.asarray(value, self.dtype)

    def value(self, array: Array) -> Any:
        """What a record has instead of a flat array of a ragged column."""
        if self.is_bytes:
            return array.tobytes()
        return None if self.like is not None and not array.size else array


COLUMNS = (
    Column("epoch", "<i8"),
    Column("loss", "<f8"),
    Column("time", "<f8"),
    Column("crc32", "<u4"),
    Column("hyper", "<f8", is_grid=True),
    Column("ids", "<i8", ragged=True),
    Column("weights", "<f8", ragged=True, like="ids"),
    Column("rng", "|u1", ragged=True, is_bytes=True),
    Column("parts", "<i8", ragged=True, since=1),
    Column("digests", "<i8", ragged=True, since=1),
    Column("changes", "|u1", ragged=True, is_bytes=True, since=1),
)
CHECKSUM = Column("record_crc32", "<u4")  # of the encoded record, which covers all the other columns
NUMBERS = tuple(c for c in COLUMNS if not c.ragged and not c.is_grid)
GRIDS = tuple(c for c in COLUMNS if c.is_grid)
FIXED = (*NUMBERS, CHECKSUM, *GRIDS)
RAGGED = tuple(c for c in COLUMNS if c.ragged)

STEP = "steps/step"
DATASETS: dict[str, tuple[str, int]] = {
    STEP: ("<i8", 1),
    **{c.path: (c.dtype, 3 if c.is_grid else 1) for c in FIXED},
    **{f"{c.path}_offsets": ("<i8", 1) for c in RAGGED},
}
"""Dtype and dimensions of the datasets that have an entry a step (those of offsets one more)."""

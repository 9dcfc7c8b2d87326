"""The records of consecutive steps as columns: the form in which they are stored and read.

Ragged columns (ids, weights, generator states) are flat, with offsets of length n + 1: those of entry k are
`ids[ids_offsets[k]:ids_offsets[k + 1]]`. An entry without weights of its own (c[t,i] = 1/B) has none there.

Entry k of a table that starts at `first` is the record of step first + k; entry 0 of a run is the record of the
weights before training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from trajrec.checksum import crc32
from trajrec.records import FloatArray, StepRecord
from trajrec.runfile.format.codec import encode
from trajrec.runfile.format.columns import CHECKSUM, COLUMNS, NUMBERS, RAGGED, Array, Column


@dataclass(frozen=True, slots=True)
class StepTable:
    """Records of n consecutive steps; see the module's docstring for the ragged columns.

    Attributes:
        first: step of entry 0.
        columns: by name: those of `COLUMNS`, numbers [n], grids [n, G, H] (rows of NaN for groups that did not exist
            yet) and flat ragged ones, with NAME_offsets [n + 1]; and record_crc32 [n] of the encoded records.
    """

    first: int
    columns: Mapping[str, Array]

    def __len__(self) -> int:
        return len(self.columns["crc32"])

    def __getitem__(self, name: str) -> Array:
        return self.columns[name]

    def record(self, step: int) -> StepRecord:
        """The record of a step in this table."""
        return next(self.records(step - self.first))

    def records(self, start: int = 0) -> Iterator[StepRecord]:
        """The records of entry `start` and those after it."""
        for step, values in enumerate(zip(*(self._values(c, start) for c in COLUMNS), strict=True), self.first + start):
            yield StepRecord(step, *values)

    def _values(self, column: Column, start: int) -> Iterator[Any]:
        """What the records from entry `start` on have of a column."""
        if column.ragged:
            return (column.value(span) for span in self._spans(column, start))
        if column.is_grid:
            grids = self[column.name][start:]
            return iter(grids if self.is_whole(start) else [present(grid) for grid in grids])
        return iter(self[column.name][start:].tolist())

    def is_whole(self, start: int = 0) -> bool:
        """Whether all groups are there of every record, from entry `start` on."""
        return not np.isnan(self["hyper"][start:, -1:]).all(axis=2).any()

    def damaged(self) -> int | None:
        """The first step whose record does not match its checksum, or None."""
        found = np.flatnonzero(self.checksums() != self[CHECKSUM.name])
        return self.first + int(found[0]) if found.size else None

    def checksums(self) -> npt.NDArray[np.uint32]:
        """CRC-32 of the encoded records [n], made anew."""
        return np.array([crc32(encode(record)) for record in self.records()], "<u4")

    def span(self, name: str, k: int) -> Array:
        """Entry k of a ragged column."""
        a, b = self[f"{name}_offsets"][k : k + 2]
        return self[name][a:b]

    def _spans(self, column: Column, start: int) -> Iterator[Array]:
        """Entries `start` and after of a ragged column."""
        values, offsets = self[column.name], self[column.offsets][start:].tolist()
        return (values[a:b] for a, b in pairwise(offsets))


def table_of(records: Sequence[StepRecord], checksums: Sequence[int] | None = None) -> StepTable:
    """The table of consecutive records; `checksums` are the CRC-32 of what they were decoded from, if they were."""
    columns: dict[str, Array] = {}
    for c in NUMBERS:
        columns[c.name] = np.array([getattr(r, c.name) for r in records], c.dtype)
    groups = max(len(r.hyper) for r in records)
    columns["hyper"] = np.stack([widened(r.hyper, groups) for r in records])
    for c in RAGGED:
        spans = [c.array(getattr(r, c.name)) for r in records]
        columns[c.name] = np.concatenate(spans)
        columns[c.offsets] = np.cumsum([0, *(span.size for span in spans)], dtype="<i8")
    table = StepTable(records[0].step, columns)
    known = checksums if checksums is not None and table.is_whole() else table.checksums()
    return StepTable(table.first, {**columns, CHECKSUM.name: np.array(known, CHECKSUM.dtype)})


def widened(hyper: FloatArray, groups: int) -> FloatArray:
    """Hyperparameters [..., G, H] with rows of NaN for groups that did not exist yet."""
    missing = groups - hyper.shape[-2]
    if missing <= 0:
        return hyper
    return np.concatenate([hyper, np.full((*hyper.shape[:-2], missing, hyper.shape[-1]), np.nan)], axis=-2)


def present(hyper: FloatArray) -> FloatArray:
    """The groups [G, H] that existed: those with any value, and all before them."""
    if not hyper.size or not np.isnan(hyper[-1]).all():
        return hyper
    existing = np.flatnonzero(~np.isnan(hyper).all(axis=1))
    return hyper[: existing[-1] + 1] if existing.size else hyper

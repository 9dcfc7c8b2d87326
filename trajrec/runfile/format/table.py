"""The records of consecutive steps as columns: the form in which they are stored and read.

Ragged columns (ids, weights, generator states) are flat, with offsets of length n + 1: those of entry k are
`ids[ids_offsets[k]:ids_offsets[k + 1]]`. An entry without weights of its own (c[t,i] = 1/B) has none there.

Entry k of a table that starts at `first` is the record of step first + k; entry 0 of a run is the record of the
weights before training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from trajrec.checksum import crc32
from trajrec.records import FloatArray, IntArray, StepRecord
from trajrec.runfile.format.codec import encode

PLAIN = {"epoch": "<i8", "loss": "<f8", "time": "<f8", "crc32": "<u4", "record_crc32": "<u4", "hyper": "<f8"}
RAGGED = {"ids": "<i8", "weights": "<f8", "rng": "|u1", "parts": "<i8", "digests": "<i8", "changes": "|u1"}
# Files without these, from before there was anything to put in, are read as if they were empty.
LATER = frozenset({"parts", "digests", "changes"})


@dataclass(frozen=True, slots=True)
class StepTable:
    """Records of n consecutive steps; see the module's docstring for the ragged columns.

    Attributes:
        first: step of entry 0.
        epoch: [n].
        loss: [n].
        time: [n] seconds, Unix time.
        crc32: [n] uint32 of the rows.
        record_crc32: [n] uint32 of the encoded records (`codec.encode`), which covers all the other columns.
        hyper: [n, G, H]; rows of NaN for groups that did not exist yet.
        ids: flat sample ids; `ids_offsets` [n + 1].
        weights: flat weights c[t,i]; `weights_offsets` [n + 1].
        rng: flat uint8; `rng_offsets` [n + 1].
        parts: flat sizes of micro-batches; `parts_offsets` [n + 1].
        digests: flat CRC-32 of the inputs; `digests_offsets` [n + 1].
        changes: flat uint8, JSON; `changes_offsets` [n + 1].
    """

    first: int
    epoch: IntArray
    loss: FloatArray
    time: FloatArray
    crc32: npt.NDArray[np.uint32]
    record_crc32: npt.NDArray[np.uint32]
    hyper: FloatArray
    ids: IntArray
    ids_offsets: IntArray
    weights: FloatArray
    weights_offsets: IntArray
    rng: npt.NDArray[np.uint8]
    rng_offsets: IntArray
    parts: IntArray
    parts_offsets: IntArray
    digests: IntArray
    digests_offsets: IntArray
    changes: npt.NDArray[np.uint8]
    changes_offsets: IntArray

    def __len__(self) -> int:
        return int(self.crc32.size)

    def record(self, step: int) -> StepRecord:
        """The record of a step in this table."""
        return next(self.records(step - self.first))

    def records(self, start: int = 0) -> Iterator[StepRecord]:
        """The records of entry `start` and those after it."""
        part = slice(start, None)
        whole = self.is_whole(start)
        columns = [getattr(self, name)[part].tolist() for name in ("epoch", "loss", "time", "crc32")]
        spans = [self._spans(name, start) for name in RAGGED]
        for k, told in enumerate(zip(*columns, *spans, strict=True), start):
            epoch, loss, time, crc, ids, weights, rng, parts, digests, changes = told
            yield StepRecord(
                self.first + k,
                epoch,
                loss,
                time,
                crc,
                self.hyper[k] if whole else present(self.hyper[k]),
                ids,
                weights if weights.size else None,
                rng.tobytes(),
                parts,
                digests,
                changes.tobytes(),
            )

    def is_whole(self, start: int = 0) -> bool:
        """Whether all groups are there of every record, from entry `start` on."""
        return not np.isnan(self.hyper[start:, -1:]).all(axis=2).any()

    def damaged(self) -> int | None:
        """The first step whose record does not match its checksum, or None."""
        found = np.flatnonzero(_checksums(self) != self.record_crc32)
        return self.first + int(found[0]) if found.size else None

    def span(self, name: str, k: int) -> npt.NDArray[Any]:
        """Entry k of a ragged column."""
        offsets = getattr(self, f"{name}_offsets")
        values: npt.NDArray[Any] = getattr(self, name)[offsets[k] : offsets[k + 1]]
        return values

    def _spans(self, name: str, start: int) -> Iterator[npt.NDArray[Any]]:
        """Entries `start` and after of a ragged column."""
        values, offsets = getattr(self, name), getattr(self, f"{name}_offsets")[start:].tolist()
        return (values[a:b] for a, b in pairwise(offsets))


def table_of(records: Sequence[StepRecord], checksums: Sequence[int] | None = None) -> StepTable:
    """The table of consecutive records; `checksums` are the CRC-32 of what they were decoded from, if they were."""
    groups = max(len(r.hyper) for r in records)
    table = StepTable(
        first=records[0].step,
        epoch=np.array([r.epoch for r in records], "<i8"),
        loss=np.array([r.loss for r in records], "<f8"),
        time=np.array([r.time for r in records], "<f8"),
        crc32=np.array([r.crc32 for r in records], "<u4"),
        record_crc32=np.zeros(len(records), "<u4"),
        hyper=np.stack([widened(r.hyper, groups) for r in records]),
        **_flat("ids", [r.ids for r in records]),
        **_flat("weights", [np.empty(0) if r.weights is None else r.weights for r in records]),
        **_flat("rng", [np.frombuffer(r.rng, np.uint8) for r in records]),
        **_flat("parts", [r.parts for r in records]),
        **_flat("digests", [r.digests for r in records]),
        **_flat("changes", [np.frombuffer(r.changes, np.uint8) for r in records]),
    )
    if checksums is not None and table.is_whole():
        return replace(table, record_crc32=np.array(checksums, "<u4"))
    return replace(table, record_crc32=_checksums(table))


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


def _checksums(table: StepTable) -> npt.NDArray[np.uint32]:
    return np.array([crc32(encode(record)) for record in table.records()], "<u4")


def _flat(name: str, spans: Sequence[npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """A ragged column and its offsets, by the names of their fields."""
    offsets = np.cumsum([0, *(span.size for span in spans)], dtype="<i8")
    return {name: np.concatenate(spans), f"{name}_offsets": offsets}

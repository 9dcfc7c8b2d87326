"""/steps and /batches of a file that is being written: created at their full length, and filled table by table.

The datasets stay open meanwhile, so that a chunk which several tables fill is compressed once. Columns have
Fletcher-32, so that any HDF5 program finds damage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import h5py
import numpy as np

from trajrec.runfile.format import hdf5
from trajrec.runfile.format.columns import FIXED, RAGGED, STEP
from trajrec.runfile.format.table import StepTable, widened

COLUMN_CHUNK_BYTES = 64 * 1024
ENTRIES = "entries"
Sizes = Mapping[str, int]
"""How long columns are: "entries", and the flat length of every ragged one by its name."""


def sizes_of(table: StepTable) -> Sizes:
    """The sizes of a table's columns."""
    return {ENTRIES: len(table), **{c.name: table[c.name].size for c in RAGGED}}


def total(sizes: Iterable[Sizes]) -> Sizes:
    """The sizes of tables put one after the other."""
    parts = list(sizes)
    return {name: sum(part[name] for part in parts) for name in (ENTRIES, *(c.name for c in RAGGED))}


class StepColumns:
    """The columns of a file.

    Args:
        file: being written.
        sizes: of all tables together.
        hyper: (G, H), with the most groups that a table has.
        compression: "zstd" or "none".
    """

    def __init__(self, file: h5py.File, sizes: Sizes, hyper: tuple[int, ...], compression: str) -> None:
        self._file, self._compression = file, compression
        self._hyper, self._at = hyper, dict.fromkeys(sizes, 0)
        self._datasets: dict[str, Any] = {}
        entries = sizes[ENTRIES]
        self._create(STEP, "<i8", entries)
        for c in FIXED:
            self._create(c.path, c.dtype, entries, *(hyper if c.is_grid else ()))
        for c in RAGGED:
            self._create(c.path, c.dtype, sizes[c.name])
            self._create(f"{c.path}_offsets", "<i8", entries + 1)

    def append(self, table: StepTable) -> None:
        """Writes a table behind those that were written before."""
        at = self._at[ENTRIES]
        self._write(STEP, at, np.arange(table.first, table.first + len(table)))
        for c in FIXED:
            values = table[c.name]
            self._write(c.path, at, widened(values, self._hyper[0]) if c.is_grid else values)
        for c in RAGGED:
            base = self._at[c.name]
            self._write(c.path, base, table[c.name])
            self._write(f"{c.path}_offsets", at, table[c.offsets] + base)
        self._at = dict(total([self._at, sizes_of(table)]))

    def _write(self, path: str, at: int, values: hdf5.Array) -> None:
        hdf5.write(self._datasets[path], values, at)

    def _create(self, path: str, dtype: str, *shape: int) -> None:
        plan = hdf5.plan()
        if 0 not in shape:
            entry = np.dtype(dtype).itemsize * int(np.prod(shape[1:], dtype=np.int64))
            chunks = (min(shape[0], max(1, COLUMN_CHUNK_BYTES // entry)), *shape[1:])
            plan = hdf5.plan(chunks, self._compression, checksum=True)
        self._datasets[path] = hdf5.create(self._file, path, shape, np.dtype(dtype), plan)

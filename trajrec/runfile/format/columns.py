"""/steps and /batches of a file that is being written: created at their full length, and filled table by table.

The datasets stay open meanwhile, so that a chunk which several tables fill is compressed once. Columns have
Fletcher-32, so that any HDF5 program finds damage.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from trajrec.runfile.format import hdf5
from trajrec.runfile.format.table import PLAIN, RAGGED, StepTable, widened

COLUMN_CHUNK_BYTES = 64 * 1024


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

    @classmethod
    def of(cls, table: StepTable) -> ColumnSizes:
        """The sizes of a table's columns."""
        return cls(len(table), *(getattr(table, name).size for name in RAGGED))


class Columns:
    """The columns of a file.

    Args:
        file: being written.
        sizes: of all tables together.
        hyper: (G, H), with the most groups that a table has.
        compression: "zstd" or "none".
    """

    def __init__(self, file: h5py.File, sizes: ColumnSizes, hyper: tuple[int, ...], compression: str) -> None:
        self._hyper, self._at = hyper, ColumnSizes(0)
        self._datasets: dict[str, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {"steps/step": (sizes.entries,)}
        shapes |= {f"steps/{name}": (sizes.entries,) for name in PLAIN} | {"steps/hyper": (sizes.entries, *hyper)}
        for name in RAGGED:
            shapes |= {f"batches/{name}": (getattr(sizes, name),), f"batches/{name}_offsets": (sizes.entries + 1,)}
        for name, shape in shapes.items():
            self._datasets[name] = _create(file, name, shape, compression)

    def append(self, table: StepTable) -> None:
        """Writes a table behind those that were written before."""
        at = self._at
        self._write("steps/step", at.entries, np.arange(table.first, table.first + len(table)))
        for name in PLAIN:
            values = getattr(table, name)
            self._write(f"steps/{name}", at.entries, widened(values, self._hyper[0]) if name == "hyper" else values)
        for name in RAGGED:
            base = getattr(at, name)
            self._write(f"batches/{name}", base, getattr(table, name))
            self._write(f"batches/{name}_offsets", at.entries, getattr(table, f"{name}_offsets") + base)
        self._at = ColumnSizes.total([at, ColumnSizes.of(table)])

    def _write(self, name: str, at: int, values: hdf5.Array) -> None:
        hdf5.write(self._datasets[name], values, at)


def _create(file: h5py.File, name: str, shape: tuple[int, ...], compression: str) -> Any:
    dtype = np.dtype(_DTYPES.get(name, "<i8"))
    if 0 in shape:
        return hdf5.create(file, name, shape, dtype, hdf5.plan())
    entry = dtype.itemsize
    for length in shape[1:]:
        entry *= length
    chunks = (min(shape[0], max(1, COLUMN_CHUNK_BYTES // entry)), *shape[1:])
    return hdf5.create(file, name, shape, dtype, hdf5.plan(chunks, compression, checksum=True))


_DTYPES = {f"steps/{name}": dtype for name, dtype in PLAIN.items()} | {
    f"batches/{name}": dtype for name, dtype in RAGGED.items()
}

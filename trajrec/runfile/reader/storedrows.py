"""Rows of /weights in a file that is open for reading: in chunks, or one behind the other in one piece.

A piece is read with plain reads at its place in the file: there is nothing to decode, and no copy between. Where it
lies is said by the HDF5 file, or follows from the step in a file that holds nothing but rows (rowfile.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import h5py
import numpy as np

from trajrec.records import Row
from trajrec.runfile.format.rowfile import HEAD_BYTES, SharedRows, read_at, rows_at_once


@dataclass(frozen=True, slots=True)
class ChunkedRows:
    """Rows in chunks (R, C).

    Attributes:
        weights: the dataset.
    """

    weights: h5py.Dataset

    @property
    def at_once(self) -> int:
        """How many rows are best read together: R, because whatever reads one decodes them all."""
        return int(self.weights.chunks[0])

    def read(self, first: int, out: Row) -> None:
        """Fills `out` [n, P] with the rows from entry `first` on."""
        self.weights.read_direct(out, np.s_[first : first + len(out)])


@dataclass(frozen=True, slots=True)
class FlatRows:
    """Rows one behind the other.

    Attributes:
        descriptor: gives that of the open file.
        start: where entry 0 begins.
        row_bytes: size of a row.
    """

    descriptor: Callable[[], int]
    start: int
    row_bytes: int

    @classmethod
    def of_folder(cls, shared: SharedRows, weights: h5py.Dataset, step: int) -> FlatRows:
        """The rows from `step` on in a file of rows like those of `weights`."""
        row_bytes = weights.shape[1] * weights.dtype.itemsize
        return cls(shared.fileno, HEAD_BYTES + step * row_bytes, row_bytes)

    @property
    def at_once(self) -> int:
        """How many rows are best read together."""
        return rows_at_once(self.row_bytes)

    def read(self, first: int, out: Row) -> None:
        """Fills `out` [n, P] with the rows from entry `first` on."""
        read_at(self.descriptor(), self.start + first * self.row_bytes, out)


StoredRows = ChunkedRows | FlatRows


def rows_of(weights: h5py.Dataset) -> StoredRows:
    """The rows of a dataset.

    Raises:
        ValueError: they lie neither in chunks nor in one piece within the file.
    """
    if weights.chunks:
        return ChunkedRows(weights)
    row_bytes, start = weights.shape[1] * weights.dtype.itemsize, weights.id.get_offset()
    if not len(weights) or not row_bytes:
        return FlatRows(weights.file.id.get_vfd_handle, 0, row_bytes)
    size = os.fstat(weights.file.id.get_vfd_handle()).st_size
    if start is None or start < 0 or start + len(weights) * row_bytes > size:
        raise ValueError("its values do not lie in one piece within the file")
    if weights.id.get_type().get_size() != weights.dtype.itemsize:
        raise ValueError(f"its values are not stored as {weights.dtype}")
    return FlatRows(weights.file.id.get_vfd_handle, start, row_bytes)

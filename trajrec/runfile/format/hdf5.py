"""The few calls of the HDF5 library that writing a run takes.

A run has many small datasets and attributes, and h5py's conveniences (names looked up piece by piece, properties made
anew for every dataset, selections of any kind) take ten times as long as creating and writing them. These are its
low-level calls, and the files are those that h5py would write.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from h5py import h5a, h5d, h5p, h5s, h5t, h5z

Array = npt.NDArray[Any]
ZSTD = 32015
_LEVEL = 1


@lru_cache(64)
def plan(chunks: tuple[int, ...] | None = None, compression: str = "none", checksum: bool = False) -> Any:
    """The creation properties of a dataset: chunks, filters, and Fletcher-32 with `checksum`."""
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)
    if chunks is not None:
        properties.set_chunk(chunks)
    if compression != "none":
        register_filter()
        properties.set_shuffle()
        properties.set_filter(ZSTD, h5z.FLAG_OPTIONAL, (_LEVEL,))
    if checksum:
        properties.set_fletcher32()
    return properties


def in_one_piece() -> Any:
    """The creation properties of a dataset that gets its place in the file at once, and nothing written there."""
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)
    properties.set_layout(h5d.CONTIGUOUS)
    properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5d.FILL_TIME_NEVER)
    return properties


def create(
    parent: Any, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike, properties: Any, grows: bool = False
) -> Any:
    """A new dataset, and the groups on the way to it; one that `grows` may do so along its first dimension."""
    space = h5s.create_simple(shape, (h5s.UNLIMITED, *shape[1:]) if grows else None)
    return h5d.create(parent.id, name.encode(), _type(np.dtype(dtype)), space, properties, lcpl=_intermediate())


def link(parent: Any, name: str, new: str) -> None:
    """Gives what is there under a name another one, and makes the groups on the way to it."""
    parent.id.links.create_hard(new.encode(), parent.id, name.encode(), lcpl=_intermediate())


def write(dataset: Any, values: Array, at: int | None = None) -> None:
    """Writes a whole dataset, or entries from `at` on."""
    if not values.size:
        return
    values = np.ascontiguousarray(values)
    if at is None:
        dataset.write(h5s.ALL, h5s.ALL, values)
        return
    space = dataset.get_space()
    space.select_hyperslab((at, *(0 for _ in values.shape[1:])), values.shape)
    dataset.write(h5s.create_simple(values.shape), space, values)


def write_attribute(owner: Any, name: str, value: np.generic) -> None:
    """Gives a group or dataset a scalar attribute."""
    array = np.asarray(value)
    attribute = h5a.create(owner, name.encode(), _type(array.dtype), h5s.create(h5s.SCALAR))
    attribute.write(array)


def register_filter() -> None:
    """Has the HDF5 library know the Zstandard filter; an uncompressed recording does without."""
    import hdf5plugin as hdf5plugin


@lru_cache(256)
def _type(dtype: np.dtype[Any]) -> Any:
    return h5t.py_create(dtype, logical=True)


@lru_cache(1)
def _intermediate() -> Any:
    properties = h5p.create(h5p.LINK_CREATE)
    properties.set_create_intermediate_group(True)
    properties.set_char_encoding(h5t.CSET_UTF8)
    return properties

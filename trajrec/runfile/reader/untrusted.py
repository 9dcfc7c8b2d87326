"""An HDF5 file that may come from anywhere, opened for reading.

Nothing here trusts the file. Only plain datasets of the expected dtype and shape that lie in the file itself are
read (no external or virtual storage, no links, no objects), every fault of the HDF5 library becomes a
`DamagedRunError`, and nothing is unpickled or executed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from trajrec.errors import DamagedRunError, NotARunError
from trajrec.runfile.format import hdf5

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_CACHE = 1024**2
_CHUNK = 4 * 1024**2  # larger ones are never written
_FILTERS = {h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, hdf5.ZSTD}
_FAULTS = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    MemoryError,
    OverflowError,
)


@contextmanager
def reading(path: Path, what: str, first: int | None = None, stop: int = 0) -> Iterator[None]:
    """Turns a fault of the HDF5 library into a `DamagedRunError` that names file, dataset and steps [first, stop)."""
    try:
        yield
    except _FAULTS as error:
        steps = None if first is None else (first, stop - 1)
        which = "" if steps is None else f", step {first}" if first == stop - 1 else f", steps {first} to {stop - 1}"
        raise DamagedRunError(
            f"{path}: {what}{which} cannot be read: the file is truncated or damaged ({_reason(error)}). "
            "Run `trajrec verify` to see what is intact.",
            *(path, what if what.startswith("/") else "", steps),
        ) from error


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class StrangersFile:
    """An open HDF5 file, from which nothing leads elsewhere.

    Attributes:
        path: of the file.
        file: to be read only by what `dataset` and `group` give.

    Raises:
        NotARunError: it is no HDF5 file. DamagedRunError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        _check_signature(path)
        self.path = path
        with reading(path, "it"):
            self._size = path.stat().st_size
            self.file = h5py.File(path, "r", locking=False, rdcc_nbytes=_CACHE)
        self._known: dict[str, h5py.Dataset] = {}
        self._walked: set[bytes] = set()

    def close(self) -> None:
        """Closes the file."""
        self.file.close()

    def has(self, name: str) -> bool:
        """Whether there is anything under a name, be it a link."""
        return name in self._known or self.file.get(name, getlink=True) is not None

    def dataset(self, name: str, kinds: str, dimensions: int | None = None) -> h5py.Dataset:
        """A dataset of the file, checked when it is first asked for."""
        if name not in self._known:
            with reading(self.path, f"/{name}"):
                self._known[name] = self.checked(name, kinds, dimensions)
        return self._known[name]

    def checked(self, name: str, kinds: str, dimensions: int | None) -> h5py.Dataset:
        """A dataset of the file.

        Raises:
            ValueError: it is none, of another kind, or its values are not all in the file.
        """
        dataset = self._own(name)
        if not isinstance(dataset, h5py.Dataset):
            raise ValueError("it is not a dataset")
        if dataset.is_virtual or dataset.external:
            raise ValueError("its values lie outside the file")
        if dataset.shape is None or dataset.dtype.kind not in kinds or dimensions not in (None, dataset.ndim):
            raise ValueError(f"unexpected dtype {dataset.dtype} or shape {dataset.shape}")
        _check_storage(dataset, self._size)
        return dataset

    def group(self, name: str) -> h5py.Group:
        """A group of the file."""
        group = self._own(name)
        if not isinstance(group, h5py.Group):
            raise ValueError("it is not a group")
        return group

    def _own(self, name: str) -> Any:
        """What is there under a name, reached without leaving the file: no link on the way leads elsewhere."""
        parts = name.split("/")
        for end in range(1, len(parts) + 1):
            path = "/".join(parts[:end]).encode()
            if path not in self._walked:
                if self.file.id.links.get_info(path).type != h5py.h5l.TYPE_HARD:
                    raise ValueError("it is a link to somewhere else")
                self._walked.add(path)
        found = h5py.h5o.open(self.file.id, name.encode())
        return h5py.Dataset(found) if isinstance(found, h5py.h5d.DatasetID) else h5py.Group(found)


def attributes_of(owner: Any) -> dict[str, Any]:
    """All attributes of a group.

    By name: the library's own iterator over both keeps its lock while it waits for more to be asked of it. Left in the
    middle, by an error, it keeps it for good, and every other thread that reads a file waits for ever.
    """
    return {name: owner.attrs[name] for name in list(owner.attrs)}


def _check_storage(dataset: h5py.Dataset, size: int) -> None:
    """Checks that a file of `size` bytes holds all of a dataset, so that no shape is only made to fill the memory.

    Raises:
        ValueError: it does not, or its chunks are stored as none of ours are.
    """
    plan, total = dataset.id.get_create_plist(), math.prod(dataset.shape) * dataset.dtype.itemsize
    filters = {plan.get_filter(k)[0] for k in range(plan.get_nfilters())}
    if not total:
        return
    if dataset.chunks is None:
        if total > size or dataset.id.get_storage_size() < total:
            raise ValueError(f"its {total} bytes do not lie in one piece within the file")
        return
    if math.prod(dataset.chunks) * dataset.dtype.itemsize > _CHUNK or not filters <= _FILTERS:
        raise ValueError(f"it is stored in chunks of {dataset.chunks} with filters {sorted(filters)}")
    expected = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
    if dataset.id.get_num_chunks() != expected:
        raise ValueError(f"some of its {expected} chunks are missing")


def _check_signature(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(len(_SIGNATURE))
    except OSError as error:
        raise NotARunError(f"There is no recording at {path} ({error.strerror}).") from error
    if not start:
        raise NotARunError(f"{path} is empty; it is not a recording of trajrec.")
    if start != _SIGNATURE:
        raise NotARunError(f"{path} is not an HDF5 file, so it is not a recording of trajrec.")


def text(value: object) -> str:
    """What a string of HDF5 says."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)

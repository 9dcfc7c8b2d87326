"""One HDF5 file of a recording, opened for reading: a segment or a packed run.

Nothing here trusts the file. Only plain datasets of the expected dtype and shape that lie in the file itself are
read (no external or virtual storage, no links, no objects), every fault of the HDF5 library becomes a
`DamagedRunError`, and nothing is unpickled or executed.

Rows come from chunks, by way of the HDF5 library, or from one piece of a file (storedrows.py).
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from trajrec.checksum import crc32
from trajrec.errors import DamagedRunError, NewerFormatError, NotARunError
from trajrec.records import Inputs, Keyframe, Row, RunSpec
from trajrec.runfile.format import hdf5
from trajrec.runfile.format.columns import DATASETS, RAGGED, STEP, Array, Column
from trajrec.runfile.format.layout import FORMAT, STEP_DIGITS, VERSION, Head, check_head, inputs_name, keyframe_name
from trajrec.runfile.format.rowfile import SharedRows
from trajrec.runfile.format.table import StepTable
from trajrec.runfile.reader.soundness import sound_keyframe, sound_table
from trajrec.runfile.reader.storedrows import FlatRows, StoredRows, rows_of
from trajrec.typed import typed

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_CACHE = 1024**2
_CHUNK = 4 * 1024**2  # larger ones are never written
_FILTERS = {h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, hdf5.ZSTD}
_STEP = re.compile(f"[0-9]{{{STEP_DIGITS}}}")
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


class StoredRun:
    """An open segment or packed run; entries [first, stop).

    Attributes:
        path: the file.
        head: what the file says of itself.
        first: step of entry 0; `stop` is the step after the last.
        has_rows: whether rows of single steps are kept.
        rows_path: the file with the rows.

    Args:
        path: the file.
        rows: of a recording in whose folder the file is, for a segment that has no rows of its own.
    """

    def __init__(self, path: Path, rows: SharedRows | None = None) -> None:
        _check_signature(path)
        self.path = path
        with reading(path, "it"):
            self._size = path.stat().st_size
            self._file = h5py.File(path, "r", locking=False, rdcc_nbytes=_CACHE)
        self._known: dict[str, h5py.Dataset] = {}
        self._walked: set[bytes] = set()
        self._spec: RunSpec | None = None
        try:
            self.head = self._head()
            if self.head.compression != "none":
                hdf5.register_filter()
            self.first = self.head.first
            self._weights = self._dataset("weights", "f", 2)
            self.has_rows = self.head.keep == "steps"
            self.entries = len(self._dataset("steps/crc32", "u", 1))
            self._check_row_length()
            self.rows_path, self._rows = self._find_rows(rows)
        except BaseException:
            self._file.close()
            raise
        self.stop = self.first + self.entries

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    # ---- what the file says of itself

    def _head(self) -> Head:
        with reading(self.path, "its attributes"):
            attributes = _attributes(self._file)
        if _text(attributes.get("format")) != FORMAT:
            raise NotARunError(f"{self.path} is an HDF5 file, but not a recording of trajrec.")
        _check_version(self.path, _text(attributes.get("version")))
        weights = self._dataset("weights", "f", 2)
        with reading(self.path, "its attributes"):
            head = typed(
                Head,
                {
                    "state": _text(attributes["state"]),
                    "first": operator.index(attributes["first"]),
                    "keep": _text(attributes["keep"]),
                    "compression": "zstd" if weights.id.get_create_plist().get_nfilters() else "none",
                    "chunks": weights.chunks,
                    "gaps": json.loads(_text(attributes["gaps"])),
                    "resumed": json.loads(_text(attributes["resumed"])),
                },
            )
            check_head(head)
            return head

    def spec(self) -> RunSpec:
        """The run's spec."""
        if self._spec is None:
            with reading(self.path, "/spec"):
                texts = _attributes(self._group("spec"))
                self._spec = RunSpec.from_json({name: json.loads(_text(value)) for name, value in texts.items()})
        return self._spec

    def _check_row_length(self) -> None:
        spec, shape, dtype = self.spec(), self._weights.shape, self._weights.dtype
        if shape[1] != spec.row_length or dtype != np.dtype(spec.dtype).newbyteorder("<"):
            raise DamagedRunError(
                f"{self.path}: /weights has rows of {shape[1]} values in {dtype}, {spec.row_length} in {spec.dtype} "
                "were expected by the spec; the file is damaged."
            )

    def _dataset(self, name: str, kinds: str, dimensions: int | None = None) -> h5py.Dataset:
        """A dataset of the file, checked when it is first asked for."""
        if name not in self._known:
            with reading(self.path, f"/{name}"):
                self._known[name] = self._checked_dataset(name, kinds, dimensions)
        return self._known[name]

    def _checked_dataset(self, name: str, kinds: str, dimensions: int | None) -> h5py.Dataset:
        dataset = self._own(name)
        if not isinstance(dataset, h5py.Dataset):
            raise ValueError("it is not a dataset")
        if dataset.is_virtual or dataset.external:
            raise ValueError("its values lie outside the file")
        if dataset.shape is None or dataset.dtype.kind not in kinds or dimensions not in (None, dataset.ndim):
            raise ValueError(f"unexpected dtype {dataset.dtype} or shape {dataset.shape}")
        _check_storage(dataset, self._size)
        return dataset

    def _group(self, name: str) -> h5py.Group:
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
                if self._file.id.links.get_info(path).type != h5py.h5l.TYPE_HARD:
                    raise ValueError("it is a link to somewhere else")
                self._walked.add(path)
        found = h5py.h5o.open(self._file.id, name.encode())
        return h5py.Dataset(found) if isinstance(found, h5py.h5d.DatasetID) else h5py.Group(found)

    def _find_rows(self, shared: SharedRows | None) -> tuple[Path, StoredRows]:
        """Where the rows are, and the file that they are in."""
        rows, expected = len(self._weights), self.entries * self.has_rows
        if shared is not None and expected and not rows and self.first >= 0:
            return shared.path, FlatRows.of_folder(shared, self._weights, self.first)
        if rows != expected or self.first < 0:
            raise DamagedRunError(f"{self.path}: /weights has {rows} rows, /steps {self.entries}; the file is damaged.")
        with reading(self.path, "/weights"):
            return self.path, rows_of(self._weights)

    # ---- rows

    @property
    def row_length(self) -> int:
        """P."""
        return int(self._weights.shape[1])

    @property
    def in_folder(self) -> bool:
        """Whether the rows are in a file that all segments of a folder share."""
        return self.rows_path != self.path

    def rows(self, first: int, stop: int) -> Row:
        """Rows of steps [first, stop) [n, P], not checked."""
        with reading(self.rows_path, "/weights", first, stop):
            out = np.empty((stop - first, self.row_length), self._weights.dtype)
            if out.size:
                self._rows.read(first - self.first, out)
            return out

    def block(self, step: int) -> tuple[int, int]:
        """The steps [first, stop) whose rows are best read together with that of `step`."""
        rows = self._rows.at_once
        start = self.first + (step - self.first) // rows * rows
        return start, min(start + rows, self.stop)

    def raw_chunks(self, first: int) -> Iterator[tuple[int, int, bytes]]:
        """Column, filter mask and stored bytes of the chunks whose rows begin with that of step `first`."""
        with reading(self.path, "/weights", first, first + 1):
            for column in range(0, self.row_length, self._weights.chunks[1]):
                mask, data = self._weights.id.read_direct_chunk((first - self.first, column))
                yield column, mask, data

    # ---- columns

    @property
    def hyper_shape(self) -> tuple[int, int]:
        """(G, H)."""
        groups, names = self._dataset("steps/hyper", "f", 3).shape[1:]
        return int(groups), int(names)

    def column_sizes(self, first: int, stop: int) -> dict[str, int]:
        """How much the columns of steps [first, stop) hold: "entries", and the flat length of ragged ones by name."""
        offsets = {c.name: self._offsets(c, first, stop) for c in RAGGED}
        return {"entries": stop - first, **{name: int(found[-1] - found[0]) for name, found in offsets.items()}}

    def table(self, first: int, stop: int, is_sound: bool = False) -> StepTable:
        """The records of steps [first, stop), checked unless the whole file is known to be sound."""
        columns = {path: self.column(path, first, stop) for path in DATASETS if not path.endswith("_offsets")}
        with reading(self.path, "/steps/step", first, stop):
            if not np.array_equal(columns.pop(STEP), np.arange(first, stop)):
                raise ValueError("the steps are not consecutive")
        fields = {path.partition("/")[2]: values for path, values in columns.items()}
        for c in RAGGED:
            fields |= self._ragged(c, first, stop)
        table = sound_table(StepTable(first, fields), self.spec(), self.path)
        if not is_sound and (step := table.damaged()) is not None:
            raise DamagedRunError(
                f"{self.path}: /steps and /batches, step {step}: the record does not match its checksum; the file is "
                "damaged. Run `trajrec verify` to see what is intact.",
                *(self.path, "/steps", (step, step)),
            )
        return table

    def _ragged(self, c: Column, first: int, stop: int) -> dict[str, Array]:
        """The values of a ragged column, and their offsets from 0."""
        offsets = self._offsets(c, first, stop)
        if self._lacks(c):
            return {c.name: c.nothing, c.offsets: offsets}
        with reading(self.path, f"/{c.path}", first, stop):
            flat = self._dataset(c.path, np.dtype(c.dtype).kind, 1)
            if offsets[0] < 0 or offsets[-1] > len(flat) or (np.diff(offsets) < 0).any():
                raise ValueError(f"/{c.path}_offsets is not an ascending list within it")
            values = flat[offsets[0] : offsets[-1]].astype(c.dtype, copy=False)
            return {c.name: values, c.offsets: offsets - offsets[0]}

    def _offsets(self, c: Column, first: int, stop: int) -> Array:
        return self.column(f"{c.path}_offsets", first, stop)

    def _lacks(self, c: Column) -> bool:
        """Whether a ragged column did not exist yet when the file was written."""
        if not c.since or f"{c.path}_offsets" in self._known:
            return False
        with reading(self.path, "/batches"):
            return self._file.get(f"{c.path}_offsets", getlink=True) is None

    def column(self, path: str, first: int, stop: int) -> Array:
        """Entries of steps [first, stop) of one of `DATASETS`; n + 1 entries of offsets."""
        more = path.endswith("_offsets")
        if more and any(self._lacks(c) for c in RAGGED if path == f"{c.path}_offsets"):
            return np.zeros(stop - first + 1, "<i8")
        with reading(self.path, f"/{path}", first, stop):
            dtype, dimensions = DATASETS[path]
            dataset = self._dataset(path, np.dtype(dtype).kind, dimensions)
            if len(dataset) != self.entries + more:
                raise ValueError(f"it has {len(dataset)} entries, {self.entries + more} were expected")
            values: Array = dataset[first - self.first : stop - self.first + more].astype(dtype, copy=False)
            return values

    # ---- keyframes and inputs

    def keyframe_steps(self) -> tuple[int, ...]:
        """Steps that have a keyframe."""
        with reading(self.path, "/keyframes"):
            names = list(self._group("keyframes"))
            steps = tuple(sorted(int(name) for name in names if _STEP.fullmatch(name)))
            if len(steps) < len(names) or max(steps, default=0) >= self.stop:
                raise ValueError(f"{max(names)!a} is no step of the run")
            return steps

    def keyframe(self, step: int, only: str | None = None) -> Keyframe:
        """A keyframe, checked; with `only`, just the array of that path."""
        found = Keyframe(step, self._arrays(keyframe_name(step), only))
        return sound_keyframe(found, step, self.spec(), self.path, only)

    def inputs(self, step: int) -> Inputs:
        """The inputs of a step, checked."""
        return Inputs(step, self._arrays(inputs_name(step), None))

    def copy_inputs(self, step: int, target: h5py.File) -> None:
        """Copies the inputs of a step into another file, compressed as they are."""
        name = inputs_name(step)
        with reading(self.path, f"/{name}"):
            self._file.copy(self._group(name), target["inputs"], f"{step:0{STEP_DIGITS}d}")

    def _arrays(self, base: str, only: str | None) -> dict[str, npt.NDArray[Any]]:
        with reading(self.path, f"/{base}"):
            names: list[str] = []
            self._group(base).visititems(lambda name, item: _note(names, name, item))
            return {n: self._checked(f"{base}/{n}") for n in names if only in (None, n)}

    def _checked(self, name: str) -> npt.NDArray[Any]:
        dataset = self._checked_dataset(name, "biufc", None)
        value = np.asarray(dataset[()])
        if crc32(np.ascontiguousarray(value).data) != int(dataset.attrs["crc32"]):
            message = f"{self.path}: /{name} does not match its checksum; the file is damaged."
            raise DamagedRunError(message, self.path, f"/{name}")
        return value.astype(value.dtype.newbyteorder("="), copy=False)


def _attributes(owner: Any) -> dict[str, Any]:
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


def holds(path: Path, run_id: str, stop: int | None = None) -> bool:
    """Whether a packed file holds a run, and with `stop` the steps before that one, all of them and no other."""
    try:
        stored = StoredRun(path)
    except NotARunError:
        return False
    try:
        return stored.spec().run_id == run_id and stop in (None, stored.stop)
    finally:
        stored.close()


def _note(names: list[str], name: str, item: object) -> None:
    if isinstance(item, h5py.Dataset):
        names.append(name)


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


def _check_version(path: Path, version: str) -> None:
    ours, theirs = VERSION.split(".")[0], version.split(".")[0]
    if not re.fullmatch(r"[0-9]{1,9}", theirs):
        raise DamagedRunError(f"{path}: its format version reads {version!r:.40}; the file is damaged.")
    if int(theirs) > int(ours):
        raise NewerFormatError(
            f"{path} has format version {version}; this trajrec reads versions up to {ours}.x. Update trajrec."
        )


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)

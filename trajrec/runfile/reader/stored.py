"""One HDF5 file of a recording, opened for reading: a segment or a packed run.

Nothing here trusts the file (untrusted.py), nor what it says (soundness.py).
Rows come from chunks, by way of the HDF5 library, or from one piece of a file (storedrows.py).
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterator
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
from trajrec.runfile.reader.untrusted import StrangersFile, attributes_of, reading, text
from trajrec.typed import typed

_STEP = re.compile(f"[0-9]{{{STEP_DIGITS}}}")


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
        self.path, self._file = path, StrangersFile(path)
        self._spec: RunSpec | None = None
        try:
            self.head = self._head()
            if self.head.compression != "none":
                hdf5.register_filter()
            self.first = self.head.first
            self._weights = self._file.dataset("weights", "f", 2)
            self.has_rows = self.head.keep == "steps"
            self.entries = len(self._file.dataset("steps/crc32", "u", 1))
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
            attributes = attributes_of(self._file.file)
        if text(attributes.get("format")) != FORMAT:
            raise NotARunError(f"{self.path} is an HDF5 file, but not a recording of trajrec.")
        _check_version(self.path, text(attributes.get("version")))
        weights = self._file.dataset("weights", "f", 2)
        with reading(self.path, "its attributes"):
            head = typed(
                Head,
                {
                    "state": text(attributes["state"]),
                    "first": operator.index(attributes["first"]),
                    "keep": text(attributes["keep"]),
                    "compression": "zstd" if weights.id.get_create_plist().get_nfilters() else "none",
                    "chunks": weights.chunks,
                    "gaps": json.loads(text(attributes["gaps"])),
                    "resumed": json.loads(text(attributes["resumed"])),
                },
            )
            check_head(head)
            return head

    def spec(self) -> RunSpec:
        """The run's spec."""
        if self._spec is None:
            with reading(self.path, "/spec"):
                texts = attributes_of(self._file.group("spec"))
                self._spec = RunSpec.from_json({name: json.loads(text(value)) for name, value in texts.items()})
        return self._spec

    def _check_row_length(self) -> None:
        spec, shape, dtype = self.spec(), self._weights.shape, self._weights.dtype
        if shape[1] != spec.row_length or dtype != np.dtype(spec.dtype).newbyteorder("<"):
            raise DamagedRunError(
                f"{self.path}: /weights has rows of {shape[1]} values in {dtype}, {spec.row_length} in {spec.dtype} "
                "were expected by the spec; the file is damaged."
            )

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
        groups, names = self._file.dataset("steps/hyper", "f", 3).shape[1:]
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
            flat = self._file.dataset(c.path, np.dtype(c.dtype).kind, 1)
            if offsets[0] < 0 or offsets[-1] > len(flat) or (np.diff(offsets) < 0).any():
                raise ValueError(f"/{c.path}_offsets is not an ascending list within it")
            values = flat[offsets[0] : offsets[-1]].astype(c.dtype, copy=False)
            return {c.name: values, c.offsets: offsets - offsets[0]}

    def _offsets(self, c: Column, first: int, stop: int) -> Array:
        return self.column(f"{c.path}_offsets", first, stop)

    def _lacks(self, c: Column) -> bool:
        """Whether a ragged column did not exist yet when the file was written."""
        with reading(self.path, "/batches"):
            return bool(c.since) and not self._file.has(f"{c.path}_offsets")

    def column(self, path: str, first: int, stop: int) -> Array:
        """Entries of steps [first, stop) of one of `DATASETS`; n + 1 entries of offsets."""
        more = path.endswith("_offsets")
        if more and any(self._lacks(c) for c in RAGGED if path == f"{c.path}_offsets"):
            return np.zeros(stop - first + 1, "<i8")
        with reading(self.path, f"/{path}", first, stop):
            dtype, dimensions = DATASETS[path]
            dataset = self._file.dataset(path, np.dtype(dtype).kind, dimensions)
            if len(dataset) != self.entries + more:
                raise ValueError(f"it has {len(dataset)} entries, {self.entries + more} were expected")
            values: Array = dataset[first - self.first : stop - self.first + more].astype(dtype, copy=False)
            return values

    # ---- keyframes and inputs

    def keyframe_steps(self) -> tuple[int, ...]:
        """Steps that have a keyframe."""
        with reading(self.path, "/keyframes"):
            names = list(self._file.group("keyframes"))
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
            self._file.file.copy(self._file.group(name), target["inputs"], f"{step:0{STEP_DIGITS}d}")

    def _arrays(self, base: str, only: str | None) -> dict[str, npt.NDArray[Any]]:
        with reading(self.path, f"/{base}"):
            names: list[str] = []
            self._file.group(base).visititems(lambda name, item: _note(names, name, item))
            return {n: self._checked(f"{base}/{n}") for n in names if only in (None, n)}

    def _checked(self, name: str) -> npt.NDArray[Any]:
        dataset = self._file.checked(name, "biufc", None)
        value = np.asarray(dataset[()])
        if crc32(np.ascontiguousarray(value).data) != int(dataset.attrs["crc32"]):
            message = f"{self.path}: /{name} does not match its checksum; the file is damaged."
            raise DamagedRunError(message, self.path, f"/{name}")
        return value.astype(value.dtype.newbyteorder("="), copy=False)


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


def _check_version(path: Path, version: str) -> None:
    ours, theirs = VERSION.split(".")[0], version.split(".")[0]
    if not re.fullmatch(r"[0-9]{1,9}", theirs):
        raise DamagedRunError(f"{path}: its format version reads {version!r:.40}; the file is damaged.")
    if int(theirs) > int(ours):
        raise NewerFormatError(
            f"{path} has format version {version}; this trajrec reads versions up to {ours}.x. Update trajrec."
        )

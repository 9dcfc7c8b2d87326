"""Whether what is read from a recording makes sense together.

A checksum says that bytes are those that were written, not that whoever wrote them meant well: a file may come from
anywhere. Here the records of steps and the keyframes are held against the spec, once, before they become values that
the rest of the program relies on. Types and shapes of HDF5 datasets are checked in untrusted.py, the spec in
records.py.

Letters: A micro-batches, B samples, G groups, H hyperparameters, P weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trajrec.checksum import crc32
from trajrec.errors import DamagedRunError
from trajrec.records import FROZEN_CHECK, Conditions, IntArray, Keyframe, RunSpec
from trajrec.runfile.format.table import StepTable
from trajrec.stretches import frozen_arrays

_LATEST = 1e11  # seconds of Unix time, in the year 5138
_EPOCHS = 2**31
_CRC32 = 2**32
_Marks = npt.NDArray[np.bool_]


def sound_table(table: StepTable, spec: RunSpec, path: Path) -> StepTable:
    """The table, if every record can be that of a step.

    Raises:
        DamagedRunError: naming the first step whose record cannot.
    """
    for what, wrong in _table_faults(table, spec):
        if (places := np.flatnonzero(wrong)).size:
            step = table.first + int(places[0])
            message = f"{path}: /steps and /batches, step {step}: {what}."
            raise DamagedRunError(message, path, "/steps", (step, step))
    return table


def _table_faults(table: StepTable, spec: RunSpec) -> Iterator[tuple[str, _Marks]]:
    """What may be wrong, and with which entries it is."""
    ids, parts = _lengths(table, "ids"), _lengths(table, "parts")
    shape = table["hyper"].shape
    if shape[1] < spec.groups or shape[2] != len(spec.hyperparameters):
        expected = f"{spec.groups} groups of {len(spec.hyperparameters)} hyperparameters"
        yield f"{expected} were expected, found {shape[1]} of {shape[2]}", np.ones(1, bool)
    yield "a sample id is negative", _any(table, "ids", table["ids"] < 0)
    yield "a sample's weight is no number", _any(table, "weights", ~np.isfinite(table["weights"]))
    yield "the number of weights is not that of samples", _neither(_lengths(table, "weights"), ids)
    yield "a micro-batch has a negative size", _any(table, "parts", table["parts"] < 0)
    yield "the sizes of the micro-batches are not those of the samples", (parts > 0) & (_sums(table) != ids)
    yield (
        "the number of digests is not that of micro-batches",
        _neither(_lengths(table, "digests"), np.maximum(parts, 1)),
    )
    yield "a digest is no CRC-32", _any(table, "digests", (table["digests"] < -1) | (table["digests"] >= _CRC32))
    size = sum(length for _, length in spec.rng)
    yield "the generator states have another length than the spec says", _lengths(table, "rng") % max(size, 1) > 0
    yield "there are generator states, and the spec knows none", (_lengths(table, "rng") > 0) & (size == 0)
    yield "its epoch is out of range", (table["epoch"] < 0) | (table["epoch"] >= _EPOCHS)
    yield "its time is out of range", ~(np.abs(table["time"]) < _LATEST)
    yield "its conditions cannot be read", _unreadable(table, {p.name for p in spec.params})


def _lengths(table: StepTable, name: str) -> IntArray:
    lengths: IntArray = np.diff(table[f"{name}_offsets"])
    return lengths


def _neither(lengths: IntArray, expected: IntArray) -> _Marks:
    wrong: _Marks = (lengths != 0) & (lengths != expected)
    return wrong


def _any(table: StepTable, name: str, wrong: _Marks) -> _Marks:
    """Entries of which any value of a ragged column is wrong."""
    found = np.zeros(len(table), bool)
    found[np.searchsorted(table[f"{name}_offsets"], np.flatnonzero(wrong), "right") - 1] = True
    return found


def _sums(table: StepTable) -> IntArray:
    """The sum of the sizes of each entry's micro-batches."""
    up_to = np.concatenate([[0], np.cumsum(table["parts"])])
    sums: IntArray = np.diff(up_to[table["parts_offsets"]])
    return sums


def _unreadable(table: StepTable, names: set[str]) -> _Marks:
    """Entries at which conditions change, and that do not tell to which."""
    found = np.zeros(len(table), bool)
    for k in np.flatnonzero(_lengths(table, "changes")).tolist():
        try:
            conditions = Conditions.from_json(table.span("changes", k).tobytes())
        except (ValueError, RecursionError):
            found[k] = True
        else:
            found[k] = any(not 0 <= group < len(table["hyper"][k]) for _, group in conditions.joined)
            found[k] |= any(not {*clip.params} <= names for clip in conditions.clips)
    return found


def sound_keyframe(keyframe: Keyframe, step: int, spec: RunSpec, path: Path, only: str | None = None) -> Keyframe:
    """The keyframe, if it can be that of a step of this run; with `only`, it has to have the array of that path.

    Raises:
        DamagedRunError: it cannot.
    """
    for fault in _keyframe_faults(keyframe, step, spec, only):
        raise DamagedRunError(f"{path}: the keyframe of step {step} does not belong to this run: {fault}.")
    return keyframe


def _keyframe_faults(keyframe: Keyframe, step: int, spec: RunSpec, only: str | None) -> Iterator[str]:
    if keyframe.step != step:
        yield f"it says step {keyframe.step}"
    if step == 0 and only is None:
        yield from _frozen_faults(keyframe, spec)
    if only is not None and only not in keyframe.arrays:
        yield f"it lacks {only}"
    for path, array in keyframe.arrays.items():
        expected = _expected_shapes(path, spec)
        if expected and array.shape not in expected:
            yield f"{path} has the shape {list(array.shape)}, {list(expected[-1])} was expected"
        if path == "weights" and array.dtype.name != spec.dtype:
            yield f"weights are {array.dtype}, {spec.dtype} was expected"
        if path == FROZEN_CHECK and array.dtype != np.uint32:
            yield f"{path} is {array.dtype}"
        if path.startswith("optimizer/") and array.dtype.kind not in "biuf":
            yield f"{path} is {array.dtype}"


def _frozen_faults(keyframe: Keyframe, spec: RunSpec) -> Iterator[str]:
    """Frozen parameters that are not there, or not those that the spec speaks of."""
    for p in spec.frozen:
        arrays = frozen_arrays(keyframe, p.name)
        crc = 0
        for name in sorted(arrays):
            crc = crc32(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8), crc)
        if crc != p.crc32 or not arrays:
            yield f"the frozen parameter {p.name} is missing, or another"
        elif p.name in arrays and arrays[p.name].shape != p.shape:
            yield f"the frozen parameter {p.name} has the shape {list(arrays[p.name].shape)}"


def _expected_shapes(path: str, spec: RunSpec) -> list[tuple[int, ...]]:
    """The shapes that an array may have, one of every stretch; none where it may have any."""
    kind, _, name = path.partition("/")
    if path == "weights" or (kind == "optimizer" and "/" not in name and not name.endswith((".present", ".scalar"))):
        return [(width,) for width in spec.widths]
    if path == FROZEN_CHECK:
        return [(len(spec.frozen),)]
    if kind != "optimizer" or "/" in name:
        return []
    return [(sum(p.span.stop <= width for p in spec.params),) for width in spec.widths]

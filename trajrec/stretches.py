"""Rows and keyframes of a run in which frozen parameters were trained later, as long as they are at its end.

Before it was trained such a parameter is what it was at the first step, and no optimizer keeps state of it. So rows and
keyframes of the earlier stretches are completed with its constant values, and with no state.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from trajrec.records import FROZEN, Array, Keyframe, Row, RunSpec

NOTHING: Row = np.empty(0)


def frozen_arrays(first: Keyframe, name: str) -> dict[str, Array]:
    """What the keyframe of step 0 has of a frozen parameter: itself, or its parts as NAME:PART."""
    start = f"{FROZEN}{name}"
    found = {path: array for path, array in first.arrays.items() if path == start or path.startswith(f"{start}:")}
    return {path.removeprefix(FROZEN): array for path, array in found.items()}


def constants(spec: RunSpec, first: Keyframe) -> Row:
    """What the end of a row is before it is trained: all parameters that are not in the rows of the first stretch.

    Args:
        spec: of the run.
        first: its keyframe of step 0.

    Raises:
        ValueError: it lacks one.
    """
    late = [p for p in spec.params if p.offset >= spec.width(0)]
    dtypes = {p.name: p.dtype for p in spec.frozen}
    parts = []
    for p in late:
        bits = first.arrays.get(f"{FROZEN}{p.name}")
        if bits is None or bits.size != p.size:
            raise ValueError(f"the keyframe of step 0 lacks the frozen parameter {p.name}")
        parts.append(_as_numbers(bits, dtypes[p.name]).reshape(-1).astype(spec.dtype))
    return np.concatenate(parts) if parts else np.empty(0, spec.dtype)


def _as_numbers(bits: Array, dtype: str) -> Array:
    if dtype == "bfloat16":  # the upper half of a float32
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits


def completed(spec: RunSpec, first: int, rows: Row, constant: Row) -> Row:
    """Rows [n, P at the end] of steps from `first` on, of rows [n, P at some step]."""
    if not spec.stretches or spec.width(first) == spec.row_length:
        return rows
    whole = np.empty((len(rows), spec.row_length), rows.dtype)
    for k, row in enumerate(rows):
        width = spec.width(first + k)
        whole[k, :width] = row[:width]
        whole[k, width:] = constant[width - spec.width(0) :]
    return whole


def completed_keyframe(spec: RunSpec, keyframe: Keyframe, constant: Row) -> Keyframe:
    """The keyframe with arrays over all parameters of the run."""
    if not spec.stretches:
        return keyframe
    arrays = {path: _longer(spec, path, array) for path, array in keyframe.arrays.items()}
    if "weights" in arrays:
        arrays["weights"] = completed(spec, keyframe.step, keyframe.arrays["weights"][None], constant)[0]
    return replace(keyframe, arrays=arrays)


def _longer(spec: RunSpec, path: str, array: Array) -> Array:
    kind, _, name = path.partition("/")
    if kind != "optimizer" or "/" in name:
        return array
    of_params = name.endswith((".present", ".scalar"))
    missing = (len(spec.params) if of_params else spec.row_length) - len(array)
    fill = np.nan if name.endswith(".scalar") else 0
    return np.concatenate([array, np.full(missing, fill, array.dtype)]) if missing > 0 else array

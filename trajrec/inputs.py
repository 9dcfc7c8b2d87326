"""A batch as arrays and the JSON of its nesting, so that it can be kept without pickling anything.

    ([x, y], {"mask": m})   ->   {"tuple": [{"list": [{"tensor": [0, "float32"]}, ...]}, ...]}  and  [x, y, m]

Lists, tuples, dictionaries, tensors, numpy arrays of numbers, numbers, strings and None come back as they were, and
nothing else does: what a loss would be given must not merely look like what the loop received. Tensors are copied at
once, because loops change batches in place, into host memory; those of a dtype that numpy lacks (bfloat16) as integers
of the same bits.

The arrays of a step are named "MICRO-BATCH/LEAF", and the nesting of all of them is one JSON text, "structure".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trajrec.errors import RecordingError

Leaf = npt.NDArray[Any]
STRUCTURE = "structure"
_BITS = {1: torch.uint8, 2: torch.int16}
_NUMPY = frozenset("biufc")


@dataclass(frozen=True, slots=True)
class Contents:
    """A batch taken apart: its nesting as JSON-ready values, and its leaves, which are copies."""

    structure: Any
    leaves: tuple[Leaf, ...]

    def rows(self, span: slice, count: int) -> Contents:
        """The part of a batch of `count` samples that a slice of it is: arrays as long as the batch are cut."""
        return Contents(self.structure, tuple([v[span] if v.shape[:1] == (count,) else v for v in self.leaves]))


def contents_of(batch: Any) -> Contents:
    """Takes a batch apart.

    Raises:
        RecordingError: if something in it cannot be kept.
    """
    leaves: list[Leaf] = []
    return Contents(_apart(batch, leaves), tuple(leaves))


def arrays_of(parts: Sequence[Contents]) -> dict[str, Leaf]:
    """The arrays to be stored for the micro-batches of a step."""
    text = json.dumps([part.structure for part in parts]).encode()
    arrays: dict[str, Leaf] = {STRUCTURE: np.frombuffer(text, np.uint8)}
    for k, part in enumerate(parts):
        arrays |= {f"{k}/{leaf}": value for leaf, value in enumerate(part.leaves)}
    return arrays


def batches_of(arrays: Mapping[str, Leaf]) -> list[Any]:
    """The batches of a step, from `arrays_of`'s value.

    Raises:
        ValueError: if the arrays are not such a value.
    """
    try:
        structures = json.loads(arrays[STRUCTURE].tobytes())
        return [_together(value, arrays, f"{k}/") for k, value in enumerate(structures)]
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the nesting of the inputs cannot be read ({error})") from error


def _apart(value: Any, leaves: list[Leaf]) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        return {"tensor": [_add(leaves, _copied(value)), str(value.dtype).removeprefix("torch.")]}
    if type(value) is np.ndarray and value.dtype.kind in _NUMPY:
        return {"array": _add(leaves, np.array(value, order="C"))}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_apart(item, leaves) for item in value]}
    if type(value) is dict:
        return {"dict": [[_key(key), _apart(item, leaves)] for key, item in value.items()]}
    raise RecordingError(
        f'inputs="store" keeps lists, tuples, dictionaries, tensors, numbers and strings; this batch holds a '
        f"{type(value).__module__}.{type(value).__qualname__}. Let the loader's collate_fn make a batch of those, or "
        'pass inputs="digest".'
    )


def _key(key: Any) -> Any:
    if type(key) in (bool, int, float, str):
        return key
    raise RecordingError(
        f'inputs="store" keeps dictionaries whose keys are strings or numbers; this batch has the key {key!r}.'
    )


def _add(leaves: list[Leaf], value: Leaf) -> int:
    leaves.append(value)
    return len(leaves) - 1


def _copied(tensor: Tensor) -> Leaf:
    """A copy in host memory."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise RecordingError(
            'inputs="store" keeps dense tensors; this batch holds a sparse or quantized one. Pass inputs="digest".'
        )
    plain = tensor.detach().resolve_conj().resolve_neg()
    copy = torch.empty(plain.shape, dtype=plain.dtype).copy_(plain)
    try:
        return copy.numpy()
    except TypeError:
        # A tensor without dimensions cannot be seen as another dtype.
        return copy.reshape(-1).view(_BITS[copy.element_size()]).reshape(copy.shape).numpy()


def _together(value: Any, arrays: Mapping[str, Leaf], prefix: str) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    match kind:
        case "tensor":
            return _tensor(arrays[f"{prefix}{inner[0]}"], inner[1])
        case "array":
            return np.array(arrays[f"{prefix}{inner}"])
        case "dict":
            return {key: _together(item, arrays, prefix) for key, item in inner}
        case "list" | "tuple":
            items = [_together(item, arrays, prefix) for item in inner]
            return items if kind == "list" else tuple(items)
    raise ValueError(f"a {kind} is not known")


def _tensor(array: Leaf, name: str) -> Tensor:
    values = torch.from_numpy(np.array(array))
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is no dtype of this torch")
    if values.dtype == dtype:
        return values
    return values.reshape(-1).view(dtype).reshape(values.shape)

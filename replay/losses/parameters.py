"""The recorded parameters in the task's model: those of rows, and the frozen ones in the dtype of the recording.

A frozen weight in bfloat16 or int8 stays that in a replay, whatever floating type it computes in: the forward pass has
operators for it. So do buffers of less than 32 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trajrec.bits import is_composed, leaves, values_of
from trajrec.errors import ModelMismatchError
from trajrec.records import WEIGHT_DTYPES, FrozenSpec, Keyframe, RunSpec
from trajrec.replay.step import RecordedRun
from trajrec.stretches import frozen_arrays


def load(model: nn.Module, run: RecordedRun, dtype: torch.dtype, device: torch.device) -> None:
    """Puts the recorded parameters into a model, which is then on a device and computes in a floating type.

    Raises:
        ModelMismatchError: if it has other parameters than the recording.
    """
    spec = run.spec
    check_model(model, spec)
    first, row, kept = run.keyframe(0), run.row(0), set[int]()
    frozen = {p.name: p for p in spec.stored_once}
    values = {p.name: torch.from_numpy(row[p.span].copy()).reshape(p.shape) for p in spec.params}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in frozen:
                _put(parameter, frozen[name], first)
                kept |= {id(parameter)} if frozen[name].dtype not in WEIGHT_DTYPES else set()
            else:
                parameter.copy_(values[name])
            parameter.requires_grad_(False)
        kept |= _kept_buffers(model, spec)

    def converted(tensor: Tensor) -> Tensor:
        floats = tensor.is_floating_point() and not is_composed(tensor) and id(tensor) not in kept
        return tensor.to(device, dtype if floats else None)

    model._apply(converted)  # type: ignore[no-untyped-call]


def _kept_buffers(model: nn.Module, spec: RunSpec) -> set[int]:
    """Buffers of less than 32 bits, in the dtype that they were recorded in."""
    narrow = {b.name: getattr(torch, b.dtype, None) for b in spec.buffers if b.dtype not in WEIGHT_DTYPES}
    found = set()
    for name, buffer in model.named_buffers():
        dtype = narrow.get(name)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
            found.add(id(buffer))
    return found


def _put(parameter: nn.Parameter, spec: FrozenSpec, first: Keyframe) -> None:
    """Gives a parameter the recorded bits."""
    arrays = frozen_arrays(first, spec.name)
    places = leaves(spec.name, parameter)
    if places.keys() != arrays.keys():
        raise _other_kind(spec, f"made of {', '.join(sorted(places))}, and of {', '.join(sorted(arrays))} there")
    for path, place in places.items():
        values = _values(arrays[path], spec.dtype if path == spec.name else str(place.dtype).removeprefix("torch."))
        if values is None or place.shape != values.shape:
            raise _other_kind(spec, f"{place.dtype} of shape {list(place.shape)}")
        if place.dtype == values.dtype or spec.dtype in WEIGHT_DTYPES:
            place.copy_(values)
        else:
            parameter.data = values.to(place.device)


def _values(array: np.ndarray[Any, Any], dtype: str) -> Tensor | None:
    kind = getattr(torch, dtype, None)
    try:
        return values_of(array, kind) if isinstance(kind, torch.dtype) else None
    except ValueError:
        return None


def _other_kind(spec: FrozenSpec, found: str) -> ModelMismatchError:
    return ModelMismatchError(
        f"The frozen parameter {spec.name} is {spec.dtype} of shape {list(spec.shape)} in the recording; in the task's "
        f"model it is {found}. Task.model must build, and quantize, the model as the training did."
    )


def check_model(model: nn.Module, spec: RunSpec) -> None:
    """Checks that a model has the recorded parameters.

    Raises:
        ModelMismatchError: naming what differs.
    """
    recorded = {p.name: p.shape for p in spec.params} | {p.name: p.shape for p in spec.stored_once}
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    missing = [f"{n} {s}" for n, s in recorded.items() if n not in found]
    extra = [f"{n} {s}" for n, s in found.items() if n not in recorded]
    shapes = [f"{n}: recorded {s}, task {found[n]}" for n, s in recorded.items() if n in found and found[n] != s]
    problems = [
        f"{title}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        for title, names in (("missing in the task", missing), ("not recorded", extra), ("other shape", shapes))
        if names
    ]
    if problems:
        raise ModelMismatchError(
            f"The task's model is not the recorded one. {'; '.join(problems)}. Task.model must build the model that "
            "was trained."
        )

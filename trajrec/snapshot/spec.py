"""The spec of a run: what stays the same, as tables of names, shapes and options."""

from __future__ import annotations

import platform
import sys
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trajrec.processor import processor
from trajrec.records import BufferSpec, OptimizerSpec, ParamSpec
from trajrec.snapshot.groups import Groups
from trajrec.snapshot.options import names_of
from trajrec.snapshot.weights import dtype_name
from trajrec.version import __version__


def param_table(parameters: Mapping[str, Tensor], groups: Groups, offset: int = 0) -> tuple[ParamSpec, ...]:
    """The parameters of a row in their order, from a place in it on."""
    table = []
    for name, p in parameters.items():
        group = groups.of(p)
        # A parameter without a gradient at the first step is skipped by the optimizer: constant, like a frozen one.
        trainable = group >= 0 and p.requires_grad and p.grad is not None
        table.append(ParamSpec(name, tuple(p.shape), dtype_name(p.dtype), offset, group, trainable))
        offset += p.numel()
    return tuple(table)


def buffer_table(model: nn.Module) -> tuple[BufferSpec, ...]:
    """The buffers of a model."""
    return tuple(BufferSpec(name, tuple(b.shape), dtype_name(b.dtype)) for name, b in model.named_buffers())


def optimizer_fields(optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """The fields of a spec that describe the optimizers."""
    known = tuple(
        OptimizerSpec(
            type(optimizer).__name__,
            type(optimizer).__module__,
            {k: v for k, v in optimizer.defaults.items() if _is_plain(v)},
            len(optimizer.param_groups),
            names_of(optimizer),
        )
        for optimizer in optimizers
    )
    if len(known) > 1:
        name = " + ".join(o.name for o in known)
        return {"optimizer": name, "optimizer_module": "", "defaults": {}, "optimizers": known}
    return {"optimizer": known[0].name, "optimizer_module": known[0].module, "defaults": known[0].defaults}


def origin(device: torch.device) -> dict[str, Any]:
    """The fields of a spec that say which run it is, and where and by what it was recorded."""
    return {
        "run_id": uuid.uuid4().hex,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "trajrec": __version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "python": platform.python_version(),
            "processor": processor(device),
        },
        "threads": torch.get_num_threads(),
        "command": tuple(sys.argv),
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)

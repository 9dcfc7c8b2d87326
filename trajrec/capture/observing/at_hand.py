"""Tensors and arrays that are at hand in the script: what a batch may have been cut out of.

Tensors are known to Python's garbage collector, wherever the script keeps them. Arrays are not: they are looked for in
the global and local variables of the functions that are running, and one level below.
"""

from __future__ import annotations

import gc
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_OURS = str(Path(__file__).parents[2])
_LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib")})
_MOST_VALUES = 10_000


def tensors_alive() -> list[Tensor]:
    """Plain tensors of which no gradient is taken, about in the order in which they were made."""
    everything = [value for generation in (2, 1, 0) for value in gc.get_objects(generation)]
    return [value for value in everything if type(value) is Tensor and is_strided(value) and not value.requires_grad]


def is_strided(value: Any) -> bool:
    """Whether this is an array, or a tensor whose values lie in memory as those of an array do."""
    if isinstance(value, Tensor):
        return value.layout is torch.strided and not value.is_meta and not value.is_quantized
    return isinstance(value, np.ndarray)


def arrays_in_sight() -> list[np.ndarray[Any, Any]]:
    """Arrays of numbers in the variables of the script's running functions, and in what these hold."""
    found: dict[int, np.ndarray[Any, Any]] = {}
    for frame in scripts_frames(sys._getframe(1)):
        for value in variables(frame):
            for inner in (value, *_held(value)):
                if isinstance(inner, np.ndarray) and inner.dtype.kind in "biuf":
                    found.setdefault(id(inner), inner)
    return [*found.values()]


def variables(frame: FrameType) -> list[Any]:
    """The values of a function's local and global variables."""
    own, shared = frame.f_locals, frame.f_globals
    return [*own.values()] if own is shared else [*own.values(), *shared.values()]


def scripts_frames(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames from this one on that are neither of an installed library nor of the recorder."""
    while frame is not None:
        if is_of_script(frame):
            yield frame
        frame = frame.f_back


def is_of_script(frame: FrameType) -> bool:
    """Whether a frame is of the user's own code."""
    name = frame.f_code.co_filename
    return not name.startswith((_OURS, *_LIBRARIES, "<frozen"))


def _held(value: Any) -> list[Any]:
    """What a list, a dictionary or an object of a class of the script holds."""
    if isinstance(value, list | tuple | dict):
        return list(value.values() if isinstance(value, dict) else value)[:_MOST_VALUES]
    if isinstance(value, ModuleType | type | nn.Module | Tensor | np.ndarray):
        return []
    try:
        inside = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return []
    return list(inside.values())[:_MOST_VALUES] if type(inside) is dict else []

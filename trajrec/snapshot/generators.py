"""Random generators: their states, and whether a step drew from them. They are read, never drawn from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from ctypes import string_at
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trajrec.errors import RecordingError

States = tuple[Tensor, ...]


class Generators:
    """The random generators that a forward pass on a device may use: the CPU's and the device's own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_cuda = device.type == "cuda"
        self._cpu = torch.default_generator.get_state

    def states(self) -> States:
        """Their states, each a vector of bytes.

        Raises:
            RecordingError: while a CUDA graph is captured, in which nothing can be read.
        """
        if self._on_cuda and torch.cuda.is_current_stream_capturing():
            raise RecordingError(
                "The step is captured in a CUDA graph, whose replays pass by every hook. Record a training without "
                'one: leave out torch.cuda.graph, or torch.compile(mode="reduce-overhead").'
            )
        return (self._cpu(), torch.cuda.get_rng_state(self.device)) if self._on_cuda else (self._cpu(),)

    def table(self) -> tuple[tuple[str, int], ...]:
        """Their names with the lengths of their states in bytes."""
        return tuple(zip(("cpu", str(self.device)), (len(state) for state in self.states()), strict=False))


def consumed(before: Sequence[States], after: States) -> bytes:
    """The states before each forward pass, one after the other, if the step drew random numbers; else b""."""
    first = _joined(before[0])
    return b"" if first == _joined(after) else b"".join([first, *map(_joined, before[1:])])


def _joined(states: States) -> bytes:
    # Every step pays for this, and what a step has pushed out of the caches comes back by way of torch.equal and numpy.
    if len(states) == 1:
        return string_at(states[0].data_ptr(), len(states[0]))
    return b"".join([string_at(state.data_ptr(), len(state)) for state in states])


class AllStates:
    """Reads the states of all generators; those that have not moved since the last time are handed out again."""

    def __init__(self) -> None:
        self._python: Any = None
        self._numpy: Any = None
        self._arrays: dict[str, npt.NDArray[Any]] = {}

    def read(self) -> dict[str, npt.NDArray[Any]]:
        """States of the generators of Python, numpy and torch on all devices, by the paths of `Keyframe.arrays`."""
        state = random.getstate()
        if state != self._python:
            self._python, (version, words, gauss) = state, state
            values = [version, *words, np.nan if gauss is None else gauss]
            self._arrays["rng/python"] = np.array(values, dtype=np.float64)
        legacy: Any = np.random.get_state()
        seen = (legacy[1].tobytes(), *legacy[2:])
        if seen != self._numpy:
            self._numpy = seen
            self._arrays["rng/numpy"] = np.append(legacy[1].astype(np.float64), legacy[2:])
        return self._arrays | _torch_states()


def _torch_states() -> dict[str, npt.NDArray[Any]]:
    arrays: dict[str, npt.NDArray[Any]] = {"rng/cpu": torch.get_rng_state().numpy().copy()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for index in range(torch.cuda.device_count()):
            arrays[f"rng/cuda:{index}"] = torch.cuda.get_rng_state(index).numpy().copy()
    return arrays

"""Random generators of torch on the replay's device: put back afterwards, and set to recorded states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Inside, random numbers may be drawn; afterwards the generators of the CPU and the device are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def set_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Sets the generators to recorded states by name, "cpu" and that of a GPU.

    What a GPU drew comes back on a GPU, whatever its number, and nowhere else: on the CPU a loss that drew there draws
    other numbers, and the certificate says so.

    Raises:
        RuntimeError, TypeError: a state is none.
    """
    torch.set_rng_state(states["cpu"])
    for name, state in states.items():
        if name.startswith("cuda") and device.type == "cuda":
            torch.cuda.set_rng_state(state, device)

"""Rows on their way to the device while the step before them is computed.

    copying stream      row t-1: pinned memory -> device          row t-2 ...
    computing stream    step t (waits for row t-1 only)           step t-1 ...

One row is in flight at a time: it is asked for before the one in front of it is handed over. On the CPU there is
nothing to be copied, and rows come one after the other as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class Transfer(Protocol):
    """Brings vectors to the device."""

    def start(self, vector: Tensor) -> Any:
        """Begins with a vector on the host."""

    def finish(self, started: Any) -> Tensor:
        """The vector on the device, ready for what is computed next."""


class OwnStream:
    """Copies from pinned memory on a stream of its own."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, vector: Tensor) -> Tensor:
        """Begins with a vector on the host."""
        pinned = vector.pin_memory()
        with torch.cuda.stream(self._stream):
            return pinned.to(self._device, self._dtype, non_blocking=True)

    def finish(self, started: Tensor) -> Tensor:
        """The vector on the device, ready for what is computed next."""
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        # Else its memory could be given to the next row while a step still reads it.
        started.record_stream(computing)
        return started


def ahead(vectors: Iterable[tuple[int, Tensor]], transfer: Transfer) -> Iterator[tuple[int, Tensor]]:
    """The vectors on the device by their number; each is begun before the one in front of it is handed over."""
    waiting: tuple[int, Any] | None = None
    for number, vector in vectors:
        # What is computed must not wait for the row that is begun here, so the one in front is finished first.
        ready = None if waiting is None else (waiting[0], transfer.finish(waiting[1]))
        waiting = number, transfer.start(vector)
        if ready is not None:
            yield ready
    if waiting is not None:
        yield waiting[0], transfer.finish(waiting[1])

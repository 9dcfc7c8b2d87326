"""Copies weights and loss from a CUDA device to the host while the training goes on.

    training stream     ... step t | gather w_t into a staging vector on the device | step t+1 ...
    copying stream                  after the gathering: staging vector -> pinned memory

The gathering is a copy within the device and takes microseconds; the transfer to the host runs on its own stream, and
nobody waits for it until step t+1 has been queued: then the row of step t is handed to the sink. The training stream
waits only if the transfer of a whole step ago has not finished reading the staging vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy.typing as npt
import torch
from torch import Tensor


class RowCopy(Protocol):
    """A transfer that is started after a step and finished after the next one."""

    def start(self, values: Sequence[Tensor], losses: Sequence[Tensor | float]) -> None:
        """Begins to transfer flat parameters and the step's loss values (their sum is the loss)."""

    def finish(self) -> tuple[npt.NDArray[Any], float]:
        """Waits for the transfer. Returns the row [P], valid until the next `start`, and the loss."""


class DeviceCopy:
    """Transfers from a CUDA device on a stream of its own.

    Args:
        sizes: number of values of each parameter.
        dtype: dtype of a row.
        device: where the parameters are.
    """

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        total = sum(sizes)
        self._device = device
        self._stage = torch.empty(total, dtype=dtype, device=device)
        self._parts = list(torch.split(self._stage, list(sizes)))
        self._stage_loss = torch.empty(1, dtype=torch.float64, device=device)
        self._row = torch.empty(total, dtype=dtype, pin_memory=True)
        self._loss = torch.empty(1, dtype=torch.float64, pin_memory=True)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def start(self, values: Sequence[Tensor], losses: Sequence[Tensor | float]) -> None:
        """Begins to transfer flat parameters and the step's loss values."""
        training = torch.cuda.current_stream(self._device)
        # The transfer of the step before reads the staging vector; it has had a whole step to do so.
        training.wait_event(self._done)
        torch._foreach_copy_(self._parts, list(values))
        self._stage_loss.fill_(float("nan") if not losses else 0.0)
        for value in losses:
            self._stage_loss += value.to(self._device, torch.float64) if isinstance(value, Tensor) else value
        self._stream.wait_stream(training)
        with torch.cuda.stream(self._stream):
            self._row.copy_(self._stage, non_blocking=True)
            self._loss.copy_(self._stage_loss, non_blocking=True)
            self._done.record(self._stream)

    def finish(self) -> tuple[npt.NDArray[Any], float]:
        """Waits for the transfer. Returns the row [P], valid until the next `start`, and the loss."""
        self._done.synchronize()
        return self._row.numpy(), float(self._loss)

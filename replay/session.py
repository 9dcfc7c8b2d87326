"""Everything that one replay needs, put together: the run, the task's losses, data, rule and certifier.

This is where a recording and a Task are held against each other before any mathematics: model, data set length,
fingerprint of the first batch. A drift found later is explained here, by going forwards from the first step.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trajrec.errors import DataMismatchError, DriftError, ReplayError
from trajrec.replay.adjoint import initial_state
from trajrec.replay.certificate import Certifier, Drifted, drift_error
from trajrec.replay.linearize import Linearization
from trajrec.replay.model import LossFunction
from trajrec.replay.samples import Samples
from trajrec.replay.targets import Targets, target_gradients
from trajrec.replay.trajectory import RecordedRun, Trajectory
from trajrec.rules import FlatLayout, rule_for
from trajrec.task import Task, digest

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Progress(Protocol):
    """Is told how far a replay is; the command line draws it."""

    def start(self, what: str, total: int) -> None:
        """A piece of work of `total` steps begins."""

    def advance(self, count: int) -> None:
        """So many steps are done."""


class Silent:
    """Draws nothing."""

    def start(self, what: str, total: int) -> None:
        """Ignores it."""

    def advance(self, count: int) -> None:
        """Ignores it."""


class Session:
    """A recording and a Task that fit each other.

    Args:
        run: an open recording.
        task: the user's task.
        dtype: "float32" or "float64"; default: the recording's.
        device: torch device; default: CPU.
        allow_drift: go on where the task does not describe the training.

    Raises:
        ModelMismatchError, DataMismatchError, UnsupportedOptimizerError, ReplayError: if they do not fit.
    """

    def __init__(
        self, run: RecordedRun, task: Task, *, dtype: Any = None, device: Any = None, allow_drift: bool = False
    ) -> None:
        if run.steps == 0:
            raise ReplayError("The recording holds no step yet: there is nothing to replay.")
        self.run = run
        self.task = task
        self.dtype = parse_dtype(dtype, run.spec.dtype)
        self.device = torch.device(device or "cpu")
        self.allow_drift = allow_drift
        self.layout = FlatLayout(run.spec)
        self.rule = rule_for(run.spec, self.layout)
        self.trajectory = Trajectory(run, self.layout, self.dtype, self.device)
        self.function = LossFunction(task, run, self.layout, self.dtype, self.device)
        self.train = Samples(task.train, task.collate, self.dtype, self.device)
        self._test: Samples | None = None
        self._check_data()

    @property
    def test(self) -> Samples:
        """The test set."""
        if self._test is None:
            self._test = Samples(self.task.test, self.task.collate, self.dtype, self.device)
        return self._test

    def _check_data(self) -> None:
        largest = max(int(self.run.sample_ids(t).max(initial=-1)) for t in range(1, self.run.steps + 1))
        self.train.check_ids(largest, "training")
        recorded = self.run.spec.data.get("first_batch_crc32")
        self.data_changed = recorded is not None and digest(self.train.raw(self.run.sample_ids(1))) != recorded
        # Other data that make the same first step (inputs prepared elsewhere, say) are the same to the mathematics.
        if self.data_changed and not self.allow_drift and self.find_drift(1) is not None:
            raise DataMismatchError(
                "The training data changed since the recording: the first batch has other contents (CRC-32 "
                f"{recorded:08x} recorded), and the first step cannot be made again from it. Give the Task the data "
                "set that the run was trained on, or go on with --allow-drift."
            )

    def certifier(self) -> Certifier:
        """A new certifier."""
        return Certifier(self.run, self.rule, self.dtype, self.allow_drift)

    def find_drift(self, last: int) -> Drifted | None:
        """The first of the steps 1..last that differs from the recording, going forwards; None if none does."""
        certifier = Certifier(self.run, self.rule, self.dtype, allow_drift=False)
        state = initial_state(self.trajectory, self.rule)
        for step in self.trajectory.forwards():
            if step.t > last:
                break
            try:
                gradient = Linearization(self.function, self.train, step).gradient
                state = certifier.forwards(step, state, gradient)
            except Drifted as drifted:
                return drifted
        return None

    def explain(self, drifted: Drifted) -> DriftError:
        """The refusal to raise for a drift: names the first bad step and the likely cause."""
        first = self.find_drift(drifted.step.t) or drifted
        here = Linearization(self.function, self.train, first.step)
        computed = float(torch.dot(first.step.shares, here.losses))
        data = " The first batch also differs from the recorded one." if self.data_changed else ""
        recorded = self.run.loss(first.step.t)
        return drift_error(first, recorded, computed, self.certifier().rtol, data)

    def guarded(self, work: Callable[[], Any]) -> Any:
        """Does the work; a drift in it becomes an explained refusal."""
        try:
            return work()
        except Drifted as drifted:
            raise self.explain(drifted) from None

    def target_gradients(self, targets: Targets) -> Tensor:
        """Grad l_j(w_T) of every target, [M, P']."""
        return target_gradients(targets, self.function, self.test, self.trajectory.weights(self.run.steps))


def parse_dtype(dtype: Any, default: str) -> torch.dtype:
    """A floating type by name or torch dtype.

    Raises:
        ReplayError: if it is not float32 or float64.
    """
    name = default if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ReplayError(
            f"A replay computes in float32 or float64, not {name}: second derivatives in half precision are wrong "
            "without a warning."
        )
    return DTYPES[name]


def check_mode(mode: str) -> None:
    """Raises ReplayError for an unknown mode."""
    if mode not in ("auto", "adjoint", "tangent"):
        raise ReplayError(f'mode must be "auto", "adjoint" or "tangent", not {mode!r}.')


def blocks(count: int, row_bytes: int, limit: int = 256 << 20, most: int = 64) -> list[slice]:
    """Pieces of `count` vectors that stay under a memory limit, as even as possible."""
    size = max(1, min(most, limit // max(row_bytes, 1)))
    pieces = -(-count // size)
    edges = np.linspace(0, count, pieces + 1).astype(int).tolist()
    return [slice(a, b) for a, b in pairwise(edges)]

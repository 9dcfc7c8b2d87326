"""The recorded training once more, without some samples.

Each sample that is left out keeps its place: batches, order, random states and denominators are those of the recording,
its loss counts nothing (or less), as eps_i = -1/N says. It takes a gradient a step, as the training itself did; weights
and states are of the session's floating type, the recording's by default. Running statistics run: a model with buffers
is trained again from the beginning, and targets are evaluated with the buffers that it ends with, as they would be
after training in earnest.

The changes of the targets are counted from a training without any change from the same keyframe, so that neither
rounding nor another machine is counted among them.

Letters: K sets, M targets, N training samples, P' trainable weights, T steps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from trajrec.records import FloatArray, IntArray
from trajrec.replay.losses.gradient import gradient_of
from trajrec.replay.losses.targets import Targets, target_values
from trajrec.replay.session import Session
from trajrec.replay.step import Step, make_step

# Of a training's length: what rounding makes of a training is far below, unless it is chaotic.
_CLOSE = 1e-3


class Retraining:
    """Trains again from keyframes, with samples taken out by a part.

    Args:
        session: the run and the Task.
        targets: what is measured at the end.
        advance: called with the number of steps done.
    """

    def __init__(self, session: Session, targets: Targets | None, advance: Callable[[int], None]) -> None:
        self.session = session
        self.targets = targets
        self.advance = advance
        self._base: dict[int, FloatArray] = {}
        self._first = _first_uses(session)

    def start(self, samples: IntArray) -> int:
        """The last keyframe before the first step that used one of these samples; T if none did.

        The first keyframe where the model has buffers.
        """
        run = self.session.run
        first = int(self._first[samples].min())
        if first > run.steps:
            return run.steps
        if self.session.function.has_buffers:
            # Some keyframes hold the buffers after the step, others those after the next forward pass.
            return 0
        return run.keyframe_steps[bisect_left(run.keyframe_steps, first) - 1]

    def steps(self, sets: Sequence[IntArray], times: int = 1) -> int:
        """How many steps it takes to take out each of these sets so many times, on a new `Retraining`."""
        starts = [self.start(samples) for samples in sets]
        # Sets with the same start share the training that nothing is taken out of.
        return sum(self.session.run.steps - start for start in (*set(starts), *starts * times))

    def change(self, samples: IntArray, part: float = 1.0) -> FloatArray:
        """The change of the target losses [M] with a part of these samples' losses taken out.

        Raises:
            Drifted: if the training without any change does not end where the recorded one did.
        """
        start = self.start(samples)
        if start not in self._base:
            self._base[start] = self._values(start, None, 0.0)
        return self._values(start, samples, part) - self._base[start]

    def _values(self, start: int, samples: IntArray | None, part: float) -> FloatArray:
        s = self.session
        weights = s.trajectory.weights(start)
        state = s.rule.initial_state(s.run.keyframe(start), s.run.hyper(min(start + 1, s.run.steps)), s.dtype, s.device)
        with s.function.running() as begin_again:
            for t in range(start + 1, s.run.steps + 1):
                step = make_step(s.run, t, weights, weights)
                gradient = self._gradient(step, samples, part)
                if t == 1:
                    begin_again()
                with torch.no_grad():
                    weights, state = s.rule.step(weights, state, gradient, step.hyper)
                self.advance(1)
            assert self.targets is not None
            found = target_values(self.targets, s.function, s.test, weights)
        if samples is None:
            self._check(start, weights)
        return found

    def _gradient(self, step: Step, samples: IntArray | None, part: float) -> Tensor:
        factors = None
        if samples is not None:
            factors = torch.ones(len(step.ids), dtype=self.session.dtype, device=self.session.device)
            factors[torch.as_tensor(np.isin(step.ids, samples))] = 1.0 - part
        return gradient_of(self.session.function, self.session.train, step, factors)

    def _check(self, start: int, weights: Tensor) -> None:
        """Where the training ends elsewhere than the recorded one, every step is held against the recording."""
        s = self.session
        recorded = s.trajectory.weights(s.run.steps)
        moved = float((recorded - s.trajectory.weights(start)).norm())
        if s.allow_drift or float((weights - recorded).norm()) <= _CLOSE * moved:
            return
        drifted = s.find_drift()
        if drifted is not None:
            raise drifted


def _first_uses(session: Session) -> IntArray:
    """The first step that used each of the N samples; T + 1 where none did."""
    run = session.run
    first = np.full(max(session.samples, len(session.train)), run.steps + 1)
    for t in range(run.steps, 0, -1):
        first[run.sample_ids(t)] = t
    return first

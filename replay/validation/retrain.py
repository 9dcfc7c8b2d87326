"""The recorded training once more, without some samples."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor

from trajrec.records import FloatArray
from trajrec.replay.losses.gradient import gradient_of
from trajrec.replay.losses.targets import Targets, target_values
from trajrec.replay.session import Session
from trajrec.replay.step import Step, make_step


class Retraining:
    """Trains again from keyframes, with samples taken out by a part."""

    def __init__(self, session: Session, targets: Targets | None, advance: Callable[[int], None]) -> None:
        self.session = session
        self.targets = targets
        self.advance = advance
        self._base: dict[int, FloatArray] = {}
        self._starts: dict[int, int] = {}

    def start(self, sample: int) -> int:
        """The last keyframe before the first step that used a sample; T if none did."""
        if sample not in self._starts:
            self._starts[sample] = self._find_start(sample)
        return self._starts[sample]

    def _find_start(self, sample: int) -> int:
        run = self.session.run
        used = (t for t in range(1, run.steps + 1) if sample in run.sample_ids(t))
        first = next(used, None)
        return run.steps if first is None else run.keyframe_steps[bisect_left(run.keyframe_steps, first) - 1]

    def change(self, sample: int, part: float) -> FloatArray:
        """The change of the target losses [M] with a part of a sample's loss taken out."""
        start = self.start(sample)
        if start not in self._base:
            self._base[start] = self._values(start, None, 0.0)
        return self._values(start, sample, part) - self._base[start]

    def _values(self, start: int, sample: int | None, part: float) -> FloatArray:
        s = self.session
        weights = s.trajectory.weights(start)
        state = s.rule.initial_state(s.run.keyframe(start), s.run.hyper(min(start + 1, s.run.steps)), s.dtype, s.device)
        for t in range(start + 1, s.run.steps + 1):
            step = make_step(s.run, t, weights, weights)
            gradient = self._gradient(step, sample, part)
            with torch.no_grad():
                weights, state = s.rule.step(weights, state, gradient, step.hyper)
            self.advance(1)
        assert self.targets is not None
        return target_values(self.targets, s.function, s.test, weights)

    def _gradient(self, step: Step, sample: int | None, part: float) -> Tensor:
        factors = torch.ones(len(step.ids), dtype=self.session.dtype, device=self.session.device)
        factors[torch.as_tensor(step.ids == sample)] = 1.0 - part
        return gradient_of(self.session.function, self.session.train, step, factors)

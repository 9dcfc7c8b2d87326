"""A drifted step, to be made again under suspicions.

Numbers of a suspicion (s, lam) are fitted by Gauss-Newton steps, which are exact for an optimizer that is linear in the
gradient.

Letters: P' trainable weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.gradient import gradient_of
from trajrec.replay.proof.refusal import Drifted
from trajrec.replay.step import RecordedRun, Step, make_step
from trajrec.rules import Rule

_FITTED = 12
_HALVED = 12
EXPLAINED = 1e-3
_MOST_STEPS = 256

GradientChange = Callable[[Tensor, Tensor], Tensor]
StepChange = Callable[[Step], Step]
WeightChange = Callable[[Tensor], Tensor]


def unchanged(step: Step) -> Step:
    """The step itself."""
    return step


def the_gradient(gradient: Tensor, weights: Tensor) -> Tensor:
    """The gradient itself."""
    return gradient


@dataclass(frozen=True, slots=True)
class Cause:
    """A cause in a sentence, with what to do about it, and the drift that is left under it."""

    sentence: str
    drift: float


class Trial:
    """A drifted step, or several up to the next keyframe, and what they should come to.

    Args:
        run: the recording.
        function: the Task's losses.
        samples: the training set; its inputs are not checked here.
        rule: the optimizer.
        drifted: the drift, with the point before it.

    Attributes:
        first: the first step; last: the number of the last one.
        state: the optimizer's before the first step.
        target: the recorded weights [P'] after the last step.
    """

    def __init__(
        self, run: RecordedRun, function: LossFunction, samples: Samples, rule: Rule, drifted: Drifted
    ) -> None:
        self.run = run
        self.function = function
        self.samples = samples
        self.rule = rule
        dtype = samples.dtype  # rows between keyframes come in the recording's own
        self.first = replace(drifted.probe, before=drifted.probe.before.to(dtype))
        self.state = drifted.state and {n: v if n in rule.scalars else v.to(dtype) for n, v in drifted.state.items()}
        self.last = drifted.seen_at
        self.target = drifted.probe.before if drifted.recorded is None else drifted.recorded.to(dtype)
        self.drift = drifted.drift
        self.is_possible = (
            drifted.recorded is not None and self.state is not None and self.last - self.first.t < _MOST_STEPS
        )
        self._gradient: Tensor | None = None

    @contextmanager
    def without_checking_inputs(self) -> Iterator[None]:
        """Inside, batches may be others than the recorded ones."""
        checked, self.samples.checks_inputs = self.samples.checks_inputs, False
        try:
            yield
        finally:
            self.samples.checks_inputs = checked

    # -- making the step again -------------------------------------------------------------------------------------

    def reached(
        self, change: StepChange = unchanged, of: GradientChange = the_gradient, weights_to: WeightChange | None = None
    ) -> Tensor:
        """The weights after the last step, under changes of steps, of gradients, and of the weights between steps."""
        weights, state = self.first.before, self.state
        assert state is not None
        for t in range(self.first.t, self.last + 1):
            weights = weights if weights_to is None or t == 1 else weights_to(weights)
            step = change(make_step(self.run, t, weights, weights))
            as_recorded = change is unchanged and t == self.first.t and weights is self.first.before
            gradient = self.first_gradient() if as_recorded else gradient_of(self.function, self.samples, step)
            with torch.no_grad():
                weights, state = self.rule.step(weights, state, of(gradient, weights), step.hyper)
        return weights

    def first_gradient(self) -> Tensor:
        """The gradient of the first step, computed once."""
        if self._gradient is None:
            self._gradient = gradient_of(self.function, self.samples, self.first)
        return self._gradient

    def drift_of(self, reached: Tensor) -> float:
        """How far weights are from the recorded ones, over what they moved."""
        moved = float((self.target - self.first.before).abs().max())
        return float((reached - self.target).abs().max()) / moved if moved else float("inf")

    def explained(self, reached: Tensor, sentence: str) -> Cause | None:
        """The cause, if the weights that are reached under it are the recorded ones."""
        drift = self.drift_of(reached)
        return Cause(sentence, drift) if drift <= EXPLAINED * min(self.drift, 1.0) else None

    def loss(self, weights: Tensor | None = None) -> float:
        """The Task's loss of the first step, at other weights than its own where they are given."""
        return self.function.value(self.first.before if weights is None else weights, self.samples, self.first)

    def loss_agrees(self, computed: float) -> bool:
        """Whether a loss of the first step is the recorded one."""
        recorded = self.run.loss(self.first.t)
        return abs(recorded - computed) <= 1e-3 * max(abs(recorded), 1e-12)

    # -- fitting ---------------------------------------------------------------------------------------------------

    def fit(self, reached: Callable[[float], Tensor], starts: Sequence[float]) -> tuple[float, Tensor]:
        """The number whose weights come nearest to the recorded ones, by Gauss-Newton steps from the best start."""
        x = min(starts, key=lambda start: self.drift_of(reached(start)))
        found = reached(x)
        for _ in range(_FITTED):
            h = 1e-3 * max(abs(x), 1e-3)
            slope = (reached(x + h) - found).double() / h
            if not bool(slope.any()):
                break
            step = -float((slope * (found - self.target).double()).sum() / slope.square().sum())
            for _ in range(_HALVED):
                made = reached(x + step)
                if self.drift_of(made) < self.drift_of(found):
                    break
                step /= 2
            else:
                break
            x, found = x + step, made
        return x, found

    def least(self, reached: Callable[[float], Tensor], low: float, high: float) -> tuple[float, Tensor]:
        """The number in an interval whose weights come nearest to the recorded ones, by golden sections."""
        ratio = 0.6180339887498949
        for _ in range(48):
            a, b = high - ratio * (high - low), low + ratio * (high - low)
            if self.drift_of(reached(a)) <= self.drift_of(reached(b)):
                high = b
            else:
                low = a
        middle = (low + high) / 2
        return middle, reached(middle)

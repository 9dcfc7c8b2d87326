"""The proof step by step: the optimizer's step, made again, must give the recorded weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trajrec.records import FloatArray
from trajrec.replay.proof.certificate import Comparisons
from trajrec.replay.proof.drift import ROUNDING, Comparison, Judged, tolerance
from trajrec.replay.proof.refusal import Drifted
from trajrec.replay.proof.rounding import Rounding
from trajrec.replay.step import RecordedRun, Step
from trajrec.rules import Rule
from trajrec.rules.step import State


class StepwiseChecks:
    """Compares recomputed steps with recorded ones.

    Args:
        run: the recording.
        rule: steps like the run's optimizer.
        dtype: floating type of the replay.
        allow_drift: go on after drift, and say so in the certificate.
        rounding: tells what rounding makes of a step.
        here: whether the replay computes where the training did.
    """

    def __init__(
        self, run: RecordedRun, rule: Rule, dtype: torch.dtype, allow_drift: bool, rounding: Rounding, here: bool
    ) -> None:
        self.run = run
        self.rule = rule
        self.allow_drift = allow_drift
        coarser = max(torch.finfo(dtype).eps, float(np.finfo(run.spec.dtype).eps))
        self.tolerance = tolerance(rule, run.spec, coarser, here=here)
        self._last_places = ROUNDING * coarser
        self._rounding = rounding
        self.found = Comparisons()
        self._waiting: tuple[Step, Tensor | None] | None = None
        self.stride = 1

    def due(self, t: int) -> bool:
        """Whether a step is to be checked: the first, the last and every `stride`-th."""
        return t in (1, self.run.steps) or t % self.stride == 0

    def wants(self, step: Step) -> bool:
        """Whether `backwards` needs the gradient of this step: to check it, or for the state of the one after."""
        return self.due(step.t) or (self.due(step.t + 1) and not self._rows_suffice(step))

    def _rows_suffice(self, step: Step) -> bool:
        """Whether the rows alone imply the state after a step."""
        nesterov = "nesterov" in self.rule.names and step.hyper[:, self.rule.names.index("nesterov")].any()
        return step.state is not None or (self.rule.constant and not nesterov)

    def forwards(self, step: Step, state: State, gradient: Tensor) -> State:
        """Checks a step whose state is known. Returns the state after it."""
        made, new_state = self.rule.step(step.before, state, gradient, step.hyper)
        self._compare(step, gradient, made, 1.0, state)
        return new_state

    def backwards(self, step: Step, gradient: Tensor | None) -> None:
        """Takes a step going backwards, and checks the one that waited for it; or the step itself, state known."""
        if step.state is not None:
            if gradient is not None:
                self._check(step, gradient, step.state, 1.0)
            return
        self._check_waiting(step, gradient)
        self._waiting = (step, gradient)

    def _check_waiting(self, before: Step, gradient: Tensor | None) -> None:
        """Checks the step that waited, if it can be; `before` is the step before it, with its gradient."""
        if self._waiting is None or self._waiting[1] is None or not (self.due(before.t + 1) or gradient is not None):
            return
        step, own = self._waiting
        state = self._state_after(before, gradient)
        if state is not None and own is not None:
            self._check(step, own, state, _growth(before.hyper, step.hyper, self.rule))

    def finish_backwards(self, initial: State) -> None:
        """Checks the first step, whose state is the one that training began with."""
        step, gradient = self._waiting or (None, None)
        if step is not None and gradient is not None:
            self._check(step, gradient, initial, 1.0)
        self._waiting = None

    def _state_after(self, step: Step, gradient: Tensor | None) -> State | None:
        if step.t in self.run.keyframe_steps:
            keyframe = self.run.keyframe(step.t)
            return self.rule.initial_state(keyframe, step.hyper, step.before.dtype, step.before.device)
        if gradient is None and not self._rows_suffice(step):
            return None
        # Where the rows suffice the gradient is not looked at: any will do.
        known = step.before if gradient is None else gradient
        return self.rule.implied_state(step.before, step.after, known, step.hyper)

    def _check(self, step: Step, gradient: Tensor, state: State, growth: float) -> None:
        made, _ = self.rule.step(step.before, state, gradient, step.hyper)
        self._compare(step, gradient, made, growth, state)

    def _compare(self, step: Step, gradient: Tensor, made: Tensor, growth: float, state: State) -> None:
        last_places = self._last_places * growth * step.after.abs()
        compared = Comparison(self.rule, step, made, last_places, self.tolerance)
        judged, proves = compared.judged(), compared.proves()
        if not judged.within:
            judged, proves = self._with_allowances(compared, step, gradient, state, judged)
        # A step that is as small as rounding proves nothing, unless it comes out to the last bit.
        if proves or not judged.within:
            self.found.checked.add(step.t)
        if not compared.exact:
            self.found.unequal.add(step.t)
        self.found.drifted(step.t, judged.drift)
        if not judged.within:
            self.found.bad(step.t)
            if not self.allow_drift:
                raise Drifted(step.t, judged.drift, step, step.t, state, step.after)

    def _with_allowances(
        self, compared: Comparison, step: Step, gradient: Tensor, state: State, judged: Judged
    ) -> tuple[Judged, bool]:
        """The verdict with what rounding makes of the step taken off, and whether that leaves a proof."""
        # Where steps are known to differ, and are gone over nevertheless, none is worth a gradient more.
        measure, proves = self.found.first_bad is None, True
        for allowance in self._rounding.allowances(step, state, gradient, measure=measure):
            judged, proves = compared.judged(allowance), compared.proves(allowance)
            if judged.within:
                break
        return judged, proves

    @property
    def waiting(self) -> tuple[Step, Tensor | None] | None:
        """A step that waits for the one before it, going backwards, with its gradient."""
        return self._waiting

    @waiting.setter
    def waiting(self, waiting: tuple[Step, Tensor | None] | None) -> None:
        self._waiting = waiting


def _growth(before: FloatArray, after: FloatArray, rule: Rule) -> float:
    """By how much a rounding error of w_{t-1} grows when the implied buffer meets another learning rate."""
    column = rule.names.index("lr")
    rates = [(float(a), float(b)) for a, b in zip(after[:, column], before[:, column], strict=True) if b]
    return max([1.0, *(abs(a / b) for a, b in rates)])

"""Which form a replay computes its derivatives in: proved right at a recorded step, then the fastest.

The forms of `replay.linearize` give the same numbers, and which is the fastest depends on the model, the number of
directions and the machine. At the first step that a replay visits, every form that may serve is carried out there:

* one that raises (an operator without a forward derivative, samples that cannot be taken one by one) is left out;
* one whose numbers differ from reverse over reverse mode is left out: a formula of torch is wrong for this model;
* of the others the fastest of a few trials is taken, and used for all steps of the same kind. Between forms that are
  about as fast the order of the candidates decides, not the noise of a measurement, so that a replay that is done once
  more chooses the same.

Where reverse over reverse mode is not to be had, because an operator has no second derivative, and only first ones are
asked for, the forms that need no other (`FIRST_ORDER`) are held against single backward passes in the same way.

The choice is noted (`names`), because another form rounds differently: a replay that is taken up again goes on with the
form it began with, and tests name the form they want.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trajrec.replay.derivatives.derivatives import Derivatives, Point
from trajrec.replay.derivatives.forward import ForwardPoint
from trajrec.replay.derivatives.gauss_newton import GaussNewtonPoint
from trajrec.replay.derivatives.per_sample import LayersPoint, PushedPoint, SamplesPoint, SinglesPoint, SlicesPoint
from trajrec.replay.derivatives.pieces import CutPoint, Cutting, Form
from trajrec.replay.derivatives.reverse import BatchedPoint, ReversePoint
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.step import Step, Trajectory
from trajrec.rules import Rule

REFERENCE = "reverse"
SINGLES = "singles"
FIRST_ORDER = ("pushed", "layers", "samples", "slices", SINGLES)
GAUSS_NEWTON = "gauss-newton"
EXACT = "exact"
_TRIALS = 4
_LONG = 0.5
_CLOSE = 1.1
_MOST_TOGETHER = 32
FORMS: dict[str, Callable[[LossFunction, Samples, Step, int], Point]] = {
    "forward": ForwardPoint,
    "reverse": ReversePoint,
    "batched": BatchedPoint,
    "samples": SamplesPoint,
    "layers": LayersPoint,
}
POINTS = FORMS | {GAUSS_NEWTON: GaussNewtonPoint, "pushed": PushedPoint, "slices": SlicesPoint, SINGLES: SinglesPoint}
Trial = Callable[[str], Derivatives]


@dataclass(slots=True)
class Forms:
    """The forms chosen so far.

    Attributes:
        only: use this form wherever it may serve, without trials; None chooses.
        gauss_newton: the Gauss-Newton form takes the place of the Hessian, and is no matter of choice.
        names: the form by kind of step.
        memory: bytes that the intermediate values of several directions may take.
        chunk: directions that "batched" takes together; 0 before it is known.
        cutting: how many samples of a batch are taken at once.
    """

    only: str | None = None
    gauss_newton: bool = False
    memory: int = 1 << 30
    chunk: int = 0
    cutting: Cutting = field(default_factory=Cutting)
    names: dict[str, str] = field(default_factory=dict)

    def settle_chunk(self, needed: Callable[[], int]) -> None:
        """Fixes the chunk from the bytes that the intermediate values of one direction need."""
        if not self.chunk:
            self.chunk = max(1, min(_MOST_TOGETHER, self.memory // max(1, needed())))

    def form(self, kind: str, candidates: Sequence[str], trial: Trial) -> str:
        """The form for a kind of step; `trial` computes a step in a form."""
        if self.gauss_newton and kind.startswith(EXACT):
            return GAUSS_NEWTON
        if kind not in self.names:
            if self.only is not None:
                self.names[kind] = self.only if self.only in candidates else reference_of(candidates)
            else:
                self.names[kind] = candidates[0] if len(candidates) == 1 else fastest(candidates, trial)
        return self.names[kind]


def kind_of(step: Step, directions: int, *, hessian: bool) -> str:
    """Steps of one kind share a form: the Hessian, directions, batch size (to a factor of 2), micro-batches, modes."""
    modes, size = ",".join(step.conditions.eval_modules), len(step.ids).bit_length()
    return f"{EXACT if hessian else 'free'}/{directions}/{size}/{len(step.parts)}/{modes}"


def reference_of(candidates: Sequence[str]) -> str:
    """What forms are held against."""
    return SINGLES if SINGLES in candidates else REFERENCE


def fastest(candidates: Sequence[str], trial: Trial) -> str:
    """The first of the forms that agree with the reference and are about as fast as the fastest of them."""
    seconds = right_forms(candidates, trial)
    for _ in range(_TRIALS - 1):
        for name, best in seconds.items():
            # One trial tells enough of what takes long.
            if len(seconds) > 1 and best < _LONG:
                seconds[name] = min(best, _timed(trial, name)[1])
    close = _CLOSE * min(seconds.values())
    return next(name for name in candidates if seconds.get(name, math.inf) <= close)


def right_forms(candidates: Sequence[str], trial: Trial) -> dict[str, float]:
    """The reference, and the forms that can be computed and agree with it; with the seconds that each took."""
    reference = reference_of(candidates)
    expected, taken = _timed(trial, reference)
    right = {reference: taken}
    for name in candidates:
        if name == reference:
            continue
        try:
            found, taken = _timed(trial, name)
        except Exception:  # whatever a model's operators raise in a form, another form serves
            continue
        if agree(found, expected):
            right[name] = taken
    return right


def _timed(trial: Trial, name: str) -> tuple[Derivatives, float]:
    began = time.perf_counter()
    found = trial(name)
    if found.inner.is_cuda:
        torch.cuda.synchronize(found.inner.device)
    return found, time.perf_counter() - began


def agree(found: Derivatives, expected: Derivatives) -> bool:
    """Whether two forms gave the same, to rounding."""
    pairs = ((found.inner, expected.inner), (found.hvp, expected.hvp), (found.gradient, expected.gradient))
    return all(_close(a, b) for a, b in pairs if a is not None and b is not None)


def _close(found: Tensor, expected: Tensor) -> bool:
    tolerance = torch.finfo(found.dtype).eps ** 0.5
    return bool((found - expected).norm() <= tolerance * expected.norm())


@dataclass(frozen=True, slots=True)
class Problem:
    """What stays the same for all steps and targets.

    Attributes:
        trajectory: the run.
        function: per-sample losses.
        samples: the training set.
        rule: the optimizer.
        exact: with the Hessian.
        forms: which form computes derivatives.
    """

    trajectory: Trajectory
    function: LossFunction
    samples: Samples
    rule: Rule
    exact: bool
    forms: Forms = field(default_factory=Forms)


def point_at(form: Form, problem: Problem, step: Step) -> Any:
    """A step in a form; in pieces, where it does not fit as a whole."""
    forms, function, samples = problem.forms, problem.function, problem.samples
    size = at_once(problem, step)
    if size == len(step.ids):
        return form(function, samples, step, forms.chunk)
    return CutPoint(form, function, samples, step, forms.chunk, size)


def at_once(problem: Problem, step: Step) -> int:
    """How many samples of a step a form takes at once."""
    return problem.forms.cutting.size(problem.function, problem.samples, step)

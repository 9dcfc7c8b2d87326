"""Which form a replay computes its derivatives in: proved right at a recorded step, then the fastest.

The forms of `replay.derivatives.derivatives` give the same numbers, and which is the fastest depends on the model, the
number of directions and the machine. At the first step of its kind every form that may serve is carried out:

* one that raises (an operator without a forward derivative, samples that cannot be taken one by one) is left out;
* one whose numbers differ from reverse over reverse mode is left out: a formula of torch is wrong for this model;
* of the others the fastest of a few trials is taken, and used for all steps of the same kind. Between forms that are
  about as fast the order of the candidates decides, not the noise of a measurement, so that a replay that is done once
  more chooses the same.

Where reverse over reverse mode is not to be had, because an operator has no second derivative, and only first ones are
asked for, the forms that need no other (`FIRST_ORDER`) are held against single backward passes in the same way.

The choice is noted (`Chosen`), because another form rounds differently: a replay that is taken up again goes on with
the form it began with. Trials go along a random direction, once a kind of step, and have no place in the recurrence.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from trajrec.replay.derivatives.derivatives import CarryingPoint, Derivatives, ForcedPoint, Point
from trajrec.replay.derivatives.forward import ForwardPoint
from trajrec.replay.derivatives.gauss_newton import GaussNewtonPoint
from trajrec.replay.derivatives.operators import operator_without
from trajrec.replay.derivatives.per_sample import LayersPoint, PushedPoint, SamplesPoint, SinglesPoint, SlicesPoint
from trajrec.replay.derivatives.pieces import CutPoint, Cutting, Form, cut
from trajrec.replay.derivatives.reverse import ReversePoint, saved_bytes
from trajrec.replay.derivatives.statistics import StatisticsPoint
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.statistics import Carried, RunningStatistics
from trajrec.replay.step import Step, Trajectory, make_step
from trajrec.rules import Rule

REFERENCE = "reverse"
SINGLES = "singles"
FIRST_ORDER = ("pushed", "layers", "samples", "slices", SINGLES)
GAUSS_NEWTON = "gauss-newton"
DIFFERENCE = "difference/"
CARRYING = ("forward", REFERENCE)
FORMS: Mapping[str, Form] = {
    "forward": ForwardPoint,
    "reverse": ReversePoint,
    "samples": SamplesPoint,
    "layers": LayersPoint,
    "pushed": PushedPoint,
    "slices": SlicesPoint,
    SINGLES: SinglesPoint,
    GAUSS_NEWTON: GaussNewtonPoint,
}
_TRIALS = 4
_LONG = 0.5
_CLOSE = 1.1
_MOST_TOGETHER = 32
Trial = Callable[[str], Derivatives]
_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class Plan:
    """How derivatives may be taken; fixed before the first step.

    Attributes:
        curvature: "hessian", "ggn", "kinks" or "none".
        only: use this form wherever it may serve, without trials; None chooses.
        memory: bytes that the gradients of many samples may take.
        cutting: how many samples of a batch are taken at once.
        forms: by name; a benchmark may put timed ones in their places.
    """

    curvature: str = "none"
    only: str | None = None
    memory: int = 1 << 30
    cutting: Cutting = field(default_factory=Cutting)
    forms: Mapping[str, Form] = field(default_factory=lambda: FORMS)

    @property
    def exact(self) -> bool:
        """Whether the derivative of the gradient is taken at all."""
        return self.curvature != "none"


@dataclass(slots=True)
class Chosen:
    """What was chosen on the way, JSON-ready.

    Attributes:
        forms: by kind of step.
        pieces: samples taken at once, by kind of step; 0 is all.
        chunk: samples of a slice; 0 before it is known.
        block: targets or samples at once; None before it is known.
    """

    forms: dict[str, str] = field(default_factory=dict)
    pieces: dict[str, int] = field(default_factory=dict)
    chunk: int = 0
    block: int | None = None


def kind_of(step: Step, directions: int, *, hessian: bool) -> str:
    """Steps of one kind share a form: the Hessian, directions, batch size (to a factor of 2), micro-batches, modes."""
    modes, size = ",".join(step.conditions.eval_modules), len(step.ids).bit_length()
    return f"{'exact' if hessian else 'free'}/{directions}/{size}/{len(step.parts)}/{modes}"


def reference_of(candidates: Sequence[str]) -> str:
    """What forms are held against."""
    return next((name for name in candidates if name.endswith(SINGLES)), REFERENCE)


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
    _finish_kernels()
    began = time.perf_counter()
    found = trial(name)
    _finish_kernels()
    return found, time.perf_counter() - began


def _finish_kernels() -> None:
    """Waits for what was queued on a GPU, if one is used."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


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
        plan: how derivatives may be taken.
        chosen: what was chosen on the way.
    """

    trajectory: Trajectory
    function: LossFunction
    samples: Samples
    rule: Rule
    plan: Plan = field(default_factory=Plan)
    chosen: Chosen = field(default_factory=Chosen)

    def at(self, step: Step, directions: int, *, gradient: bool, first: bool = False, usual: bool = False) -> At:
        """A step, ready for derivatives along several directions at once.

        Args:
            step: the step.
            directions: how many there will be.
            gradient: whether g_t is wanted beside them.
            first: whether it is wanted before the directions are known.
            usual: whether most steps want it: a form is tried as these need it.
        """
        kind = kind_of(step, directions, hessian=self.plan.exact)
        stages = (self._candidates(step, directions), (REFERENCE,), () if self.plan.exact else self._first_order(step))
        return At(self, step, kind, stages, gradient, _Need(directions, first, usual))

    def forced(self, step: Step, samples: int) -> At:
        """A step, ready for what the gradient changes by: for the tangents of so many samples."""
        kind = kind_of(step, samples, hessian=self.plan.exact)
        differences = self._differences()
        first = GAUSS_NEWTON if self.plan.curvature == "ggn" else reference_of(differences or (REFERENCE,))
        stages = ((first,), () if self.plan.exact else (SINGLES,))
        return At(self, step, kind, stages, True, _Need(samples, True, True))

    def _candidates(self, step: Step, directions: int) -> tuple[str, ...]:
        """The forms that may serve."""
        if self.plan.curvature == "ggn":
            return (GAUSS_NEWTON,)
        if differences := self._differences():
            return differences
        seen = self.function.seen
        if seen.derivatives or seen.functions or seen.hooks:
            # What the others make of derivatives within need not show at the step where they are tried; and they know
            # no backward pass but that of the loss.
            return (REFERENCE,)
        if directions == 1:
            return ("forward", REFERENCE)
        if self.plan.exact:
            return (REFERENCE, "forward")
        return (REFERENCE, "layers", *(("samples",) if self._fits(step) else ()), "forward")

    def _differences(self) -> tuple[str, ...]:
        """The forms that difference the gradient, where the plan has them: no other is right then."""
        return tuple(name for name in self.plan.forms if name.startswith(DIFFERENCE))

    def _first_order(self, step: Step) -> tuple[str, ...]:
        """The forms that may serve where only first derivatives are to be had."""
        return tuple(name for name in FIRST_ORDER if name != "samples" or self._fits(step))

    def _fits(self, step: Step) -> bool:
        """Whether the gradients of all samples fit into the memory."""
        return self.at_once(step) * step.before.nbytes <= self.plan.memory

    def at_once(self, step: Step) -> int:
        """How many samples of a step a form takes at once."""
        return self.plan.cutting.size(self.function, self.samples, step, self.chosen.pieces)

    def point(self, name: str, step: Step) -> Point:
        """A step in a form; in pieces, where it does not fit as a whole."""
        size, form = self.at_once(step), self.plan.forms[name]
        if name == "slices" and not self.chosen.chunk:
            piece = step if size == len(step.ids) else next(cut(self.function, self.samples, step, size))
            needed = max(1, saved_bytes(self.function, self.samples, piece))
            self.chosen.chunk = max(1, min(_MOST_TOGETHER, self.plan.memory // needed))
        given = self.function, self.samples, step, self.chosen.chunk
        return form(*given) if size == len(step.ids) else CutPoint(form, *given, size)


def carried_of(problem: Problem, values: Tensor | None) -> Carried | None:
    """Cotangents [K, Q] of the running statistics at the end; None without them, or without a curvature."""
    statistics = problem.function.statistics
    if statistics is None or values is None or not problem.plan.exact:
        return None
    return Carried(statistics, values, problem.function.counts())


def carried_from_start(problem: Problem, tangents: int) -> Carried | None:
    """The tangents [K, Q] of the running statistics at the beginning, zero; None as above.

    A recording may begin after the first forward pass: how many there were before follows from those at the end.
    """
    statistics, trajectory = problem.function.statistics, problem.trajectory
    if statistics is None or not problem.plan.exact:
        return None
    values = torch.zeros(tangents, statistics.size, dtype=trajectory.dtype, device=trajectory.device)
    counts = problem.function.counts()
    if None in statistics.momenta:
        steps = [make_step(trajectory.run, t, values, values) for t in range(1, trajectory.run.steps + 1)]
        first = next(step for step in steps if statistics.moved_in(step.conditions.eval_modules))
        weights = trajectory.weights(first.t - 1)
        seen = StatisticsPoint(problem.function, problem.samples, replace(first, before=weights)).passes
        moving = [steps_of_norm(statistics, place, steps) for place in range(len(counts))]
        counts = tuple(n - seen[k] * moving[k] // len(first.parts) for k, n in enumerate(counts))
    return Carried(statistics, values, counts)


def steps_of_norm(statistics: RunningStatistics, place: int, steps: Sequence[Step]) -> int:
    """Through how many micro-batches of these steps a normalisation went in training mode."""
    name = statistics.names[place]
    return sum(len(s.parts) for s in steps if not {"", name} & set(s.conditions.eval_modules))


@dataclass(frozen=True, slots=True)
class _Need:
    """What a form is tried for: directions, whether g_t is needed before them, and whether beside them."""

    directions: int
    first: bool
    gradient: bool


class At:
    """A step in the form that is right and fastest for its kind; in a plainer one where that cannot be computed here.

    A model may use its weights otherwise than at the step that was tried, and an operator may have no second
    derivative. Nothing takes the place of a curvature that was asked for.
    """

    def __init__(
        self, problem: Problem, step: Step, kind: str, stages: Sequence[Sequence[str]], gradient: bool, need: _Need
    ) -> None:
        self._problem, self._step, self._kind, self._gradient, self._need = problem, step, kind, gradient, need
        self._stages = [stage for stage in stages if stage]
        self._point: Point | None = None

    @property
    def shares(self) -> Tensor:
        """The c[t,i] [B] of the batch."""
        return self._computed(lambda point: cast(ForcedPoint, point).shares)

    def gradient(self) -> Tensor:
        """g_t [P']."""
        return self._computed(lambda point: point.gradient())

    def along(self, directions: Tensor, carried: Carried | None = None) -> Derivatives:
        """Derivatives along directions [K, P'], with what is carried of the running statistics."""
        exact, gradient = self._problem.plan.exact, self._gradient

        def found(point: Point) -> Derivatives:
            if carried is not None and self._form() in CARRYING and not isinstance(point, CutPoint):
                return cast(CarryingPoint, point).carrying(directions, carried, gradient=gradient)
            return point.along(directions, hessian=exact, gradient=gradient)

        made = self._computed(found)
        if carried is None or made.carried is not None:
            return made
        lam, before = self._statistics().pull(directions, carried)
        return replace(made, hvp=None if made.hvp is None else made.hvp + lam, carried=before)

    def push_statistics(self, directions: Tensor, carried: Carried) -> tuple[Tensor | None, Carried]:
        """What the running statistics change the gradient by, [K, P'] or None, and what is carried on."""
        return self._statistics().push(directions, carried)

    def _statistics(self) -> StatisticsPoint:
        return StatisticsPoint(self._problem.function, self._problem.samples, self._step)

    def forced(self, directions: Tensor | None, multipliers: Tensor) -> Tensor:
        """H directions + sum_i multipliers[k, i] grad l_i: [K, P'] from [K, P'] and [K, B]; None drops the Hessian."""
        return self._computed(lambda point: cast(ForcedPoint, point).forced(directions, multipliers))

    def _computed(self, what: Callable[[Point], _Found]) -> _Found:
        while True:
            try:
                if self._point is None:
                    self._point = self._problem.point(self._form(), self._step)
                return what(self._point)
            except RuntimeError as error:
                may_give_way = isinstance(error, NotImplementedError) or operator_without(error)
                if len(self._stages) == 1 or not may_give_way or self._problem.plan.curvature == "ggn":
                    raise
            self._problem.chosen.forms.pop(self._kind, None)
            self._stages.pop(0)
            self._point = None

    def _form(self) -> str:
        """The form for this kind of step, chosen at the first of its kind."""
        plan, chosen, candidates = self._problem.plan, self._problem.chosen.forms, self._stages[0]
        if self._kind not in chosen:
            if plan.only is not None and candidates != (GAUSS_NEWTON,):
                chosen[self._kind] = plan.only if plan.only in candidates else reference_of(candidates)
            else:
                chosen[self._kind] = candidates[0] if len(candidates) == 1 else fastest(candidates, self._trial)
        return chosen[self._kind]

    def _trial(self, name: str) -> Derivatives:
        problem, need = self._problem, self._need
        point = problem.point(name, self._step)
        if need.first:
            point.gradient()
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(need.directions, problem.function.layout.size, generator=generator)
        given = problem.function.free(directions.to(self._step.before), self._step)
        return point.along(given, hessian=problem.plan.exact, gradient=need.gradient)

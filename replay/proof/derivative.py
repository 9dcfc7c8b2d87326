r"""The second proof: that ITS derivative is taken.

The first proof compares g_t, and says nothing about the derivative J of g. Where the training hid a part of its loss
from its gradient, or torch's second derivative of an operator is wrong, J is not what automatic differentiation gives
of it, and everything that is built on it is wrong under a clean certificate. One central difference tells:

    (g(w + h d) - g(w - h d)) / 2h   against   J d,        in float64

at the first step of a replay, the last, and some between, along d = g/|g| + z/|z| with random z, and beside w by a
hundredth of its size: at w itself kinks may be hit exactly (biases that begin as zeros). g is that of a few samples of
the step's batch. A step h that is too large sees a kink, of which a deep network on pictures has millions; one that is
too small sees rounding; the best of several counts, and of several points. Clean losses agree to 1e-7 and better, also
with ReLU and BatchNorm; faulty ones differ by some per cent and more, whatever the step and the point.

Going backwards J' gamma is what is wanted: where J is not symmetric, <a, J d> = <J' a, d> is asked for, too.

Where no derivative is right, J d is taken by differences (`replay.derivatives.difference`): forwards always; backwards
where J is symmetric, as of every plain gradient.

Letters: P' trainable weights, T steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from trajrec.errors import DerivativeError, NonFiniteError, TrajrecError, first_line
from trajrec.replay.derivatives.difference import STEP, Differences, in_float64, precisely
from trajrec.replay.derivatives.operators import operator_without, shown
from trajrec.replay.derivatives.per_sample import SinglesPoint
from trajrec.replay.derivatives.pieces import cut, has_rows
from trajrec.replay.derivatives.reverse import ReversePoint
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.seen import Seen
from trajrec.replay.proof.scalars import AGREE, ASIDE, POINTS, random_like, unit
from trajrec.replay.step import Part, Step, make_step

if TYPE_CHECKING:
    from trajrec.replay.session import Session

_STEPS = (1e-7, 1e-9, STEP, 1e-8, 1e-10, 1e-5, 1e-4, 1e-3)
_FLOOR = 1e-3
_SMOOTH, _SYMMETRIC = 1e-3, 1e-4
_EVERY, _MOST, _FEW = 1000, 6, 4


class Derivation(StrEnum):
    """What the derivative of the training's gradient rests on."""

    PROVED = "proved"
    DIFFERENCES = "by differences"
    NOT_PROVED = "not proved"


@dataclass(frozen=True, slots=True)
class DerivativeProof:
    """What the second proof found.

    Attributes:
        verdict: what the derivative rests on.
        steps: where it was tried.
        worst: the largest relative difference found at them.
        reason: why it was not proved, or what is taken by differences.
    """

    verdict: Derivation
    steps: tuple[int, ...]
    worst: float
    reason: str = ""

    @property
    def sentence(self) -> str:
        """The proof in words."""
        where = f"at step{'s' * (len(self.steps) > 1)} {_listed(self.steps)}"
        if self.verdict is Derivation.PROVED:
            return f"Its derivative is the right one: {where} a central difference agrees with it to {self.worst:.1e}."
        if self.verdict is Derivation.DIFFERENCES:
            return f"Its derivative was taken by central differences in float64 {where} and everywhere: {self.reason}."
        return f"Its derivative is not proved {where}: {self.reason}."


def _listed(steps: tuple[int, ...]) -> str:
    *others, last = [f"{t:,}" for t in steps]
    return f"{', '.join(others)} and {last}" if others else last


class _Wrong(Exception):  # noqa: N818
    """Automatic differentiation gives no derivative, or another: `what` is wrong with it."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


def prove(session: Session, *, forwards: bool) -> DerivativeProof:
    """Tries the derivative at a few steps, before the replay begins; `forwards` is the direction that it takes.

    Raises:
        DerivativeError: if no way of taking it is right; names what is to blame.
    """
    steps = proved_steps(session)
    try:
        return _proved(session, steps, forwards)
    except NonFiniteError as error:
        return DerivativeProof(Derivation.NOT_PROVED, steps, math.nan, f"beside its weights {first_line(error)}")
    except (TrajrecError, MemoryError):
        raise
    except Exception as error:  # whatever the user's code raises in float64, or a device that has none
        reason = f"its loss cannot be computed in float64 ({type(error).__name__}: {first_line(error)})"
        return DerivativeProof(Derivation.NOT_PROVED, steps, math.nan, reason)


def _proved(session: Session, steps: tuple[int, ...], forwards: bool) -> DerivativeProof:
    worst, wrong = 0.0, ""
    for t in steps:
        few, trial = _tried(session, t, forwards)
        try:
            worst = max(worst, _error_beside(session, t, trial, few))
        except _Wrong as found:
            if (lower := trial.lower_precision()) is not None:
                reason = f"the loss computes in {lower} inside (the nearest difference was off by {trial.least:.0e})"
                return DerivativeProof(Derivation.NOT_PROVED, steps, trial.least, reason)
            if not trial.is_linear():
                # Hooks of nodes of the graph show nowhere else. Differences then have to go by the shares, too.
                session.function.seen |= Seen(hooks=True)
                session.differences.function.seen = session.function.seen
            wrong = found.what or _blame(session.function.seen)
            if (step := trial.smooth_step()) is None:
                raise _refusal(t, trial, wrong, forwards) from None
            session.difference_step = min(session.difference_step, step)
    if wrong:
        return DerivativeProof(Derivation.DIFFERENCES, steps, worst, wrong)
    return DerivativeProof(Derivation.PROVED, steps, worst)


def proved_steps(session: Session) -> tuple[int, ...]:
    """The first step, the last, and some between; those after keyframes, where only these are stored."""
    last = session.run.steps
    count = 2 + min(1 + last // _EVERY, _MOST)
    wanted = {1 + round((last - 1) * k / (count - 1)) for k in range(count)}
    if session.is_keyframed:
        starts = [t + 1 for t in session.run.keyframe_steps if t < last]
        wanted = {min(starts, key=lambda start, t=t: abs(start - t)) for t in wanted}  # type: ignore[misc]
    return tuple(sorted(wanted))


def _tried(session: Session, t: int, forwards: bool) -> tuple[bool, _Trial]:
    """A trial of a few samples of step t, and True; of all where a few cannot be taken, and False."""
    with suppress(Exception):  # whatever a loss says of a batch that is smaller than it thinks
        return True, _Trial(session.differences, _beside(session, t, 0, few=True), forwards)
    return False, _Trial(session.differences, _beside(session, t, 0, few=False), forwards)


def _error_beside(session: Session, t: int, trial: _Trial, few: bool) -> float:
    """The relative difference at step t, at the first of several points where it is small.

    Raises:
        _Wrong: if there is none.
    """
    for seed in range(POINTS):
        made = _Trial(session.differences, _beside(session, t, seed, few=few), trial.forwards) if seed else trial
        try:
            return made.error()
        except _Wrong as found:
            if found.what:
                raise
            trial.least = min(trial.least, made.least)
    raise _Wrong("")


def _beside(session: Session, t: int, seed: int, *, few: bool) -> Step:
    """A few samples of step t in float64, or all, at weights beside its own."""
    weights = session.trajectory.weights(t - 1).to(session.dtype)
    step = make_step(session.run, t, weights, weights)
    step = in_float64(_of_few(session, step) if few else step)
    aside = ASIDE * float(step.before.square().mean().sqrt()) * _random(step, 10 + seed)
    return replace(step, before=step.before + aside)


def _of_few(session: Session, step: Step) -> Step:
    """The loss of the first few samples: it has the same operators, and fewer kinks to be hit."""
    first, samples = step.parts[0], session.train
    unchecked = replace(step, parts=tuple(replace(part, digest=None) for part in step.parts))
    if has_rows(samples, unchecked):
        piece = next(cut(session.function, samples, unchecked, _FEW))
        return replace(piece, parts=(replace(piece.parts[0], rng=first.rng),))
    if session.run.inputs(step.t) is not None:
        return step
    few = min(_FEW, first.span.stop)
    shares = None if step.shares is None else step.shares[:few]
    part = Part(slice(0, few), first.rng, penalty=first.penalty)
    return replace(step, ids=step.ids[:few], shares=shares, parts=(part,))


def _random(step: Step, seed: int) -> Tensor:
    return random_like(step.before, 1000 * step.t + seed)


class _Trial:
    """One step, at which the derivative is held against differences."""

    def __init__(self, differences: Differences, step: Step, forwards: bool) -> None:
        self._differences, self._step, self.forwards = differences, step, forwards
        self._function = differences.function
        self._gradient = differences.gradient(step)
        self._direction = self._free(unit(self._gradient) + unit(_random(step, 1)))
        self.least = math.inf

    def _free(self, values: Tensor) -> Tensor:
        return self._function.free(values, self._step)

    def error(self) -> float:
        """The relative difference.

        Raises:
            _Wrong: if it is too large, or there is no derivative.
        """
        made, pulled = self._derivative()
        for h in _STEPS:
            difference = self._differenced(h, self._direction)
            self.least = min(self.least, self._apart(made, pulled, difference))
            if self.least <= AGREE:
                return self.least
        raise _Wrong("")

    def _apart(self, made: Tensor | None, pulled: Tensor | None, difference: Tensor) -> float:
        """How far J d and J' a are from what a difference says of them."""
        found, floor = [0.0], _FLOOR * float(self._gradient.norm()) / max(float(self._step.before.norm()), 1.0)
        scale = max(float(difference.norm()), floor) or 1.0
        if made is not None:
            found.append(float((made - difference).norm()) / max(scale, float(made.norm())))
        if pulled is not None:
            a = self._a()
            product = float(a @ difference) - float(pulled @ self._direction)
            found.append(abs(product) / (scale * float(a.norm()) / math.sqrt(len(a))))
        return max(found)

    def _a(self) -> Tensor:
        return self._free(_random(self._step, 2))

    def _differenced(self, h: float, direction: Tensor) -> Tensor:
        return self._free(replace(self._differences, step=h).along(self._step, direction))

    def _derivative(self) -> tuple[Tensor | None, Tensor | None]:
        """J d, and J' a where J is not symmetric and the replay goes backwards."""
        hides = self._function.seen.hides
        try:
            with precisely(self._function):
                point = ReversePoint(self._function, self._differences.samples, self._step)
                nothing = torch.zeros(1, len(self._step.ids), dtype=torch.float64, device=self._step.before.device)
                if not hides:
                    return self._free(self._along(point, self._direction)), None
                if not self.forwards:
                    return None, self._free(self._along(point, self._a()))
                return self._free(point.forced(self._direction[None], nothing)[0]), None
        except RuntimeError as error:
            operator = operator_without(error)
            if operator is None:
                raise
            raise _Wrong(f"torch has no second derivative of {shown(operator, self._function.model)}") from None

    def _along(self, point: ReversePoint, direction: Tensor) -> Tensor:
        found = point.along(direction[None], hessian=True, gradient=False).hvp
        assert found is not None
        return found[0]

    def smooth_step(self) -> float | None:
        """The h at which differences give what is needed; None if at none.

        Those of h and h/10 agree; and J is symmetric, or J D is asked for.
        """
        d, a = self._direction, self._a()
        for h in (STEP, 1e-7, 1e-8):
            along = self._differenced(h / 10, d)
            scale = float(along.norm()) or 1.0
            if float((along - self._differenced(h, d)).norm()) > _SMOOTH * scale:
                continue
            if self.forwards:
                return h / 10
            if not self.is_linear():
                return None
            apart = abs(float(a @ along) - float(d @ self._differenced(h / 10, a)))
            return h / 10 if apart <= _SYMMETRIC * scale * float(a.norm()) / math.sqrt(len(a)) else None
        return None

    def is_linear(self) -> bool:
        """Whether the gradient is the sum of the samples' own, each times its share: not where hooks act on it."""
        m = torch.arange(1.0, 1 + len(self._step.ids)).to(self._step.before).cos()
        with precisely(self._function):
            point = SinglesPoint(self._function, self._differences.samples, self._step)
            own = point.forced(None, m[None])[0]
        found = self._differences.by_shares(self._step, m)
        return float(self._free(found - own).norm()) <= _SMOOTH * (float(self._free(own).norm()) or 1.0)

    def lower_precision(self) -> str | None:
        """The floating type below float64 that the loss computes in somewhere, or None."""
        return lower_precision(self._function, lambda: self._differences.gradient(self._step))


def lower_precision(function: LossFunction, compute: Callable[[], Any]) -> str | None:
    """The floating type below float64 that losses in float64 compute in somewhere, or None; `compute` computes them."""
    casts = _Casts()
    with function.evaluated(lambda: casts):
        compute()
    return casts.lower


class _Casts(TorchFunctionMode):
    """Notes a floating type below float64 that a function gives of float64 values."""

    lower: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function."""
        found = func(*args, **(kwargs or {}))
        given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        if any(v.dtype == torch.float64 for v in given):
            made = [v.dtype for v in tree_leaves(found) if isinstance(v, Tensor) and v.is_floating_point()]
            self.lower = next((str(d).removeprefix("torch.") for d in made if d != torch.float64), self.lower)
        return found


def _blame(seen: Seen) -> str:
    """What is most likely to blame for a derivative that is not the right one."""
    if seen.functions:
        return f"the backward pass of {seen.functions[0]} is not the derivative of its forward pass"
    if Tensor.backward in seen.called:
        return "the loss calls backward() itself, and what that leaves in .grad is in no graph (torch.autograd.grad is)"
    if seen.exits:
        return f"a value leaves the graph by {seen.exits[0]}, and counts as a constant in every derivative"
    if seen.stops:
        return "a part of the loss is detached in a way that is not seen through (changed in place under no_grad, say)"
    if seen.hooks:
        return "a backward hook changes the gradient, in a way that is not seen through"
    return "an operator's second derivative is wrong, or a value is changed in place where no gradient is recorded"


def _refusal(t: int, trial: _Trial, wrong: str, forwards: bool) -> DerivativeError:
    off = f", off by {trial.least:.1e} of a central difference in float64 at step {t}" if trial.least < math.inf else ""
    offer = "" if forwards else "Going forwards differences of the gradient suffice: ask with --mode tangent. "
    return DerivativeError(
        f"The derivative of the training's gradient is not the derivative that automatic differentiation gives{off}: "
        f"{wrong}. {offer}Without the Hessian first derivatives are enough: --hessian-free."
    )

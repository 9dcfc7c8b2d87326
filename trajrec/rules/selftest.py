r"""Every rule proves itself before it is used, at the recorded start of the run and one step further on.

For random directions (d, r, k) of (w, s, g) and random cotangents (c, sigma) of the step's results,

    <c, D> + <sigma, R>  =  <lam', d> + <sigma', r> + <gamma, k>  =  central finite difference

where (D, R) comes from the rule's forward mode and (lam', sigma', gamma) from its reverse mode. Three tests: a step at
the start, a step at the point that it leads to (where no buffer is empty any more), and both in a row, with the
derivative of the first pushed through the second: what a class hides from its state between two steps shows there. A
class that cuts the graph, works on `.data` or rounds inside fails one of them.

A state that does not exist yet begins with constants, and so do the weights then (D_0 = 0): such a start is not moved.
Directions are proportional to the values, so that no sign flips and no zero is left: the kinks of an optimizer are not
what is tested here. All in float64.

That takes several hundred bytes a weight. So a large model's rule proves itself on a part of the weights, at least a
block of every parameter in every group (`trajrec.rules.part`). Where the part speaks against it (a step may want its
tensors whole, and clipping by hand their shapes), the whole decides, if there is memory for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trajrec.errors import UnsupportedOptimizerError
from trajrec.records import FloatArray
from trajrec.rules.part import part_of
from trajrec.rules.step import Rule, State

_STEP = 1e-6
MOST = 100_000  # weights that a rule proves itself on
LEAST = 4096  # where there is little memory
BYTES = 600  # a weight; 554 were measured for AdamW


@dataclass(frozen=True, slots=True)
class _Point:
    """Weights [P'], state and gradient [P'] of a step, or a direction of them."""

    weights: Tensor
    state: State
    gradient: Tensor

    def moved(self, h: float, along: _Point) -> _Point:
        state = self.state | {name: self.state[name] + h * value for name, value in along.state.items()}
        return _Point(self.weights + h * along.weights, state, self.gradient + h * along.gradient)


def self_test(
    rule: Rule, weights: Tensor, state: State, gradient: Tensor, hyper: FloatArray, memory: int | None = None
) -> None:
    """Checks a rule's derivatives at a point: weights [P'], state, gradient [P'], hyperparameters [G, H].

    Args:
        rule: to be checked.
        weights: of the point.
        state: of the point.
        gradient: of the point.
        hyper: of the step.
        memory: bytes that it may take.

    Raises:
        UnsupportedOptimizerError: if its two directions, or a finite difference, disagree.
    """
    most = MOST if memory is None else min(MOST, max(LEAST, memory // BYTES))
    whole = _Point(weights, state, gradient)
    if weights.numel() <= most:
        _prove(rule, whole, hyper)
        rule.accept(rule)
        return
    try:
        proved, point = _cut(rule, whole, most)
        _prove(proved, point, hyper)
    except Exception as refusal:  # a user's function may raise anything at tensors of other shapes
        needed = weights.numel() * BYTES
        if memory is not None and needed > memory:
            raise _refused_in_part(rule, refusal, weights.numel(), memory) from refusal
        _prove(rule, whole, hyper)
        proved = rule
    rule.accept(proved)


def _cut(rule: Rule, whole: _Point, most: int) -> tuple[Rule, _Point]:
    part = part_of(rule.spec, rule.layout, whole.weights, whole.gradient, most)
    weights, gradient = (
        part.vector(vector, slice(0, rule.layout.size)).double() * scale.to(vector.device)
        for vector, scale in zip((whole.weights, whole.gradient), part.scales, strict=True)
    )
    return rule.cut(part), _Point(weights, rule.cut_state(whole.state, part), gradient)


def _prove(rule: Rule, point: _Point, hyper: FloatArray) -> None:
    start = _Point(point.weights.double(), _map(rule, point.state, Tensor.double), point.gradient.double())
    try:
        with rule.proving():
            _Test(rule, hyper).run(start)
    except (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise _refusal(rule, f"its step cannot be differentiated ({_first_line(error)})") from error


class _Test:
    """The three tests of one rule."""

    def __init__(self, rule: Rule, hyper: FloatArray) -> None:
        self.rule = rule
        self.hyper = hyper
        self._random = torch.Generator().manual_seed(0)

    def run(self, start: _Point) -> None:
        first = self._direction(start)
        if not start.state:
            first = _Point(torch.zeros_like(first.weights), {}, first.gradient)
        pushed = self._single(start, first)
        after = self._step(start)
        g = start.gradient * (1 + self._draw(start.gradient))
        second = _Point(after[0], after[1], g)
        self._single(second, self._direction(second))
        self._both(start, first, second, _Point(*pushed, g * self._draw(g)))

    def _single(self, point: _Point, along: _Point) -> tuple[Tensor, State]:
        """Compares the three derivatives of one step. Returns the forward one."""
        d, r = self._push(point, along)
        c, sigma = self._draw(d), {name: self._draw(value) for name, value in r.items()}
        lam, sigma_back, gamma = self.rule.pull(
            *(point.weights, point.state, point.gradient, self.hyper),
            *(c[None], {name: value[None] for name, value in sigma.items()}),
        )
        backward = float((lam[0] * along.weights).sum() + (gamma[0] * along.gradient).sum())
        backward += sum(float((sigma_back[name][0] * value).sum()) for name, value in along.state.items())
        self._compare((d, r), (c, sigma), lambda h: self._step(point.moved(h, along)), backward)
        return d, r

    def _both(self, start: _Point, first: _Point, second: _Point, then: _Point) -> None:
        """Compares the forward derivative of two steps in a row with a finite difference."""

        def twice(h: float) -> tuple[Tensor, State]:
            weights, state = self._step(start.moved(h, first))
            return self._step(_Point(weights, state, second.gradient + h * then.gradient))

        d, r = self._push(second, then)
        cotangents = self._draw(d), {name: self._draw(value) for name, value in r.items()}
        self._compare((d, r), cotangents, twice, None)

    def _compare(
        self,
        pushed: tuple[Tensor, State],
        cotangents: tuple[Tensor, State],
        moved: Callable[[float], tuple[Tensor, State]],
        backward: float | None,
    ) -> None:
        (d, r), (c, sigma) = pushed, cotangents
        terms = [c * d, *(sigma[name] * value for name, value in r.items())]
        forward = float(sum(term.sum() for term in terms))
        scale = float(sum(term.abs().sum() for term in terms)) + 1e-300

        def value(h: float) -> float:
            weights, state = moved(h)
            return float((c * weights).sum() + sum((sigma[name] * state[name]).sum() for name in sigma))

        difference = (value(_STEP) - value(-_STEP)) / (2 * _STEP)
        errors = abs(forward - (forward if backward is None else backward)) / scale, abs(forward - difference) / scale
        if not (errors[0] < 1e-9 and errors[1] < 1e-4):
            raise _refusal(
                self.rule,
                f"forward and reverse derivative of its step differ by {errors[0]:.1e}, derivative and finite "
                f"difference by {errors[1]:.1e} (relative)",
            )

    def _step(self, point: _Point) -> tuple[Tensor, State]:
        return self.rule.step(point.weights, point.state, point.gradient, self.hyper)

    def _push(self, point: _Point, along: _Point) -> tuple[Tensor, State]:
        state = {name: value[None] for name, value in along.state.items()}
        d, r = self.rule.push(
            *(point.weights, point.state, point.gradient, self.hyper),
            *(along.weights[None], state, along.gradient[None]),
        )
        return d[0], {name: value[0] for name, value in r.items()}

    def _direction(self, point: _Point) -> _Point:
        state = {name: value * self._draw(value) for name, value in self.rule.vectors_of(point.state).items()}
        return _Point(point.weights * self._draw(point.weights), state, point.gradient * self._draw(point.gradient))

    def _draw(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._random, dtype=torch.float64).to(like.device)


def _map(rule: Rule, state: State, change: Callable[[Tensor], Tensor]) -> State:
    """The state with its differentiated values changed."""
    return state | {name: change(value) for name, value in rule.vectors_of(state).items()}


def _refusal(rule: Rule, found: str) -> UnsupportedOptimizerError:
    name = rule.optimizer_class.__name__
    return UnsupportedOptimizerError(
        f"{name} failed its self-test in torch {torch.__version__}: {found}. {rule.suspects()}"
    )


def _refused_in_part(rule: Rule, error: Exception, weights: int, memory: int) -> UnsupportedOptimizerError:
    found = str(error) if isinstance(error, UnsupportedOptimizerError) else _first_line(error)
    return UnsupportedOptimizerError(
        f"{found} That was on a part of the weights, as {rule.optimizer_class.__name__}'s self-test on all {weights:,} "
        f"takes about {weights * BYTES / 1e9:.2g} GB of memory, and {memory / 1e9:.2g} GB may be taken (--memory)."
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": .")

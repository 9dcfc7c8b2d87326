r"""Derivatives by central differences of the gradient, in float64.

    J d = (g(w + h d) - g(w - h d)) / 2h,      h |d| = 1e-6 max(|w|, 1) as a rule

For losses whose gradient torch cannot differentiate, or differentiates wrongly: operators without a second derivative
(EmbeddingBag, CTC loss, cdist), or values that leave the graph. What is differenced is the training's own gradient, so
nothing can be left out. It costs two gradients in float64 a direction, and errs by some 1e-9 of |J d|.

Going forwards J D is what is wanted. Going backwards it is J' gamma, the same only where J is symmetric, as of every
plain gradient (`replay.proof.derivative` tries it). First derivatives come from one of the forms that need no second.

Letters: B batch, K directions, P' trainable weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from trajrec.replay.derivatives.derivatives import Derivatives
from trajrec.replay.derivatives.per_sample import SinglesPoint
from trajrec.replay.derivatives.pieces import Form
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.gradient import gradient_of
from trajrec.replay.step import Part, Step

STEP = 1e-6
_SHARES = 1e-4


@dataclass(frozen=True, slots=True)
class Differences:
    """The gradient of steps in float64, and its differences.

    Attributes:
        function: per-sample losses in float64.
        samples: the training set in float64.
        step: h |d| over |w|.
    """

    function: LossFunction
    samples: Samples
    step: float = STEP

    def gradient(self, step: Step) -> Tensor:
        """G [P'] at a step's weights, in float64."""
        with precisely(self.function):
            return gradient_of(self.function, self.samples, step)

    def along(self, step: Step, direction: Tensor) -> Tensor:
        """J direction [P'] of a step, in float64."""
        precise = in_float64(step)
        d = direction.double()
        norm = float(d.norm())
        if not norm:
            return torch.zeros_like(d)
        h = self.step * max(float(precise.before.norm()), 1.0) / norm
        ahead, behind = (self.gradient(replace(precise, before=precise.before + s * h * d)) for s in (1, -1))
        return (ahead - behind) / (2 * h)

    def by_shares(self, step: Step, multipliers: Tensor) -> Tensor:
        """(dg/dc) multipliers [P'] for multipliers [B] of the c[t,i]: where g is not linear in them."""
        precise = in_float64(step)
        shares, m = self.function.shares(self.samples, precise), multipliers.double()
        if not m.any():
            return torch.zeros_like(precise.before)
        h = _SHARES * float(shares.abs().max()) / float(m.abs().max())
        ahead, behind = (self.gradient(replace(precise, shares=shares + s * h * m)) for s in (1, -1))
        return (ahead - behind) / (2 * h)


def in_float64(step: Step) -> Step:
    """A step with its numbers in float64."""
    shares = None if step.shares is None else step.shares.double()
    parts = tuple(part if part.batch is None else _precise(part) for part in step.parts)
    return replace(step, before=step.before.double(), after=step.after.double(), shares=shares, parts=parts)


def _precise(part: Part) -> Part:
    def cast(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return replace(part, batch=tree_map(cast, part.batch))


_LOWER = (torch.float32, torch.bfloat16, torch.float16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


class _Precise(TorchFunctionMode):
    """Inside, the user's code computes in float64 where it asks for less."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function."""
        if func in _CASTS:
            return args[0].double()
        args, kwargs = tree_map(_raised, (args, kwargs or {}))
        return func(*args, **kwargs)


def _raised(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _LOWER else value


@contextmanager
def precisely(function: LossFunction) -> Iterator[None]:
    """Inside, the losses of a function in float64 are in float64 throughout."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with function.evaluated(_Precise):
            yield
    finally:
        torch.set_default_dtype(before)


class DifferencePoint:
    """A form that needs first derivatives only, and differences for the second ones."""

    def __init__(
        self,
        differences: Differences,
        first: Form,
        function: LossFunction,
        samples: Samples,
        step: Step,
        chunk: int,
    ) -> None:
        self._differences, self._step = differences, step
        self._first = first(function, samples, step, chunk)
        self._singles = SinglesPoint(function, samples, step, chunk)

    @property
    def shares(self) -> Tensor:
        """The c[t,i] [B] of the batch."""
        return self._singles.shares

    def gradient(self) -> Tensor:
        """g_t [P']."""
        return self._first.gradient()

    def along(self, directions: Tensor, *, hessian: bool, gradient: bool) -> Derivatives:
        """Derivatives along directions [K, P']; H is J."""
        found = self._first.along(directions, hessian=False, gradient=gradient)
        return replace(found, hvp=self._products(directions)) if hessian else found

    def forced(self, directions: Tensor | None, multipliers: Tensor) -> Tensor:
        """J directions + sum_i multipliers[k, i] grad l_i: [K, P'] from [K, P'] and [K, B]; None drops the first."""
        force = self._by_shares(multipliers)
        return force if directions is None else force + self._products(directions)

    def _by_shares(self, multipliers: Tensor) -> Tensor:
        if not self._differences.function.seen.hides:
            return self._singles.forced(None, multipliers)
        found = [self._differences.by_shares(self._step, row) for row in multipliers]
        return torch.stack(found).to(multipliers.dtype)

    def _products(self, directions: Tensor) -> Tensor:
        return torch.stack([self._differences.along(self._step, d) for d in directions]).to(directions.dtype)


def difference(differences: Differences, first: Form) -> Form:
    """The form that takes first derivatives by another, and second ones by differences."""
    return partial(DifferencePoint, differences, first)

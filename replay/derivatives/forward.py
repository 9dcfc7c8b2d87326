"""Derivatives by a tangent that is carried forwards, and pulled back once."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor

from trajrec.replay.derivatives.derivatives import Derivatives, Wanted
from trajrec.replay.derivatives.dual_rules import DualOperators
from trajrec.replay.derivatives.tangents import dual_of, parts_of
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.gradient import gradient_of
from trajrec.replay.losses.objective import Objective
from trajrec.replay.step import Step
from trajrec.rules import FlatLayout


class ForwardPoint:
    """Reverse over forward mode; directions one after the other."""

    def __init__(self, function: LossFunction, samples: Samples, step: Step, chunk: int = 0) -> None:
        self._function, self._samples, self._step = function, samples, step
        self._gradient: Tensor | None = None

    def gradient(self) -> Tensor:
        """g_t [P'], by a pass of its own."""
        if self._gradient is None:
            self._gradient = gradient_of(self._function, self._samples, self._step)
        return self._gradient

    def along(self, directions: Tensor, *, hessian: bool, gradient: Wanted) -> Derivatives:
        """Derivatives along directions [K, P']."""
        inners, products, shares = [], [], directions
        for direction in directions:
            wanted = gradient if self._gradient is None else False
            inner, hvp, shares = self._one(direction.detach(), hessian, wanted)
            inners.append(inner)
            products.append(hvp)
        hvps = torch.stack([p for p in products if p is not None]) if hessian else None
        return Derivatives(torch.stack(inners), shares, hvps, self._gradient)

    def _one(self, direction: Tensor, hessian: bool, gradient: Wanted) -> tuple[Tensor, Tensor | None, Tensor]:
        weights = self._step.before.detach().requires_grad_(hessian)
        tangents = self._function.layout.split(direction)
        chosen = [name for name in tangents if gradient is True or (gradient and name in gradient)]
        leaves = [tangents[name].detach().requires_grad_() for name in chosen]
        tangents |= dict(zip(chosen, leaves, strict=True))
        wanted = [weights, *leaves] if hessian else leaves
        with torch.set_grad_enabled(bool(wanted)), fwd.dual_level(), DualOperators():
            values = self._function.layout.split(weights)
            duals = {name: dual_of(value, tangents[name]) for name, value in values.items()}
            parts = list(self._function.parts(duals, self._samples, self._step))
            found = [_tangents(part) for part in parts]
        # Outside of the level: inside, the backward pass would carry tangents along as well.
        sums = _summed([slope for _, slope in found], wanted)
        if gradient:
            self._gradient = _filled(
                self._function.layout, dict(zip(chosen, sums[-len(chosen) :], strict=True)), direction
            )
        inner = torch.cat([inner.detach() for inner, _ in found])
        return inner, sums[0] if hessian else None, torch.cat([part.shares for part in parts])


def _filled(layout: FlatLayout, known: dict[str, Tensor], like: Tensor) -> Tensor:
    """Parameters by name as a vector [P'] like another, with zeros for those that are missing."""
    if len(known) == len(layout.params):
        return layout.join(known)
    vector = torch.zeros_like(like)
    parts = layout.split(vector)
    for name, value in known.items():
        parts[name].copy_(value)
    return vector


def _summed(slopes: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The gradients of the sum of slopes, one slope after the other."""
    sums = [torch.zeros_like(v) for v in inputs]
    for slope in slopes:
        if inputs and slope.requires_grad:
            found = torch.autograd.grad(slope, inputs, materialize_grads=True)
            sums = list(found) if len(slopes) == 1 else [a + b for a, b in zip(sums, found, strict=True)]
    return sums


def _tangents(part: Objective) -> tuple[Tensor, Tensor]:
    """The tangents of the losses [B] and of the total."""
    inner = parts_of(part.losses)[1]
    inner = torch.zeros_like(part.losses) if inner is None else inner
    slope = torch.dot(part.shares, inner)
    penalty = None if part.penalty is None else parts_of(part.penalty)[1]
    return inner, slope if penalty is None else slope + penalty

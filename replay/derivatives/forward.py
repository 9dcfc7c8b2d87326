"""Derivatives by a tangent that is carried forwards, and pulled back once."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor

from trajrec.replay.derivatives.derivatives import Derivatives
from trajrec.replay.derivatives.dual_rules import DualOperators, dual_of, parts_of
from trajrec.replay.derivatives.through import hidden_parts
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.gradient import gradient_of
from trajrec.replay.losses.objective import Objective
from trajrec.replay.losses.statistics import Carried
from trajrec.replay.step import Step


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

    def along(self, directions: Tensor, *, hessian: bool, gradient: bool) -> Derivatives:
        """Derivatives along directions [K, P']."""
        return self._all(directions, [None] * len(directions), hessian, gradient)

    def carrying(self, directions: Tensor, carried: Carried, *, gradient: bool) -> Derivatives:
        """Derivatives along directions [K, P'], with the Hessian and the running statistics."""
        return self._all(directions, [carried.row(k) for k in range(len(directions))], True, gradient)

    def _all(self, directions: Tensor, carried: list[Carried | None], hessian: bool, gradient: bool) -> Derivatives:
        found = []
        for direction, row in zip(directions, carried, strict=True):
            wanted = gradient if self._gradient is None else False
            found.append(self._one(direction.detach(), row, hessian, wanted))
        return Derivatives(
            torch.stack([each.inner for each in found]),
            found[-1].shares,
            torch.stack([each.hvp for each in found if each.hvp is not None]) if hessian else None,
            self._gradient,
            Carried.rows([each.carried for each in found if each.carried is not None]),
        )

    def _one(self, direction: Tensor, carried: Carried | None, hessian: bool, gradient: bool) -> Derivatives:
        weights = self._step.before.detach().requires_grad_(hessian)
        tangents = self._function.layout.split(direction)
        if gradient:
            tangents = {name: tangent.detach().requires_grad_() for name, tangent in tangents.items()}
        leaves = list(tangents.values()) if gradient else []
        wanted = [weights, *leaves] if hessian else leaves
        hidden = hidden_parts(self._function, forward=True)
        noting = self._function.noting() if carried is not None else nullcontext()
        with torch.set_grad_enabled(bool(wanted)), fwd.dual_level(), DualOperators(), hidden, noting as noted:
            values = self._function.layout.split(weights)
            duals = {name: dual_of(value, tangents[name]) for name, value in values.items()}
            parts = list(self._function.parts(duals, self._samples, self._step))
            found = [_tangents(part) for part in parts]
        slopes = [slope for _, slope in found]
        if carried is not None and noted is not None:
            bars, carried = carried.pulled(noted.updates)
            terms = [torch.dot(bar[0], stat) for bar, (_, stat) in zip(bars, noted.updates, strict=True)]
            slopes = [torch.stack([*slopes, *terms]).sum()]
            wanted += [] if noted.b is None else [noted.b]
        # Outside of the level: inside, the backward pass would carry tangents along as well.
        sums = _summed(slopes, wanted)
        if carried is not None and len(sums) > 1 + len(leaves):
            carried = carried.plus(sums.pop()[None])
        if gradient:
            self._gradient = self._function.layout.join(dict(zip(tangents, sums[-len(leaves) :], strict=True)))
        inner = torch.cat([inner.detach() for inner, _ in found])
        shares = torch.cat([part.shares for part in parts])
        return Derivatives(inner, shares, sums[0] if hessian else None, None, carried)


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

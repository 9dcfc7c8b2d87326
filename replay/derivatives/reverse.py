"""Derivatives by two reverse passes: the reference that every other form is proved against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trajrec.replay.derivatives.derivatives import Derivatives
from trajrec.replay.derivatives.operators import cuts_told, operator_without
from trajrec.replay.derivatives.through import differentiating, hidden_parts
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.objective import Objective
from trajrec.replay.losses.statistics import Carried
from trajrec.replay.step import Step
from trajrec.rules.step import pull_batched


class ReversePoint:
    """Reverse over reverse mode; one recorded pass for all directions, taken one after the other."""

    def __init__(self, function: LossFunction, samples: Samples, step: Step, chunk: int = 0) -> None:
        self._hides = function.seen.hides
        self._weights = step.before.detach().requires_grad_()
        with torch.enable_grad(), hidden_parts(function), function.noting() as self._noted:
            objective = function.objective(self._weights, samples, step)
            self._losses = objective.losses
            # A tensor of its own: shares may be kept from one step to the next.
            self._shares = objective.shares.detach().clone().requires_grad_()
            total = Objective(self._losses, self._shares, objective.penalty).total
            with cuts_told():
                (self._gradient,) = torch.autograd.grad(total, self._weights, create_graph=True)

    @property
    def shares(self) -> Tensor:
        """The c[t,i] [B] of the batch."""
        return self._shares.detach()

    def gradient(self) -> Tensor:
        """g_t [P']."""
        return self._gradient.detach()

    def along(self, directions: Tensor, *, hessian: bool, gradient: bool) -> Derivatives:
        """Derivatives along directions [K, P']."""
        inputs = [self._shares, self._weights] if hessian else [self._shares]
        with differentiating(self._hides):
            found = self._pull([self._gradient], inputs, [directions])
        return Derivatives(found[0], self.shares, found[1] if hessian else None, self.gradient())

    def carrying(self, directions: Tensor, carried: Carried, *, gradient: bool) -> Derivatives:
        """Derivatives along directions [K, P'], with the Hessian and the running statistics, in one pass."""
        assert self._noted is not None
        bars, before = carried.pulled(self._noted.updates)
        inputs = [self._shares, self._weights, *([] if self._noted.b is None else [self._noted.b])]
        outputs = [self._gradient, *(stat for _, stat in self._noted.updates)]
        with differentiating(self._hides):
            found = self._pull(outputs, inputs, [directions, *bars])
        before = before.plus(found[2]) if len(found) > 2 else before
        return Derivatives(found[0], self.shares, found[1], self.gradient(), before)

    def forced(self, directions: Tensor | None, multipliers: Tensor) -> Tensor:
        """H directions + sum_i multipliers[k, i] grad l_i: [K, P'] from [K, P'] and [K, B]; None drops the Hessian."""
        if self._hides:
            return self._pushed(directions, multipliers)
        if directions is None:
            return self._pull([self._losses], [self._weights], [multipliers])[0]
        if not multipliers.any():
            return self._pull([self._gradient], [self._weights], [directions])[0]
        return self._pull([self._losses, self._gradient], [self._weights], [multipliers, directions])[0]

    def _pushed(self, directions: Tensor | None, multipliers: Tensor) -> Tensor:
        """The same where J = dg/dw is not symmetric, and g not linear in the shares c[t,i]: (dg/dw, dg/dc) along both.

        A vjp of g is linear in its cotangent v, so its derivative by v along a direction is g's own along it.
        """
        v = torch.zeros_like(self._gradient, requires_grad=True)
        inputs = [self._shares] if directions is None else [self._shares, self._weights]
        along = [multipliers] if directions is None else [multipliers, directions]
        with differentiating():
            pulled = torch.autograd.grad(self._gradient, inputs, v, create_graph=True, materialize_grads=True)
            return self._pull(list(pulled), [v], along)[0]

    def _pull(self, outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
        count = len(cotangents[0])
        rows = [  # the last pass frees what was recorded
            pull_batched(outputs, inputs, [c[k : k + 1] for c in cotangents], retain=k + 1 < count)
            for k in range(count)
        ]
        return rows[0] if len(rows) == 1 else [torch.cat(column) for column in zip(*rows, strict=True)]


def saved_bytes(function: LossFunction, samples: Samples, step: Step) -> int:
    """The bytes of intermediate values that a recorded pass over a step keeps: what each direction needs again.

    Where the gradient cannot be recorded, those of the losses alone; 0 where torch cannot tell (a loss of torch.func).
    """
    try:
        return _kept_bytes(lambda: ReversePoint(function, samples, step))
    except RuntimeError as error:
        if "saved tensor hooks" in str(error):
            return 0
        if operator_without(error) is None:
            raise
    weights = step.before.detach().requires_grad_()
    with torch.enable_grad():
        return _kept_bytes(lambda: function.objective(weights, samples, step))


def _kept_bytes(record: Callable[[], Any]) -> int:
    sizes: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        record()
    return sum(sizes.values())

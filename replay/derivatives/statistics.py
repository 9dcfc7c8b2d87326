r"""The derivative's way through the running statistics of normalisations, in both directions.

With b_t = (1 - m) b_{t-1} + m stat_t(w_{t-1}) (`replay.losses.statistics`), going backwards a cotangent c is carried
along, c_T = d l_j / d b_T:

    lam_{t-1} += grad_w <m c_t, stat_t(w_{t-1})>,      c_{t-1} = (1 - m) c_t

and forwards a tangent, db_t = (1 - m) db_{t-1} + m dstat_t/dw D_{t-1}. eps weighs losses and no statistics: nothing
else changes, and there is no further Hessian-vector product. Where a step's normalisations are in eval mode its
gradient depends on b, and c_{t-1} += (dg/db)' gamma; forwards the gradient changes by (dg/db) db.

A step may go through the same normalisation several times (micro-batches, two views of a batch).

Letters: C channels, K directions, P' trainable weights, Q running statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trajrec.replay.derivatives.through import differentiating, hidden_parts
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.statistics import Carried
from trajrec.replay.step import Step
from trajrec.rules.step import pull_batched


class StatisticsPoint:
    """A step's running statistics as functions of the weights, by a forward pass of their own."""

    def __init__(self, function: LossFunction, samples: Samples, step: Step) -> None:
        self._weights = step.before.detach().requires_grad_()
        with torch.enable_grad(), hidden_parts(function), function.noting(carried=True) as noted:
            objective = function.objective(self._weights, samples, step)
            assert noted is not None
            self._updates, self._b, self._norms = noted.updates, noted.b, noted.norms
            self._statistics = [stat for _, stat in self._updates]
            self._gradient: Tensor | None = None
            if self._b is not None:
                (self._gradient,) = torch.autograd.grad(objective.total, self._weights, create_graph=True)

    @property
    def passes(self) -> list[int]:
        """How often each normalisation was gone through in training mode."""
        return [sum(place == other for other, _ in self._updates) for place in range(self._norms)]

    def projected(self) -> Tensor:
        """The statistics of the step along a fixed direction, [1]; what their derivative is proved by."""
        generator = torch.Generator().manual_seed(0)
        along = [torch.randn(len(s), generator=generator, dtype=s.dtype).to(s.device) for s in self._statistics]
        return torch.stack([s @ a for s, a in zip(self._statistics, along, strict=True)]).sum()[None]

    def projected_gradient(self) -> Tensor:
        """Its gradient by the weights, [1, P']."""
        return self._pulled([self.projected()], [self._weights.new_ones(1, 1)], [self._weights])[0]

    def pull(self, directions: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """What the statistics add to lam [K, P'] along directions [K, P'], and what is carried to the step before."""
        bars, before = carried.pulled(self._updates)
        lam = torch.zeros_like(directions)
        if self._statistics:
            lam, *b = self._pulled(self._statistics, bars, self._inputs)
            before = before.plus(b[0]) if b else before
        if self._gradient is not None and self._b is not None:
            before = before.plus(self._pulled([self._gradient], [directions], [self._b])[0])
        return lam, before

    def push(self, directions: Tensor, carried: Carried) -> tuple[Tensor | None, Carried]:
        """What the statistics change the gradient by, [K, P'] or None, and what is carried to the step after."""
        changes, force = list[Tensor](), None
        if self._statistics:
            changes = self._pushed(self._statistics, self._inputs, [directions, carried.values])
        if self._gradient is not None and self._b is not None:
            (force,) = self._pushed([self._gradient], [self._b], [carried.values])
        return force, carried.pushed(self._updates, changes)

    @property
    def _inputs(self) -> list[Tensor]:
        return [self._weights] if self._b is None else [self._weights, self._b]

    def _pulled(self, outputs: list[Tensor], bars: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
        """The vjp of outputs by inputs for cotangents [K, ...]."""
        with differentiating():
            rows = [
                pull_batched(outputs, inputs, [bar[k : k + 1] for bar in bars], retain=True)
                for k in range(len(bars[0]))
            ]
        return [torch.cat(column) for column in zip(*rows, strict=True)]

    def _pushed(self, outputs: list[Tensor], inputs: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
        """The jvp of outputs by inputs for tangents [K, ...]: a vjp is linear in its cotangents."""
        dummies = [torch.zeros_like(value, requires_grad=True) for value in outputs]
        with torch.enable_grad(), differentiating():
            pulled = torch.autograd.grad(
                outputs, inputs, dummies, create_graph=True, retain_graph=True, materialize_grads=True
            )
        return self._pulled(list(pulled), directions[: len(inputs)], dummies)

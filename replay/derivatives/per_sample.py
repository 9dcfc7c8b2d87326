r"""Inner products from first derivatives alone: a backward pass for every sample, over the graph of its whole batch.

    <grad l_i, gamma_k>,   grad l_i = dl_i/dw by one backward pass from l_i

The other forms get all samples' inner products out of one pass that is differentiated again, or carried forwards. Some
operators allow neither (EmbeddingBag, CTC loss, cdist, hard sigmoid). This form asks of them what training did; it
costs a backward pass a sample, and holds the gradients of a slice of samples at a time. Samples that touch each other
(BatchNorm in training mode) are right: the graph is that of the batch. Where an operator can carry a tangent forwards,
if only once, `PushedPoint` needs a pass a direction instead.

Letters: B batch, K directions, P' trainable weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_map

from trajrec.replay.derivatives.derivatives import Derivatives
from trajrec.replay.derivatives.forward import ForwardPoint
from trajrec.replay.derivatives.layers import Piece, Tape
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.gradient import gradient_of, rows_of
from trajrec.replay.losses.objective import Objective
from trajrec.replay.step import Step


class SamplesPoint:
    """The gradient of every sample, [B, P'], and matrix products with it; no Hessian."""

    def __init__(self, function: LossFunction, samples: Samples, step: Step, chunk: int = 0) -> None:
        weights = step.before.detach()
        rows = [gradient_rows(function, samples, step, weights, k) for k in range(len(step.parts))]
        self._rows = torch.cat(rows)
        self._shares = function.shares(samples, step)
        self._has_penalty = function.task.penalty is not None
        self._point = function, samples, step

    def gradient(self) -> Tensor:
        """g_t [P']."""
        return gradient_of(*self._point) if self._has_penalty else self._shares @ self._rows

    def along(self, directions: Tensor, *, hessian: bool, gradient: bool) -> Derivatives:
        """Derivatives along directions [K, P']."""
        if hessian:
            raise NotImplementedError("Per-sample gradients give no Hessian-vector product.")
        return Derivatives(directions @ self._rows.T, self._shares, None, self.gradient() if gradient else None)


def gradient_rows(function: LossFunction, samples: Samples, step: Step, weights: Tensor, k: int) -> Tensor:
    """Per-sample gradients [B, P'] of micro-batch k."""
    part = step.parts[k]
    if part.rng:
        raise NotImplementedError("Random numbers are drawn for a batch, not for each sample.")
    batch = samples.part(step, part)

    def loss(weights: Tensor, item: Any) -> Tensor:
        return function.single_loss(weights, tree_map(lambda value: value[None], item))

    gradients: Tensor = vmap(grad(loss), (None, 0))(weights, batch)
    return gradients


class LayersPoint:
    """The pieces of which the gradients of all samples are made, layer by layer; no Hessian."""

    def __init__(self, function: LossFunction, samples: Samples, step: Step, chunk: int = 0) -> None:
        values = function.layout.split(step.before)
        tape = Tape({name: value.detach().requires_grad_() for name, value in values.items()})
        self._parts: list[tuple[Tensor, list[tuple[str, Callable[[], Piece]]]]] = []
        with torch.enable_grad(), tape:
            for part in function.parts(tape.weights, samples, step):
                self._parts.append((part.shares, tape.pieces(part.losses)))
        self._has_penalty = function.task.penalty is not None
        self._point = function, samples, step

    def gradient(self) -> Tensor:
        """g_t [P']."""
        function, _, step = self._point
        if self._has_penalty:
            return gradient_of(*self._point)
        total = torch.zeros_like(step.before)
        values = function.layout.split(total)
        for shares, pieces in self._parts:
            for name, piece in pieces:
                values[name].add_(piece().summed(shares).view_as(values[name]))
        return total

    def along(self, directions: Tensor, *, hessian: bool, gradient: bool) -> Derivatives:
        """Derivatives along directions [K, P']."""
        if hessian:
            raise NotImplementedError("Per-sample gradients give no Hessian-vector product.")
        layout = self._point[0].layout
        columns = torch.split(directions, layout.sizes, 1)
        named = {p.name: column for p, column in zip(layout.params, columns, strict=True)}
        inners = []
        for shares, pieces in self._parts:
            inner = directions.new_zeros(len(directions), len(shares))
            for name, piece in pieces:
                inner += piece().inner(named[name])
            inners.append(inner)
        shares = torch.cat([shares for shares, _ in self._parts])
        return Derivatives(torch.cat(inners, 1), shares, None, self.gradient() if gradient else None)


class SinglesPoint:
    """A backward pass a sample, one after the other; no Hessian."""

    together = False

    def __init__(self, function: LossFunction, samples: Samples, step: Step, chunk: int = 0) -> None:
        self._size = max(1, chunk) if self.together else 1
        self._point = function, samples, step

    @property
    def shares(self) -> Tensor:
        """The c[t,i] [B] of the batch."""
        function, samples, step = self._point
        return function.shares(samples, step)

    def gradient(self) -> Tensor:
        """g_t [P'], by a pass of its own."""
        return gradient_of(*self._point)

    def along(self, directions: Tensor, *, hessian: bool, gradient: bool) -> Derivatives:
        """Derivatives along directions [K, P']."""
        if hessian:
            raise NotImplementedError("First derivatives give no Hessian-vector product.")
        inners = [
            directions @ rows.T for part, weights in self._parts() for rows in rows_of(part.losses, weights, self._size)
        ]
        return Derivatives(torch.cat(inners, 1), self.shares, None, self.gradient() if gradient else None)

    def forced(self, directions: Tensor | None, multipliers: Tensor) -> Tensor:
        """sum_i multipliers[k, i] grad l_i: [K, P'] from [K, B]; directions are None: there is no Hessian."""
        if directions is not None:
            raise NotImplementedError("First derivatives give no Hessian-vector product.")
        total = multipliers.new_zeros(len(multipliers), len(self._point[2].before))
        counts = [part.span.stop - part.span.start for part in self._point[2].parts]
        for (part, weights), mine in zip(self._parts(), torch.split(multipliers, counts, 1), strict=True):
            for row, cotangent in zip(total, mine, strict=True):
                row += torch.autograd.grad(part.losses, weights, cotangent, retain_graph=True, materialize_grads=True)[
                    0
                ]
        return total

    def _parts(self) -> Iterator[tuple[Objective, Tensor]]:
        """One micro-batch after the other, with the weights that its losses are recorded from."""
        function, samples, step = self._point
        weights = step.before.detach().requires_grad_()
        with torch.enable_grad():
            for part in function.parts(weights, samples, step):
                yield part, weights


class SlicesPoint(SinglesPoint):
    """The backward passes of a slice of samples together, as many as the memory allows."""

    together = True


class PushedPoint(ForwardPoint):
    """Forward mode by itself: the gradient comes from a pass of its own, and nothing is differentiated twice."""

    def along(self, directions: Tensor, *, hessian: bool, gradient: bool) -> Derivatives:
        """Derivatives along directions [K, P']."""
        if hessian:
            raise NotImplementedError("First derivatives give no Hessian-vector product.")
        if gradient:
            self.gradient()
        return super().along(directions, hessian=False, gradient=False)

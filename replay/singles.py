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

from collections.abc import Iterator

import torch
from torch import Tensor

from trajrec.replay.linearize import Derivatives, ForwardPoint, Wanted, gradient_of
from trajrec.replay.model import LossFunction, Objective
from trajrec.replay.samples import Samples
from trajrec.replay.trajectory import Step
from trajrec.rules.step import pull_batched


def rows_of(losses: Tensor, weights: Tensor, size: int) -> Iterator[Tensor]:
    """The gradients of losses [B] for weights [P'], a slice [size, P'] of them at a time."""
    units = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
    for chosen in torch.split(units, size):
        yield pull_batched([losses], [weights], [chosen], retain=True)[0]


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

    def along(self, directions: Tensor, *, hessian: bool, gradient: Wanted) -> Derivatives:
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

    def along(self, directions: Tensor, *, hessian: bool, gradient: Wanted) -> Derivatives:
        """Derivatives along directions [K, P']."""
        if hessian:
            raise NotImplementedError("First derivatives give no Hessian-vector product.")
        if gradient:
            self.gradient()
        return super().along(directions, hessian=False, gradient=False)

r"""One recorded step, linearised: losses, gradient, directional derivatives and Hessian-vector products.

With multipliers u [B] of the losses l(w) [B], one backward pass gives g(u, w) = sum_i u_i grad l_i(w). Differentiating
<g, gamma> once more gives both things that an exact step needs, in one pass:

    d/du <g, gamma> = (<grad l_i, gamma>)_i         the inner products of all samples of the batch
    d/dw <g, gamma> = H gamma                       the Hessian-vector product, H = sum_i u_i hess l_i

No per-sample gradient is ever formed, so BatchNorm in train mode (coupled losses) stays exact. The gradient itself is
the loop's own, which is what the certificate compares.

Letters: B batch, K directions, P' trainable weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trajrec.replay.model import LossFunction
from trajrec.replay.samples import Samples
from trajrec.replay.trajectory import Step
from trajrec.rules.step import pull_batched


def gradient_of(function: LossFunction, samples: Samples, step: Step) -> Tensor:
    """The gradient g_t [P'] alone, micro-batches added up one after the other as a training loop does."""
    weights = step.before.detach().requires_grad_()
    total: Tensor | None = None
    with torch.enable_grad():
        for part in function.parts(weights, samples, step):
            (gradient,) = torch.autograd.grad(part.total, weights)
            total = gradient if total is None else total + gradient
    assert total is not None
    return total


class Linearization:
    """A step at w_{t-1}: losses [B] and gradient [P'], ready to be differentiated again."""

    def __init__(self, function: LossFunction, samples: Samples, step: Step) -> None:
        self._weights = step.before.detach().requires_grad_()
        with torch.enable_grad():
            objective = function.objective(self._weights, samples, step)
            self._losses = objective.losses
            self._shares = objective.shares.requires_grad_()
            (self._gradient,) = torch.autograd.grad(objective.total, self._weights, create_graph=True)

    @property
    def shares(self) -> Tensor:
        """The c[t,i] [B] of the batch."""
        return self._shares.detach()

    @property
    def losses(self) -> Tensor:
        """Losses of the batch, [B]."""
        return self._losses.detach()

    @property
    def gradient(self) -> Tensor:
        """sum_i c[t,i] grad l_i, [P']."""
        return self._gradient.detach()

    def inner_products(self, directions: Tensor) -> Tensor:
        """<grad l_i, direction> for every sample of the batch: [K, B] from [K, P']."""
        (inner,) = pull_batched([self._gradient], [self._shares], [directions])
        return inner

    def inner_products_and_hvp(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """[K, B] inner products and [K, P'] Hessian-vector products of directions [K, P'], from one pass."""
        inner, hvp = pull_batched([self._gradient], [self._shares, self._weights], [directions])
        return inner, hvp

    def forced(self, directions: Tensor | None, multipliers: Tensor) -> Tensor:
        """H directions + sum_i multipliers[k, i] grad l_i: [K, P'] from [K, P'] and [K, B]; None drops the Hessian."""
        outputs, cotangents = [self._losses], [multipliers]
        if directions is not None:
            outputs, cotangents = [self._losses, self._gradient], [multipliers, directions]
        (force,) = pull_batched(outputs, [self._weights], cotangents)
        return force

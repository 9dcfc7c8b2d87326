r"""One recorded step, linearised: gradient, inner products of all samples, and Hessian-vector products.

With l(w) [B] the losses of the batch, c [B] their shares, R the penalty, and gamma a direction,

    inner  = (<grad l_i, gamma>)_i                                       [B]
    hvp    = H gamma,  H = sum_i c_i hess l_i + hess R                    [P']
    g      = sum_i c_i grad l_i + grad R                                  [P']   what the certificate compares

Four forms give the same numbers, at different prices:

    forward   reverse over forward: one pass carries the tangent gamma along, so inner = dl/dw gamma comes out of it;
              one backward pass of sum_i c_i inner_i gives H gamma (with respect to w) and g (with respect to gamma)
    reverse   reverse over reverse: g(u, w) = sum_i u_i grad l_i by one backward pass that is recorded;
              d/du <g, gamma> = inner and d/dw <g, gamma> = H gamma. The recorded pass serves any number of directions
    samples   the gradient of every sample by itself, then one matrix product with the directions. Only without the
              Hessian, and only where the samples of a batch do not touch each other (no BatchNorm in train mode)
    layers    the same from one pass over the whole batch, layer by layer (`replay.derivatives.layers`); only where
              every weight is used in layers that are known there

The first two never form a per-sample gradient, so BatchNorm in train mode (coupled losses) stays exact. Where operators
have no second derivative, forms of their own serve (`replay.derivatives.per_sample`). Which form a replay uses is
chosen in `replay.derivatives.choice`.

Letters: B batch, K directions, P' trainable weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from trajrec.replay.losses.statistics import Carried


@dataclass(frozen=True, slots=True)
class Derivatives:
    """What a step yields along K directions.

    Attributes:
        inner: <grad l_i, direction>, [K, B].
        shares: the c[t,i], [B].
        hvp: H direction, [K, P']; None without the Hessian.
        gradient: g_t [P']; None where it was neither asked for nor at hand.
        carried: of the running statistics, to the step before; what they add to lam is in `hvp`. None without them.
    """

    inner: Tensor
    shares: Tensor
    hvp: Tensor | None
    gradient: Tensor | None
    carried: Carried | None = None


class Point(Protocol):
    """A step, ready to be differentiated."""

    def gradient(self) -> Tensor:
        """g_t [P'], before any direction is known."""

    def along(self, directions: Tensor, *, hessian: bool, gradient: bool) -> Derivatives:
        """Derivatives along directions [K, P']; `gradient`: g_t is wanted, too."""


class CarryingPoint(Point, Protocol):
    """A step that takes the way through the running statistics along."""

    def carrying(self, directions: Tensor, carried: Carried, *, gradient: bool) -> Derivatives:
        """Derivatives along directions [K, P'], with the Hessian and the statistics."""


class ForcedPoint(Protocol):
    """A step, ready for what its gradient changes by when weights and samples' shares do."""

    @property
    def shares(self) -> Tensor:
        """The c[t,i] [B] of the batch."""

    def forced(self, directions: Tensor | None, multipliers: Tensor) -> Tensor:
        """H directions + sum_i multipliers[k, i] grad l_i: [K, P'] from [K, P'] and [K, B]; None drops the Hessian."""

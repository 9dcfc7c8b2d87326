r"""One recorded step, linearised: gradient, inner products of all samples, and Hessian-vector products.

With l(w) [B] the losses of the batch, c [B] their shares, R the penalty, and gamma a direction,

    inner  = (<grad l_i, gamma>)_i                                       [B]
    hvp    = H gamma,  H = sum_i c_i hess l_i + hess R                    [P']
    g      = sum_i c_i grad l_i + grad R                                  [P']   what the certificate compares

Four forms give the same numbers, at different prices:

    forward   reverse over forward: one pass carries the tangent gamma along, so inner = dl/dw gamma comes out of it;
              one backward pass of sum_i c_i inner_i gives H gamma (with respect to w) and g (with respect to gamma)
    reverse   reverse over reverse: g(u, w) = sum_i u_i grad l_i by one backward pass that is recorded;
              d/du <g, gamma> = inner and d/dw <g, gamma> = H gamma. The recorded pass serves any number of directions,
              one after the other ("reverse") or together ("batched")
    samples   the gradient of every sample by itself, then one matrix product with the directions. Only without the
              Hessian, and only where the samples of a batch do not touch each other (no BatchNorm in train mode)
    layers    the same from one pass over the whole batch, layer by layer (`replay.layers`); only where every weight is
              used in layers that are known there

The first two never form a per-sample gradient, so BatchNorm in train mode (coupled losses) stays exact. Where operators
have no second derivative, forms of their own serve (`replay.singles`). Which form a replay uses is chosen in
`replay.choice`.

Letters: B batch, K directions, P' trainable weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_map

from trajrec.replay.composed import composed_norms
from trajrec.replay.dual import DualOperators
from trajrec.replay.layers import Piece, Tape
from trajrec.replay.model import LossFunction, Objective
from trajrec.replay.operators import cuts_told, operator_without
from trajrec.replay.samples import Samples
from trajrec.replay.tangents import dual_of, parts_of
from trajrec.replay.trajectory import Step
from trajrec.rules import FlatLayout
from trajrec.rules.step import pull_batched


def gradient_of(function: LossFunction, samples: Samples, step: Step, factors: Tensor | None = None) -> Tensor:
    """The gradient g_t [P'] alone, micro-batches added up one after the other as a training loop does.

    `factors` [B] multiply the c[t,i]; all one by default.
    """
    weights = step.before.detach().requires_grad_()
    total: Tensor | None = None
    with torch.enable_grad():
        for part, piece in zip(function.parts(weights, samples, step), step.parts, strict=True):
            counted = part if factors is None else replace(part, shares=part.shares * factors[piece.span])
            (gradient,) = torch.autograd.grad(counted.total, weights)
            total = gradient if total is None else total + gradient
    assert total is not None
    return function.free(total, step)


# Whether g_t is wanted; or the names of the parameters for which it is, with zeros for the others.
Wanted = bool | frozenset[str]


@dataclass(frozen=True, slots=True)
class Derivatives:
    """What a step yields along K directions.

    Attributes:
        inner: <grad l_i, direction>, [K, B].
        shares: the c[t,i], [B].
        hvp: H direction, [K, P']; None without the Hessian.
        gradient: g_t [P']; None where it was neither asked for nor at hand.
    """

    inner: Tensor
    shares: Tensor
    hvp: Tensor | None
    gradient: Tensor | None


class Point(Protocol):
    """A step, ready to be differentiated."""

    def gradient(self) -> Tensor:
        """g_t [P'], before any direction is known."""

    def along(self, directions: Tensor, *, hessian: bool, gradient: Wanted) -> Derivatives:
        """Derivatives along directions [K, P']; `gradient`: g_t is wanted, too."""


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


class ReversePoint:
    """Reverse over reverse mode; one recorded pass for all directions, taken one after the other."""

    batched = False

    def __init__(self, function: LossFunction, samples: Samples, step: Step, chunk: int = 0) -> None:
        self._chunk, self._layout = chunk, function.layout
        self._weights = step.before.detach().requires_grad_()
        with torch.enable_grad(), composed_norms(function.takes_derivatives):
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

    def along(self, directions: Tensor, *, hessian: bool, gradient: Wanted) -> Derivatives:
        """Derivatives along directions [K, P']."""
        inputs = [self._shares, self._weights] if hessian else [self._shares]
        found = self._pull([self._gradient], inputs, [directions])
        whole = self.gradient()
        if isinstance(gradient, frozenset):
            parts = self._layout.split(whole)
            whole = _filled(self._layout, {name: parts[name] for name in gradient}, whole)
        return Derivatives(found[0], self.shares, found[1] if hessian else None, whole)

    def forced(self, directions: Tensor | None, multipliers: Tensor) -> Tensor:
        """H directions + sum_i multipliers[k, i] grad l_i: [K, P'] from [K, P'] and [K, B]; None drops the Hessian."""
        if directions is None:
            return self._pull([self._losses], [self._weights], [multipliers])[0]
        if not multipliers.any():
            return self._pull([self._gradient], [self._weights], [directions])[0]
        return self._pull([self._losses, self._gradient], [self._weights], [multipliers, directions])[0]

    def _pull(self, outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
        count = len(cotangents[0])
        size = (self._chunk or count) if self.batched else 1
        rows = []
        for start in range(0, count, size):
            given = [c[start : start + size] for c in cotangents]
            # The last pass frees what was recorded.
            rows.append(pull_batched(outputs, inputs, given, retain=start + size < count))
        return rows[0] if len(rows) == 1 else [torch.cat(column) for column in zip(*rows, strict=True)]


class BatchedPoint(ReversePoint):
    """Reverse over reverse mode, many directions in one pass."""

    batched = True


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


class SamplesPoint:
    """The gradient of every sample, [B, P'], and matrix products with it; no Hessian."""

    def __init__(self, function: LossFunction, samples: Samples, step: Step, chunk: int = 0) -> None:
        weights = step.before.detach()
        rows = [_rows(function, samples, step, weights, k) for k in range(len(step.parts))]
        self._rows = torch.cat(rows)
        self._shares = function.shares(samples, step)
        self._has_penalty = function.task.penalty is not None
        self._point = function, samples, step

    def gradient(self) -> Tensor:
        """g_t [P']."""
        return gradient_of(*self._point) if self._has_penalty else self._shares @ self._rows

    def along(self, directions: Tensor, *, hessian: bool, gradient: Wanted) -> Derivatives:
        """Derivatives along directions [K, P']."""
        if hessian:
            raise NotImplementedError("Per-sample gradients give no Hessian-vector product.")
        return Derivatives(directions @ self._rows.T, self._shares, None, self.gradient() if gradient else None)


def _rows(function: LossFunction, samples: Samples, step: Step, weights: Tensor, k: int) -> Tensor:
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

    def along(self, directions: Tensor, *, hessian: bool, gradient: Wanted) -> Derivatives:
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


FORMS: dict[str, Callable[[LossFunction, Samples, Step, int], Point]] = {
    "forward": ForwardPoint,
    "reverse": ReversePoint,
    "batched": BatchedPoint,
    "samples": SamplesPoint,
    "layers": LayersPoint,
}

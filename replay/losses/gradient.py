"""A step's gradient g_t, by one backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.step import Step
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


def rows_of(losses: Tensor, weights: Tensor, size: int) -> Iterator[Tensor]:
    """The gradients of losses [B] for weights [P'], a slice [size, P'] of them at a time."""
    units = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
    for chosen in torch.split(units, size):
        yield pull_batched([losses], [weights], [chosen], retain=True)[0]

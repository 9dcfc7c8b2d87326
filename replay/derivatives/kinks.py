r"""Kinks with a second derivative: curvature "kinks".

ReLU's second derivative is a unit mass at 0 that autograd takes for 0: it never sees that a sample pushes units over
their kinks. Here the mass is spread over a width h = .25 standard deviations of the pre-activations z, as a logistic
kernel:

    relu''(z) = S'(z / h) / h,    S the logistic function

Values stay those of ReLU to the bit, and slopes to rounding. The same holds for the other piecewise linear activations,
each kink weighted by the jump of its slope. It is no derivative of the training: an approximation, with small gains on
ReLU networks and no cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_WIDTH = 0.25


def bent(z: Tensor) -> Tensor:
    """Zero in value and slope, with the second derivative of ReLU's kink at z = 0 spread over its width."""
    still = z.detach()
    h = _WIDTH * float(still.std(correction=0)) + 1e-12
    soft = functional.softplus(z / h) * h
    return (soft - soft.detach()) - torch.sigmoid(still / h) * (z - still)


def _relu(x: Tensor, inplace: bool = False) -> Tensor:
    return torch.relu(x) + bent(x)


def _leaky_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    return functional.leaky_relu(x, negative_slope) + (1 - negative_slope) * bent(x)


def _hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    return functional.hardtanh(x, min_val, max_val) + bent(x - min_val) - bent(x - max_val)


def _relu6(x: Tensor, inplace: bool = False) -> Tensor:
    return _hardtanh(x, 0.0, 6.0)


def _abs(x: Tensor) -> Tensor:
    return torch.abs(x) + 2 * bent(x)


SMOOTHED: dict[Any, Any] = {
    functional.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    functional.relu6: _relu6,
    functional.hardtanh: _hardtanh,
    functional.leaky_relu: _leaky_relu,
    torch.abs: _abs,
    Tensor.abs: _abs,
}

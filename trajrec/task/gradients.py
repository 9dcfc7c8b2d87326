"""What training loops do to a gradient between backward() and step(), as functions that can be differentiated.

    task = trajrec.Task(..., gradient=trajrec.clip_norm(1.0))

A function takes the gradients by parameter name, in the order of `model.parameters()`, and gives new ones. It must
use out-of-place tensor operations only; replay differentiates through it, and the certificate checks every value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Gradients = dict[str, Tensor]


def clip_norm(max_norm: float, norm_type: float = 2.0) -> Callable[[Gradients], Gradients]:
    """What `torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, norm_type)` does.

    All gradients are scaled by min(1, max_norm / (norm + 1e-6)), norm being that of all of them together. Where the
    factor is exactly 1 the derivative is that of no clipping.
    """

    def clip(gradients: Gradients) -> Gradients:
        norms = [torch.linalg.vector_norm(gradient, norm_type) for gradient in gradients.values()]
        factor = max_norm / (torch.linalg.vector_norm(torch.stack(norms), norm_type) + 1e-6)
        factor = torch.clamp(factor, max=1.0)
        return {name: gradient * factor for name, gradient in gradients.items()}

    return clip


def clip_value(limit: float) -> Callable[[Gradients], Gradients]:
    """What `torch.nn.utils.clip_grad_value_(model.parameters(), limit)` does: each value is cut to [-limit, limit].

    The derivative of a cut value is zero.
    """

    def clip(gradients: Gradients) -> Gradients:
        return {name: gradient.clamp(-limit, limit) for name, gradient in gradients.items()}

    return clip

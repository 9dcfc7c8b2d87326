r"""Values whose gradient is held against central differences, in float64.

What contributions begin with, the gradients of the target losses at w_T, and what running statistics add to them on the
way, have no part in the gradient g of the training, and the second proof of J = dg/dw does not see them. So

    (v(w + h d) - v(w - h d)) / 2h   against   <grad v(w), d>

is asked for each of several values v, along d = s/|s| + z/|z| with the sum s of their gradients and random z. The best
of several h and points counts, as for J (`replay.proof.derivative`).

Letters: M values, n inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

AGREE = 1e-5
_STEPS = (1e-6, 1e-5, 1e-7, 1e-4, 1e-8, 1e-3)
_FLOOR = 1e-3
ASIDE, POINTS = 1e-2, 3

Values = Callable[[Tensor], Tensor]


def apart(values: Values, gradients: Values, at: Tensor, movable: int) -> float:
    """The largest relative difference of M values' gradients [M, n] from what differences of the values [M] say.

    Args:
        values: M values of inputs [n].
        gradients: theirs, [M, n].
        at: inputs [n] in float64.
        movable: so many of the first inputs may be put aside, from where kinks are hit exactly.
    """
    least = torch.full((1,), math.inf, dtype=at.dtype, device=at.device)
    for number in range(POINTS):
        z = random_like(at, number)
        point = at.clone()
        point[:movable] += ASIDE * float(at[:movable].square().mean().sqrt()) * z[:movable]
        found = gradients(point)
        d = unit(found.sum(0)) + unit(random_like(at, POINTS + number))
        for step in _STEPS:
            least = torch.minimum(least, _differences(values, found, point, d, step))
            if float(least.max()) <= AGREE:
                return float(least.max())
    return float(least.max())


def _differences(values: Values, gradients: Tensor, at: Tensor, d: Tensor, step: float) -> Tensor:
    size = max(float(at.norm()), 1.0)
    h = step * size / float(d.norm())
    ahead, behind = values(at + h * d), values(at - h * d)
    difference, said = (ahead - behind) / (2 * h), gradients @ d
    usual = gradients.norm(dim=1) * float(d.norm()) / math.sqrt(len(d))
    floor = _FLOOR * ahead.abs() / size
    scale = torch.stack([difference.abs(), said.abs(), usual, floor]).amax(0)
    return torch.where(scale > 0, (said - difference).abs() / scale, 0.0).nan_to_num(math.inf, math.inf)


def random_like(like: Tensor, seed: int) -> Tensor:
    """Random numbers [n] like others, the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(like), generator=generator, dtype=like.dtype).to(like.device)


def unit(values: Tensor) -> Tensor:
    """Values over their norm; zeros as they are."""
    return values / (values.norm() or 1.0)

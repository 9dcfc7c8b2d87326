"""A value and its tangent, in torch's forward mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor

Handler = Callable[..., Any]


def parts_of(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Value and tangent of a tensor."""
    parts = fwd.unpack_dual(x)  # type: ignore[no-untyped-call]
    return parts.primal, parts.tangent


def dual_of(value: Tensor, tangent: Tensor) -> Tensor:
    """A tensor that carries a tangent."""
    dual: Tensor = fwd.make_dual(value, tangent)  # type: ignore[no-untyped-call]
    return dual


def both_of(bars: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """The cotangents of value and tangent, the first two of `bars`; zeros in place of one that there is none of."""
    u, v = bars[:2]
    if u is None:
        assert v is not None
        return torch.zeros_like(v), v
    return u, torch.zeros_like(u) if v is None else v

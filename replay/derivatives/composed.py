r"""Normalisations that can be differentiated three times: composed of operators that can.

A loss that takes derivatives itself (a gradient penalty, physics) has second derivatives in its own gradient, and third
ones in its Hessian. torch's second derivatives of batch, instance and layer normalisation treat the statistics that
they were given as constants: differentiated once more they are wrong by 3 to 30 %, without an error (torch 2.13; group
and RMS normalisation, and every activation of torch.nn, are right). Inside `composed_norms` these are

    n = (x - mean x) / sqrt(var x + eps)

step by step. Values differ from torch's in the last place, and running statistics are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def composed_norms(wanted: bool) -> AbstractContextManager[Any]:
    """Inside, where wanted, normalisations are composed."""
    return _Composed() if wanted else nullcontext()


class _Composed(TorchFunctionMode):
    """Calls the functions below in place of torch's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, or what takes its place."""
        return _FUNCTIONS.get(func, func)(*args, **(kwargs or {}))


def _normal(x: Tensor, dims: Sequence[int], eps: float) -> Tensor:
    variance, mean = torch.var_mean(x, tuple(dims), correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return functional.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    shape = [-1] + [1] * (x.dim() - 2)
    return _affine(_normal(x, [d for d in range(x.dim()) if d != 1], eps), weight, bias, shape)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return functional.instance_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    return _affine(_normal(x, range(2, x.dim()), eps), weight, bias, [-1] + [1] * (x.dim() - 2))


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    return _affine(_normal(x, range(x.dim() - len(shape), x.dim()), eps), weight, bias, shape)


_FUNCTIONS: dict[Any, Any] = {
    functional.batch_norm: _batch_norm,
    functional.instance_norm: _instance_norm,
    functional.layer_norm: _layer_norm,
}

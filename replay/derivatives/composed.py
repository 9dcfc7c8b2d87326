r"""Operators whose derivatives of torch are wrong or missing: composed of operators that have them.

Twice, for every Hessian: the second derivative of weight normalisation is wrong (3 % on a CPU, torch 2.13, without an
error), hard sigmoid and others have none.

Three times: a loss that takes derivatives itself (a gradient penalty, physics) has second derivatives in its own
gradient, and third ones in its Hessian. torch's second derivatives of batch, instance and layer normalisation treat the
statistics that they were given as constants: differentiated once more they are wrong by 3 to 30 %, without an error
(torch 2.13; group and RMS normalisation, and every activation of torch.nn, are right). These become

    n = (x - mean x) / sqrt(var x + eps)

step by step. Values differ from torch's in the last place, and running statistics are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from trajrec.replay.derivatives.kinks import SMOOTHED
from trajrec.replay.losses.seen import Seen


def composed(seen: Seen, smoothing: bool = False) -> AbstractContextManager[Any]:
    """Inside, functions that a loss was seen to call are computed by what takes their places; by kinks, if wanted."""
    table = _TWICE | (_THRICE if seen.derivatives else {}) | (SMOOTHED if smoothing else {})
    wanted = {function: other for function, other in table.items() if function in seen.called}
    return _Composed(wanted) if wanted else nullcontext()


class _Composed(TorchFunctionMode):
    """Calls other functions in place of torch's."""

    def __init__(self, table: dict[Any, Any]) -> None:
        super().__init__()
        self._table = table

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, or what takes its place."""
        return self._table.get(func, func)(*args, **(kwargs or {}))


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


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def applied(function: Any, *given: Any) -> Any:
    """What an autograd.Function makes of arguments; torch gives `apply` no types."""
    return function.apply(*given)


class _Slope(Function):
    """The backward pass of a function of one number, with a derivative: `second` is the function's second one."""

    @staticmethod
    def forward(ctx: Any, bar: Tensor, x: Tensor, slope: Any, second: Any) -> Any:
        ctx.save_for_backward(bar, x)
        ctx.slope, ctx.second = slope, second
        return slope(bar, x)

    @staticmethod
    def backward(ctx: Any, *bars: Any) -> Any:
        bar, x = ctx.saved_tensors
        return ctx.slope(bars[0], x), bars[0] * bar * ctx.second(x), None, None


class _Bent(Function):
    """A function of one number, with torch's own value and slope to the bit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Any, slope: Any, second: Any) -> Any:
        ctx.save_for_backward(x)
        ctx.slope, ctx.second = slope, second
        return value(x)

    @staticmethod
    def backward(ctx: Any, *bars: Any) -> Any:
        (x,) = ctx.saved_tensors
        return applied(_Slope, bars[0], x, ctx.slope, ctx.second), None, None, None


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Any:
    aten = torch.ops.aten
    return applied(_Bent, x, aten.hardsigmoid, aten.hardsigmoid_backward, torch.zeros_like)


def _hardswish(x: Tensor, inplace: bool = False) -> Any:
    aten = torch.ops.aten
    return applied(_Bent, x, aten.hardswish, aten.hardswish_backward, lambda x: (x.abs() < 3) / 3)


_TWICE: dict[Any, Any] = {
    torch._weight_norm: _weight_norm,
    functional.hardsigmoid: _hardsigmoid,
    functional.hardswish: _hardswish,
}
_THRICE: dict[Any, Any] = {
    functional.batch_norm: _batch_norm,
    functional.instance_norm: _instance_norm,
    functional.layer_norm: _layer_norm,
}

r"""Operators that carry a tangent forwards and can be differentiated backwards again.

Reverse mode over forward mode needs operators whose forward derivative is itself differentiable. torch's (2.13) is not
for some of the most used: log_softmax and softmax write over a value that the backward pass needs (an error); batch and
layer normalisation treat their statistics as constants (Hessian-vector products wrong by 3 to 20 %, without an error).
Inside `DualOperators` these are computed from values x and tangents x' with derivatives that are whole:

    log_softmax   y' = x' - sum(exp(y) x')              softmax   y' = y (x' - sum(y x'))
    normalisation n = (x - mean x) s,   n' = s a(x')    with  a(t) = t - mean t - n mean(n t)

For a normalisation with cotangents (u, v) of (n, n') the backward pass is, a being symmetric,

    x'-bar = s a(v)
    x-bar  = s a(u - s (v mean(n x') + x' mean(n v))) - s n (mean(v n') + ...)      see `_BatchNorm.backward`

GELU has a formula of its own because torch's second derivative goes through many small steps, products have theirs to
sum in place (`replay.products`), and max pooling over 2 x 2 finds the same places as torch's, faster. Values are
torch's own to the bit: where they differed in the last one, a ReLU behind would flip now and then, and the certificate
would see another gradient. Everything else is torch's forward mode. That all of it is right for a model is proved at
the first step of every replay (`replay.choice`); these formulas are tested one by one.

Letters: B batch, C channels, M values that one statistic is taken of.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from trajrec.replay.derivatives import products
from trajrec.replay.derivatives.tangents import Handler, both_of, dual_of, parts_of

_batch_norm = torch.ops.aten.native_batch_norm
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward
_gelu_backward = torch.ops.aten.gelu_backward


class DualOperators(TorchFunctionMode):
    """Inside, the functions named in `HANDLERS` are computed by them if a tangent goes through."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the handler of a function, or the function."""
        handler = HANDLERS.get(func)
        if handler is not None:
            found = handler(*args, **(kwargs or {}))
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))


def _pair(x: Tensor | None, like: Tensor, value: float) -> tuple[Tensor, Tensor]:
    """An affine parameter and its tangent; constant where there is none."""
    if x is None:
        return torch.full_like(like, value), torch.zeros_like(like)
    primal, tangent = parts_of(x)
    return primal, torch.zeros_like(primal) if tangent is None else tangent


def _log_softmax(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor | None:
    value, tangent = parts_of(x)
    if tangent is None or dim is None or dtype is not None:
        return None
    y = torch.log_softmax(value, dim)
    return dual_of(y, tangent - (y.exp() * tangent).sum(dim, keepdim=True))


def _softmax(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor | None:
    value, tangent = parts_of(x)
    if tangent is None or dim is None or dtype is not None:
        return None
    y = torch.softmax(value, dim)
    product = y * tangent
    return dual_of(y, product - y * product.sum(dim, keepdim=True))


def _logsumexp(x: Tensor, dim: Any, keepdim: bool = False) -> Tensor | None:
    value, tangent = parts_of(x)
    if tangent is None or not isinstance(dim, int):
        return None
    return dual_of(value.logsumexp(dim, keepdim), (value.softmax(dim) * tangent).sum(dim, keepdim))


def _cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    if label_smoothing or target.is_floating_point() or size_average is not None or reduce is not None:
        return None
    logs = _log_softmax(x, 1 if x.dim() > 1 else 0)
    if logs is None:
        return None
    return functional.nll_loss(logs, target, weight, ignore_index=ignore_index, reduction=reduction)


def _batch_normalised(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if not training:
        return None
    value, tangent = parts_of(x)
    like = value.new_empty(value.shape[1])
    (w, dw), (b, db) = _pair(weight, like, 1.0), _pair(bias, like, 0.0)
    tangent = torch.zeros_like(value) if tangent is None else tangent
    pair = _BatchNorm.apply(value, tangent, w, dw, b, db, running_mean, running_var, momentum, eps)  # type: ignore[no-untyped-call]
    return dual_of(pair[0], pair[1])


class _BatchNorm(torch.autograd.Function):
    """(y, y') of batch normalisation over all dimensions but the second, in train mode: y = n w + b."""

    @staticmethod
    def forward(x: Tensor, dx: Tensor, w: Tensor, dw: Tensor, b: Tensor, db: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        running_mean, running_var, momentum, eps = rest
        shape, count = _channels(x)
        y, mean, s = _batch_norm(x, w, b, running_mean, running_var, True, momentum, eps)
        n = (x - mean.view(shape)).mul_(s.view(shape))
        scaled, n_dx, sum_dx = _batch_norm_backward(dx, x, w, None, None, mean, s, True, eps, [True, True, True])
        dy = scaled.addcmul_(n, dw.view(shape)).add_(db.view(shape))
        return y, dy, n, mean, s, n_dx / count, sum_dx / count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, dx, w, dw = inputs[:4]
        ctx.save_for_backward(x, dx, w, dw, *output[2:])
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.eps = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dx, w, dw, n, mean, s, n_dx, mean_dx = ctx.saved_tensors
        u, v = both_of(bars)
        shape, count = _channels(x)

        def backwards(g: Tensor, weight: Tensor | None, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
            three: tuple[Tensor, Tensor, Tensor]
            three = _batch_norm_backward(g, x, weight, None, None, mean, s, True, ctx.eps, mask)
            return three

        dx_bar, n_v, sum_v = backwards(v, w, [True, True, True])
        _grad, n_u, sum_u = backwards(u, None, [False, True, True])
        # sum over a channel of v n', which is also what s contributes: d s / d x = - s^2 n / M.
        through_s = s * ((v * dx).sum([d for d in range(x.dim()) if d != 1]) - sum_v * mean_dx - n_v * n_dx)
        g = (u * w.view(shape)).addcmul_(v, (dw - s * w * n_dx).view(shape))
        g.addcmul_(dx, (-s * w * n_v / count).view(shape))
        x_bar = backwards(g, None, [True, False, False])[0]
        x_bar.addcmul_(n, (-s * w * through_s / count).view(shape))
        return x_bar, dx_bar, n_u + through_s, n_v, sum_u, sum_v, None, None, None, None


def _channels(x: Tensor) -> tuple[list[int], float]:
    """The shape that spreads a value a channel over x, and M."""
    return [1, -1] + [1] * (x.dim() - 2), x.numel() / x.shape[1]


def _layer_normalised(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor | None:
    value, tangent = parts_of(x)
    like = value.new_empty(list(shape))
    (w, dw), (b, db) = _pair(weight, like, 1.0), _pair(bias, like, 0.0)
    tangent = torch.zeros_like(value) if tangent is None else tangent
    pair = _LayerNorm.apply(value, tangent, w, dw, b, db, list(shape), eps)  # type: ignore[no-untyped-call]
    return dual_of(pair[0], pair[1])


class _LayerNorm(torch.autograd.Function):
    """(y, y') of layer normalisation over the last dimensions: y = n w + b."""

    @staticmethod
    def forward(x: Tensor, dx: Tensor, w: Tensor, dw: Tensor, b: Tensor, db: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        shape, eps = rest
        y, mean, s = torch.native_layer_norm(x, shape, w, b, eps)
        n = (x - mean).mul_(s)
        dims = list(range(-len(shape), 0))
        n_dx = (n * dx).mean(dims, keepdim=True)
        dn = (dx - dx.mean(dims, keepdim=True)).sub_(n * n_dx).mul_(s)
        dy = torch.addcmul(db, n, dw).addcmul_(dn, w)
        return y, dy, n, mean, s, dn, n_dx

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, dx, w, dw, _, _, ctx.shape, _ = inputs
        ctx.save_for_backward(x, dx, w, dw, *output[2:])
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dx, w, dw, n, mean, s, dn, n_dx = ctx.saved_tensors
        u, v = both_of(bars)
        dims, rows = list(range(-len(ctx.shape), 0)), list(range(x.dim() - len(ctx.shape)))
        dx_bar, dw_bar, db_bar = _layer_norm_backward(v, x, ctx.shape, mean, s, w, w, [True, True, True])
        _, w_bar, b_bar = _layer_norm_backward(u, x, ctx.shape, mean, s, w, w, [False, True, True])
        scaled, v_dn = v * w, v * dn
        through_s = (v_dn * w).mean(dims, keepdim=True)
        g = (u * w).addcmul_(v, dw).addcmul_(scaled, -s * n_dx)
        g.addcmul_(dx, -s * (n * scaled).mean(dims, keepdim=True))
        x_bar = _layer_norm_backward(g, x, ctx.shape, mean, s, None, None, [True, False, False])[0]
        x_bar.addcmul_(n, -s * through_s)
        w_bar = w_bar + (v_dn.sum(rows) if rows else v_dn)
        return x_bar, dx_bar, w_bar, dw_bar, b_bar, db_bar, None, None


def _gelu(x: Tensor, approximate: str = "none") -> Tensor | None:
    value, tangent = parts_of(x)
    if tangent is None or approximate != "none":
        return None
    y, dy = _Gelu.apply(value, tangent)  # type: ignore[no-untyped-call]
    return dual_of(y, dy)


class _Gelu(torch.autograd.Function):
    """(y, y') of x Phi(x): first derivative Phi + x phi, second phi (2 - x^2)."""

    @staticmethod
    def forward(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        return functional.gelu(x), _gelu_backward(dx, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> tuple[Tensor, Tensor]:
        x, dx = ctx.saved_tensors
        u, v = both_of(bars)
        square = x * x
        density = (-0.5 * square).exp_().mul_(1 / math.sqrt(2 * math.pi))
        x_bar = square.neg_().add_(2).mul_(density).mul_(dx).mul_(v).add_(_gelu_backward(u, x))
        return x_bar, _gelu_backward(v, x)


def _max_pool2d(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    two_by_two = _both(kernel_size, 2) and (stride is None or stride == [] or _both(stride, 2))
    plain = _both(padding, 0) and _both(dilation, 1) and not ceil_mode and not return_indices
    value, tangent = parts_of(x)
    if not (two_by_two and plain) or x.dim() != 4 or tangent is None or x.device.type != "cpu":
        return None
    with torch.no_grad():
        places = pool_places(value)
    return dual_of(_picked(value, places), _picked(tangent, places))


def _both(value: Any, wanted: int) -> bool:
    return value == wanted or (isinstance(value, tuple | list) and all(v == wanted for v in value))


def _picked(x: Tensor, places: Tensor) -> Tensor:
    return x.flatten(2).gather(2, places.flatten(2)).view(places.shape)


def pool_places(x: Tensor) -> Tensor:
    """Where in its plane [H W] the largest value of each 2 x 2 window of x [B, C, H, W] is; of equal ones the first."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    left, right = x[..., : 2 * height, : 2 * width : 2], x[..., : 2 * height, 1 : 2 * width : 2]
    larger, is_right = torch.maximum(left, right), right > left
    is_below = larger[..., 1::2, :] > larger[..., ::2, :]
    column = torch.where(is_below, is_right[..., 1::2, :], is_right[..., ::2, :])
    rows = torch.arange(height, device=x.device)[:, None] * (2 * x.shape[3])
    corner = rows + torch.arange(width, device=x.device) * 2
    return is_below.long().mul_(x.shape[3]).add_(column).add_(corner)


HANDLERS: dict[Any, Handler] = products.HANDLERS | {
    functional.log_softmax: _log_softmax,
    torch.log_softmax: _log_softmax,
    Tensor.log_softmax: _log_softmax,
    functional.softmax: _softmax,
    torch.softmax: _softmax,
    Tensor.softmax: _softmax,
    torch.logsumexp: _logsumexp,
    Tensor.logsumexp: _logsumexp,
    functional.cross_entropy: _cross_entropy,
    functional.batch_norm: _batch_normalised,
    functional.layer_norm: _layer_normalised,
    functional.gelu: _gelu,
    functional.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
}

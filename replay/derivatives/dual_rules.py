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

Attention is products with the softmax in between, as torch's own plain path has it. The values of a normalisation and a
softmax are torch's own to the bit: where they differed in the last one, a ReLU behind would flip now and then, and the
certificate would see another gradient. Everything else is torch's forward mode. That all of it is right for a model is
proved at the first step of every replay (`replay.derivatives.choice`); these formulas are tested one by one.

Letters: B batch, C channels, M values that one statistic is taken of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_batch_norm = torch.ops.aten.native_batch_norm
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward
Handler = Callable[..., Any]
Context: TypeAlias = Any  # torch's, on which attributes are put


def parts_of(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Value and tangent of a tensor."""
    parts = fwd.unpack_dual(x)  # type: ignore[no-untyped-call]
    return parts.primal, parts.tangent


def dual_of(value: Tensor, tangent: Tensor) -> Tensor:
    """A tensor that carries a tangent."""
    dual: Tensor = fwd.make_dual(value, tangent)  # type: ignore[no-untyped-call]
    return dual


def _both_of(bars: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """The cotangents of value and tangent, the first two of `bars`; zeros in place of one that there is none of."""
    u, v = bars[:2]
    if u is None:
        assert v is not None
        return torch.zeros_like(v), v
    return u, torch.zeros_like(u) if v is None else v


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


def _log_softmax(
    x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor | None:
    value, tangent = parts_of(x)
    if tangent is None or dim is None or dtype is not None:
        return None
    y = torch.log_softmax(value, dim)
    return dual_of(y, tangent - (y.exp() * tangent).sum(dim, keepdim=True))


def _softmax(
    x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor | None:
    value, tangent = parts_of(x)
    if tangent is None or dim is None or dtype is not None:
        return None
    return _softmax_dual(torch.softmax(value, dim), tangent, dim)


def _softmax_dual(y: Tensor, tangent: Tensor, dim: int) -> Tensor:
    product = y * tangent
    return dual_of(y, product - y * product.sum(dim, keepdim=True))


def _logsumexp(x: Tensor, dim: int | Sequence[int], keepdim: bool = False) -> Tensor | None:
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
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, dx, w, dw = inputs[:4]
        ctx.save_for_backward(x, dx, w, dw, *output[2:])
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.eps = inputs[-1]

    @staticmethod
    def backward(ctx: Context, *bars: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dx, w, dw, n, mean, s, n_dx, mean_dx = ctx.saved_tensors
        u, v = _both_of(bars)
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
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
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
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, dx, w, dw, _, _, ctx.shape, _ = inputs
        ctx.save_for_backward(x, dx, w, dw, *output[2:])
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Context, *bars: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dx, w, dw, n, mean, s, dn, n_dx = ctx.saved_tensors
        u, v = _both_of(bars)
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


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    # With dropout the mask must come from the same random numbers: left to torch's own plain path.
    if dropout_p or enable_gqa or all(parts_of(x)[1] is None for x in (query, key, value)):
        return None
    scores = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.mT
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    s, ds = parts_of(scores)
    # Safe, as torch's own: a row whose mask leaves nothing (padding) is zero, not NaN.
    p = torch._safe_softmax(s, -1)
    return (p if ds is None else _softmax_dual(p, ds, -1)) @ value


HANDLERS: dict[Any, Handler] = {
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
    functional.scaled_dot_product_attention: _attention,
}

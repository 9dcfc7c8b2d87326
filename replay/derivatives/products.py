r"""Products that carry a tangent: linear layers, convolutions, attention.

All three are bilinear where it counts, so that with values x, w and tangents x', w', and cotangents (u, v) of (y, y'),

    y = x w          y' = x w' + x' w
    x-bar = u w + v w'      x'-bar = v w      w-bar = x u + x' v      w'-bar = x v

which torch's forward mode finds, too; here each sum is made in place, and what nobody asks for is not computed.
Attention is softmax(s) v of such products, with the derivative of the softmax in between (`replay.dual`).

Letters: B batch, D width of a head, L places.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trajrec.replay.derivatives.tangents import Handler, both_of, dual_of, parts_of

_convolution_backward = torch.ops.aten.convolution_backward
_FEW_CHANNELS = 16


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    (value, dx), (w, dw) = parts_of(x), parts_of(weight)
    b, db = (None, None) if bias is None else parts_of(bias)
    if dw is None or weight.dim() != 2 or x.dim() < 2 or (bias is not None and db is None):
        return None
    rows, d_rows = value.flatten(0, -2), None if dx is None else dx.flatten(0, -2)
    y, dy = _Linear.apply(rows, d_rows, w, dw, b, db)  # type: ignore[no-untyped-call]
    shape = (*value.shape[:-1], w.shape[0])
    return dual_of(y.view(shape), dy.view(shape))


class _Linear(torch.autograd.Function):
    """(y, y') of y = x w^T + b, for rows x."""

    @staticmethod
    def forward(
        x: Tensor, dx: Tensor | None, w: Tensor, dw: Tensor, b: Tensor | None, db: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dy = functional.linear(x, dw, db)
        return functional.linear(x, w, b), dy if dx is None else dy.addmm_(dx, w.T)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dx, w, dw = ctx.saved_tensors
        u, v = both_of(bars)
        of_x, of_dx, of_w, of_dw, of_b, of_db = ctx.needs_input_grad
        w_bar = torch.mm(u.T, x) if of_w else None
        if w_bar is not None and dx is not None:
            w_bar.addmm_(v.T, dx)
        return (
            (u @ w).addmm_(v, dw) if of_x else None,
            v @ w if of_dx else None,
            w_bar,
            v.T @ x if of_dw else None,
            u.sum(0) if of_b else None,
            v.sum(0) if of_db else None,
        )


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    (value, dx), (w, dw) = parts_of(x), parts_of(weight)
    b, db = (None, None) if bias is None else parts_of(bias)
    if dw is None or (bias is not None and db is None):
        return None
    # Of many channels several convolutions are as fast as one over all of them, and torch sums them well.
    if isinstance(padding, str) or groups != 1 or x.dim() != 4 or x.shape[1] > _FEW_CHANNELS:
        return None
    options = [pair(option) for option in (stride, padding, dilation)]
    y, dy = _Convolution.apply(value, dx, w, dw, b, db, options)  # type: ignore[no-untyped-call]
    return dual_of(y, dy)


def pair(value: Any) -> list[int]:
    """An option of a convolution for both dimensions of an image."""
    return list(value) if isinstance(value, tuple | list) else [value, value]


class _Convolution(torch.autograd.Function):
    """(y, y') of y = x * w + b; x * w' + x' * w is one convolution over twice the channels."""

    @staticmethod
    def forward(
        x: Tensor, dx: Tensor | None, w: Tensor, dw: Tensor, b: Tensor | None, db: Tensor | None, options: Any
    ) -> tuple[Tensor, Tensor]:
        both = (x, dw) if dx is None else _joined(x, dx, w, dw)
        return functional.conv2d(x, w, b, *options), functional.conv2d(*both, db, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *saved, _, _, ctx.options = inputs
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dx, w, dw = ctx.saved_tensors
        u, v = both_of(bars)
        of_x, of_dx, of_w, of_dw, of_b, of_db, _ = ctx.needs_input_grad

        def backwards(g: Tensor, x: Tensor, w: Tensor, of_x: bool, of_w: bool) -> tuple[Any, Any]:
            mask = [of_x, of_w, False]
            found = _convolution_backward(g, x, w, None, *ctx.options, False, [0, 0], 1, mask)
            return found[0], found[1]

        x_bar, w_bar = backwards(u, x, w, of_x, of_w)
        if dx is None:
            dx_bar, dw_bar = None, backwards(v, x, w, False, of_dw)[1]
        else:
            of_both, of_weights = backwards(v, *_joined(x, dx, w, dw), of_x or of_dx, of_w or of_dw)
            of_x_part, dx_bar = (None, None) if of_both is None else of_both.chunk(2, 1)
            dw_bar, of_w_part = (None, None) if of_weights is None else of_weights.chunk(2, 1)
            x_bar = None if x_bar is None else x_bar.add_(of_x_part)
            w_bar = None if w_bar is None else w_bar.add_(of_w_part)
        spread = (0, 2, 3)
        return x_bar, dx_bar, w_bar, dw_bar, u.sum(spread) if of_b else None, v.sum(spread) if of_db else None, None


def _joined(x: Tensor, dx: Tensor, w: Tensor, dw: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and weights of x * w' + x' * w."""
    return torch.cat([x, dx], 1), torch.cat([dw, w], 1)


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
    lead = torch.broadcast_shapes(*(x.shape[:-2] for x in (query, key, value)))  # type: ignore[no-untyped-call]
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -math.inf)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*attn_mask.shape[:-2], query.shape[-2], key.shape[-2])
    inputs = [part for x in (query, key, value) for part in _stacked(x, lead)]
    mask, dmask = (None, None) if attn_mask is None else _stacked(attn_mask, lead)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    y, dy = _Attention.apply(*inputs, mask, dmask, scale)[:2]  # type: ignore[no-untyped-call]
    shape = (*lead, *y.shape[1:])
    return dual_of(y.view(shape), dy.view(shape))


def _stacked(x: Tensor, lead: torch.Size) -> tuple[Tensor, Tensor]:
    """Value and tangent as [N, L, D]; contiguous once, here, instead of in every product."""
    value, tangent = parts_of(x)
    tangent = torch.zeros_like(value) if tangent is None else tangent
    shape = (*lead, *x.shape[-2:])
    return value.expand(shape).reshape(-1, *shape[-2:]), tangent.expand(shape).reshape(-1, *shape[-2:])


class _Attention(torch.autograd.Function):
    """(y, y') of y = p v, p = softmax(s), s = scale q k^T + mask; all [N, L, D] or [N, L, L]."""

    @staticmethod
    def forward(
        q: Tensor,
        dq: Tensor,
        k: Tensor,
        dk: Tensor,
        v: Tensor,
        dv: Tensor,
        mask: Tensor | None,
        dmask: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, ...]:
        q, dq = q * scale, dq * scale
        s = torch.bmm(q, k.mT) if mask is None else torch.baddbmm(mask, q, k.mT)
        # Safe, as torch's own: a row whose mask leaves nothing (padding) is zero, not NaN.
        p = torch.softmax(s, -1) if mask is None else torch._safe_softmax(s, -1)
        ds = torch.bmm(dq, k.mT).baddbmm_(q, dk.mT)
        if dmask is not None:
            ds.add_(dmask)
        dp = p * ds
        dp.addcmul_(p, dp.sum(-1, keepdim=True), value=-1)
        return p @ v, torch.bmm(p, dv).baddbmm_(dp, v), q, dq, p, dp, ds

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, k, dk, v, dv, _, _, ctx.scale = inputs
        ctx.save_for_backward(k, dk, v, dv, *output[2:])
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> tuple[Tensor | None, ...]:
        k, dk, v, dv, q, dq, p, dp, ds = ctx.saved_tensors
        y_bar, dy_bar = both_of(bars)
        v_bar = torch.bmm(p.mT, y_bar).baddbmm_(dp.mT, dy_bar)
        dv_bar = torch.bmm(p.mT, dy_bar)
        # p' = p (s' - r) with r = sum p s', so that p r = p s' - p'.
        a = torch.bmm(dy_bar, v.mT)
        ds_bar = p * a
        mean = ds_bar.sum(-1, keepdim=True)
        ds_bar.addcmul_(p, mean, value=-1)
        s_bar = torch.bmm(y_bar, v.mT).baddbmm_(dy_bar, dv.mT).addcmul_(ds, mean, value=-1).mul_(p).addcmul_(dp, a)
        s_bar.addcmul_(p, s_bar.sum(-1, keepdim=True), value=-1)
        q_bar = torch.bmm(s_bar, k).baddbmm_(ds_bar, dk).mul_(ctx.scale)
        dq_bar = torch.bmm(ds_bar, k).mul_(ctx.scale)
        k_bar = torch.bmm(s_bar.mT, q).baddbmm_(ds_bar.mT, dq)
        dk_bar = torch.bmm(ds_bar.mT, q)
        of_mask, of_dmask = ctx.needs_input_grad[6:8]
        mask_bars = s_bar if of_mask else None, ds_bar if of_dmask else None
        return q_bar, dq_bar, k_bar, dk_bar, v_bar, dv_bar, *mask_bars, None


HANDLERS: dict[Any, Handler] = {
    functional.linear: _linear,
    functional.conv2d: _conv2d,
    functional.scaled_dot_product_attention: _attention,
}

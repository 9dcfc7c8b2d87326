r"""Adafactor: second moments kept as a row and a column of a matrix, steps relative to the size of the weights.

    beta_t = 1 - t^decay,   rho_t = min(eta, t^{-1/2}),   alpha_t = max(eps_2, rms(w_{t-1})) rho_t
    R_t = beta_t R_{t-1} + (1 - beta_t) mean_columns(g^2),   C_t = beta_t C_{t-1} + (1 - beta_t) mean_rows(g^2)
    V = R_t C_t / max(mean(R_t), eps_1)    (a vector keeps V itself)
    u = g / max(sqrt(V), eps_1),   w_t = (1 - eta lam) w_{t-1} - alpha_t u / max(1, rms(u) / d)

torch takes rms(w) and rms(u) out of the graph as Python numbers, and with them the derivative through the step length
and through the clipping; the formula here keeps both. Decided on purpose:

* the three max at a tie: the derivative of the side that depends on the weights. rms at zero weights: zero.
* V = 0 (a row whose gradient was always zero): u = g / eps_1 is linear there, and so is its derivative.
* eps_1 that is not given is the epsilon of the weights' dtype in the training, also where a replay computes in another.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adafactor

from trajrec.records import ParamSpec
from trajrec.rules.matrix.formula import STEP, ParameterRule
from trajrec.rules.step import State

ROW, COLUMN, VARIANCE = "row_var", "col_var", "variance"


class AdafactorRule(ParameterRule):
    """torch.optim.Adafactor."""

    optimizer_class = Adafactor

    def first_state(self, param: ParamSpec) -> dict[str, tuple[int, ...]]:
        """A step count, and second moments: factors of a matrix, or those of a vector."""
        shape = param.shape
        if len(shape) < 2:
            return {STEP: (), VARIANCE: shape}
        return {STEP: (), ROW: (*shape[:-1], 1), COLUMN: (*shape[:-2], 1, shape[-1])}

    def complete(self, options: dict[str, Any], param: ParamSpec) -> dict[str, Any]:
        """Options of a group, with the eps_1 that training used."""
        options = super().complete(options, param)
        smallest, least = options["eps"]
        return options | {
            "eps": (torch.finfo(getattr(torch, param.dtype)).eps if smallest is None else smallest, least)
        }

    def formula(self, weights: Tensor, state: State, gradient: Tensor, options: dict[str, Any]) -> tuple[Tensor, State]:
        """The step with nothing taken out of the graph."""
        g = -gradient if options["maximize"] else gradient
        t, lr = float(state[STEP]) + 1, options["lr"]
        smallest, least = options["eps"]
        moments = _moments(state, g, t ** options["beta2_decay"])
        update = g * _estimate(moments, smallest).clamp(min=smallest**2).rsqrt()
        update = update / (_rms(update) / options["d"]).clamp(min=1.0)
        length = _rms(weights).clamp(min=least) * min(lr, 1 / sqrt(t))
        return weights * (1 - lr * options["weight_decay"]) - length * update, moments


def _moments(state: State, g: Tensor, share: float) -> State:
    squares = g * g
    if VARIANCE in state:
        return {VARIANCE: state[VARIANCE].lerp(squares, share)}
    rows, columns = squares.mean(-1, keepdim=True), squares.mean(-2, keepdim=True)
    return {ROW: state[ROW].lerp(rows, share), COLUMN: state[COLUMN].lerp(columns, share)}


def _estimate(moments: State, smallest: float) -> Tensor:
    if VARIANCE in moments:
        return moments[VARIANCE]
    row, column = moments[ROW], moments[COLUMN]
    return row @ column / row.mean(-2, keepdim=True).clamp(min=smallest)


def _rms(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values)
    return norm / sqrt(values.numel())

r"""Muon: momentum, made orthogonal by a Newton-Schulz iteration. Matrices only.

    b_t = mu b_{t-1} + (1 - mu) g_t,    x = (1 - mu) g_t + mu b_t (Nesterov) or b_t
    o_0 = x / max(|x|_F, eps),    o_{k+1} = a o_k + (b A + c A A) o_k,  A = o_k o_k^T
    w_t = (1 - eta lam) w_{t-1} - eta s(shape) o_K

torch computes the iteration in bfloat16. That is a staircase: its derivative is zero almost everywhere, and of no use.
The value of a step made again goes through the same staircase, so that it is the recorded one to the bit; its
derivative is that of the same polynomials without the rounding. (Taken at the rounded iterates instead, it comes no
closer to slopes of the staircase over many stairs: cosine .98 to .99 either way for full-rank matrices.) Where x has
almost no part along some singular direction, as with fewer samples in a batch than a matrix has rows, rounding fills
that part in and the true slope there, up to a^K / |x|_F, is an upper bound of what training can show.

At x = 0 (a layer without a gradient) the step is steep but smooth, a polynomial of x / eps in a ball of radius eps, and
its derivative there is the slope that it has, a^K / eps.

A rounding error of the gradient can move an entry by a stair, and the iteration enlarges it: in float64 replays of
float32 trainings by up to .06 of a step, where a Task with label smoothing that the training did not have made .11 to
.33. So the certificate is sharp only where the gradient is the recorded one to the bit (same machine, threads and
dtype); otherwise it allows for a fraction `tolerance` of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trajrec.records import ParamSpec
from trajrec.rules.matrix.formula import ParameterRule
from trajrec.rules.step import State
from trajrec.rules.users.rounded import Unrounded

BUFFER = "momentum_buffer"


class MuonRule(ParameterRule):
    """torch.optim.Muon."""

    # Muon is younger than the oldest torch that is supported.
    optimizer_class: type[Optimizer] = getattr(torch.optim, "Muon", Optimizer)
    placeholder_shape = (1, 1)
    tolerance = 0.1

    def first_state(self, param: ParamSpec) -> dict[str, tuple[int, ...]]:
        """The momentum buffer."""
        return {BUFFER: param.shape}

    def formula(self, weights: Tensor, state: State, gradient: Tensor, options: dict[str, Any]) -> tuple[Tensor, State]:
        """The step without the rounding."""
        momentum, lr = options["momentum"], options["lr"]
        buffer = state[BUFFER].lerp(gradient, 1 - momentum)
        update = gradient.lerp(buffer, momentum) if options["nesterov"] else buffer
        update = orthogonal(update, options["ns_coefficients"], options["ns_steps"], options["eps"])
        rate = lr * _scale(weights.shape, options["adjust_lr_fn"])
        return weights * (1 - lr * options["weight_decay"]) - rate * update, {BUFFER: buffer}

    @contextmanager
    def proving(self) -> Iterator[None]:
        """The class itself, with its rounding left out: that is what the derivative is of."""
        with Unrounded():
            yield


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The Newton-Schulz iteration from a matrix [M, N], in its own precision."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x / torch.linalg.vector_norm(x).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def _scale(shape: torch.Size, kind: str | None) -> float:
    rows, columns = shape
    return 0.2 * sqrt(max(rows, columns)) if kind == "match_rms_adamw" else sqrt(max(1, rows / columns))

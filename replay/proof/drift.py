"""How far a step that was made again is from the recorded one, and what of that is rounding.

Letters: P' trainable weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trajrec.records import FloatArray
from trajrec.replay.step import Step
from trajrec.rules import Rule
from trajrec.rules.step import State

TOLERANCE = 1e-3

ROUNDING = 8
PROVES = 0.1
_NOISE = 1e-3
_NUDGE = 64.0


def movements(rule: Rule, step: Step) -> list[float]:
    """By how much the weights of every group moved at most, floored where a group's movement may be mere rounding.

    Each group is held against its own movement, so that a slow one does not hide behind a fast one; but one whose
    gradient is nothing but rounding (biases before BatchNorm) against a thousandth of what the others would do.
    """
    moved = (step.after - step.before).abs()
    rates = _rates(rule, step)
    spans = rule.layout.groups
    reach = [
        float(moved[span].max()) / rate if span.start < span.stop else 0.0
        for span, rate in zip(spans, rates, strict=True)
    ]
    return [max(reached, _NOISE * max(reach)) * rate for reached, rate in zip(reach, rates, strict=True)]


def worst_group(rule: Rule, scales: list[float], error: Tensor, excess: Tensor, rtol: float) -> tuple[float, bool]:
    """The largest drift of any parameter group, and whether all are within tolerance; `scales` are their movements."""
    drift, within = 0.0, True
    for span, scale in zip(rule.layout.groups, scales, strict=True):
        if span.start == span.stop:
            continue
        left = float(excess[span].max())
        within &= left <= rtol * scale
        found = float(error[span].max())
        drift = max(drift, found / scale if scale else (math.inf if left else 0.0))
    return drift, within


def _rates(rule: Rule, step: Step) -> list[float]:
    """The learning rate of every group; 1 where it has none, or does not step."""
    if "lr" not in rule.names:
        return [1.0] * len(rule.layout.groups)
    column = step.hyper[:, rule.names.index("lr")].tolist()
    return [rate if rate == rate and rate > 0 else 1.0 for rate in column]


def noisy(rule: Rule, weights: Tensor, state: State, gradient: Tensor, hyper: FloatArray) -> Tensor:
    """Weights [P'] whose step is made of rounding: a last-place change of the largest gradient changes it by a tenth.

    Their gradient is zero but for rounding (biases before BatchNorm), and their optimizer divides by its size (Adam).
    Nothing can be proved of them on another machine or with another number of threads.
    """
    with torch.no_grad():
        nudge = _NUDGE * torch.finfo(gradient.dtype).eps * gradient.abs().max()
        steps = [rule.step(weights, state, gradient + s * nudge, hyper)[0] for s in (-1.0, 0.0, 1.0)]
        changed = (steps[0] - steps[2]).abs() / 2
        rounding = ROUNDING * torch.finfo(weights.dtype).eps * weights.abs()
        return changed > PROVES * (steps[1] - weights).abs() + rounding

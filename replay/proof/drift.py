r"""How far a step that was made again is from the recorded one, and whether that is more than rounding.

Held against what moved, after rounding has been taken off weight by weight (`replay.proof.rounding`):

    every parameter, by norm      ||excess|| <= rtol ||w_t - w_{t-1}||   over its weights
    every weight, by its group    |excess_i| <= rtol max |w_t - w_{t-1}|  over its group's weights

The first finds an error that is spread, or in one small parameter; the second one that sits in few weights of a large
one. The drift that is told is by norm, of the parameter group with the largest.

The tolerance is tight where the replay computes where the training did (`replay.proof.place`): what differs there is
the order of summation at most. Another processor may take another algorithm (a convolution by another transform, say).
A checksum that fails is no proof of drift even there: fused and foreach optimizers, and a mean over tokens where the
Task takes one over samples first, give other bits for a right Task (`benchmarks/certificate.py`).

Letters: G groups, P' trainable weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trajrec.records import RunSpec
from trajrec.replay.machine.torch_switches import tolerance_of
from trajrec.replay.step import Step
from trajrec.rules import FlatLayout, Rule

STATE_TOLERANCE = 1e-3
ROUNDING = 8
PROVES = 0.1
_PROVED = 0.5
_NOISE = 1e-3
_TIGHT = {"float32": 1e-5, "float64": 1e-11}
_ELSEWHERE = {"float32": 1e-4, "float64": 1e-9}


def tolerance(rule: Rule, spec: RunSpec, eps: float, *, here: bool) -> float:
    """Rtol of a comparison in a floating type with this eps, made `here`, where the training ran, or elsewhere."""
    name = "float32" if eps > 1e-10 else "float64"
    return max((_TIGHT if here else _ELSEWHERE)[name], rule.tolerance, tolerance_of(spec))


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


def _rates(rule: Rule, step: Step) -> list[float]:
    """The learning rate of every group; 1 where it has none, or does not step."""
    if "lr" not in rule.names:
        return [1.0] * len(rule.layout.groups)
    column = step.hyper[:, rule.names.index("lr")].tolist()
    return [rate if rate == rate and rate > 0 else 1.0 for rate in column]


@dataclass(frozen=True, slots=True)
class Judged:
    """What a comparison comes to: the drift, and whether it is within tolerance."""

    drift: float
    within: bool


class Comparison:
    """Weights that were made again against recorded ones.

    Args:
        rule: the optimizer.
        step: the step; over several, its first, with the weights before the first and after the last.
        made: the weights [P'] that were made again.
        rounding: [P'] what the last places of the weights themselves allow for.
        rtol: the tolerance.
    """

    def __init__(self, rule: Rule, step: Step, made: Tensor, rounding: Tensor, rtol: float) -> None:
        self._layout, self._rtol = rule.layout, rtol
        self._scales = movements(rule, step)
        self._error, self._moved = (made - step.after).abs(), (step.after - step.before).abs()
        self._reach = torch.maximum(self._moved, (made - step.before).abs())
        self._rounding = rounding
        self.exact = not bool(self._error.any())

    def judged(self, allowance: Tensor | None = None) -> Judged:
        """The verdict, with an allowance [P'] taken off, if any."""
        error = self._error if allowance is None else self._left(allowance)
        excess = (error - self._rounding).clamp_min(0)
        moved, left = _norms(self._layout, self._moved), _norms(self._layout, excess)
        drifts = self._by_group(error)
        if float(left.max()) > 0:
            whole = float(moved.norm()) or 1.0
            off = left / torch.where(moved > 0, moved, whole)
            peaks = torch.tensor(self._peaks(excess))
            if float(off.max()) > self._rtol or float(peaks.max()) > self._rtol:
                return Judged(max(drifts, float(off.max()), float(peaks.max())), False)
        return Judged(drifts, True)

    def _left(self, allowance: Tensor) -> Tensor:
        """What an allowance leaves of the error; of weights whose step it may halve, nothing, as nothing is proved."""
        return (self._error - allowance).clamp_min(0) * (allowance <= _PROVED * self._reach)

    def proves(self, allowance: Tensor | None = None) -> bool:
        """Whether rounding is small enough, against what moved, for the comparison to say anything."""
        allowed = self._rounding if allowance is None else self._rounding + torch.minimum(allowance, self._moved)
        share = PROVES if allowance is None else _PROVED
        return self.exact or float(allowed.norm()) <= share * float(self._moved.norm())

    def _by_group(self, error: Tensor) -> float:
        drifts = [0.0]
        for span in self._layout.groups:
            moved, off = float(self._moved[span].double().norm()), float(error[span].double().norm())
            drifts.append(off / moved if moved else 0.0)
        return max(drifts)

    def _peaks(self, excess: Tensor) -> list[float]:
        """The largest excess of every group, over its largest movement."""
        found = [0.0]
        for span, scale in zip(self._layout.groups, self._scales, strict=True):
            peak = float(excess[span].max()) if span.start < span.stop else 0.0
            found.append(peak / scale if scale else float("inf") * (peak > 0) if peak else 0.0)
        return found


def _norms(layout: FlatLayout, values: Tensor) -> Tensor:
    """The norms of a vector's parameters."""
    return torch.stack([torch.linalg.vector_norm(v, dtype=torch.float64) for v in layout.split(values).values()])

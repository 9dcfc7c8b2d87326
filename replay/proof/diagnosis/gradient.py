"""Suspicions about what the training did to its gradient, or had in its loss beside the samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trajrec.replay.proof.diagnosis.trial import Cause, Trial

_LARGEST = 50.0


def scaled(trial: Trial) -> Cause | None:
    """A multiple of the Task's gradient: clipped by its norm, or another scale of the loss."""

    def reached(logarithm: float) -> Tensor:
        return trial.reached(of=lambda g, _: math.exp(min(logarithm, _LARGEST)) * g)

    recorded, computed = trial.run.loss(trial.first.t), trial.loss()
    starts = [0.0, math.log(recorded / computed)] if min(recorded, computed) > 0 else [0.0]
    logarithm, found = trial.fit(reached, starts)
    s = math.exp(min(logarithm, _LARGEST))
    norm = float(trial.first_gradient().norm())
    sentence = f"The training's gradient is {s:.4g} times the Task's: its norm {s * norm:.4g}, not {norm:.4g}. "
    if s < 1 and trial.loss_agrees(computed):
        advice = (
            "The loss itself agrees, so it was clipped by its norm, Task(gradient=trajrec.clip_norm"
            f"({s * norm:.3g})), or scaled, Task(gradient=lambda g: {{n: {s:.4g} * v for n, v in g.items()}})."
        )
    else:
        advice = (
            "Another loss scale: a sum for a mean, a factor before the loss, or micro-batches averaged otherwise. "
            "Give Task.loss the factor, or Task(reduction=...)."
        )
    return trial.explained(found, sentence + advice)


def with_values_cut(trial: Trial) -> Cause | None:
    """Cut values: the limit is the largest value of the gradient that was not cut, or just below."""
    high = float(trial.first_gradient().abs().max())
    limit, found = trial.least(lambda limit: trial.reached(of=lambda g, _: g.clamp(-limit, limit)), 0.0, high)
    sentence = f"The training's gradient was clipped by value: Task(gradient=trajrec.clip_value({limit:.3g}))."
    return trial.explained(found, sentence)


def weight_decay(trial: Trial) -> Cause | None:
    """Weight decay that the optimizer does not know of: of all weights, or of the matrices alone."""
    for mask, which in ((None, ""), (_matrices(trial), " if p.dim() > 1")):
        squares = trial.first.before.square() if mask is None else trial.first.before.square() * mask
        starts = _from_loss(trial, float(squares.sum()) / 2)
        lam, found = trial.fit(lambda x, on=mask: _decayed(trial, x, on), starts)  # type: ignore[misc]
        penalty = f"{lam / 2:.4g} * sum(p.square().sum() for p in model.parameters(){which})"
        sentence = (
            f"The training's gradient holds {lam:.4g} times the weights more: a weight decay in the loss, which is "
            f"missing in the Task: Task(penalty=lambda model: {penalty})."
        )
        if (cause := trial.explained(found, sentence)) is not None:
            return cause
    return None


def with_l1_penalty(trial: Trial) -> Cause | None:
    """A multiple of the weights' signs."""
    starts = _from_loss(trial, float(trial.first.before.abs().sum()))
    lam, found = trial.fit(lambda x: trial.reached(of=lambda g, w: g + x * w.sign()), starts)
    penalty = f"{lam:.4g} * sum(p.abs().sum() for p in model.parameters())"
    sentence = (
        f"The training's gradient holds an L1 penalty of {lam:.4g}, which is missing in the Task: "
        f"Task(penalty=lambda model: {penalty})."
    )
    return trial.explained(found, sentence)


def _from_loss(trial: Trial, penalty: float) -> Sequence[float]:
    """Where to look for the factor of a penalty: zero, and what explains the difference of the losses."""
    missing = trial.run.loss(trial.first.t) - trial.loss()
    return [0.0, missing / penalty] if penalty and math.isfinite(missing) else [0.0]


def _decayed(trial: Trial, lam: float, mask: Tensor | None) -> Tensor:
    return trial.reached(of=lambda g, w: g + lam * (w if mask is None else w * mask))


def _matrices(trial: Trial) -> Tensor:
    """One for weights of parameters with two or more dimensions, zero for others, [P']."""
    layout = trial.function.layout
    parts = layout.split(torch.ones_like(trial.first.before))
    return layout.join({name: part * float(part.dim() > 1) for name, part in parts.items()})

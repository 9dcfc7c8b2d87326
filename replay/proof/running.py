"""The running statistics of normalisations, proved to be moved as a replay differentiates them.

The weights do not depend on them, so steps that are made again bit for bit say nothing of them: a loop may have sent
further batches through the model (validation in train mode, gradient checkpointing), set another momentum, begun the
statistics anew, or computed them at the end. They would be differentiated as what the Task alone makes of them. So the
run is gone through once with the losses alone, and what the statistics become is held against every keyframe. Their
derivative by the weights is held against differences at the steps of the second proof.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trajrec.errors import DerivativeError
from trajrec.replay.derivatives.difference import in_float64, precisely
from trajrec.replay.derivatives.statistics import StatisticsPoint
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.statistics import tracking
from trajrec.replay.proof.derivative import proved_steps
from trajrec.replay.proof.scalars import AGREE, apart
from trajrec.replay.step import Step, make_step

if TYPE_CHECKING:
    from trajrec.replay.session import Session

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}


def prove_running(session: Session) -> None:
    """Checks what the running statistics become on the way, and how they depend on the weights.

    Raises:
        DerivativeError: if they were moved otherwise, or hang on what is in no graph.
    """
    if session.allow_drift:
        return
    for t in proved_steps(session):
        if (off := _derivative_apart(session, t)) > AGREE:
            raise DerivativeError(
                "The target loss depends on running statistics, whose derivative is not the one that automatic "
                f"differentiation gives, off by {off:.1e} of a central difference in float64 at step {t}: what the "
                "normalisation is given has left the graph. Give it values that are computed by torch."
            )
    _compare(session)


def _derivative_apart(session: Session, t: int) -> float:
    function, samples = session.differences.function, session.differences.samples
    weights = session.trajectory.weights(t - 1).to(session.dtype)
    step = in_float64(make_step(session.run, t, weights, weights))

    def point(at: Tensor) -> StatisticsPoint:
        return StatisticsPoint(function, samples, replace(step, before=at))

    with precisely(function):
        if not any(point(step.before).passes):
            return 0.0
        return apart(
            lambda at: point(at).projected().detach(),
            lambda at: point(at).projected_gradient(),
            step.before,
            len(weights),
        )


def _compare(session: Session) -> None:
    """Goes through the run, and compares the running statistics with those of every keyframe."""
    function, run = session.function, session.run
    # A keyframe that was added where modules change is written behind the next forward pass.
    keyframes = {t for t in run.keyframe_steps[1:] if t + 1 not in run.changes}
    with function.running() as begin:
        for step in session.trajectory.forwards():
            session.loss(step)
            if step.t == 1:
                begin()
            if step.t in keyframes:
                _check(function, function.buffers_at(step.t), step)


def _check(function: LossFunction, recorded: Mapping[str, Tensor], step: Step) -> None:
    for name, norm in tracking(function.model).items():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        prefix = f"{name}." if name else ""
        if f"{prefix}running_mean" not in recorded:
            continue
        mean, variance = recorded[f"{prefix}running_mean"], recorded[f"{prefix}running_var"]
        off = float((norm.running_var - variance).norm() / variance.norm())
        off = max(off, float((norm.running_mean - mean).norm() / (mean.norm() + variance.sum().sqrt())))
        if not off <= _TOLERANCE[mean.dtype]:
            raise _refusal(name, type(norm).__name__, step.t, off)


def _refusal(name: str, kind: str, t: int, off: float) -> DerivativeError:
    return DerivativeError(
        f"The target loss depends on the running statistics of {kind} {name!r}, and up to step {t} the training has "
        f"moved them otherwise than the Task's loss does, by {off:.1e}: further batches went through the model in "
        "train mode (validation, gradient checkpointing, statistics made anew at the end), its momentum was changed, "
        "or they were set by hand. How they depend on the samples is in no derivative. Give Task(measure=...) a loss "
        "that does not use them, or record a training that moves them by its own batches alone."
    )

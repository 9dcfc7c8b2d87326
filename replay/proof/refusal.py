"""What a replay says that does not reproduce its recording, or has no derivative.

A `Drifted` in the middle of a replay says only where it was seen. Before it becomes a refusal, the run is gone through
from its beginning to the first step that differs, and the cause is looked for by trying (`replay.proof.diagnosis`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from trajrec.errors import DerivativeError, DriftError, NonFiniteError
from trajrec.replay.derivatives.operators import derivative_error
from trajrec.replay.derivatives.zeros import zeros_error
from trajrec.replay.losses.batches import OtherInputs
from trajrec.replay.proof.fit import about_augmentation, collated_by
from trajrec.replay.step import OtherState, Step, make_step
from trajrec.rules.step import State
from trajrec.tf32 import full_single_precision

if TYPE_CHECKING:
    from trajrec.replay.session import Session

T = TypeVar("T")

_COMPILED = (
    " The step drew random numbers: a compiled model draws others for its dropout than the model itself, unless "
    "torch._inductor.config.fallback_random is set before training."
)


class Drifted(Exception):  # noqa: N818
    """Drift, before its cause has been looked for.

    Attributes:
        t: the first step known to differ.
        drift: drift_t.
        probe: a step at recorded weights whose loss can be held against the recorded loss.
        seen_at: the step at which it was seen; later than t where only keyframes are stored.
        state: the optimizer's state before the probe, where it is known.
        recorded: the weights [P'] after step `seen_at`.
    """

    def __init__(
        self,
        t: int,
        drift: float,
        probe: Step,
        seen_at: int,
        state: State | None = None,
        recorded: Tensor | None = None,
    ) -> None:
        super().__init__(t)
        self.t = t
        self.drift = drift
        self.probe = probe
        self.seen_at = seen_at
        self.state = state
        self.recorded = recorded


def drift_error(
    first: Drifted, recorded_loss: float, computed_loss: float, tolerance: float, cause: str, more: str = ""
) -> DriftError:
    """The refusal, with the first bad step and its cause, or what the losses tell about it where none was found.

    `more` is what else there is to look at.
    """
    where = "" if first.seen_at == first.t else f" (measured at the keyframe of step {first.seen_at})"
    if not cause:
        cause = _cause(recorded_loss, computed_loss) + _COMPILED * any(part.rng for part in first.probe.parts)
    return DriftError(
        f"Replay drifted at step {first.t}: the recomputed weights differ from the recorded ones by "
        f"{first.drift:.1e} of what they moved{where}, tolerance {tolerance:.0e}. "
        f"{' '.join(filter(None, (cause, more.strip())))} Mend the Task, or go on with --allow-drift."
    )


def _cause(recorded: float, computed: float) -> str:
    if math.isnan(recorded):
        return "The Task does not describe the recorded training (loss, clipping, augmentation, dropout, data)."
    if abs(recorded - computed) <= 1e-3 * max(abs(recorded), 1e-12):
        return (
            f"The loss agrees ({recorded:.6g}), so the gradient was changed after the loss: clipping, loss scaling, "
            "or weights changed outside the optimizer."
        )
    ratio = computed / recorded if recorded else math.inf
    return (
        f"The loss differs: recorded {recorded:.6g}, by the Task {computed:.6g} (ratio {ratio:.4g}). Another loss or "
        "reduction, other data or labels, augmentation, or another train/eval mode."
    )


def guarded(session: Session, work: Callable[[], T]) -> T:
    """Does the work; a drift in it, or a derivative that there is not, becomes a refusal that says why.

    Raises:
        DriftError: with the first bad step and the cause. DerivativeError: with the operator.
    """
    try:
        return _explained_on_drift(session, work)
    except OtherInputs as other:  # which may show while the cause of a drift is looked for
        raise DriftError(
            f"Replay drifted at step {_first_other_inputs(session, other.t)}: the inputs of its batch are not those "
            "that the training loop received (their CRC-32 differs). Data were changed, or augmented at random. "
            f"{about_augmentation(session)}{collated_by(session.run, session.task)} "
            "Mend the Task, or go on with --allow-drift."
        ) from None


def _explained_on_drift(session: Session, work: Callable[[], T]) -> T:
    try:
        with full_single_precision():
            return _derivable(session, work)
    except Drifted as drifted:
        raise explained(session, drifted) from None
    except DerivativeError:
        # A loss that is another each time has no derivative either, and that it drifts is the matter.
        first = None if session.allow_drift or _comes_back(session) else session.find_drift()
        if first is None:
            raise
        raise explained(session, first) from None
    except OtherState as other:
        first = session.find_drift()
        raise (DriftError(str(other)) if first is None else explained(session, first)) from None


def _comes_back(session: Session) -> bool:
    """Whether the loss of the first step is the same when it is computed again."""
    step = session.step_at_start()
    return session.loss(step) == session.loss(step)


def _derivable(session: Session, work: Callable[[], T]) -> T:
    try:
        return work()
    except NonFiniteError as error:
        raise _zeros(session, error) or error from None
    except RuntimeError as error:
        refusal = derivative_error(error, session.function.model)
        if refusal is None:
            raise
        raise refusal from error


def _zeros(session: Session, error: NonFiniteError) -> DerivativeError | None:
    """The refusal of a derivative that became NaN at a step for 0/0 in its loss, or in that of the step after it."""
    if error.step is None:
        return None
    run = session.run
    for t in (error.step, error.step + 1):
        if t <= run.steps:
            before = session.trajectory.weights(t - 1).to(session.dtype)
            found = zeros_error(session.function, session.train, make_step(run, t, before, before))
            if found is not None:
                return found
    return None


def explained(session: Session, drifted: Drifted) -> DriftError:
    """The refusal to raise for a drift: names the first bad step and the likely cause."""
    from trajrec.replay.proof.diagnosis import Trial, cause_of, what_to_look_at, what_was_noted

    first = session.find_drift() or drifted
    trial = Trial(session.run, session.function, session.train, session.rule, first)
    found = cause_of(trial)
    cause = found.sentence if found else ""
    more = "" if found else what_to_look_at(trial)
    more = f"{what_was_noted(trial)} {more}"
    if session.data_changed:
        more += " The first batch also differs from the recorded one."
    probe = first.probe
    losses = session.run.loss(probe.t), session.loss(probe)
    return drift_error(first, *losses, session.checks.tolerance, cause, more)


def _first_other_inputs(session: Session, seen_at: int) -> int:
    """The first step whose inputs differ from the recorded ones, `seen_at` being one."""
    nothing = torch.empty(0)
    for t in range(1, seen_at):
        step = make_step(session.run, t, nothing, nothing)
        try:
            for part in step.parts:
                session.train.part(step, part)
        except OtherInputs:
            return t
    return seen_at

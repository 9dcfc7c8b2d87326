"""Why a replay drifted: found by trying. Imports no method, no HDF5, no Polars.

A drifted step is made again under one suspicion after the other, and what comes out is compared with the recording. A
suspicion that brings the drift down to rounding is the cause, for a step has far more weights than a suspicion has free
numbers. A suspicion is a function of a `Trial`; suspected are

    step        the modes (train or eval); the batch of a neighbouring step; a gradient that only the Task changes
    randomness  drawn where the training drew none, or not drawn where it did; drawn before the model was called
    gradient    f(g) = s g (loss scale; clipping by norm if only some steps need it), cut to [-v, v],
                g + lam w (weight decay in the loss), g + lam sign(w) (an L1 penalty)
    weights     changed between the steps: cut to an interval, or to rows of one norm
    outside     outputs that were broadcast against labels; weights that the loss uses and nobody recorded

What can only be suspected (a hidden state that the loop carries, say) is listed, and not asserted (`hints`).
Of a run that keeps keyframes only, all steps between two keyframes are made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trajrec.replay.proof.diagnosis.gradient import scaled, weight_decay, with_l1_penalty, with_values_cut
from trajrec.replay.proof.diagnosis.hints import hints, noted
from trajrec.replay.proof.diagnosis.outside import broadcast
from trajrec.replay.proof.diagnosis.randomness import drawn_before_the_call, drawn_or_not
from trajrec.replay.proof.diagnosis.step import given_change, other_batch, other_modes
from trajrec.replay.proof.diagnosis.trial import Cause, Trial
from trajrec.replay.proof.diagnosis.weights import cut_after_the_step, cut_before_the_step, normalised_rows

__all__ = ["Cause", "Trial", "cause_of"]

SUSPICIONS: Sequence[Callable[[Trial], Cause | None]] = (
    given_change,
    other_modes,
    drawn_before_the_call,
    drawn_or_not,
    other_batch,
    cut_after_the_step,
    normalised_rows,
    scaled,
    with_values_cut,
    weight_decay,
    with_l1_penalty,
    cut_before_the_step,
    broadcast,
)


def cause_of(trial: Trial) -> Cause | None:
    """The first suspicion that explains the drift, or None."""
    if not trial.is_possible:
        return None
    with trial.without_checking_inputs():
        found = (suspicion(trial) for suspicion in SUSPICIONS)
        return next((cause for cause in found if cause is not None), None)


def what_to_look_at(trial: Trial) -> str:
    """What may be the cause and cannot be tried, in a sentence; "" for nothing."""
    with trial.without_checking_inputs():
        return hints(trial)


def what_was_noted(trial: Trial) -> str:
    """What the recording notes and the replay did not follow, in a sentence; "" for nothing."""
    return noted(trial)

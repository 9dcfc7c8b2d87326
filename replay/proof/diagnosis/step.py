"""Suspicions about the step as a whole: its modes, its batch, a gradient that only the Task changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from trajrec.replay.proof.diagnosis.trial import Cause, StepChange, Trial
from trajrec.replay.step import Step, make_step
from trajrec.rules.composed.transformed import TransformedRule


def given_change(trial: Trial) -> Cause | None:
    """Whether the Task changes a gradient that the training left alone."""
    rule = trial.rule
    if not isinstance(rule, TransformedRule):
        return None
    trial.rule = rule.untransformed
    try:
        reached = trial.reached()
    finally:
        trial.rule = rule
    return trial.explained(
        reached, f"{rule.source} changes the gradient of this step, and the training left it as it was."
    )


def other_modes(trial: Trial) -> Cause | None:
    """Train or eval mode, of the model as a whole or of one kind of layer."""
    for modes, words in _other_modes(trial.first.conditions.eval_modules):
        changed = replace(trial.first.conditions, eval_modules=modes)
        cause = _tried(trial, lambda step, to=changed: replace(step, conditions=to))  # type: ignore[misc]
        if cause is not None:
            return replace(cause, sentence=words)
    return None


def _other_modes(now: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if now:
        yield (
            (),
            (
                "The training step was made in train mode, although the model was in eval mode when the optimizer "
                "stepped: call model.train() before the forward pass and leave the mode alone until step()."
            ),
        )
    if now != ("",):
        yield (
            ("",),
            (
                "The training step was made in eval mode and the Task's in train mode, or by a model without its "
                "dropout. Build the same model, and let Task.loss make the same calls of train() and eval() as the "
                "loop."
            ),
        )


def other_batch(trial: Trial) -> Cause | None:
    """The samples of a neighbouring step."""
    for offset in (1, -1, 2, -2):
        if 1 <= trial.first.t + offset <= trial.run.steps and 1 <= trial.last + offset <= trial.run.steps:
            cause = _tried(trial, lambda step, by=offset: _with_batch_of(trial, step, by))  # type: ignore[misc]
            if cause is not None:
                sentence = (
                    f"The step was made with another batch: that of step {trial.first.t + offset} gives the "
                    "recorded weights. The ids passed to trajrec.set_batch are shifted, or the loop keeps a batch "
                    "for a later step: name the ids of every step with trajrec.set_batch."
                )
                return replace(cause, sentence=sentence)
    return None


def _with_batch_of(trial: Trial, step: Step, offset: int) -> Step:
    other = make_step(trial.run, step.t + offset, step.before, step.after)
    return replace(step, ids=other.ids, shares=other.shares, parts=other.parts, epoch=other.epoch)


def _tried(trial: Trial, change: StepChange) -> Cause | None:
    return trial.explained(trial.reached(change), "")

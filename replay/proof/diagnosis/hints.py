"""What may have caused a drift, and cannot be tried: listed, never asserted."""

from __future__ import annotations

import inspect

from torch import nn

from trajrec.replay.proof.diagnosis.outside import weights_outside
from trajrec.replay.proof.diagnosis.randomness import drawn_outside
from trajrec.replay.proof.diagnosis.trial import Trial
from trajrec.replay.proof.fit import collated_by

_STATES = ("h", "hx", "hidden", "hidden_state", "state", "states", "memory", "mems", "past", "cache", "carry")


def noted(trial: Trial) -> str:
    """What the recording notes of the step that the replay did not follow, in sentences; "" for nothing."""
    said = _clipping(trial), _criterion(trial), _autocast(trial), collated_by(trial.run, trial.function.task)
    return " ".join(sentence.strip() for sentence in said if sentence)


def _autocast(trial: Trial) -> str:
    noted, function = trial.run.spec.autocast, trial.function
    if noted is None or function.autocast is not None or function.enters_autocast:
        return ""
    return f"The training's forward pass ran under {noted}: put `with {noted}:` into Task.loss."


def _criterion(trial: Trial) -> str:
    """Which criteria the training was seen to call, where the loss is another than the recorded one."""
    seen = [str(criterion) for criterion in trial.run.spec.criteria]
    if not seen or trial.loss_agrees(trial.loss()):
        return ""
    return f"The training's loss was seen to be made of {' and '.join(seen)}."


def _clipping(trial: Trial) -> str:
    clips = trial.first.conditions.clips
    if any(clip.kind == "other" for clip in clips):
        return (
            "The recorder saw torch's clipping of gradients before this step, and could not tell what it came to: it "
            "was given parameters outside of the recorded optimizer, or gradients were added behind it."
        )
    if clips and trial.function.task.gradient is not None:
        said = ", ".join(map(str, clips))
        return f"Task.gradient was used; the recording notes that gradients were clipped, {said}: leave it out."
    return ""


def hints(trial: Trial) -> str:
    """Sentences; "" for nothing."""
    found = [drawn_outside(trial.run), weights_outside(trial), _carried(trial)]
    return " ".join(sentence for sentence in found if sentence)


def _carried(trial: Trial) -> str:
    """What may stay from step to step, where the steps before agree."""
    if trial.first.t == 1:
        return ""
    agree = f"Step{'s' * (trial.first.t > 2)} {'1' if trial.first.t == 2 else f'1 to {trial.first.t - 1}'} agree"
    agree += "s" * (trial.first.t == 2)
    if _has_state(trial.function.model):
        return (
            f"{agree}: does the loop carry a hidden state from batch to batch? Each step is made again from its own "
            "batch: begin every batch with a new state."
        )
    return (
        f"{agree}: look at what came to be on the way: a state that the loop carries from batch to batch, weights or "
        "buffers that it changes, a teacher that follows the weights, a schedule of the loss."
    )


def _has_state(model: nn.Module) -> bool:
    """Whether a model may take and give a state."""
    recurrent = any(isinstance(module, nn.RNNBase | nn.RNNCellBase) for module in model.modules())
    return recurrent or any(name in _STATES for name in inspect.signature(model.forward).parameters)

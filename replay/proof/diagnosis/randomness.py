"""Suspicions about random numbers.

The recorder keeps the states of torch's generators at the model's call, for steps that draw after it. What the loop
draws before (noise, masks, times of a diffusion, mixup) is gone by then. That something outside of the model has drawn
shows in the states of all generators, which every keyframe holds: between two of them they move by what the loaders
draw, and by nothing else, where no step drew in the model.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from trajrec.replay.machine.generators import generators_kept
from trajrec.replay.proof.diagnosis.trial import Cause, Trial
from trajrec.replay.step import Part, RecordedRun

_NAMES = {"rng/numpy": "numpy", "rng/python": "Python"}
_LOADERS = 64  # numbers that loaders draw beside two in every epoch: evaluations have loaders, too
_NOT_RECORDED = (
    "The states of the generators are recorded at the model's call, so that what a loop draws before it (noise, "
    "masks, times, mixup) cannot be drawn again: draw it inside of the model's forward(), or for every item in a data "
    "set that is wrapped in trajrec.seeded; or make it in the collate function, and record with --inputs store."
)


def drawn_before_the_call(trial: Trial) -> Cause | None:
    """Whether the Task's loss draws random numbers before it calls the model."""
    if not _draws_before_the_call(trial):
        return None
    return Cause(f"Task.loss draws random numbers before the model is called. {_NOT_RECORDED}", float("nan"))


def drawn_or_not(trial: Trial) -> Cause | None:
    """Random numbers where the training drew none, or the other way round, or from nobody knows where."""
    draws, drew = _is_random(trial), any(part.rng for part in trial.first.parts)
    if draws and drew and (gpu := _elsewhere(trial)):
        return Cause(
            f"The training drew random numbers of {gpu}, which come back on a GPU only: replay with --device cuda.",
            float("nan"),
        )
    if not _comes_back(trial):
        sentence = (
            "The Task's loss is another each time it is computed: it draws random numbers from a generator of its own, "
            "whose state is not recorded, or goes on from what it left somewhere the last time. Draw from torch's "
            "default generator, and let nothing stay from batch to batch."
        )
    elif draws and not drew:
        sentence = (
            "The Task's loss draws random numbers where the training step drew none: dropout, noise or "
            "augmentation that the training did not have."
        )
    elif drew and not draws:
        sentence = (
            "The training step drew random numbers and the Task's loss draws none: its dropout, noise or "
            "augmentation is missing in the Task."
        )
    else:
        return None
    return Cause(sentence, float("nan"))


def drawn_outside(run: RecordedRun) -> str:
    """A sentence on what drew random numbers outside of the model, as the keyframes show it; "" if nothing did."""
    found = [_NAMES[path] for path in _NAMES if _moved(run, path)] + ["torch"] * _loop_drew(run)
    if not found:
        return ""
    return (
        f"The training drew random numbers of {' and '.join(found)} outside of the model's forward pass, and Task.loss "
        f"does not. {_NOT_RECORDED}"
    )


def _elsewhere(trial: Trial) -> str:
    """The GPU whose generator the training may have used, where the replay computes on none; "" otherwise."""
    on_gpu = trial.function.device.type == "cuda"
    return "" if on_gpu else next((name for name, _ in trial.run.spec.rng if name.startswith("cuda")), "")


def _is_random(trial: Trial) -> bool:
    """Whether the loss depends on the state of torch's generator, or on another."""
    with generators_kept(trial.function.device):
        values = [_loss(trial, seed) for seed in (0, 1)]
    return values[0] != values[1]


def _comes_back(trial: Trial) -> bool:
    """Whether the same state of torch's generator gives the same loss."""
    with generators_kept(trial.function.device):
        return _loss(trial, 0) == _loss(trial, 0)


def _loss(trial: Trial, seed: int) -> float:
    torch.manual_seed(seed)
    step = replace(trial.first, parts=tuple(Part(part.span) for part in trial.first.parts))
    return trial.function.value(trial.first.before, trial.samples, step)


def _draws_before_the_call(trial: Trial) -> bool:
    states: list[Tensor] = []

    def note(module: nn.Module, inputs: object) -> None:
        states.append(torch.get_rng_state())

    handle = trial.function.model.register_forward_pre_hook(note)
    try:
        with generators_kept(trial.function.device):
            _loss(trial, 0)
            torch.manual_seed(0)
            return bool(states) and not torch.equal(states[0], torch.get_rng_state())
    finally:
        handle.remove()


def _moved(run: RecordedRun, path: str) -> bool:
    """Whether a generator of which loaders draw nothing has moved during the training."""
    first, last = (run.keyframe(run.keyframe_steps[k]).arrays.get(path) for k in (0, -1))
    return first is not None and last is not None and not np.array_equal(first, last, equal_nan=True)


def _loop_drew(run: RecordedRun) -> bool:
    """Whether torch's generator has moved by more than loaders draw, in a run whose steps drew nothing in the model."""
    if any(run.rng(t) for t in range(1, run.steps + 1)):
        return False
    states = [run.keyframe(t).arrays.get("rng/cpu") for t in run.keyframe_steps]
    epochs = int(run.epochs[-1]) + 1
    return any(
        a is not None and b is not None and not _follows(torch.from_numpy(a), torch.from_numpy(b), epochs)
        for a, b in pairwise(states)
    )


def _follows(before: Tensor, after: Tensor, epochs: int) -> bool:
    """Whether a state comes of another by numbers as loaders draw them: a seed, and one for their sampler."""
    generator = torch.Generator()
    generator.set_state(before.clone())
    for _ in range(2 * epochs + _LOADERS):
        if torch.equal(generator.get_state(), after):
            return True
        torch.empty((), dtype=torch.int64).random_(generator=generator)
    return False

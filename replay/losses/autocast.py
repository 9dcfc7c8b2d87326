"""The autocast that a training's forward pass ran under, where the Task's loss does not enter one itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch
from torch import nn

from trajrec.records import Autocast
from trajrec.replay.machine.generators import generators_kept

if TYPE_CHECKING:
    from trajrec.replay.losses.batches import Samples
    from trajrec.replay.losses.function import LossFunction
    from trajrec.replay.step import Step


def take_autocast(function: LossFunction, samples: Samples, step: Step, recorded: float) -> None:
    """Has the function compute the Task's loss under the noted autocast, if that gives the recorded loss of a step.

    Not where the Task enters an autocast itself, or the plain loss is as near.
    """
    noted = function.spec.autocast
    if noted is None or noted.device != function.device.type:
        return
    with (
        generators_kept(function.device),
        suppress(Exception),
    ):  # what the Task raises it raises again, where it is told
        with _calls_under_autocast(function.model, noted) as seen:
            plain = function.value(step.before, samples, step)
        function.enters_autocast = bool(seen)
        if seen:
            return
        function.autocast = noted
        cast = function.value(step.before, samples, step)
        if abs(cast - recorded) < abs(plain - recorded):
            return
    function.autocast = None


@contextmanager
def _calls_under_autocast(model: nn.Module, noted: Autocast) -> Iterator[list[bool]]:
    """A list that is filled where a module of the model is called under autocast."""
    seen: list[bool] = []

    def look(*_: object) -> None:
        if torch.is_autocast_enabled(noted.device):
            seen.append(True)

    handles = [module.register_forward_pre_hook(look) for module in model.modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()

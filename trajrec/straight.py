"""The straight way: steps that are like the one before are taken by compiled hooks (lane.c), not by Python.

A hook in Python costs little by itself, but a step of training has pushed all of it out of the processor's caches, and
there are six hooks a step. Nearly every step is like the one before: the next batch of the same loader, one forward and
one backward pass, the same modes and parameters. Such a step is looked at, copied and published by `Lane`; it decides
nothing. Whatever it does not know (another pass over the loader, a second forward pass, a parameter that has moved) it
leaves to the Python code, together with what it has seen of the step so far, and takes over again after a step that
went the straight way through the books (`BatchLedger.take`). At the end of a stretch of the ring it asks Python to do
what is due there (a keyframe, a glance at the writer) and for the next stretch.

Recordings are the same to the byte with and without it (tests/test_straight.py). Where lane.c could not be compiled
there is no lane, and Python does everything, as it does on a GPU, with stored inputs and for several optimizers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from enum import IntEnum
from typing import Any

import torch
from torch import nn

from trajrec import stopwatch
from trajrec.batches import MicroBatch, as_ids, samples_in
from trajrec.checksum import crc32

try:
    from trajrec.lane import Hook, Lane
except ImportError:
    HAS_LANE = False
else:
    HAS_LANE = sys.byteorder == "little"  # as records are encoded

_PAUSE = 32  # steps that a lane is not entered for where it was left at once


class Stage(IntEnum):
    """How far the present step has come in the lane; lane.c counts alike."""

    OFF = 0
    READY = 1
    DRAWN = 2
    FORWARDED = 3
    BACKWARD = 4
    PREPARED = 5


class Kind(IntEnum):
    """What a hook hears of; lane.c counts alike."""

    FORWARD = 0
    BACKWARD = 1
    BEFORE = 2
    AFTER = 3
    CLEARING = 4


class Unshared:
    """A hook of the model: copies and pickles of the model must not take the recorder along."""

    def __deepcopy__(self, _: Any) -> Unshared:
        return self

    def __reduce__(self) -> Any:
        # A hook that hands the inputs on as they are, and needs nothing of ours where the model is loaded.
        return getattr, (nullcontext(), "__exit__")


class ForwardHook(Unshared):
    """Stands in the model's forward hooks."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before a forward pass."""
        self._call(module, inputs, named)


if HAS_LANE:

    class StraightForwardHook(Unshared, Hook):
        """The same, by way of the lane."""


class Straight:
    """The lane of one recorder.

    Args:
        take_over: called with the stage, the batch and the lane when a step that has begun in it is left to Python.
        renew: called when an option of the optimizer has changed: the fields "options" and "hyper", or None to leave.
        onward: called where the stretch of the ring ends: the fields "stop" and "arena_until" of the next, or None.
        settled: called with the lane before Python goes by what the lane has counted.
    """

    def __init__(
        self,
        take_over: Callable[[Stage, MicroBatch, Lane], None],
        renew: Callable[[], tuple[Any, bytes] | None],
        onward: Callable[[], dict[str, Any] | None],
        settled: Callable[[Lane], None],
    ) -> None:
        self.lane = Lane() if HAS_LANE else None
        self._take_over = take_over
        self._renew = renew
        self._onward = onward
        self._settled = settled
        self._map: Any = None
        self._entered_at = self._not_before = 0

    def hook(
        self, kind: Kind, otherwise: Callable[..., Any], original: Callable[..., Any] | None = None
    ) -> Callable[..., Any]:
        """What calls `otherwise`, or goes through the lane where it can, and then calls `original`."""
        return otherwise if self.lane is None else Hook(self.lane, kind, otherwise, original)

    def forward_hook(self, otherwise: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
        """The same for a model's forward hooks; a compiler that looks into them must not meet the lane."""
        if self.lane is None or compiled:
            return ForwardHook(otherwise)
        return StraightForwardHook(self.lane, Kind.FORWARD, otherwise)

    def is_open(self, step: int) -> bool:
        """Whether the step after this one may go through the lane, as far as it is known here."""
        return self.lane is not None and step >= self._not_before

    def enter(self, step: int, ring: Any, fields: dict[str, Any]) -> None:
        """Waits in the lane for the step after this one; `ring` is the map that it is to be published in."""
        assert self.lane is not None
        if ring is not self._map:
            self._map = ring
            self.lane.attach(ring)
        self._entered_at = step
        self.lane.arm(
            **fields,
            entry=step + 1,
            crc32=crc32,
            is_grad_enabled=torch.is_grad_enabled,
            tensor=torch.Tensor,
            float32=torch.float32,
            left=self._left,
            renew=self._renew,
            onward=self._go_on,
            settled=self._settle,
            time_every=stopwatch.EVERY,
        )

    def settle(self) -> None:
        """Has everything counted that the lane has done."""
        if self.lane is not None:
            self.lane.settle()

    def _settle(self) -> None:
        assert self.lane is not None
        self._settled(self.lane)

    def _go_on(self) -> None:
        """The lane has come to the end of a stretch."""
        assert self.lane is not None
        fields = self._onward()
        if fields is None:
            self.lane.leave()
        else:
            self.lane.arm(**fields)

    def end(self) -> None:
        """Leaves the lane for good."""
        self._not_before = sys.maxsize
        if self.lane is not None:
            self.lane.leave()
            self.lane.detach()
            self._map = None

    def _left(self, number: int) -> None:
        """The lane's word that it does not know how to go on."""
        lane, stage = self.lane, Stage(number)
        assert lane is not None
        if stage is not Stage.PREPARED and lane.entry == self._entered_at + 1:
            self._not_before = max(self._not_before, lane.entry + _PAUSE)
        if stage is Stage.READY:
            return
        batch = MicroBatch(as_ids(lane.ids), lane.loader, serial=lane.serial, content=lane.content, sketch=lane.sketch)
        if stage is not Stage.DRAWN:
            batch.used_in_training_mode = True
            batch.passes.append((samples_in(lane.inputs), (lane.before,)))
        self._take_over(stage, batch, lane)

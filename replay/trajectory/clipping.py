"""Gradients that were clipped by torch's own functions, as the recorder noted the calls of every step.

`as_clipped` puts before a run the view in which each step's hyperparameters have one column more, that says which of
the noted calls its gradient went through (`trajrec.rules.composed.clipped`). Of a call whose effect cannot be told
("other") nothing is made: the certificate then finds the drift.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any

import numpy as np

from trajrec.records import Clip, FloatArray
from trajrec.replay.step import RecordedRun
from trajrec.rules import Rule
from trajrec.rules.composed.clipped import ClippedRule, Transform
from trajrec.task.gradients import Gradients, clip_norm, clip_value

_SHOWN = 3


class ClippedRun:
    """A run whose hyperparameters tell which calls clipped the gradients of a step; everything else is the run's own.

    Attributes:
        ways: the different sequences of calls that its steps had.
    """

    def __init__(self, run: RecordedRun) -> None:
        self._run = run
        self.ways: list[tuple[Clip, ...]] = []
        self._steps, self._numbers = [0], [self._number(())]
        for step, conditions in run.changes.items():
            self._steps.append(step)
            self._numbers.append(self._number(conditions.clips))

    def _number(self, clips: tuple[Clip, ...]) -> int:
        if clips not in self.ways:
            self.ways.append(clips)
        return self.ways.index(clips)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)

    def hyper(self, t: int) -> FloatArray:
        """Hyperparameters at step t [G, H], and the number of its calls in one more column."""
        recorded = self._run.hyper(t)
        number = self._numbers[bisect_right(self._steps, t) - 1]
        return np.column_stack([recorded, np.full(len(recorded), float(number))])

    def rule(self, rule: Rule) -> ClippedRule:
        """The rule behind these calls."""
        return ClippedRule(rule, [_transform(clips) for clips in self.ways])

    @property
    def note(self) -> str:
        """What was taken from the recording, in a sentence."""
        said = list(dict.fromkeys(str(clip) for clips in self.ways for clip in clips if clip.kind != "other"))
        more = f", and {len(said) - _SHOWN} others" if len(said) > _SHOWN else ""
        changes = " at some steps" if len(self.ways) > 2 or not _always(self) else ""
        return f"Gradients were clipped{changes}, as the recording notes: {'; '.join(said[:_SHOWN])}{more}."


def _always(run: ClippedRun) -> bool:
    """Whether all steps were clipped."""
    at_first = run.ways[run._numbers[bisect_right(run._steps, 1) - 1]]
    return bool(at_first) and all(run.ways[number] for number in run._numbers[1:])


def as_clipped(run: RecordedRun) -> ClippedRun | None:
    """The run with its clipping, or None if none was noted."""
    noted = any(clip.kind != "other" for conditions in run.changes.values() for clip in conditions.clips)
    return ClippedRun(run) if noted else None


def _transform(clips: tuple[Clip, ...]) -> Transform:
    """All calls of a step, one after the other."""
    functions = [(_function(clip), frozenset(clip.params)) for clip in clips if clip.kind != "other"]

    def transform(gradients: Gradients) -> Gradients:
        for function, names in functions:
            given = {name: g for name, g in gradients.items() if not names or name in names}
            gradients = gradients | function(given) if given else gradients
        return gradients

    return transform


def _function(clip: Clip) -> Transform:
    if clip.kind == "value":
        return clip_value(clip.limit)
    return clip_norm(clip.limit, math.inf if clip.order is None else clip.order)

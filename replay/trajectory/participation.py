"""Which parameters took part in which steps, and in which modes the model was.

A parameter that is frozen, unfrozen or given to the optimizer on the way has steps in which the optimizer leaves it
alone. To the rules such a run looks like one with more parameter groups: parameters of one group with one history make
a group of their own, and in steps that pass a group by its hyperparameters are all NaN (`Rule.rests`). `as_seen`
puts that view before a run; a run in which every parameter takes part in every step is handed back as it is.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np

from trajrec.records import Conditions, FloatArray, OptimizerSpec, ParamSpec, RunSpec
from trajrec.replay.step import RecordedRun

_Activity = tuple[tuple[int, bool], ...]


class History:
    """The conditions of every step of a run."""

    def __init__(self, run: RecordedRun) -> None:
        still = tuple(p.name for p in run.spec.params if p.group >= 0 and not p.trainable)
        self._steps = [0, *run.changes]
        self._conditions = [Conditions(run.spec.eval_modules, still), *run.changes.values()]

    @property
    def joined(self) -> dict[str, int]:
        """Parameters that came into the optimizer after the first step, with their group."""
        return dict(pair for conditions in self._conditions for pair in conditions.joined)

    def activity(self, param: ParamSpec) -> _Activity:
        """From which steps on the optimizer stepped a parameter, and from which it did not."""
        found: list[tuple[int, bool]] = []
        for t, conditions in zip(self._steps, self._conditions, strict=True):
            held = param.group >= 0 or param.name in dict(conditions.joined)
            active = held and param.name not in conditions.still
            if not found or found[-1][1] != active:
                found.append((t, active))
        return tuple(found)


class RegroupedRun:
    """A run whose groups are split by history; everything else is the run's own."""

    def __init__(self, run: RecordedRun, history: History) -> None:
        self._run = run
        joined = history.joined
        placed = [replace(p, group=joined.get(p.name, p.group)) for p in run.spec.params]
        activities = [history.activity(p) for p in run.spec.params]
        moving = [any(active for _, active in activity) for activity in activities]
        keys = [(p.group, a) if m else None for p, a, m in zip(placed, activities, moving, strict=True)]
        self._blocks = sorted({key for key in keys if key is not None}, key=lambda key: (key[0], str(key[1])))
        params = tuple(
            replace(p, group=-1 if key is None else self._blocks.index(key), trainable=key is not None)
            for p, key in zip(placed, keys, strict=True)
        )
        self.spec: RunSpec = replace(
            run.spec, params=params, groups=len(self._blocks), optimizers=self._regrouped(run.spec)
        )

    def _regrouped(self, spec: RunSpec) -> tuple[OptimizerSpec, ...]:
        """The optimizers, where there are several, with the blocks that their groups have become."""
        stops = accumulate(o.groups for o in spec.optimizers)
        spans = [(stop - o.groups, stop) for o, stop in zip(spec.optimizers, stops, strict=True)]
        counts = [sum(a <= group < b for group, _ in self._blocks) for a, b in spans]
        return tuple(replace(o, groups=count) for o, count in zip(spec.optimizers, counts, strict=True))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)

    def hyper(self, t: int) -> FloatArray:
        """Hyperparameters at step t, a row for every block; NaN where the step passes it by."""
        recorded = self._run.hyper(t)
        rows = np.full((len(self._blocks), recorded.shape[1]), np.nan)
        for row, (group, activity) in zip(rows, self._blocks, strict=True):
            if _active(activity, t):
                row[:] = recorded[group]
        return rows


def _active(activity: _Activity, t: int) -> bool:
    return activity[bisect_right([start for start, _ in activity], t) - 1][1]


def as_seen(run: RecordedRun) -> RecordedRun:
    """The run as the rules see it."""
    history = History(run)
    params = [p for p in run.spec.params if p.trainable or p.group >= 0 or p.name in history.joined]
    if all(history.activity(p) == ((0, p.trainable),) for p in params):
        return run
    return RegroupedRun(run, history)

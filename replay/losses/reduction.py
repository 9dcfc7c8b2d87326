"""How the loop made one number of the losses of a step: told by the Task, or found from the recorded losses.

The recorder saw the number that backward() was called on. Here the Task's losses at the recorded weights are reduced in
every known way, and the way that gives that number is taken; whether it is the right one, the certificate proves at
every step. Over equal micro-batches "mean" and "mean-of-means" are the same, so a step with unequal ones, and one with
more or fewer, are asked too.
Where no way fits (a loss that is scaled and unscaled again for mixed precision, say), it is the mean.

A loss that has several values a sample (tokens, outputs, pixels) is averaged over them, or summed, or averaged over
those whose labels are not -100, by the same test; where that makes no difference in the steps that are asked, labels of
-100 do not count.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.shapes import COUNTED, WITHIN
from trajrec.replay.step import RecordedRun, make_step, vector_of
from trajrec.task.task import REDUCTIONS

_PREFERRED = ("mean-of-means", "mean", "scaled-means", "sum-of-means", "sum")
_TOLERANCE = 1e-3
_LOOKED_AT = 2000


def found_reduction(run: RecordedRun, function: LossFunction, samples: Samples) -> str:
    """The reduction of REDUCTIONS that gives the recorded losses; leaves `function` with it, and with its `within`."""
    names = _candidates(run, function)
    ways = [Way(within, name) for within in _within(function) for name in names]
    if len(ways) > 1:
        fits = _fitting(run, function, samples, ways)
        preferred = _PREFERRED if function.usual_parts > 1 else REDUCTIONS
        order = (COUNTED, "mean", "sum")
        ways.sort(key=lambda way: (order.index(way.within), preferred.index(way.name)))
        way = next((way for way in ways if way in fits), ways[0])
        function.within, function.reduction = way.within, way.name
    return function.reduction


def _within(function: LossFunction) -> tuple[str, ...]:
    """What may have been made of several values of a sample."""
    if not function.has_further:
        return WITHIN[:1]
    return WITHIN[:2] if function.left_out is None else WITHIN


class Way(NamedTuple):
    """How a number is made of losses: `within` each sample, and of the samples, by name."""

    within: str
    name: str


def _candidates(run: RecordedRun, function: LossFunction) -> tuple[str, ...]:
    """The reductions that are possible: one where the Task names it, or where the weights of samples were recorded."""
    known = function.task.reduction is not None or run.recorded_weights(1) is not None
    return (function.reduction,) if known else REDUCTIONS


def _fitting(run: RecordedRun, function: LossFunction, samples: Samples, ways: list[Way]) -> set[Way]:
    """The ways that give the recorded losses of all the steps that tell them apart."""
    fits = set(ways)
    for t in _telling(run, sizes=function.has_further):
        found = {way: _ratio(run, function, samples, t, way) for way in ways}
        if run.stored(t - 1):
            fits &= {way for way, ratio in found.items() if ratio <= _TOLERANCE}
        elif fits:
            # At the weights of a keyframe nearby the loss is another, but near enough to tell thirds from halves.
            least = min(found[way] for way in fits)
            fits = {way for way in fits if found[way] <= least + _TOLERANCE}
    return fits


def _telling(run: RecordedRun, sizes: bool) -> list[int]:
    """Step 1, and the first with unequal micro-batches, with more or fewer, and of another size where that matters."""
    steps, first = range(1, min(run.steps, _LOOKED_AT) + 1), run.parts(1).tolist()
    shorter = (t for t in steps if sizes and sum(run.parts(t)) != sum(first))
    unequal = (t for t in steps if len(set(run.parts(t).tolist())) > 1)
    fewer = (t for t in steps if len(run.parts(t)) != len(first))
    return sorted({1, next(shorter, 1), next(unequal, 1), next(fewer, 1)})


def _ratio(run: RecordedRun, function: LossFunction, samples: Samples, t: int, way: Way) -> float:
    """How far the computed loss of a step is from the recorded one: |log of their ratio|; 0 where none was recorded."""
    at = max(step for step in (*run.keyframe_steps, t - 1) if step < t and run.stored(step))
    before = vector_of(run.row(at), at, function.layout).to(samples.device, samples.dtype)
    function.within, function.reduction = way
    computed = function.value(before, samples, make_step(run, t, before, before))
    recorded = run.loss(t)
    if math.isnan(recorded):
        return 0.0
    comparable = 0 < computed < math.inf and 0 < recorded < math.inf
    return abs(math.log(computed) - math.log(recorded)) if comparable else float(computed != recorded)

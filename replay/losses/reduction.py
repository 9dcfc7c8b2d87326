"""How the loop made one number of the losses of a step: told by the Task, or found from the recorded losses.

The recorder saw the number that backward() was called on. Here the Task's losses at the recorded weights are reduced in
every known way, and the way that gives that number is taken; whether it is the right one, the certificate proves at
every step. Over equal micro-batches "mean" and "mean-of-means" are the same, so a step with unequal ones, and one with
more or fewer, are asked too.
Where no way fits (a loss that is scaled and unscaled again for mixed precision, say), it is the mean.
"""

from __future__ import annotations

import math

from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.step import RecordedRun, make_step, vector_of
from trajrec.task.task import REDUCTIONS

_PREFERRED = ("mean-of-means", "mean", "scaled-means", "sum-of-means", "sum")
_TOLERANCE = 1e-3
_LOOKED_AT = 2000


def found_reduction(run: RecordedRun, function: LossFunction, samples: Samples) -> str:
    """The reduction of REDUCTIONS that gives the recorded losses; leaves `function` with it."""
    if function.task.reduction is None and run.recorded_weights(1) is None:
        fits = set(REDUCTIONS)
        for t in _telling(run):
            found = {name: _ratio(run, function, samples, t, name) for name in REDUCTIONS}
            if run.stored(t - 1):
                fits &= {name for name, ratio in found.items() if ratio <= _TOLERANCE}
            elif fits:
                # At the weights of a keyframe nearby the loss is another, but near enough to tell thirds from halves.
                least = min(found[name] for name in fits)
                fits = {name for name in fits if found[name] <= least + _TOLERANCE}
        preferred = _PREFERRED if function.usual_parts > 1 else REDUCTIONS
        function.reduction = next((name for name in preferred if name in fits), preferred[0])
    return function.reduction


def _telling(run: RecordedRun) -> list[int]:
    """Step 1, and the first with unequal micro-batches, and with more or fewer."""
    steps, first = range(1, min(run.steps, _LOOKED_AT) + 1), run.parts(1).tolist()
    unequal = (t for t in steps if len(set(run.parts(t).tolist())) > 1)
    fewer = (t for t in steps if len(run.parts(t)) != len(first))
    return sorted({1, next(unequal, 1), next(fewer, 1)})


def _ratio(run: RecordedRun, function: LossFunction, samples: Samples, t: int, name: str) -> float:
    """How far the computed loss of a step is from the recorded one: |log of their ratio|; 0 where none was recorded."""
    at = max(step for step in (*run.keyframe_steps, t - 1) if step < t and run.stored(step))
    before = vector_of(run.row(at), at, function.layout).to(samples.device, samples.dtype)
    function.reduction = name
    computed = function.value(before, samples, make_step(run, t, before, before))
    recorded = run.loss(t)
    if math.isnan(recorded):
        return 0.0
    comparable = 0 < computed < math.inf and 0 < recorded < math.inf
    return abs(math.log(computed) - math.log(recorded)) if comparable else float(computed != recorded)

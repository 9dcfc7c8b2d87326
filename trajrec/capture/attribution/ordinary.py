"""The ordinary step: one batch drawn, one forward pass on it, one backward pass from that, and the step.

Nearly all steps are like this, and every one of them pays for its reading. This says what `reading.read_in_general`
would say, or nothing: where another batch waits, a pass is over, the first step is read, or anything else is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trajrec.capture.attribution.batches import Batch, StepBatch
from trajrec.capture.attribution.facts import Backward, Cleared, Drawn, Forward, Released, Returned, Stepped
from trajrec.capture.attribution.known import NOTHING, Known
from trajrec.capture.attribution.making import lengths_of, part_of


def _orders() -> dict[tuple[type, ...], tuple[int, int, int]]:
    """The orders of facts in an ordinary step, with the places of drawing, forward and backward pass."""
    found: dict[tuple[type, ...], tuple[int, int, int]] = {}
    kinds: tuple[type, ...] = (Drawn, Forward, Returned, Backward)
    for cleared in (None, 0, 1, 2, 3):  # never between the backward pass and the step
        order = kinds if cleared is None else (*kinds[:cleared], Cleared, *kinds[cleared:])
        places = (order.index(Drawn), order.index(Forward), order.index(Backward))
        for end in ((Stepped,), (Released, Stepped)):  # the graph is gone, or will be when there is another loss
            found[*order, *end] = places
    return found


_ORDINARY = _orders()


def read_ordinary(known: Known, facts: Sequence[Any]) -> tuple[Known, StepBatch] | None:
    """What is known after such a step, and its samples; None where it is another, or the loop is not known yet."""
    places = _ORDINARY.get(tuple(map(type, facts)))
    if places is None or known.unfinished is not NOTHING:
        return None
    drawn, forward, backward = [facts[place] for place in places]
    batch, habits = drawn.batch, known.habits
    needs_proof = habits.needs_proof or batch.source.is_indexed
    is_meant = forward.shown is batch or (forward.shown is None and not needs_proof)
    if not (
        is_meant
        and batch.ids is not None
        and habits.has_stepped
        and habits.uses_newest
        and batch.source.loader in habits.trained
        and batch.source.dataset == habits.dataset
        and habits.thread == batch.thread == forward.thread == facts[-1].thread
        and habits.lengths == lengths_of(forward, batch)
        and forward.number in backward.reaches
        and not backward.is_nested
    ):
        return None
    epochs = known.epochs.with_step_of(batch)
    if epochs is not known.epochs:
        known = Known(habits, epochs)
    return known, _alone(batch, forward, backward.loss)


def _alone(batch: Batch, forward: Forward, loss: Any) -> StepBatch:
    """`joined` of one batch that went through the model once: every step pays for this."""
    ids: Any = batch.ids
    return StepBatch(
        ids,
        None,
        () if loss is None else (loss,),
        (len(ids),),
        (forward.states,) if forward.states else None,
        None if batch.digest is None else (batch.digest,),
        () if batch.contents is None else tuple(part_of(batch, [forward]).cut_contents()),
        batch.checksum,
        (batch,),
    )

"""What a step is made of, and whether that can be: batches with ids, of one data set, and the whole of them.

Letters: B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trajrec.capture.attribution import refusals
from trajrec.capture.attribution.batches import Batch, Part
from trajrec.capture.attribution.facts import Backward, Forward
from trajrec.capture.attribution.known import NONE, Habits, Use
from trajrec.errors import UnknownBatchError


def uses_by_batch(made: Sequence[Use], habits: Habits) -> dict[Batch, list[Use]]:
    """The uses that a step is made of, by their batch.

    Raises:
        UnknownBatchError: if there are none, the batch of one cannot be told or has no ids, they are of another data
            set than the steps before, or were not shown to be used where that takes proof.
    """
    uses: dict[Batch, list[Use]] = {}
    for use in made:
        if use.batch is None:
            raise UnknownBatchError(use.why)
        uses.setdefault(use.batch, []).append(use)
    _check_sets(list(uses), habits)
    for batch, of_it in uses.items():
        if batch.ids is None:
            raise UnknownBatchError(refusals.no_ids(batch.source))
        is_shown = any(use.is_shown for use in of_it)
        if batch.source.is_indexed and not is_shown:
            raise UnknownBatchError(refusals.NOT_ROWS)
        if habits.needs_proof and not is_shown:
            raise UnknownBatchError(refusals.UNPROVEN)
    return uses


def _check_sets(batches: Sequence[Batch], habits: Habits) -> None:
    names = {batch.source.dataset: batch.source.name for batch in batches}
    if not names:
        raise UnknownBatchError(refusals.NONE_SEEN)
    if len(names) > 1:
        raise UnknownBatchError(refusals.several_sets(list(names.values())))
    if habits.dataset not in (None, *names):
        raise UnknownBatchError(refusals.another_set(batches[0].source.name))


def lengths_after(uses: dict[Batch, list[Use]], habits: Habits) -> frozenset[int] | None:
    """`Habits.lengths` after a step: the dimensions in which inputs were as long as their batch in all steps.

    Raises:
        UnknownBatchError: if there is none any more: the model was called on more or fewer samples than the batch has.
    """
    lengths = habits.lengths
    for batch, of_it in uses.items():
        passes = [use.forward for use in of_it if use.forward is not None]
        if batch.source.is_indexed or batch.ids is None or len(passes) < len(of_it):
            continue  # its rows were seen to be the samples; or nobody saw what the model was called on
        size = sum(forward.size for forward in passes)
        in_pieces = len(passes) > 1 and size == len(batch.ids)
        found = frozenset({0}) if in_pieces else NONE.union(*[lengths_of(forward, batch) for forward in passes])
        known = found if lengths is None else lengths & found
        if lengths and not known:
            raise UnknownBatchError(refusals.other_size(size, len(batch.ids)))
        lengths = known
    return lengths


def lengths_of(forward: Forward, batch: Batch) -> frozenset[int]:
    """The dimensions of the first tensor that went in in which it is as long as the batch."""
    count = -1 if batch.ids is None else len(batch.ids)
    return frozenset([k for k, size in enumerate(forward.shape) if size == count])


def part_of(batch: Batch, passes: Sequence[Forward]) -> Part:
    """A batch as part of a step, with the forward passes that led to it."""
    ids: Any = batch.ids
    kept = tuple([(forward.size, forward.states) for forward in passes if forward.states is not None])
    return Part(ids, kept, None, batch.digest, batch.checksum, batch.contents)


def picked(use: Use, backward: Backward) -> Use:
    """The use of those samples that the loss is of, where it is of some rows of the outputs only."""
    if use.batch is None or use.batch.ids is None or not use.batch.source.is_indexed:
        return use
    if use.number not in backward.picked:
        return use
    positions = backward.picked[use.number]
    if positions is None:
        return use._replace(batch=None, why=refusals.PICKED)
    return use._replace(batch=replace(use.batch, ids=use.batch.ids[positions]))

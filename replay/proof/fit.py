"""Whether a recording and a Task belong together, as far as it shows before any step is made again.

The weights of the first step, the inputs of its batch and its loss are in the recording; so are the ids that the data
set must have, and the weights that nobody may have moved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import default_collate

from trajrec.digest import digest
from trajrec.errors import DataMismatchError, DriftError, HalfPrecisionError, ReplayError, TaskError
from trajrec.records import FROZEN_CHECK, HALF_DTYPES, LoaderSpec, ParamSpec
from trajrec.replay.step import RecordedRun
from trajrec.rules import FlatLayout
from trajrec.task.seeding import find_seeded
from trajrec.task.task import Task

if TYPE_CHECKING:
    from trajrec.replay.session import Session


def check_start(run: RecordedRun) -> None:
    """Checks that there is something to replay, and the state that it begins with.

    Raises:
        ReplayError: if there is not.
    """
    if run.steps == 0:
        raise ReplayError("The recording holds no step yet: there is nothing to replay.")
    if 0 not in run.keyframe_steps:
        raise ReplayError(
            "The recording lacks its keyframe of step 0 (buffers and optimizer state before the training), with "
            "which every replay begins. `trajrec verify` tells what else is missing; restore the file from a copy."
        )


def largest_id(run: RecordedRun) -> int:
    """The largest sample id of all steps.

    Raises:
        ReplayError: if a step has none.
    """
    largest = -1
    for t in range(1, run.steps + 1):
        ids = run.sample_ids(t)
        if not len(ids):
            raise ReplayError(f"The recording names no sample of step {t}: its gradient cannot be made again.")
        largest = max(largest, int(ids.max()))
    return largest


def check_trainable(run: RecordedRun, layout: FlatLayout, allow_drift: bool) -> None:
    """Checks that parameters which the optimizer never stepped, and which are held constant, were.

    Raises:
        ReplayError: if none was ever stepped. DriftError: if one of the others moved.
        HalfPrecisionError: if one was stepped in 16 bits.
    """
    if not layout.params:
        raise ReplayError("No parameter ever had a gradient in this recording: there is nothing to replay.")
    half = next((p for p in layout.params if p.dtype in HALF_DTYPES), None)
    if half is not None:
        raise HalfPrecisionError(
            f"Parameter {half.name} was trained in {half.dtype}: the recording has its bits, but its steps are rounded "
            "so much that the derivative of the training cannot be checked against them. Keep the weights that are "
            "trained in float32 and use torch.autocast for the forward pass; frozen ones may have any dtype."
        )
    if not allow_drift:
        _check_frozen(run)
    last = run.steps if run.stored(run.steps) else run.keyframe_steps[-1]
    first_row, last_row = run.row(0), run.row(last)
    moved = [p for p in run.spec.params if not p.trainable and (first_row[p.span] != last_row[p.span]).any()]
    if moved and not allow_drift:
        raise DriftError(
            f"Parameter {moved[0].name} is not in the optimizer and was changed by step {last}"
            f"{_followed(run, moved[0])}. Weights that change outside the optimizer are not replayed: a mean teacher "
            "that a loss compares with, or an exponential average of weights. An average that no loss depends on "
            "belongs into a copy beside the model."
        )


def _check_frozen(run: RecordedRun) -> None:
    """Checks that the parameters which are stored once are what they were.

    Raises:
        DriftError: if one is not.
    """
    for t in reversed(run.keyframe_steps):
        found = run.keyframe(t).arrays.get(FROZEN_CHECK)
        if found is None:
            continue
        changed = [p.name for p, crc in zip(run.spec.frozen, found.tolist(), strict=True) if p.crc32 != crc]
        if changed:
            raise DriftError(
                f"Parameter {changed[0]} is not in the optimizer and was changed by step {t}. Weights that change "
                "outside the optimizer are not replayed: a mean teacher that a loss compares with, or an exponential "
                "average of weights. An average that no loss depends on belongs into a copy beside the model."
            )
        return


def _followed(run: RecordedRun, moved: ParamSpec) -> str:
    """Whose exponential average a parameter is, in words; "" if none is found in the rows of the first steps."""
    t = next((t for t in range(run.steps) if run.stored(t) and run.stored(t + 1) and _moves(run, moved, t)), None)
    if t is None:
        return ""
    old, new = (run.row(k)[moved.span].astype(np.float64) for k in (t, t + 1))
    for p in (p for p in run.spec.params if p.trainable and p.shape == moved.shape):
        for k in (t, t + 1):  # the average may be made before the row is recorded, or after
            way = run.row(k)[p.span].astype(np.float64) - old
            share = float(way @ (new - old)) / max(float(way @ way), 1e-300)
            if 0 < share <= 1 and np.abs(old + share * way - new).max() <= 1e-4 * np.abs(new - old).max():
                return f": it is the exponential average of {p.name}, with a decay of {1 - share:.4g}"
    return ""


def _moves(run: RecordedRun, moved: ParamSpec, t: int) -> bool:
    return bool((run.row(t)[moved.span] != run.row(t + 1)[moved.span]).any())


def data_changed(session: Session) -> bool:
    """Whether the first batch has other contents than when it was recorded.

    Raises:
        DataMismatchError: if it has, and gives another loss.
    """
    recorded = session.run.spec.data.get("first_batch_crc32")
    if recorded is None or digest(session.train.raw_step(session.step_at_start())) == recorded:
        return False
    # Other data that give the same first loss (inputs prepared elsewhere, say) are the same to the mathematics.
    if not session.allow_drift and not _same_first_loss(session):
        raise DataMismatchError(
            "The training data changed since the recording: the first batch has other contents (CRC-32 "
            f"{recorded:08x} recorded), and the first loss is another. Give the Task the data set that the run "
            f"was trained on, or go on with --allow-drift. {about_augmentation(session)}"
            f"{collated_by(session.run, session.task)}"
        )
    return True


def _same_first_loss(session: Session) -> bool:
    recorded, computed = session.run.loss(1), session.loss(session.step_at_start())
    return abs(recorded - computed) <= 1e-4 * abs(recorded)


def collated_by(run: RecordedRun, task: Task) -> str:
    """Which collate function the training used, after a blank, where the Task has torch's own; else ""."""
    loader = run.spec.loader
    if loader is None or not loader.collates_itself or task.collate is not default_collate:
        return ""
    return f" The training's loader made its batches by {loader.collate}: pass Task(collate=...)."


def evaluated_on(run: RecordedRun) -> tuple[LoaderSpec, ...]:
    """The loaders that the training was seen to evaluate its model on, each once."""
    return tuple(dict.fromkeys(spec for _, conditions in sorted(run.changes.items()) for spec in conditions.evaluated))


def check_test(run: RecordedRun, task: Task) -> None:
    """Checks that the Task has a test set.

    Raises:
        TaskError: it has none; says what the training was evaluated on.
    """
    try:
        _ = task.test
    except TaskError as error:
        seen = [] if task.has_test else [str(spec) for spec in evaluated_on(run)]
        if not seen:
            raise
        raise TaskError(f"{error} The training was seen to evaluate its model on {'; '.join(seen)}.") from None


def about_augmentation(session: Session) -> str:
    """What a user should know of random augmentation where inputs differ."""
    was, is_now = "seeded_from" in session.run.spec.data, find_seeded(session.task.train) is not None
    if was != is_now:
        return f"It was {'' if was else 'not '}recorded with trajrec.seeded(...), and the Task's is{' not' * was}."
    return "Items with random augmentation come back only if both are wrapped in trajrec.seeded(...)."

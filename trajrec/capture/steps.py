"""One step of the training becomes a record: from before the optimizer steps to after it.

    before  its samples, its hyperparameters, what changed in the model since the last one; and where the model's modes
            change, or a rate of zero ends, a keyframe of the state so far
    after   the weights w_t are copied into the row that the sink hands out; from a CUDA device they travel on a stream
            of their own, and the step is handed over after the next one

Random generator states are compared before the first forward pass and before the step, and recorded only for steps that
drew random numbers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch.optim import Optimizer

from trajrec.capture.attribution.batches import StepBatch
from trajrec.capture.companions import Round, is_within_step
from trajrec.capture.observing.observer import Observer
from trajrec.capture.stopwatch import Stopwatch
from trajrec.errors import RecordingError
from trajrec.inputs import arrays_of
from trajrec.records import NO_IDS, FloatArray, Inputs, LiveKeyframe, ParamSpec, StepRecord
from trajrec.sink import Sink
from trajrec.snapshot.generators import consumed
from trajrec.snapshot.model import Snapshot
from trajrec.snapshot.weights import copy_row


@dataclass(frozen=True, slots=True)
class Pending:
    """A step that is about to be made: number, epoch, samples, hyperparameters [G, H], generator states, changes."""

    step: int
    epoch: int
    batch: StepBatch
    hyper: FloatArray
    rng: bytes = b""
    changes: bytes = b""

    def record(self, loss: float, crc32: int) -> StepRecord:
        """Its record, with the loss and the checksum of the weights after it."""
        batch = self.batch
        return StepRecord(
            self.step,
            self.epoch,
            loss,
            time.time(),
            crc32,
            self.hyper,
            batch.ids,
            batch.weights,
            self.rng,
            np.array(batch.parts, dtype=np.int64) if len(batch.parts) > 1 else NO_IDS,
            NO_IDS if batch.digests is None else np.array(batch.digests, dtype=np.int64),
            self.changes,
        )


class Rows:
    """Hands the weights after a step to the sink, with its record.

    Args:
        sink: where they go.
        snapshot: of the model.

    Attributes:
        crc32: of the last weights.
        are_kept: whether the sink keeps rows, and not checksums only.
    """

    def __init__(self, sink: Sink, snapshot: Snapshot) -> None:
        self.crc32 = 0
        self.are_kept = True
        self._sink = sink
        self._snapshot = snapshot
        self._transfer = snapshot.transfer()
        self._travelling: StepRecord | None = None

    def commit(self, pending: Pending) -> None:
        """The step was made."""
        batch = pending.batch
        if self._transfer is None:
            row = self._sink.reserve()
            self.are_kept = row is not None
            self.crc32 = self._snapshot.copy(row)
            self._sink.commit(pending.record(batch.loss, self.crc32))
            return
        self.flush()
        self._transfer.start(self._snapshot.flat(), batch.losses)
        self._travelling = pending.record(float("nan"), 0)

    def flush(self) -> None:
        """Hands over the step whose weights are still on their way from the device."""
        if self._transfer is None or self._travelling is None:
            return
        source, loss = self._transfer.finish()
        record, self._travelling = self._travelling, None
        row = self._sink.reserve()
        self.are_kept = row is not None
        self.crc32 = copy_row(source, row)
        self._sink.commit(replace(record, loss=loss, crc32=self.crc32))

    def widen(self, params: Sequence[ParamSpec]) -> None:
        """From the coming step on rows have further parameters."""
        self.flush()
        self._sink.widen(params)
        self._transfer = self._snapshot.transfer()

    def give_up(self) -> None:
        """Hands over nothing more."""
        self._travelling = None


class _Rates:
    """The learning rates of the step before.

    A step with a rate of zero does not show the momentum buffer in the weights, and when the rate rises it counts.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._hyper: FloatArray | None = None
        self._rates: list[float] = []

    def rise_from_zero(self, hyper: FloatArray) -> bool:
        """Whether a rate of the coming step does."""
        if hyper is self._hyper:
            return False
        self._hyper = hyper
        before, self._rates = self._rates, self._snapshot.rates(hyper)
        return any(a == 0 != b for a, b in zip(before, self._rates, strict=False))


class Steps:
    """The steps of a training, once the first is about to be made.

    Args:
        sink: where records go.
        snapshot: of the model and its optimizers.
        observer: knows the samples of a step.
        optimizers: that step together.
        watch: times what takes long.
        keeps_inputs: whether the contents of batches are recorded.

    Attributes:
        number: of the last step that was made.
        is_made: it has changed the weights, and is not recorded yet.
    """

    def __init__(
        self,
        sink: Sink,
        snapshot: Snapshot,
        observer: Observer,
        optimizers: Sequence[Optimizer],
        watch: Stopwatch,
        keeps_inputs: bool,
    ) -> None:
        self.number = 0
        self.is_made = False
        self._sink = sink
        self._snapshot = snapshot
        self._observer = observer
        self._watch = watch
        self._keeps_inputs = keeps_inputs
        self._rows = Rows(sink, snapshot)
        self._round = Round(optimizers)
        self._rates = _Rates(snapshot)
        self._pending: Pending | None = None
        self._batch: StepBatch | None = None  # of the step that is tried, or tried again
        self._prepared_at = 0  # backward passes seen by then
        self._inner = 0  # steps within the one that is being made
        self._last_keyframe = -1

    def begin(self, batch: StepBatch, seeded_from: int | None) -> None:
        """Records the weights before the first step, and the state then; the step will be made of this batch."""
        self._rows.commit(Pending(0, self._epoch(), StepBatch(NO_IDS), self._snapshot.hyper()))
        self._rows.flush()
        self._batch = batch
        self.number = self._sink.resumed_at
        if self.number == 0:
            self._snapshot.begin_seeded(seeded_from)
            self.keyframe(is_first=True)
        else:
            self._snapshot.begin_again()

    # ---- before the optimizer steps

    def is_within(self, optimizer: Optimizer) -> bool:
        """Whether the step that begins is called by the one that is being made, as by a class's `super().step()`."""
        if self._pending is None or not is_within_step(optimizer):
            return False
        self._inner += 1
        return True

    def before(self, optimizer: Optimizer, inner: int = 0) -> None:
        """An optimizer is about to step, within so many steps of its own step.

        Raises:
            RecordingError: if what it does cannot be recorded.
        """
        if self.is_made:
            raise RecordingError(f"Step {self.number} was interrupted while it was being recorded.")
        self._inner = inner
        if not self._round.is_open:
            self.check_pending()
        if self._round.begin(optimizer, self._observer.backwards):
            self._pending = self._prepare()
        else:
            self._pending = self._with_hyper_of(optimizer)

    def check_whole(self) -> None:
        """Checks that what was made was recorded.

        Raises:
            RecordingError: it was not.
        """
        self._round.check_complete()
        self.check_pending()

    def check_pending(self) -> None:
        """Checks that the step before has come to its end.

        Raises:
            RecordingError: it was made, but an error came out of it before it could be recorded.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        self._rows.flush()
        is_still = self._snapshot.copy(None) == self._rows.crc32
        if is_still and all(self._snapshot.rates(pending.hyper) or [0.0]):
            # It failed before it had changed anything, and may be tried again.
            self._batch = pending.batch if self._observer.backwards == self._prepared_at else None
            return
        self.number += 1
        self.is_made = True
        raise RecordingError(
            f"Step {self.number} changed the weights, but an error in optimizer.step(), or in a hook of yours on it, "
            "kept it from being recorded. Let hooks on the optimizer's step not raise."
        )

    def _prepare(self) -> Pending:
        """What the coming step uses."""
        snapshot, observer = self._snapshot, self._observer
        is_tried_again = self._batch is not None and self._prepared_at == observer.backwards
        self._prepared_at = observer.backwards
        batch = self._batch or observer.take()
        self._batch = None
        epoch, made_for = self._epoch(), observer.known.epochs.seeded_pass
        snapshot.tell_pass(None if made_for is None else made_for - epoch)
        snapshot.tell_clips(observer.clippings.take(), is_tried_again)
        snapshot.tell_evaluated(observer.surroundings.evaluated)
        changes = snapshot.changes(self.number + 1)
        if thawed := snapshot.thawed():
            self._rows.widen(thawed)
        if snapshot.enters_other_modes and snapshot.has_buffers:
            self.keyframe()
        rng = b"" if batch.rng is None else consumed(batch.rng, snapshot.generators.states())
        hyper = snapshot.hyper()
        if self._rates.rise_from_zero(hyper) and self._last_keyframe != self.number:
            self.keyframe()
        return Pending(self.number + 1, epoch, batch, hyper, rng, b"" if changes is None else changes.to_json())

    def _with_hyper_of(self, optimizer: Optimizer) -> Pending:
        """What the step in progress uses, with the options of another optimizer as they are now."""
        assert self._pending is not None
        rows, hyper = self._snapshot.rows_of(optimizer), self._pending.hyper.copy()
        hyper[rows] = self._snapshot.hyper()[rows]
        return replace(self._pending, hyper=hyper)

    def _epoch(self) -> int:
        """The epoch of the last step whose samples are known, from 0."""
        return self._sink.resumed_epochs + max(self._observer.known.epochs.count - 1, 0)

    # ---- after it has stepped

    def after(self, optimizer: Optimizer) -> bool:
        """An optimizer has stepped. Whether the step was recorded: all of several optimizers have to step."""
        if self._pending is None:
            return False
        if self._inner:
            self._inner -= 1
            return False
        if not self._round.end(optimizer):
            return False
        pending, self._pending = self._pending, None
        self._observer.clippings.take()  # within the step: of no other
        self.number += 1
        self.is_made = True
        self._rows.flush()
        if self._keeps_inputs:
            self._store_inputs(pending.batch)
        self._rows.commit(pending)
        self.is_made = False
        if self._sink.wants_keyframe(self.number):
            self.keyframe()
        return True

    def _store_inputs(self, batch: StepBatch) -> None:
        if not batch.contents:
            raise RecordingError(
                f'inputs="store" keeps the batches of a DataLoader, but those of step {self.number} came from none. '
                'Pass inputs="digest".'
            )
        self._sink.inputs(Inputs(self.number, arrays_of(batch.contents)))

    def keyframe(self, *, is_first: bool = False, is_last: bool = False) -> None:
        """Records the state after the last step.

        Raises:
            RecordingError: a parameter that is stored once has changed.
        """
        began = time.thread_time()
        self._rows.flush()
        with_weights = not self._rows.are_kept
        arrays = self._snapshot.keyframe(with_weights, is_first=is_first, is_last=is_last)
        self._sink.keyframe(LiveKeyframe(self.number, arrays))
        self._last_keyframe = self.number
        self._watch.rare(began)
        self._snapshot.check_frozen(arrays)

    # ---- the end

    def give_up(self) -> None:
        """Records no more steps; one that was made by now is the first that is missing."""
        if self.is_made:
            self._sink.note_gap(self.number)
        self._pending = self._batch = None
        self._rows.give_up()
        self.is_made = False

    def was_not_seen(self) -> None:
        """A step was made, and what it was made of was not seen: recording ends with it."""
        self.number += 1
        self.is_made = True

    def pass_over(self) -> None:
        """A step was made that is not recorded."""
        self.number += 1
        self._sink.note_gap(self.number)

    def finish(self) -> None:
        """Records what is left: weights on their way, and the state at the end."""
        self._rows.flush()
        if self._last_keyframe != self.number or self._snapshot.owes_a_look:
            # Timed like one within a hook: what is rare is taken out of the hook that it happens in.
            began = self._watch.start()
            self.keyframe(is_last=True)
            self._watch.stop(began)

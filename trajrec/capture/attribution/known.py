"""What is known of a training loop from its facts: a small frozen value, which a step is read with and leaves behind.

Habits      how the loop goes about: its data set, its thread, whether it draws ahead of what it uses
Epochs      passes over the training data that steps were made in
Unfinished  what the next step may be made of: batches that wait, and their uses. After an ordinary step: NOTHING
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from trajrec.capture.attribution.batches import Batch, Part
from trajrec.capture.attribution.facts import Forward

NONE: frozenset[int] = frozenset()


class Waiting(NamedTuple):
    """A batch that may be used yet, or again.

    Attributes:
        batch: the batch.
        is_evaluated: a forward pass without gradients was about it.
        is_used: one with gradients was.
        is_shown: the last of these was seen to be about its tensors, or copies of them.
        is_over: nothing more comes from the pass over a loader that it is of.
        is_left: it waited already when the model was called with gradients, or a backward pass began.
    """

    batch: Batch
    is_evaluated: bool = False
    is_used: bool = False
    is_shown: bool = False
    is_over: bool = False
    is_left: bool = False


class Use(NamedTuple):
    """A forward pass with gradients, and the batch that it is about.

    Attributes:
        forward: the pass; None if nobody saw one, and the batch is thought to have been used because it was there.
        batch: None if it cannot be told.
        why: the reason, then.
        is_shown: what the model was called on was seen to be the batch.
        is_newest: the batch was the newest of its loader, and there could have been a newer one.
        is_marked: a backward pass from it can be seen.
        is_gone: none can come from it any more.
        is_stale: the gradient of an earlier backward pass from it was thrown away.
    """

    forward: Forward | None
    batch: Batch | None
    why: str = ""
    is_shown: bool = False
    is_newest: bool = False
    is_marked: bool = False
    is_gone: bool = False
    is_stale: bool = False

    @property
    def number(self) -> int:
        """Of the forward pass; 0 for none."""
        return 0 if self.forward is None else self.forward.number


@dataclass(frozen=True, slots=True)
class Habits:
    """How the loop goes about, as far as steps have shown.

    Attributes:
        dataset: number of the one that is trained on; None before the first step.
        thread: that calls the model; 0 before it does.
        has_stepped: whether there was a step.
        needs_proof: the gradient is another model's, too: that a batch is there says nothing.
        uses_newest: a step was made of a batch that was used while it was the newest of its loader.
        draws_ahead: an older one was used, or one that another thread has drawn.
        trained: loaders that steps were made of, and that are there still.
        lengths: dimensions of the first input in which it was as long as the batch in all steps; None before one.
    """

    dataset: int | None = None
    thread: int = 0
    has_stepped: bool = False
    needs_proof: bool = False
    uses_newest: bool = False
    draws_ahead: bool = False
    trained: frozenset[int] = NONE
    lengths: frozenset[int] | None = None


@dataclass(frozen=True, slots=True)
class Epochs:
    """Passes over the training data that steps were made in.

    Attributes:
        count: how many there were.
        serial: number of the newest.
        seeded_pass: that the last step's items were made for.
    """

    count: int = 0
    serial: int = 0
    seeded_pass: int | None = None

    def with_step_of(self, batch: Batch) -> Epochs:
        """The same after a step of this batch.

        Passes that made no step (a look at the data, an evaluation on them) are no epochs; nor does one begin where the
        loop comes back to a pass that it left for another.
        """
        if batch.serial > self.serial or not self.count:
            return Epochs(self.count + 1, batch.serial, batch.seeded_pass)
        if batch.seeded_pass != self.seeded_pass:
            return Epochs(self.count, self.serial, batch.seeded_pass)
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Unfinished:
    """What the next step may be made of.

    Attributes:
        waiting: batches, in the order drawn.
        uses: forward passes that no backward pass has come from yet.
        made: those that one has come from.
        losses: of the backward passes.
        named: samples that the user has named.
        is_naming: no backward pass has come since then.
        single: number of the batch that was drawn while there was no other; 0 after a backward pass or another draw.
        is_cleared: gradients were set to zero after the last backward pass.
    """

    waiting: tuple[Waiting, ...] = ()
    uses: tuple[Use, ...] = ()
    made: tuple[Use, ...] = ()
    losses: tuple[Any, ...] = ()
    named: tuple[Part, ...] = ()
    is_naming: bool = False
    single: int = 0
    is_cleared: bool = False


NOTHING = Unfinished()


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a loop from the facts that were read."""

    habits: Habits = Habits()
    epochs: Epochs = Epochs()
    unfinished: Unfinished = NOTHING

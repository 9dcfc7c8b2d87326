"""Which samples made an optimizer step: what the facts of a loop say (see `trajrec.capture.attribution.facts`).

    read(known, facts) -> (known', step or refusal)

A pure function. The common step is one batch drawn, one forward pass on it, one backward pass from that, and the step:
`attribution.ordinary` matches just this. `read_in_general` reads any facts one after the other, and says the same.

    Drawn       the batch waits
    Forward     is a use of a batch: of the one that it was shown to be about (its tensors, views or copies); or of the
                only one there is; or of the newest, in a loop that has been seen to use its batches as it draws them.
                Otherwise it is not known of which
    Backward    the uses that the gradient comes from belong to the next step: autograd's graph says which these are.
                Where no forward pass was seen (the loop calls parts of the model), the batch that is there is guessed
    Cleared     and another backward pass after it: what was made before is no part of the step
    Stepped     the step is made of the batches of these uses, or of what the user has named

A batch that was drawn but never went through a forward pass with gradients and a backward pass is no training batch:
validation passes between steps drop out. What the facts do not tell (data sets without ids, loops without a DataLoader,
two batches that could be meant) is a refusal in words, which say to call `trajrec.set_batch(ids)` before each step.
Ids are right or absent, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from trajrec.capture.attribution import refusals
from trajrec.capture.attribution.batches import Batch, Part, StepBatch, joined
from trajrec.capture.attribution.facts import (
    Backward,
    Cleared,
    Drawn,
    Ended,
    Evaluated,
    Fact,
    Forgotten,
    Forward,
    Named,
    Released,
    Returned,
    Shared,
    Stepped,
)
from trajrec.capture.attribution.known import NOTHING, Known, Unfinished, Use, Waiting
from trajrec.capture.attribution.making import lengths_after, part_of, picked, uses_by_batch
from trajrec.capture.attribution.ordinary import read_ordinary
from trajrec.errors import UnknownBatchError

_MOST_WAITING = 64
_MOST_EVALUATED = 16  # without a gradient, and without a word which they are

Outcome = StepBatch | UnknownBatchError | None
"""The samples of a step, or why they cannot be told; None where no step was made."""


def read(known: Known, facts: Sequence[Fact]) -> tuple[Known, Outcome]:
    """What is known after these facts, and the step that ends them, if one does."""
    return read_ordinary(known, facts) or read_in_general(known, facts)


def read_in_general(known: Known, facts: Iterable[Fact]) -> tuple[Known, Outcome]:
    """`read` without a look for the ordinary step."""
    reading, outcome = _Reading(known), None
    for fact in facts:
        if type(fact) is Stepped:
            outcome = reading.stepped(fact)
        else:
            _READS[type(fact)](reading, fact)
    return reading.known(), outcome


class _Reading:
    """What is known, while facts are read one after the other."""

    def __init__(self, known: Known) -> None:
        before = known.unfinished
        self.habits, self.epochs = known.habits, known.epochs
        self.waiting, self.uses, self.made = [*before.waiting], [*before.uses], [*before.made]
        self.losses, self.named = before.losses, before.named
        self.is_naming, self.is_cleared, self.single = before.is_naming, before.is_cleared, before.single

    def known(self) -> Known:
        """What is known by now."""
        left = (tuple(self.waiting), tuple(self.uses), tuple(self.made), self.losses, self.named)
        flags = (self.is_naming, self.single, self.is_cleared)
        return Known(self.habits, self.epochs, Unfinished(*left, *flags) if any(left) or any(flags) else NOTHING)

    # -- batches

    def drawn(self, fact: Drawn) -> None:
        """The batch waits."""
        if self.waiting or self.made or self.uses:
            self._put_away(fact.batch.source.loader)
        is_single = not (self.waiting or self.made or self.uses)
        self.single = fact.batch.number if is_single else 0
        self.waiting.append(Waiting(fact.batch, is_over=fact.is_over))

    def _put_away(self, loader: int) -> None:
        """What a loader handed out before is done with, if it has been used; and there is an end to waiting."""
        left = [w for w in self.waiting if not (w.batch.source.loader == loader and w.is_shown and w.is_used)]
        evaluated = [w for w in left if w.is_evaluated][:-_MOST_EVALUATED]
        self.waiting = [w for w in left if w not in evaluated][-_MOST_WAITING:]

    def ended(self, fact: Ended) -> None:
        """Batches of this pass are not followed by another one."""
        self._note(lambda waiting: waiting.batch.serial == fact.serial, is_over=True)

    def forgotten(self, fact: Forgotten) -> None:
        """What comes from other loaders now may be as usual as what came from this one."""
        self.habits = replace(self.habits, trained=self.habits.trained - {fact.loader})

    def name(self, fact: Named) -> None:
        """In place of what was named since the last backward pass."""
        kept = self.named[:-1] if self.is_naming else self.named
        self.named, self.is_naming = (*kept, Part(fact.ids, weights=fact.weights)), True

    def _note(self, fits: Callable[[Waiting], bool], **flags: Any) -> None:
        self.waiting = [w._replace(**flags) if fits(w) else w for w in self.waiting]

    # -- forward passes

    def evaluated(self, fact: Evaluated) -> None:
        """It was about the batch that was drawn last, if nothing else is known."""
        batch = fact.shown or (self.waiting[-1].batch if self.waiting else None)
        is_shown = fact.shown is not None
        self._note(lambda w: w.batch is batch and not w.is_used, is_evaluated=True, is_shown=is_shown)

    def forward(self, fact: Forward) -> None:
        """It is a use of a batch."""
        if self.is_naming:
            last = self.named[-1]
            passed = () if fact.states is None else ((fact.size, fact.states),)
            self.named = (*self.named[:-1], replace(last, passes=(*last.passes, *passed)))
        use = self._use(fact)
        self.waiting = [w._replace(is_used=w.is_used or w.batch is use.batch, is_left=True) for w in self.waiting]
        self.uses.append(use)

    def _use(self, fact: Forward) -> Use:
        """The use that a forward pass is: of no batch, and why, if it cannot be told of which."""
        if self.habits.thread not in (0, fact.thread):
            return Use(fact, None, refusals.THREADS_CALL)
        if not self.habits.thread:
            self.habits = replace(self.habits, thread=fact.thread)
        if fact.shown is not None:
            self._note(lambda w: w.batch is fact.shown, is_shown=True)
            return Use(fact, fact.shown, is_shown=True, is_newest=self._is_newest(fact.shown, fact.thread))
        single = next((w for w in self.waiting if w.batch.number == self.single), None)
        if single and self._is_usual(single) and not (single.is_evaluated and self.habits.dataset is None):
            return Use(fact, single.batch, is_newest=self._is_newest(single.batch, fact.thread))
        batch, why = self._only()
        return Use(fact, batch, fact.why if fact.why and why == refusals.NONE_SEEN else why)

    def _is_usual(self, waiting: Waiting) -> bool:
        """Whether steps were made of this batch's loader before, or of none that is still there."""
        return not self.habits.trained or waiting.batch.source.loader in self.habits.trained

    def _is_newest(self, batch: Batch, thread: int) -> bool:
        """Whether a batch is used while it is the newest, as far as that says something; notes it if it is not."""
        others = [w for w in self.waiting if w.batch.source.loader == batch.source.loader]
        is_newest = all(other.batch.number <= batch.number for other in others)
        self._set(draws_ahead=self.habits.draws_ahead or not is_newest or batch.thread != thread)
        return is_newest and not any(other.batch is batch and other.is_over for other in others)

    def _only(self) -> tuple[Batch | None, str]:
        """The batch that nothing but its being there speaks for."""
        uses = (*self.made, *[use for use in self.uses if not use.is_stale])
        before = [use.batch for use in uses if use.batch and use.forward]
        there = [w for w in self._own([w for w in self.waiting if self._is_usual(w)]) if w.batch not in before]
        # An evaluation is over when its pass is: until then a batch that was thought to be evaluated may be meant.
        unseen = [w for w in there if not (w.is_evaluated and (w.is_shown or w.is_over))]
        # So may one that was looked at, if it is from where others are, or nobody knows yet what is trained on.
        loaders = {batch.source.loader for batch in (*[w.batch for w in unseen], *before)}
        is_new = not self.habits.trained and bool(unseen)
        fitting = [w for w in there if w.batch.source.loader in loaders or (is_new and not w.is_over)]
        if not fitting:
            return self._again(before)
        is_left = bool(before) and fitting[0].is_left  # it was there already when the last one was used
        is_evaluated = fitting[-1].is_evaluated and fitting[-1].is_over
        if is_left or is_evaluated or not (len(fitting) == 1 or self._is_newest_meant(fitting)):
            return None, refusals.several([*before[-1:], *[w.batch for w in fitting]])
        return fitting[-1].batch, ""

    def _again(self, before: Sequence[Batch]) -> tuple[Batch | None, str]:
        """The batch that is used once more, where no other waits: the one of the step, or the newest of several."""
        if not before:
            return None, refusals.NONE_SEEN
        if len(set(before)) > 1 and not self._is_in_turn:
            return None, refusals.several(before)
        return max(before, key=lambda batch: batch.number), ""

    @property
    def _is_in_turn(self) -> bool:
        """Whether the loop, by all that was seen of it, uses batches as it draws them."""
        return self.habits.uses_newest and not self.habits.draws_ahead

    def _is_newest_meant(self, fitting: Sequence[Waiting]) -> bool:
        """Whether the loop uses the newest of these batches, and has skipped the others.

        They come from one pass over a loader then, or from earlier ones that came to their end.
        """
        *skipped, newest = fitting
        return self._is_in_turn and all(
            w.batch.source.loader == newest.batch.source.loader and (w.batch.serial == newest.batch.serial or w.is_over)
            for w in skipped
        )

    def _own(self, waiting: list[Waiting]) -> list[Waiting]:
        """Those of the training set, where it is known and there are any."""
        return [w for w in waiting if self.habits.dataset in (None, w.batch.source.dataset)] or waiting

    def returned(self, fact: Returned) -> None:
        """A backward pass from it can be seen."""
        self.uses = [u._replace(is_marked=True) if u.number == fact.number else u for u in self.uses]
        self.made = [u._replace(is_marked=True) if u.number == fact.number else u for u in self.made]

    def released(self, fact: Released) -> None:
        """No backward pass comes from it any more."""
        self.uses = [u for u in self.uses if u.number != fact.number]
        self.made = [u._replace(is_gone=True) if u.number == fact.number else u for u in self.made]

    # -- backward passes

    def cleared(self, _: Cleared) -> None:
        """If there is a backward pass after it, or the step, what was made before is no part of it."""
        self.is_cleared = True

    def shared(self, _: Shared) -> None:
        """From now on it takes proof."""
        self.habits = replace(self.habits, needs_proof=True)

    def backward(self, fact: Backward) -> None:
        """What it comes from belongs to the next step."""
        self.single = 0
        named = self.named[:-1] if self.is_naming else self.named
        if (self.made or named) and not fact.is_nested and (self.is_cleared or not fact.adds):
            self._start_anew()
        is_marked = any(use.is_marked for use in (*self.uses, *self.made))
        is_ours = not is_marked or any(use.number in fact.reaches for use in (*self.uses, *self.made))
        self._make(fact)
        self._note(lambda _: True, is_left=True)
        self.is_cleared = self.is_naming = False
        if is_ours and fact.loss is not None:
            self.losses = (*self.losses, fact.loss)

    def _start_anew(self) -> None:
        """The gradients of earlier backward passes were thrown away without a step.

        A scaler skipped it, or the pass was for something else (the gradient of the inputs, another model): then there
        may be another one from the same outputs, or the batch that was thought to be used still waits.
        """
        self.losses = ()
        self.named = self.named[-1:] if self.is_naming else ()
        stale = [use._replace(is_stale=True) for use in self.made if use.is_marked and not use.is_gone]
        self.uses, self.made = [*stale, *self.uses], []

    def _make(self, fact: Backward) -> None:
        """Moves the uses that a backward pass comes from to those that the step is made of."""
        reached = [use for use in self.uses if use.number in fact.reaches]
        if not any(use.is_marked for use in self.uses):  # nothing is known of their outputs
            reached = [use for use in self.uses if use.forward and use.forward.training] or self.uses
            batches = list({use.batch: None for use in reached if use.batch is not None})
            if len(batches) > 1:
                self.uses = []
                self.made.append(Use(reached[0].forward, None, refusals.several(batches)))
                return
        if not self.uses and not any(use.forward for use in self.made):
            reached = self._guessed(fact.thread)
        self.uses = [use for use in self.uses if use not in reached]
        self.made += [picked(use._replace(is_stale=False), fact) for use in reached]
        self._lay_aside()

    def _guessed(self, thread: int) -> list[Use]:
        """Where no forward pass was seen (the loop calls parts of the model), the batch that is there is used."""
        made = [use.batch for use in self.made]
        fitting = [w for w in self._own([*self.waiting]) if w.batch not in made and not (w.is_used or w.is_shown)]
        if not fitting:
            return []
        if len(fitting) > 1 and not self._is_newest_meant(fitting):
            return [Use(None, None, refusals.several([w.batch for w in fitting]))]
        batch = fitting[-1].batch
        return [Use(None, batch, is_newest=self._is_newest(batch, thread))]

    def _lay_aside(self) -> None:
        """Done with what was drawn, but for the batches that wait for their turn: those after the last in use."""
        last = max((use.batch.number for use in self.made if use.batch and use.forward), default=0)
        self.waiting = [w for w in self.waiting if not w.is_used and w.batch.number > last]

    # -- the step

    def stepped(self, fact: Stepped) -> StepBatch | UnknownBatchError:
        """The samples of the step, or why they cannot be told."""
        if self.habits.thread not in (0, fact.thread):
            return UnknownBatchError(refusals.THREAD_STEPS)
        # Of outputs that nobody knows no backward pass can be seen to come any more.
        self.uses = [use for use in self.uses if use.is_marked]
        if self.is_cleared and self.made:
            self._start_anew()  # the gradient that the step is made of was thrown away
        made, losses, named = self.made, self.losses, self.named
        self._set(uses_newest=self.habits.uses_newest or any(use.is_newest for use in made))
        self.made, self.losses, self.named, self.is_naming = [], (), (), False
        try:
            return self._step_named(named, made, losses) if named else self._step(made, losses)
        except UnknownBatchError as error:
            return error

    def _step_named(self, named: tuple[Part, ...], made: list[Use], losses: tuple[Any, ...]) -> StepBatch:
        """The step whose samples the user has named."""
        drawn = [use.batch for use in made if use.batch is not None and not use.batch.source.is_indexed]
        batches = list(dict.fromkeys(drawn))
        if len(named) == len(batches):
            named = tuple([replace(p, contents=b.contents) for p, b in zip(named, batches, strict=True)])
        self._has_stepped(batches[-1:])
        states = [use.forward.states for use in made if use.forward and use.forward.states is not None]
        return joined(named, losses, loose=states[0] if states else None)

    def _step(self, made: list[Use], losses: tuple[Any, ...]) -> StepBatch:
        """The step of these uses.

        Raises:
            UnknownBatchError: if the batch of one of them cannot be told, or they are of two data sets.
        """
        uses = uses_by_batch(made, self.habits)
        self._set(lengths=lengths_after(uses, self.habits))
        self.waiting = [w for w in self.waiting if w.batch not in uses]
        batches = sorted(uses, key=lambda batch: batch.number)
        self._set(trained=self.habits.trained | {batch.source.loader for batch in batches})
        self._has_stepped(batches[-1:])
        parts = [part_of(batch, [use.forward for use in uses[batch] if use.forward]) for batch in batches]
        return joined(parts, losses, drawn=tuple(batches))

    def _has_stepped(self, last: Sequence[Batch]) -> None:
        """Notes that there was a step, and the last batch that it was made of, if any."""
        for batch in last:
            self.epochs = self.epochs.with_step_of(batch)
            if self.habits.dataset is None:
                self._set(dataset=batch.source.dataset)
        self._set(has_stepped=True)

    def _set(self, **habits: Any) -> None:
        if any(getattr(self.habits, name) != value for name, value in habits.items()):
            self.habits = replace(self.habits, **habits)


_READS: dict[type, Callable[[_Reading, Any], None]] = {
    Drawn: _Reading.drawn,
    Ended: _Reading.ended,
    Forgotten: _Reading.forgotten,
    Named: _Reading.name,
    Evaluated: _Reading.evaluated,
    Forward: _Reading.forward,
    Returned: _Reading.returned,
    Released: _Reading.released,
    Cleared: _Reading.cleared,
    Shared: _Reading.shared,
    Backward: _Reading.backward,
}

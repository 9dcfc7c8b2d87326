"""Which samples made this optimizer step: the books that are kept of what is seen (see `trajrec.capture.hooks`).

    draw        a batch is drawn, and waits
    forward     with gradients: a `Use` of one of the batches that wait, or of the last one again. It is the batch whose
                tensors the model was called on, or copies of them; or the only one there is; or the newest, in a
                loop that has been seen to use its batches as it draws them. Otherwise it is not known
    backward    the uses that the gradient comes from belong to the next step: autograd's graph says which these are
    take        the step is made: their samples

A batch that was drawn but never went through a forward pass with gradients and a backward pass is no training
batch: validation passes between steps drop out. What this cannot tell (iterable data sets, ids that are no
integers, loops without a DataLoader, two batches that could be meant) is an error that says to call
`trajrec.set_batch(ids)` before each step. Ids are right or absent, never wrong.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from trajrec.capture.batches import (
    Handed,
    MicroBatch,
    States,
    StepBatch,
    alone,
    as_ids,
    holders_of,
    samples_in,
    step_of,
    tensors_in,
    traces_of,
)
from trajrec.capture.observing.digesting import Sums
from trajrec.capture.stopwatch import Stopwatch
from trajrec.digest import digest, sketch
from trajrec.errors import RecordingError, UnknownBatchError
from trajrec.inputs import contents_of
from trajrec.records import FloatArray, IntArray
from trajrec.task.seeding import Seeded, find_seeded

_MOST_DRAWN = 64
_MOST_EVALUATED = 16  # without a word which they are
_MOST_RECENT = 32
_HINT = "Call trajrec.set_batch(ids) with the sample ids of the step before optimizer.step()."
_MARK = "trajrec"


class _Token:
    """Lives as long as the node of autograd's graph that it was given to."""

    __slots__ = ("__weakref__",)


@dataclass(slots=True, eq=False)
class Use:
    """A forward pass with gradients.

    Attributes:
        batch: that it was called on; None if that cannot be told.
        why: the reason, then.
        training: whether the model was in training mode.
        size: samples that went in.
        states: of the generators before it.
        marks: of its outputs in autograd's graph; none if they are not known.
        is_guess: no pass was seen: the batch is thought to have been used because it was there.
        is_shown: what the model was called on was the batch, a view or a copy of it.
        is_stale: the gradient of an earlier backward pass was thrown away.
        lengths: the dimensions of the first input in which it is as long as the batch.
    """

    batch: MicroBatch | None
    why: str = ""
    training: bool = True
    size: int = 0
    states: States | None = None
    marks: list[ref[_Token]] = field(default_factory=list)
    is_guess: bool = False
    is_shown: bool = False
    is_stale: bool = False
    lengths: frozenset[int] = frozenset()

    def mark(self, outputs: Any) -> None:
        """Marks the outputs in autograd's graph, so that a backward pass can be seen to come from them."""
        token = _Token()
        nodes = [
            tensor.grad_fn
            for output in tensors_in(outputs)
            for tensor in (output, output._base)
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None
        ]
        for node in nodes:
            _metadata(node).setdefault(_MARK, []).append(token)
        if nodes:
            self.marks.append(ref(token))

    @property
    def is_gone(self) -> bool:
        """Whether its graph is gone, so that no backward pass can come from it any more."""
        return bool(self.marks) and all(mark() is None for mark in self.marks)


class BatchLedger:
    """Books drawn batches and says which of them made a step.

    Args:
        loaders: the training loaders, or None to watch every loader and take the training set to be the data set
            whose batch made the first step.
        keeps_contents: whether batches are copied as the loop receives them.
    """

    def __init__(self, loaders: Sequence[Any] | None, keeps_contents: bool = False) -> None:
        self.loaders = loaders
        self.keeps_contents = keeps_contents
        self.dataset: Any = None if loaders is None else loaders[0].dataset
        self.epochs = 0
        self.watch = Stopwatch()
        self.backwards = 0  # backward passes seen
        self._lock = threading.RLock()
        self._thread = 0  # that calls the model
        self._steps = 0
        self._sums = Sums(lambda: len(self.dataset) if hasattr(self.dataset, "__len__") else 0)
        self._waiting: list[MicroBatch] = []
        self._lone: MicroBatch | None = None  # the batch in use, while there is no other
        self._number = 0
        self._drawn_before = 0  # the last backward pass
        self._uses: list[Use] = []  # no backward pass has come from them yet
        self._made: list[Use] = []  # of the coming step
        self._forwards: list[Use] = []  # whose outputs are not there yet
        self._uses_newest = False  # the loop has used a batch while it was the newest of its loader
        self._draws_ahead = False  # or an older one
        self._given: list[MicroBatch] = []
        self._given_is_open = False
        self._losses: list[Tensor | float] = []
        self._passes: dict[int, int] = {}
        self._serial = 0
        self._last_serial = 0
        self.passes_before = 0  # over the training data, before the one that the first step was in
        self.seeded_pass: int | None = None  # that the last step's items were made for
        self._seeded: dict[int, Seeded | None] = {}  # by data set
        self._first = True
        self._cleared = False
        self.owners: list[Any] = []  # of the gradients: the model, its optimizers
        self._accumulates: Callable[[], bool] | None = None
        self.needs_proof = False  # the gradient is another model's, too: that a batch is there says nothing
        self._leaves: dict[int, Tensor] = {}  # that the gradients of the first step are of, by their ids
        self._recent: deque[MicroBatch] = deque(maxlen=_MOST_RECENT)
        self._trained: WeakSet[Any] = WeakSet()  # the loaders that steps were made of
        self._lengths: frozenset[int] | None = None  # the same, of all steps before

    def ask_for_gradients(self, accumulates: Callable[[], bool]) -> None:
        """Gives the ledger a way to know whether gradients of an earlier backward pass are still there."""
        self._accumulates = accumulates

    def know(self, model: nn.Module) -> None:
        """This is the model that is recorded: before the samples of its first step are taken.

        Where the gradient is also that of another model, as in adversarial training, the recorded one may be called on
        what that one made, or on noise.
        """
        own = {id(p) for p in model.parameters()}
        self.needs_proof = any(isinstance(leaf, nn.Parameter) and id(leaf) not in own for leaf in self._leaves.values())
        self._leaves = {}

    # ---- batches

    def watches(self, loader: Any) -> bool:
        """Whether batches of this loader can be training batches."""
        return self.loaders is None or any(loader is known for known in self.loaders)

    def begin_pass(self, loader: Any, around: Sequence[Any] = ()) -> int | None:
        """A new pass over a loader has begun, for those `around` it. Returns its number; None if none is watched."""
        if not any(map(self.watches, (loader, *around))):
            return None
        with self._lock:
            key = id(loader.dataset)
            self._passes[key] = self._passes.get(key, 0) + 1
            seeded = find_seeded(loader.dataset)
            # Another loader over the same items (validation, say) does not tell the epoch of the training.
            if seeded is not None and self.dataset in (None, loader.dataset):
                seeded.set_epoch(self._passes[key] - 1)
            self._seeded[key] = seeded
            self._serial += 1
            return self._serial

    def end_pass(self, serial: int) -> None:
        """Nothing more comes from a pass over a loader."""

    def draw(self, handed: Handed, serial: int = 0) -> None:
        """The loop has received a batch."""
        with self._lock:
            if self._waiting or self._made or self._uses:
                self._put_away(handed.loader)
            dataset = handed.loader.dataset
            seeded = self._seeded.get(id(dataset))
            # As it is now: a pass over the same data in between (an evaluation) has told another one.
            made_for = None if seeded is None else seeded.epoch
            self._number += 1
            batch = MicroBatch(
                as_ids(handed.ids),
                handed.loader,
                serial=serial,
                about=handed.about,
                number=self._number,
                thread=threading.get_ident(),
                seeded_pass=made_for,
            )
            made = handed.content if handed.made is None else handed.made
            if self.dataset is None or dataset is self.dataset:
                self._look_at(batch, made)
            batch.content = made if handed.made is None else (handed.content, made)
            self._lone = None if self._waiting or self._made or self._uses else batch
            self._waiting.append(batch)

    def _put_away(self, loader: Any) -> None:
        """What this loader handed out before is done with, if it has been used; and there is an end to waiting."""
        for batch in (*self._waiting, *(use.batch for use in (*self._uses, *self._made) if use.batch is not None)):
            batch.let_go()
        is_done = [batch.loader is loader and batch.is_known and batch.is_used for batch in self._waiting]
        self._waiting = [batch for batch, is_over in zip(self._waiting, is_done, strict=True) if not is_over]
        looked_at = [batch for batch in self._waiting if batch.evaluated][:-_MOST_EVALUATED]
        self._waiting = [batch for batch in self._waiting if batch not in looked_at][-_MOST_DRAWN:]
        self._uses = [use for use in self._uses if not use.is_gone]

    def _look_at(self, batch: MicroBatch, content: Any) -> None:
        """Sums, and copies if that is wanted, what is in a batch: now, because loops change batches in place."""
        batch.sketch = self._sum(batch.ids, content, batch.serial, self._steps + 1)
        if self.keeps_contents:
            try:
                batch.contents = contents_of(content)
            except RecordingError as error:
                batch.contents = error  # to be raised only if the batch makes a step
        elif self._first:
            batch.digest = digest(content)

    def _sum(self, ids: Any, content: Any, serial: int, step: int) -> int | None:
        is_first = not self.epochs or (self.epochs == 1 and serial == self._last_serial)
        return sketch(content) if self._sums.wants(ids, step, is_first) else None

    def give(self, ids: IntArray, weights: FloatArray | None) -> None:
        """The user has named the samples of the next step, or of its next micro-batch."""
        with self._lock:
            if self._given_is_open:
                del self._given[-1]
            self._given.append(MicroBatch(ids, weights=weights))
            self._given_is_open = True

    # ---- forward passes

    def forward(self, gradients: bool, training: bool, inputs: tuple[Any, ...], states: Callable[[], States]) -> None:
        """The model is being called, with or without gradients, in training mode or not.

        `states` reads the generators: their states belong to the batch that is used, so that other random numbers drawn
        before it (shuffling, an evaluation) do not count.
        """
        if _is_transformed():
            return
        with self._lock:
            if not gradients:
                self._evaluated(inputs)
                return
            size = samples_in(inputs)
            if self._given_is_open:
                self._given[-1].passes.append((size, states()))
            use = self._used(inputs)
            if use.batch is not None:
                use.batch.is_used = True
            use.training, use.size, use.states = training, size, states()
            if use.batch is not None and use.batch.ids is not None:
                use.lengths = _lengths(inputs, len(use.batch.ids))
            self._uses.append(use)
            self._forwards.append(use)

    def forwarded(self, outputs: Any) -> None:
        """The forward pass with gradients that began last has ended with these outputs."""
        if _is_transformed():
            return
        with self._lock:
            if self._forwards:
                self._forwards.pop().mark(outputs)

    def _evaluated(self, inputs: tuple[Any, ...]) -> None:
        """The model was called without gradients: on the batch that was drawn last, if nothing else is known."""
        shown = _shown(self._waiting, inputs)
        batch = shown or (self._waiting[-1] if self._waiting else None)
        if batch is not None and not batch.is_used:
            batch.evaluated, batch.is_known = True, shown is not None

    def _used(self, inputs: tuple[Any, ...]) -> Use:
        """The batch that a forward pass with gradients is about; None and why, if that cannot be told."""
        thread = threading.get_ident()
        if self._thread not in (0, thread):
            return Use(
                None, f"More than one thread calls the model, and it cannot be told which of them makes a step. {_HINT}"
            )
        self._thread = thread
        asks = self.needs_proof or self._first
        if self._lone is not None and not asks and self._is_lone_meant(self._lone, inputs):
            self._learn(self._lone)
            return Use(self._lone)
        uses = (*self._made, *[use for use in self._uses if not use.is_gone and not use.is_stale])
        before = [use.batch for use in uses if use.batch is not None and not use.is_guess]
        there = (*before, *self._waiting)
        shown = _shown((*self._recent, *there), inputs, copies=False) or _shown(there, inputs)
        if shown is not None:
            self._learn(shown)
            shown.is_known = True
            return Use(shown, is_shown=True)
        if (
            self._lone is not None
            and not (self._lone.evaluated and self.dataset is None)
            and self._is_usual(self._lone)
        ):
            self._learn(self._lone)
            return Use(self._lone)
        return Use(*self._only(before))

    def _is_lone_meant(self, lone: MicroBatch, inputs: tuple[Any, ...]) -> bool:
        """Whether the only batch there is the one that the model is called on, as far as a short look tells."""
        if _shown([lone], inputs, copies=False):
            return True
        if not self._is_usual(lone) or (lone.evaluated and self.dataset is None):
            return False
        return _shown(self._recent, inputs, copies=False) is None

    def _is_usual(self, batch: MicroBatch) -> bool:
        """Whether steps were made of this batch's loader before, or of none that is still there."""
        return not self._trained or batch.loader in self._trained

    def _learn(self, batch: MicroBatch) -> None:
        """Notes whether the loop uses batches as it draws them, or draws some ahead of those that it uses."""
        newest = all(other.number <= batch.number for other in self._waiting if other.loader is batch.loader)
        self._uses_newest |= newest
        self._draws_ahead |= not newest or batch.thread != threading.get_ident()

    def _only(self, before: Sequence[MicroBatch]) -> tuple[MicroBatch | None, str]:
        """The batch that nothing but its being there speaks for."""
        # An evaluation is over when its pass is: until then a batch that was thought to be evaluated may be meant.
        usual = [batch for batch in self._waiting if self._is_usual(batch)]
        waiting = [b for b in self._own(usual) if not (b.evaluated and (b.is_known or _is_over(b)))]
        fitting = [batch for batch in waiting if batch not in before]
        if not fitting:
            return self._again(before)
        if before and fitting[0].number <= self._drawn_before:
            return None, _why_several([before[-1], *fitting])  # it was there already when the last one was used
        if len(fitting) == 1:
            return fitting[0], ""
        return (fitting[-1], "") if self._is_newest_meant(fitting) else (None, _why_several(fitting))

    def _again(self, before: Sequence[MicroBatch]) -> tuple[MicroBatch | None, str]:
        """The batch that is used once more, where no other waits: the one of the step, or the newest of several."""
        if not before:
            return None, _why_none()
        in_turn = self._uses_newest and not self._draws_ahead
        if len({id(batch) for batch in before}) > 1 and not in_turn:
            return None, _why_several(before)
        return max(before, key=lambda batch: batch.number), ""

    def _is_newest_meant(self, batches: Sequence[MicroBatch]) -> bool:
        """Whether the loop, by all that was seen of it, uses the newest of these batches, and has skipped the others.

        They come from one pass over a loader then, or from earlier ones that came to their end.
        """
        *skipped, newest = batches
        in_turn = [
            batch.loader is newest.loader and (batch.serial == newest.serial or _is_over(batch)) for batch in skipped
        ]
        return self._uses_newest and not self._draws_ahead and all(in_turn)

    def _own(self, batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        """Those of the training set, where it is known and there are any."""
        return [batch for batch in batches if self.dataset in (None, batch.loader.dataset)] or batches

    # ---- backward passes

    def cleared(self, by: Any) -> None:
        """An optimizer or a module has set its gradients to zero."""
        for known in self.owners:
            if by is known:
                self._cleared = True

    def backward(self, loss: Any) -> None:
        """A backward pass has begun: what it comes from belongs to the next step."""
        thread = threading.get_ident()
        if self._thread not in (0, thread):
            return  # of another training
        with self._lock:
            # A checkpoint calls backward within a backward pass.
            is_nested = torch._C._current_graph_task_id() != -1
            self.backwards += not is_nested
            self._lone = None
            is_ours = self._book(loss, is_nested)
            self._drawn_before = self._number
            self._cleared = self._given_is_open = False
            if is_ours and isinstance(loss, Tensor) and loss.numel() == 1:
                # A number that is at hand is read at once; from another device it is fetched with the weights.
                self._losses.append(loss.item() if loss.is_cpu else loss.detach())

    def _book(self, loss: Any, is_nested: bool) -> bool:
        """Takes in what a backward pass comes from. Whether it may be one of the training that is recorded."""
        given = self._given[:-1] if self._given_is_open else self._given
        if (self._made or given) and not is_nested and (self._cleared or not self._adds_up(loss)):
            self._start_anew()
        pending = [use for use in self._uses if not use.is_gone]
        reached = _reached(pending, loss)
        marked = [use for use in (*pending, *self._made) if use.marks]
        is_ours = bool(reached) or not marked or bool(_reached(self._made, loss))
        if is_ours and self._first:
            self._leaves |= {id(node.variable): node.variable for node in _graph(loss) if hasattr(node, "variable")}
        known = [use for use in pending if use.marks]
        if not known:
            # Nothing is known of their outputs.
            reached = [use for use in pending if use.training] or pending
            batches = [use.batch for use in reached if use.batch is not None]
            if len({id(batch) for batch in batches}) > 1:
                reached, self._uses, pending = [Use(None, _why_several(batches))], [], []
                self._made += reached
                return is_ours
        self._uses = [use for use in pending if use not in reached]
        if not pending and not any(not use.is_guess for use in self._made):
            reached = self._guessed()
        self._made += reached
        self._lay_aside()
        return is_ours

    def _adds_up(self, loss: Any) -> bool:
        """Whether this backward pass adds to gradients of an earlier one."""
        if self._accumulates is not None:
            return self._accumulates()
        # Nobody knows the model yet: the parameters that the pass will come to do.
        leaves = [node.variable for node in _graph(loss) if hasattr(node, "variable")]
        return not leaves or any(leaf.grad is not None and bool(leaf.grad.any()) for leaf in leaves)

    def _start_anew(self) -> None:
        """The gradients of earlier backward passes were thrown away without a step.

        A scaler skipped it, or the pass was for something else (the gradient of the inputs, another model): then there
        may be another one from the same outputs, or the batch that was thought to be used still waits.
        """
        self._losses, self._leaves = [], {}
        self._given = self._given[-1:] if self._given_is_open else []
        for use in self._made:
            use.is_stale = True
        self._uses = [use for use in self._made if use.marks and not use.is_gone] + self._uses
        self._made = []

    def _guessed(self) -> list[Use]:
        """Where no forward pass was seen (the loop calls parts of the model), the batch that is there is used."""
        made = [use.batch for use in self._made]
        there = [batch for batch in self._own(self._waiting) if batch not in made]
        fitting = [batch for batch in there if not batch.is_used and not batch.is_known]
        if not fitting:
            return []
        if len(fitting) > 1 and not self._is_newest_meant(fitting):
            return [Use(None, _why_several(fitting), is_guess=True)]
        self._learn(fitting[-1])
        return [Use(fitting[-1], is_guess=True)]

    def _lay_aside(self) -> None:
        """Done with what was drawn, but for the batches that wait for their turn: those after the last in use."""
        made = [use.batch for use in self._made if use.batch is not None and not use.is_guess]
        last = max((batch.number for batch in made), default=0)
        unused = [batch for batch in self._waiting if not batch.is_used]
        self._waiting = [batch for batch in unused if batch.number > last] if last else unused
        for batch in self._waiting:
            batch.let_go()

    # ---- the step

    def take(self) -> StepBatch:
        """The samples of the step that is about to be made; forgets them.

        Raises:
            UnknownBatchError: if they cannot be told.
        """
        with self._lock:
            if self._thread not in (0, threading.get_ident()):
                raise UnknownBatchError(
                    "The optimizer steps in another thread than the one that calls the model, so it cannot be told "
                    f"which batches made the step. {_HINT}"
                )
            self._steps += 1
            self._forwards.clear()
            # Of outputs that nobody knows no backward pass can be seen to come any more.
            self._uses = [use for use in self._uses if use.marks and not use.is_gone]
            if self._cleared and self._made:
                self._start_anew()  # the gradient that the step is made of was thrown away
            return self._take_lone() or self._take_all()

    def _take_all(self) -> StepBatch:
        made, losses, given = self._made, self._losses, self._given
        self._made, self._losses, self._given, self._given_is_open = [], [], [], False
        if given:
            return self._take_given(given, made, losses)
        batches = self._batches_of(made)
        self._waiting = [batch for batch in self._waiting if batch not in batches]
        self._count_epoch(batches[-1])
        self._first = False
        for batch in batches:
            if batch.sketch is not None:
                self._sums.note(batch.ids)
        return step_of(batches, losses, None)

    def _take_given(self, given: list[MicroBatch], made: list[Use], losses: list[Tensor | float]) -> StepBatch:
        """The step whose samples the user has named."""
        batches = list({id(use.batch): use.batch for use in made if use.batch is not None}.values())
        if len(given) == len(batches):
            for named, drawn in zip(given, batches, strict=True):
                named.contents = drawn.contents
        if batches:
            self._count_epoch(batches[-1])
        self._first = False
        return step_of(given, losses, next((use.states for use in made if use.states is not None), None))

    def _batches_of(self, made: list[Use]) -> list[MicroBatch]:
        """The batches of these uses in the order they were drawn, each with its passes.

        Raises:
            UnknownBatchError: one of them cannot be told, or they are of two data sets.
        """
        if not made:
            raise UnknownBatchError(_why_none())
        for use in made:
            if use.batch is None:
                raise UnknownBatchError(use.why)
        made = self._of_one_set(made)
        batches = {id(use.batch): use.batch for use in made if use.batch is not None}
        for batch in batches.values():
            if batch.ids is None:
                raise UnknownBatchError(_why_unknown(batch.loader))
            if self.needs_proof and not any(use.is_shown for use in made if use.batch is batch):
                raise UnknownBatchError(_WHY_UNPROVEN)
            self._check_size([use for use in made if use.batch is batch])
            batch.passes = [(use.size, use.states) for use in made if use.batch is batch and use.states is not None]
        for batch in batches.values():
            self._remember(batch)
        return sorted(batches.values(), key=lambda batch: batch.number)

    def _check_size(self, uses: Sequence[Use]) -> None:
        """Checks that the model was called on as many samples as the batch has, as in all steps before.

        Raises:
            UnknownBatchError: it was not: several batches were joined, perhaps.
        """
        batch = uses[0].batch
        if batch is None or batch.ids is None or any(use.is_guess for use in uses):
            return
        size = sum(use.size for use in uses)
        in_pieces = len(uses) > 1 and size == len(batch.ids)
        lengths = frozenset({0}) if in_pieces else frozenset().union(*(use.lengths for use in uses))
        known = lengths if self._lengths is None else self._lengths & lengths
        if self._lengths and not known:
            raise UnknownBatchError(
                f"The model was called on {size} samples in this step, and the batch that it seems to be has "
                f"{len(batch.ids)}: batches were joined, or cut. {_HINT}"
            )
        self._lengths = known

    def _remember(self, batch: MicroBatch) -> None:
        """Knows the batch again for a while, and its loader for as long as it is there."""
        self._trained.add(batch.loader)
        if batch.content is not None:
            batch.traces, batch.content = traces_of(batch.content), None
        if not self.keeps_contents and batch not in self._recent:
            self._recent.append(batch)

    def _of_one_set(self, made: list[Use]) -> list[Use]:
        """These uses, if they are of one data set.

        Raises:
            UnknownBatchError: they are of two.
        """
        known = {id(use.batch.loader.dataset): use.batch.loader.dataset for use in made if use.batch is not None}
        if len(known) > 1:
            names = " and ".join(type(dataset).__name__ for dataset in known.values())
            raise UnknownBatchError(
                f"This step was made of batches of {len(known)} data sets ({names}), and a recording has the samples "
                "of one. Name its loader, trajrec.record(loader=...), if the other one is no training data, or "
                f"train on one data set that holds both (torch.utils.data.ConcatDataset). {_HINT}"
            )
        if self.dataset is not None and id(self.dataset) not in known:
            raise UnknownBatchError(
                "This step was made of a batch of another data set than the steps before it (another object, a "
                f"{type(next(iter(known.values()))).__name__}): ids of two data sets do not go together. Make the data "
                f"set once, before the loop. {_HINT}"
            )
        return made

    def _take_lone(self) -> StepBatch | None:
        """The step where all of it is one batch that went through the model once, as most do; else None."""
        if len(self._made) != 1 or self._waiting or self._given or self.dataset is None:
            return None
        use = self._made[0]
        batch = use.batch
        if batch is None or batch.ids is None or use.states is None or batch.loader.dataset is not self.dataset:
            return None
        if (self.needs_proof and not use.is_shown) or use.lengths != self._lengths or self._cleared:
            return None
        losses = self._losses
        self._made, self._losses = [], []
        batch.passes = [(use.size, use.states)]
        if batch.serial != self._last_serial or self._first:
            self._count_epoch(batch)
            self._first = False
        self.seeded_pass = batch.seeded_pass
        if batch.sketch is not None:
            self._sums.note(batch.ids)
        self._remember(batch)
        return alone(batch, losses)

    def _count_epoch(self, batch: MicroBatch) -> None:
        self.dataset = batch.loader.dataset if self.dataset is None else self.dataset
        if self._first:
            self.passes_before = self._passes.get(id(self.dataset), 1) - 1
        self.seeded_pass = batch.seeded_pass
        if batch.serial > self._last_serial or not self.epochs:
            # Passes that made no step (a look at the data, an evaluation on them) are no epochs; nor does one begin
            # where the loop comes back to a pass that it left for another.
            self._last_serial = batch.serial
            self.epochs += 1


def _lengths(inputs: tuple[Any, ...], count: int) -> frozenset[int]:
    """The dimensions of the first tensor of these in which it is as long as a batch."""
    first = next(tensors_in(inputs), None)
    return frozenset() if first is None else frozenset(k for k, size in enumerate(first.shape) if size == count)


def _shown(batches: Iterable[MicroBatch], inputs: tuple[Any, ...], copies: bool = True) -> MicroBatch | None:
    """The batch that inputs are taken from, the newest of several with the same samples; None if nothing tells."""
    known = list({id(batch): batch for batch in batches}.values())
    found = [known[place] for place in holders_of([batch.traces_now() for batch in known], inputs, copies)]
    samples = {None if batch.ids is None else batch.ids.tobytes() for batch in found}
    return (
        max(found, key=lambda batch: batch.number)
        if len(samples) == 1 and (len(found) == 1 or None not in samples)
        else None
    )


def _is_transformed() -> bool:
    """Whether torch.func is at work, which calls the model on tensors that have no values to look at."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _is_over(batch: MicroBatch) -> bool:
    """Whether nothing more comes from the pass over a loader that a batch is of."""
    return batch.about is None or batch.about.is_over


def _reached(uses: Sequence[Use], loss: Any) -> list[Use]:
    """The uses that a gradient comes from, found in autograd's graph from the loss on, nearest nodes first."""
    sought = {id(token): use for use in uses for mark in use.marks if (token := mark()) is not None}
    found: set[int] = set()
    for node in _graph(loss) if sought else ():
        found |= {id(sought[id(token)]) for token in _metadata(node).get(_MARK, ()) if id(token) in sought}
        if len(found) == len({id(use) for use in sought.values()}):
            break
    return [use for use in uses if id(use) in found]


def _graph(loss: Any) -> Iterator[Any]:
    """The nodes of autograd's graph behind a loss, nearest first."""
    nodes = [tensor.grad_fn for tensor in tensors_in(loss) if tensor.grad_fn is not None]
    seen = set(nodes)
    for node in nodes:  # which grows meanwhile
        yield node
        further = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= further
        nodes.extend(further)


def _metadata(node: Any) -> dict[str, Any]:
    """A dictionary that lives as long as a node of autograd's graph (torch's stubs take it for a method)."""
    found: dict[str, Any] = node.metadata
    return found


_WHY_UNPROVEN = (
    "The gradient is that of another model, too, as in adversarial training, and what the recorded model was called on "
    f"is no batch of a DataLoader, nor a copy of one: it cannot be told whether samples made this step. {_HINT}"
)


def _why_none() -> str:
    return (
        "No batch of a DataLoader was seen that this optimizer step could have been made of: none was drawn, or "
        f"another step has used it. {_HINT}"
    )


def _why_several(batches: Sequence[MicroBatch]) -> str:
    if len({id(batch.loader) for batch in batches}) > 1:
        return (
            "Two loaders handed out a batch before this step, and it cannot be told which of them the model was called "
            f"on: its inputs are neither. {_HINT}"
        )
    return (
        f"{len(batches)} batches were drawn before the model was called, and it cannot be told which of them it was "
        f"called on: its inputs are none of them. {_HINT}"
    )


def _why_unknown(loader: Any) -> str:
    dataset = type(loader.dataset).__name__
    if isinstance(loader.dataset, IterableDataset):
        return f"{dataset} is an iterable data set: its samples have no ids. {_HINT}"
    if not getattr(loader, "in_order", True):
        return f"The DataLoader over {dataset} has in_order=False: batches come in any order. {_HINT}"
    return (
        f"The sampler of the DataLoader over {dataset} does not draw integer ids, or a batch before this one failed: "
        f"its ids cannot be told. {_HINT}"
    )

"""Writes down what is seen of a training loop as facts, and has them read when a step is made.

The methods are called by the hooks that are put into the loop. What they look at themselves is what needs the tensors
of that moment: which batch a model's inputs are taken from, which forward passes a gradient comes from, whether
gradients of an earlier backward pass are there. They decide nothing: that is for `trajrec.capture.attribution.reading`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from trajrec.capture.attribution.batches import Batch, Source, States, StepBatch
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
from trajrec.capture.attribution.known import NOTHING, Habits, Known
from trajrec.capture.attribution.reading import Outcome, read
from trajrec.capture.observing.arrivals import Arrivals
from trajrec.capture.observing.clipping import Clippings
from trajrec.capture.observing.criteria import Criteria
from trajrec.capture.observing.cut_out import Cut, CutOut, Described
from trajrec.capture.observing.digesting import Sums
from trajrec.capture.observing.graph import GraphMarks, leaves_of
from trajrec.capture.observing.listeners import Handed
from trajrec.capture.observing.passes import Passes
from trajrec.capture.observing.picked import picked_from
from trajrec.capture.observing.surroundings import Surroundings
from trajrec.capture.observing.traces import BatchTensors, Held, tensors_of
from trajrec.digest import digest, sampled_digest
from trajrec.errors import RecordingError, UnknownBatchError
from trajrec.inputs import contents_of
from trajrec.records import FloatArray, IntArray

# More are read before the step: an evaluation between two steps may see any number of batches.
_MOST_FACTS, _MOST_HELD = 512, 96


_transforms = torch._C._functorch.peek_interpreter_stack
_running_backward = torch._C._current_graph_task_id


class Observer:
    """What is seen of a training loop.

    Args:
        loaders: the training loaders, or None to watch every loader and take the training set to be the data set
            whose batch made the first step.
        keeps_contents: whether batches are copied as the loop receives them.
        numbers_arrivals: whether samples whose ids cannot be told get them in the order in which they arrive.

    Attributes:
        known: what the facts have told so far.
        passes: over the loaders.
        backwards: how many backward passes were seen.
        owners: of the gradients: the model, its optimizers.
        clippings: of gradients; criteria: of the losses; surroundings: of the forward passes.
        arrivals: the samples that are numbered as they arrive; None if none are.
    """

    def __init__(
        self, loaders: Sequence[Any] | None, keeps_contents: bool = False, numbers_arrivals: bool = False
    ) -> None:
        self.passes = Passes(loaders, self._forgotten)
        habits = Habits() if loaders is None else Habits(self.passes.source(loaders[0]).dataset)
        self.known = Known(habits)
        self.backwards = 0
        self.owners: list[Any] = []
        self.clippings, self.criteria, self.surroundings = Clippings(), Criteria(), Surroundings()
        self._keeps_contents = keeps_contents
        self._facts: list[Fact] = []
        self._lock = threading.RLock()
        self._cut = CutOut(self.passes.new_source)
        self.arrivals = Arrivals() if numbers_arrivals else None
        self._whole: dict[int, int] = {}  # N of forward passes on what was cut out, by their numbers
        self._tensors = BatchTensors()
        self._marks = GraphMarks(self._released)
        self._digests = Sums(self._samples)
        self._thread = 0  # that calls the model
        self._batches = self._forwards = self._steps = 0  # how many there were
        self._running: list[int] = []  # forward passes whose outputs are not there yet
        self._is_open = False  # a backward pass was seen since the last step
        self._is_cleared = False  # gradients were set to zero since the last backward pass
        self._is_evaluated = False  # the model was called without gradients since the last batch was drawn
        self._accumulates: Callable[[], bool] | None = None
        self._leaves: dict[int, Tensor] = {}  # that the gradients of the first step are of, by their ids

    def ask_for_gradients(self, accumulates: Callable[[], bool]) -> None:
        """Gives a way to know whether gradients of an earlier backward pass are still there."""
        self._accumulates = accumulates

    def know(self, model: nn.Module) -> None:
        """This is the model that is recorded: before the samples of its first step are taken.

        Where the gradient is also that of another model, as in adversarial training, the recorded one may be called on
        what that one made, or on noise.
        """
        own = {id(p) for p in model.parameters()}
        others = [leaf for key, leaf in self._leaves.items() if isinstance(leaf, nn.Parameter) and key not in own]
        if others:
            self._facts.append(Shared())
        self._leaves = {}

    # ---- batches

    def _samples(self) -> int:
        return len(self.passes.dataset) if hasattr(self.passes.dataset, "__len__") else 0

    def draw(self, handed: Handed, serial: int = 0) -> None:
        """The loop has received a batch."""
        with self._lock:
            source = self.passes.source(handed.loader)
            made = handed.content if handed.made is None else handed.made
            is_training = self.passes.is_training(handed.loader)
            ids = handed.ids
            if ids is None and self.arrivals is not None:
                ids = self.arrivals.number(source, made)
            batch = self._batch(ids, source, serial, made if is_training else None, handed.ids is None)
            self._facts.append(Drawn(batch, handed.about is None or handed.about.is_over))
            content = made if handed.made is None else (handed.content, made)
            self._tensors.add(Held(batch, content, handed.loader))
            self._is_evaluated = False
            self._tidy()

    def _batch(self, ids: IntArray | None, source: Source, serial: int, content: Any, is_new: bool) -> Batch:
        """A batch with what is kept of its content: now, because loops change batches in place."""
        self._batches += 1
        found = checksum = contents = None
        if content is not None:
            epochs = self.known.epochs
            is_first = is_new or not epochs.count or (epochs.count == 1 and serial == epochs.serial)
            if self._digests.wants(ids, self._steps + 1, is_first):
                found = sampled_digest(content)
            if self._keeps_contents:
                contents = _copied(content)
            elif not self.known.habits.has_stepped:
                checksum = digest(content)
        made_for = self.passes.seeded_pass(source)
        thread = threading.get_ident()
        return Batch(self._batches, source, ids, serial, thread, made_for, found, checksum, contents)

    def end_pass(self, serial: int) -> None:
        """Nothing more comes from a pass over a loader."""
        self._facts.append(Ended(serial))

    def _forgotten(self, loader: int) -> None:
        if loader in self.known.habits.trained:
            self._facts.append(Forgotten(loader))

    def give(self, ids: IntArray, weights: FloatArray | None) -> None:
        """The user has named the samples of the next step, or of its next micro-batch."""
        self._facts.append(Named(ids, weights))

    # ---- forward passes

    def forward(self, gradients: bool, training: bool, inputs: tuple[Any, ...], states: Callable[[], States]) -> None:
        """The model is being called, with or without gradients, in training mode or not.

        `states` reads the generators: their states belong to the batch that is used, so that other random numbers drawn
        before it (shuffling, an evaluation) do not count.
        """
        if _is_transformed():
            return
        with self._lock:
            given = tensors_of(inputs)
            shown, why = self._tensors.shown(given, not gradients or self._is_value_wanted()), ""
            if shown is None and gradients and self._is_cut_out():
                shown, why = self._rows(given)
            if not gradients:
                if shown is not None and not training and not shown.source.is_indexed:
                    self.surroundings.evaluates(shown.source.loader, self.passes.loader(shown.source.loader))
                self._facts.append(Evaluated(shown))
                self._is_evaluated = True
                self._tidy()
                return
            thread = threading.get_ident()
            self._thread = self._thread or thread
            self._forwards += 1
            if not self.known.habits.has_stepped:
                self.surroundings.look()
            shape = tuple(given[0].shape) if given else ()
            fact = Forward(self._forwards, thread, training, _samples_in(inputs, given), shape, states(), shown, why)
            self._facts.append(fact)
            if shown is not None and shown.ids is not None and shown.source.is_indexed:
                self._whole[fact.number] = len(shown.ids)
            self._running.append(fact.number)

    def _is_value_wanted(self) -> bool:
        """Whether copies of a batch are to be told, too: not where there is one batch only, as in most steps."""
        habits, only = self.known.habits, self._tensors.only
        is_plain = habits.has_stepped and not (habits.needs_proof or habits.draws_ahead or self._is_evaluated)
        return not is_plain or only is None or only.source.is_indexed or only.source.loader not in habits.trained

    def _is_cut_out(self) -> bool:
        """Whether the model may be called on rows of a tensor: not where a loader's batches are trained on."""
        habits = self.known.habits
        if habits.has_stepped:
            return self._cut.described(habits.dataset) is not None
        return self.passes.loaders is None

    def _rows(self, given: Sequence[Tensor]) -> tuple[Batch | None, str]:
        """The rows of a tensor that the model is called on, or why they cannot be told."""
        cut = self._cut.find(given, may_search=not self.known.habits.has_stepped)
        return (None, cut) if isinstance(cut, str) else (self._cut_batch(cut), "")

    def _cut_batch(self, cut: Cut) -> Batch:
        self._batches += 1
        return Batch(self._batches, cut.source, cut.ids, self._cut.serial(cut.source), threading.get_ident())

    def stacked(self, pieces: Any, stacked: Any, frame: FrameType) -> None:
        """Tensors were stacked in this frame: a batch, if they are windows of a tensor."""
        cut = self._cut.stacked(pieces, frame) if isinstance(stacked, Tensor) and self._is_cut_out() else None
        if cut is None:
            return
        with self._lock:
            batch = self._cut_batch(cut)
            self._facts.append(Drawn(batch))
            self._tensors.add(Held(batch, [stacked], None))
            self._is_evaluated = False
            self._tidy()

    def wants_stacked(self) -> bool:
        """Whether what is stacked may be a batch: not once steps are made of something else."""
        return not self.known.habits.has_stepped or self._is_cut_out()

    @property
    def is_numbered(self) -> bool:
        """Whether the training samples get their ids in the order in which they arrive."""
        return self.arrivals is not None and self.arrivals.counts(self.known.habits.dataset)

    def cut_out(self) -> Described | None:
        """What the training data are where the loop cuts batches out of a tensor; None where a loader makes them."""
        return self._cut.described(self.known.habits.dataset)

    def forwarded(self, outputs: Any) -> None:
        """The forward pass with gradients that began last has ended with these outputs."""
        if self._running and not _is_transformed():
            number = self._running.pop()
            if self._marks.mark(number, outputs):
                self._facts.append(Returned(number))

    def _released(self, number: int) -> None:
        self._facts.append(Released(number))

    # ---- backward passes

    def cleared(self, by: Any) -> None:
        """An optimizer or a module has set its gradients to zero."""
        for owner in self.owners:
            if by is owner:
                self._facts.append(Cleared(type(by).__name__))
                self._is_cleared = True

    def backward(self, loss: Any) -> None:
        """A backward pass has begun."""
        thread = threading.get_ident()
        if self._thread not in (0, thread):
            return  # of another training
        with self._lock:
            # A checkpoint calls backward within a backward pass.
            is_nested = _running_backward() != -1
            self.backwards += not is_nested
            self.clippings.backward()
            self.criteria.backward(loss)
            adds = not self._is_open or is_nested or self._is_cleared or self._adds_up(loss)
            if not is_nested and (self._is_cleared or not adds):
                self._marks.begin_anew()
                self._leaves = {}
            reaches = self._marks.reached_from(loss)
            if not self.known.habits.has_stepped and (reaches or self._marks.are_none):
                self._leaves |= leaves_of(loss)
            is_number = isinstance(loss, Tensor) and loss.numel() == 1
            # A number that is at hand is read at once; from another device it is fetched with the weights.
            value = None if not is_number else loss.item() if loss.is_cpu else loss.detach()
            of_whole = {number: count for number, count in self._whole.items() if number in reaches}
            picked = picked_from(loss, self._marks, of_whole) if of_whole else {}
            self._facts.append(Backward(thread, reaches, adds, is_nested, value, picked))
            self._is_open, self._is_cleared = True, False

    def _adds_up(self, loss: Any) -> bool:
        """Whether this backward pass adds to gradients of an earlier one."""
        if self._accumulates is not None:
            return self._accumulates()
        # Nobody knows the model yet: the parameters that the pass will come to do.
        leaves = leaves_of(loss).values()
        return not leaves or any(leaf.grad is not None and bool(leaf.grad.any()) for leaf in leaves)

    # ---- the step

    def take(self) -> StepBatch:
        """The samples of the step that is about to be made.

        Raises:
            UnknownBatchError: if they cannot be told.
        """
        with self._lock:
            self._steps += 1
            self._running.clear()
            self._facts.append(Stepped(threading.get_ident()))
            step = self._read()
            self._is_open = False
            if not isinstance(step, StepBatch):
                raise UnknownBatchError(str(step))
            for batch in step.drawn:
                if batch.source.is_indexed:
                    self._cut.note(batch.source, len(step.ids) // len(step.drawn))
                if batch.digest is not None:
                    self._digests.note(batch.ids)
            return step

    def _tidy(self) -> None:
        if len(self._facts) > _MOST_FACTS or self._tensors.count > _MOST_HELD:
            self._read()

    def _read(self) -> Outcome:
        """Reads the facts; keeps at hand what later ones may be about."""
        facts = self._facts[:]
        del self._facts[: len(facts)]  # what another thread has added meanwhile stays
        had_stepped = self.known.habits.has_stepped
        self.known, step = read(self.known, facts)
        number, left = self.known.habits.dataset, self.known.unfinished
        if number is not None and (self.passes.dataset is None or not had_stepped):
            self.passes.train_on(number)
        if self._whole:
            used_by = {use.number for use in (*self.known.unfinished.uses, *self.known.unfinished.made)}
            self._whole = {number: count for number, count in self._whole.items() if number in used_by}
        made = step.drawn if isinstance(step, StepBatch) and not self._keeps_contents else ()
        if left is NOTHING:
            self._marks.keep((), ())
            self._tensors.keep((), made)
            return step
        used = (*left.uses, *left.made)
        self._marks.keep([use.number for use in used], [use.number for use in left.made])
        waiting = [w.batch for w in left.waiting] + [use.batch for use in used if use.batch is not None]
        self._tensors.keep(waiting, made)
        return step


def _copied(content: Any) -> Any:
    """A copy of a batch, or the error that is to be raised if the batch makes a step."""
    try:
        return contents_of(content)
    except RecordingError as error:
        return error


def _samples_in(inputs: tuple[Any, ...], tensors: Sequence[Tensor]) -> int:
    """How many samples a forward pass is called on: the length of its first tensor; 0 if it has none."""
    tensor = next((value for value in (*inputs, *tensors) if isinstance(value, Tensor)), None)
    return len(tensor) if tensor is not None and tensor.dim() else 0


def _is_transformed() -> bool:
    """Whether torch.func is at work, which calls the model on tensors that have no values to look at."""
    return _transforms() is not None

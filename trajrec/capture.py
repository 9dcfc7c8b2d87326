"""Which samples made this optimizer step: found by watching, without a line in the training loop.

Three things are watched while a recording is on:

    DataLoader.__iter__         a stand-in for the loader's batch sampler remembers the ids it drew; the iterator
                                hands them over when the loop receives the batch. Loaders yield in the order drawn,
                                so this also holds with worker processes that fetch ahead.
    the model's forward pass    marks the batch that it used; a pass without gradients is evaluation.
    torch.autograd.backward     batches that were used and led to a backward pass belong to the next step; the
                                loss is the tensor it was called on.

A batch that was drawn but never went through a forward pass with gradients and a backward pass is no training
batch: validation passes between steps drop out. What this cannot tell (iterable data sets, ids that are no
integers, loops without a DataLoader) is an error that says to call `trajrec.set_batch(ids)` before each step.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import wraps
from itertools import accumulate, pairwise
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from trajrec.contents import Contents, contents_of
from trajrec.errors import RecordingError, UnknownBatchError
from trajrec.records import FloatArray, IntArray
from trajrec.seeding import find_seeded
from trajrec.stopwatch import Stopwatch
from trajrec.task import digest, sketch

States = tuple[Tensor, ...]
_MOST_DRAWN = 64
_HINT = "Call trajrec.set_batch(ids) with the sample ids of the step before optimizer.step()."


@dataclass(slots=True)
class MicroBatch:
    """A batch that the loop received from a loader, or whose samples the user has named, and how it was used.

    Attributes:
        ids: [B]; None if they cannot be told.
        loader: where it came from; None if the user named it.
        weights: [B] the c that the user has given, or None.
        contents: a copy of the batch, where it is kept, or why there can be none.
        digest: checksum of the whole content, made until the first step.
        sketch: checksum of a sample of the content, or None.
        used_in_training_mode: None if no forward pass with gradients was seen.
        evaluated: a forward pass without gradients was seen.
        passes: sizes of what went into the model's forward passes with gradients, and generator states before them.
        spent: how many of the passes were made before the last backward pass.
        serial: of the pass over a loader that it came from.
        tensors: of the batch as the loader yielded it, not kept alive.
    """

    ids: IntArray | None
    loader: Any = None
    weights: FloatArray | None = None
    contents: Contents | RecordingError | None = None
    digest: int | None = None
    sketch: int | None = None
    used_in_training_mode: bool | None = None
    evaluated: bool = False
    passes: list[tuple[int, States]] = field(default_factory=list)
    spent: int = 0
    serial: int = 0
    tensors: Sequence[ref[Tensor]] = ()

    def holds(self, inputs: tuple[Any, ...]) -> bool:
        """Whether one of these tensors, or what it is a view of, is in the batch."""
        alive = (tensor for reference in self.tensors if (tensor := reference()) is not None)
        places = {tensor.untyped_storage().data_ptr() for tensor in alive} - {0}
        return any(isinstance(v, Tensor) and v.untyped_storage().data_ptr() in places for v in inputs)

    def cut(self) -> list[tuple[int, States | None]]:
        """Sizes and generator states of the pieces that went through the model one by one; most often only one."""
        assert self.ids is not None
        sizes = [size for size, _ in self.passes]
        if len(sizes) > 1 and sum(sizes) == len(self.ids):
            return list(self.passes)
        return [(len(self.ids), self.passes[0][1] if self.passes else None)]

    def cut_contents(self) -> list[Contents]:
        """The copies of these pieces; none where there is no copy.

        Raises:
            RecordingError: if the batch could not be copied.
        """
        if self.contents is None or self.ids is None:
            return []
        if isinstance(self.contents, RecordingError):
            raise self.contents
        sizes = [size for size, _ in self.cut()]
        if len(sizes) == 1:
            return [self.contents]
        edges = [0, *accumulate(sizes)]
        return [self.contents.rows(slice(a, b), len(self.ids)) for a, b in pairwise(edges)]


@dataclass(slots=True)
class StepBatch:
    """The samples of one step, from one or more micro-batches.

    Attributes:
        ids: [B].
        weights: [B] the c that the user has given, or None.
        losses: what backward was called on; they stay where they are until they are read.
        parts: [A] sizes of the micro-batches.
        rng: [A] generator states at the start of their forward passes; None if there was none.
        sketches: [A] CRC-32 of the batches as the loader made them, or None.
        contents: [A] copies of the micro-batches; none where they are not kept, or no loader made them.
        digest: CRC-32 of the whole batch as the loader made it; None after the first step, or where no loader did.
    """

    ids: IntArray
    weights: FloatArray | None
    losses: list[Tensor]
    parts: tuple[int, ...] = ()
    rng: tuple[States, ...] | None = None
    sketches: tuple[int, ...] | None = None
    contents: tuple[Contents, ...] = ()
    digest: int | None = None

    @property
    def loss(self) -> float:
        """The loss as the loop computed it (sum over backward passes); NaN if there was none."""
        return sum([value.item() for value in self.losses]) if self.losses else float("nan")


class SamplerTap:
    """Stands in for a loader's (batch) sampler and remembers what it drew since the last `iter`."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.drawn: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        self.drawn = deque()
        return self._draw(self.drawn)

    def _draw(self, drawn: deque[Any]) -> Iterator[Any]:
        for ids in self.sampler:
            drawn.append(ids)
            yield ids

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)


class WatchedIterator:
    """A loader's iterator that reports each batch when the loop receives it."""

    def __init__(self, iterator: Any, received: Callable[[Any, Any], None], drawn: deque[Any] | None) -> None:
        self._iterator = iterator
        self._received = received
        self._drawn = drawn

    def __iter__(self) -> WatchedIterator:
        return self

    def __next__(self) -> Any:
        content = next(self._iterator)
        self._received(self._drawn.popleft() if self._drawn else None, content)
        return content

    def __len__(self) -> int:
        return len(self._iterator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


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
        self._drawn: list[MicroBatch] = []
        self._ahead: list[MicroBatch] = []  # drawn before the last backward pass, and not used yet
        self._made_step: list[MicroBatch] = []
        self._given: list[MicroBatch] = []
        self._given_is_open = False
        self._losses: list[Tensor] = []
        self._passes: dict[int, int] = {}
        self._serial = 0
        self._last_serial = 0
        self.passes_before = 0  # over the training data, before the one that the first step was in
        self._loose_rng: States | None = None
        self._is_unclear = False
        self._first = True
        self._cleared = False
        self.owners: list[Any] = []  # of the gradients: the model, its optimizers
        self._accumulates: Callable[[], bool] = lambda: True

    def ask_for_gradients(self, accumulates: Callable[[], bool]) -> None:
        """Gives the ledger a way to know whether gradients of an earlier backward pass are still there."""
        self._accumulates = accumulates

    def watches(self, loader: Any) -> bool:
        """Whether batches of this loader can be training batches."""
        return self.loaders is None or any(loader is known for known in self.loaders)

    def begin_pass(self, loader: Any) -> int:
        """A new pass over a loader has begun. Returns its serial number."""
        key = id(loader.dataset)
        self._passes[key] = self._passes.get(key, 0) + 1
        seeded = find_seeded(loader.dataset)
        # Another loader over the same items (validation, say) does not tell the epoch of the training.
        if seeded is not None and self.dataset in (None, loader.dataset):
            seeded.set_epoch(self._passes[key] - 1)
        self._serial += 1
        return self._serial

    def draw(self, loader: Any, ids: Any, content: Any, serial: int = 0) -> None:
        """The loop has received a batch."""
        self._drawn = [batch for batch in self._drawn if not self._is_over(batch, loader)]
        batch = MicroBatch(_as_ids(ids), loader, serial=serial, tensors=_references(content))
        if self.dataset is None or loader.dataset is self.dataset:
            self._look_at(batch, content)
        self._drawn.append(batch)
        del self._drawn[:-_MOST_DRAWN], self._ahead[:-_MOST_DRAWN]

    def _is_over(self, batch: MicroBatch, loader: Any) -> bool:
        """Whether a batch is done with now that its loader has handed out the next one.

        It was evaluated; or it went through the model and the loop went on without a backward pass: skipped. (Losses
        of several batches of one loader that are added up before one backward pass look the same: they need
        `set_batch`.)
        """
        return batch.loader is loader and (batch.evaluated or batch.used_in_training_mode is not None)

    def _look_at(self, batch: MicroBatch, content: Any) -> None:
        """Sums, and copies if that is wanted, what is in a batch: now, because loops change batches in place."""
        batch.sketch = sketch(content)
        if self.keeps_contents:
            try:
                batch.contents = contents_of(content)
            except RecordingError as error:
                batch.contents = error  # to be raised only if the batch makes a step
        elif self._first:
            batch.digest = digest(content)

    def give(self, ids: IntArray, weights: FloatArray | None) -> None:
        """The user has named the samples of the next step, or of its next micro-batch."""
        if self._given_is_open:
            del self._given[-1]
        self._given.append(MicroBatch(ids, weights=weights))
        self._given_is_open = True

    def forward(self, gradients: bool, training: bool, inputs: tuple[Any, ...], states: Callable[[], States]) -> None:
        """The model is being called, with or without gradients, in training mode or not.

        `states` reads the generators: their states belong to the batch that is used, so that other random numbers drawn
        before it (shuffling, an evaluation) do not count.
        """
        if not gradients:
            if self._drawn and self._drawn[-1].used_in_training_mode is None:
                self._drawn[-1].evaluated = True
            return
        size = _samples_in(inputs)
        if self._given_is_open:
            self._given[-1].passes.append((size, states()))
        used = self._used(training, inputs)
        if used is None:
            self._loose_rng = self._loose_rng or states()
            return
        used.used_in_training_mode = training
        used.passes.append((size, states()))

    def _used(self, training: bool, inputs: tuple[Any, ...]) -> MicroBatch | None:
        """The batch that a forward pass with gradients is about: the newest of the training set that fits.

        Where several were drawn, one that holds the inputs comes first; nothing is known of inputs that were made anew
        from a batch (sent to a device, say).
        """
        if self._ahead and not any(batch.holds(inputs) for batch in (*self._made_step, *self._drawn)):
            self._drawn, self._ahead = [*self._ahead, *self._drawn], []
        if not self._drawn:
            return self._made_step[-1] if self._made_step else None
        own = [batch for batch in self._drawn if self.dataset in (None, batch.loader.dataset)] or self._drawn
        fitting = [b for b in own if not b.evaluated and b.used_in_training_mode in (None, training)]
        if len(self._made_step) + len(fitting) > 1:
            fed = [batch for batch in (*self._made_step, *fitting) if batch.holds(inputs)]
            self._is_unclear |= not fed and self._looks_like_two(fitting, _samples_in(inputs))
            fitting = fed or fitting
        return (fitting or own)[-1]

    def _looks_like_two(self, fitting: Sequence[MicroBatch], size: int) -> bool:
        """Whether the newest batch has been through the model, and now it may be the turn of another loader's."""
        if not any(batch.loader is not fitting[-1].loader for batch in fitting):
            return False
        ids, sizes = fitting[-1].ids, [size for size, _ in fitting[-1].passes]
        return ids is not None and sum(sizes) + size > len(ids)

    def cleared(self, by: Any) -> None:
        """An optimizer or a module has set its gradients to zero."""
        self._cleared |= any(by is known for known in self.owners)

    def backward(self, loss: Any) -> None:
        """A backward pass has begun: what was used so far belongs to the next step."""
        self.backwards += 1
        if self._made_step and (self._cleared or not self._accumulates()):
            self._start_anew()
        self._cleared = False
        self._made_step += self._training_batches()
        for batch in self._made_step:
            batch.spent = len(batch.passes)
        self._ahead = [*self._ahead, *self._drawn_ahead()]
        self._drawn = []
        self._given_is_open = False
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach())

    def _drawn_ahead(self) -> list[MicroBatch]:
        """The batches that were drawn after the last one in use, and wait for their turn."""
        used = [batch.used_in_training_mode is not None for batch in self._drawn]
        newer = len(used) - used[::-1].index(True) if any(used) else len(used)
        return [batch for batch in self._drawn[newer:] if not batch.evaluated]

    def _start_anew(self) -> None:
        """The gradients of earlier backward passes were thrown away without a step.

        A scaler skipped it, say: then a newer batch was drawn. Otherwise the pass was for something else (the gradient
        of the inputs, another model), and the batch is still in use.
        """
        self._losses = []
        self._given = self._given[-1:] if self._given_is_open else []
        if self._drawn:
            self._made_step = []
        for batch in self._made_step:
            batch.passes = batch.passes[batch.spent :] or batch.passes

    def _training_batches(self) -> list[MicroBatch]:
        """Of the batches used with gradients, those of the training set and, if any, in training mode.

        Where no forward pass was seen (the loop calls parts of the model), the batch drawn last counts as used.
        """
        used = [batch for batch in self._drawn if batch.used_in_training_mode is not None] or self._drawn[-1:]
        if not used:
            return []
        dataset = self.dataset if self.dataset is not None else used[-1].loader.dataset
        own = [batch for batch in used if batch.loader.dataset is dataset]
        in_training_mode = [batch for batch in own if batch.used_in_training_mode]
        return in_training_mode or own

    def take(self) -> StepBatch:
        """The samples of the step that is about to be made; forgets them.

        Raises:
            UnknownBatchError: if they cannot be told.
        """
        batches: Sequence[MicroBatch] = self._made_step or self._training_batches()
        loose, losses, given, is_unclear = self._loose_rng, self._losses, self._given, self._is_unclear
        self._made_step, self._losses, self._drawn, self._loose_rng, self._is_unclear = [], [], [], None, False
        self._given, self._given_is_open = [], False
        if given:
            if len(given) == len(batches):
                for named, drawn in zip(given, batches, strict=True):
                    named.contents = drawn.contents
            if batches:
                self._count_epoch(batches[-1])
            self._first = False
            return _step_of(given, losses, loose)
        self._check_known(batches)
        if is_unclear:
            raise UnknownBatchError(
                "Two loaders over the same data handed out a batch before this step, and it cannot be told which of "
                f"them the model was called on. {_HINT}"
            )
        self._count_epoch(batches[-1])
        self._first = False
        return _step_of(batches, losses, loose)

    def _count_epoch(self, batch: MicroBatch) -> None:
        self.dataset = batch.loader.dataset if self.dataset is None else self.dataset
        if self._first:
            self.passes_before = self._passes.get(id(self.dataset), 1) - 1
        if batch.serial != self._last_serial or not self.epochs:
            # Passes that made no step (a look at the data, an evaluation on them) are no epochs.
            self._last_serial = batch.serial
            self.epochs += 1

    def _check_known(self, batches: Sequence[MicroBatch]) -> None:
        if not batches:
            raise UnknownBatchError(
                "No batch of a DataLoader was seen that this optimizer step could have been made of: none was drawn, "
                f"or another step has used it. {_HINT}"
            )
        for batch in batches:
            if batch.ids is None:
                raise UnknownBatchError(_why_unknown(batch.loader))


def _step_of(batches: Sequence[MicroBatch], losses: list[Tensor], loose: States | None) -> StepBatch:
    if len(batches) == 1 and len(batches[0].passes) == 1:
        return _alone(batches[0], losses)
    return _joined(batches, losses, loose)


def _joined(batches: Sequence[MicroBatch], losses: list[Tensor], loose: States | None) -> StepBatch:
    """The step that these micro-batches made; `loose` are generator states of a pass that belongs to none of them."""
    ids = [batch.ids for batch in batches if batch.ids is not None]
    pieces = [piece for batch in batches for piece in batch.cut()]
    states = [state or pieces[0][1] or loose for _, state in pieces]
    known = [state for state in states if state is not None]
    sketches = [batch.sketch for batch in batches if batch.sketch is not None]
    contents = [part for batch in batches for part in batch.cut_contents()]
    return StepBatch(
        ids[0] if len(ids) == 1 else np.concatenate(ids),
        _given_weights(batches),
        losses,
        tuple([size for size, _ in pieces]),
        tuple(known) if len(known) == len(pieces) else None,
        tuple(sketches) if len(sketches) == len(pieces) else None,
        tuple(contents) if len(contents) == len(pieces) else (),
        batches[0].digest if len(batches) == 1 else None,
    )


def _alone(batch: MicroBatch, losses: list[Tensor]) -> StepBatch:
    """`_joined` of one batch that went through the model once, as most do: every step pays for this."""
    assert batch.ids is not None
    return StepBatch(
        batch.ids,
        batch.weights,
        losses,
        (len(batch.ids),),
        (batch.passes[0][1],),
        None if batch.sketch is None else (batch.sketch,),
        tuple(batch.cut_contents()),
        batch.digest,
    )


def _given_weights(batches: Sequence[MicroBatch]) -> FloatArray | None:
    """The weights [B] that the user gave.

    Raises:
        UnknownBatchError: if only some micro-batches have them.
    """
    weights = [batch.weights for batch in batches if batch.weights is not None]
    if weights and len(weights) < len(batches):
        raise UnknownBatchError("trajrec.set_batch got weights for some micro-batches of a step and none for others.")
    return np.concatenate(weights) if weights else None


def _why_unknown(loader: Any) -> str:
    dataset = type(loader.dataset).__name__
    if isinstance(loader.dataset, IterableDataset):
        return f"{dataset} is an iterable data set: its samples have no ids. {_HINT}"
    if not getattr(loader, "in_order", True):
        return f"The DataLoader over {dataset} has in_order=False: batches come in any order. {_HINT}"
    return f"The sampler of the DataLoader over {dataset} does not draw integer ids. {_HINT}"


def _as_ids(drawn: Any) -> IntArray | None:
    """What a sampler drew as [B] int64, or None if it is not integers."""
    if type(drawn) is list and drawn:
        with suppress(TypeError, OverflowError):
            return np.frombuffer(array("q", drawn), np.int64)  # several times faster than to find out the dtype
    try:
        ids = np.asarray(drawn)
    except (TypeError, ValueError):
        return None
    if ids.dtype.kind not in "iu":
        return None
    return ids.astype(np.int64, copy=False).reshape(-1)


def _samples_in(inputs: tuple[Any, ...]) -> int:
    """How many samples a forward pass is called on: the length of its first tensor; 0 if it has none."""
    for value in inputs:
        if isinstance(value, Tensor):
            return len(value) if value.dim() else 0
    return 0


def _references(content: Any) -> list[ref[Tensor]]:
    """The tensors of a batch, of whatever is no deeper than a list or a dictionary of them."""
    if isinstance(content, Tensor):
        return [ref(content)]
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    return [ref(value) for value in values if isinstance(value, Tensor)]


class Capture:
    """Installs the watching of loaders and backward passes, and takes it out again."""

    def __init__(self, ledger: BatchLedger) -> None:
        self.ledger = ledger
        self._taps: list[tuple[Any, str, SamplerTap]] = []
        self._original_iter: Any = None
        self._original_backward: Any = None
        self._original_clearing: list[tuple[Any, Any]] = []

    def _watch_clearing(self, owner: Any) -> None:
        """Watches `zero_grad` of all optimizers or modules."""
        original, ledger = owner.zero_grad, self.ledger
        self._original_clearing.append((owner, original))

        @wraps(original)
        def watched(cleared: Any, *args: Any, **kwargs: Any) -> None:
            ledger.cleared(cleared)
            original(cleared, *args, **kwargs)

        owner.zero_grad = watched

    def install(self) -> None:
        """Starts watching."""
        self._original_iter = DataLoader.__iter__
        self._original_backward = torch.autograd.backward
        capture = self

        def watched_iter(loader: Any) -> Any:
            if not capture.ledger.watches(loader):
                return capture._original_iter(loader)
            return capture._watch(loader)

        def watched_backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            began = capture.ledger.watch.start()
            capture.ledger.backward(tensors)
            capture.ledger.watch.stop(began)
            return capture._original_backward(tensors, *args, **kwargs)

        DataLoader.__iter__ = watched_iter  # type: ignore[method-assign]
        torch.autograd.backward = watched_backward
        for owner in (Optimizer, nn.Module):
            self._watch_clearing(owner)
        _active.append(self.ledger)

    def remove(self) -> None:
        """Stops watching; loaders get their own samplers back."""
        DataLoader.__iter__ = self._original_iter  # type: ignore[method-assign]
        torch.autograd.backward = self._original_backward
        for owner, original in self._original_clearing:
            owner.zero_grad = original
        self._original_clearing.clear()
        _active.remove(self.ledger)
        for owner, attribute, tap in self._taps:
            object.__setattr__(owner, attribute, tap.sampler)
        self._taps.clear()

    def _watch(self, loader: Any) -> WatchedIterator:
        tap = self._tap(loader)
        serial = self.ledger.begin_pass(loader)
        iterator = self._original_iter(loader)
        # Read after the iterator exists: making it is what starts the sampler anew.
        drawn = tap.drawn if tap is not None else None

        def received(ids: Any, content: Any) -> None:
            began = self.ledger.watch.start()
            self.ledger.draw(loader, ids, content, serial)
            self.ledger.watch.stop(began)

        return WatchedIterator(iterator, received, drawn)

    def _tap(self, loader: Any) -> SamplerTap | None:
        """The stand-in of this loader's sampler, put in place on the first pass."""
        if isinstance(loader.dataset, IterableDataset) or not getattr(loader, "in_order", True):
            return None
        attribute = "batch_sampler" if loader.batch_sampler is not None else "sampler"
        sampler = getattr(loader, attribute)
        if isinstance(sampler, SamplerTap):
            return sampler
        tap = SamplerTap(sampler)
        # DataLoader forbids to set its sampler later, to keep it consistent; a stand-in that draws the same is.
        self._replace(loader, attribute, tap)
        kept = getattr(loader, "_iterator", None)
        if kept is not None:  # workers that live on: their iterator has the sampler at hand
            self._replace(kept, "_index_sampler", tap)
        return tap

    def _replace(self, owner: Any, attribute: str, tap: SamplerTap) -> None:
        object.__setattr__(owner, attribute, tap)
        self._taps.append((owner, attribute, tap))


_active: list[BatchLedger] = []


def set_batch(ids: Any, weights: Any = None) -> None:
    """Names the samples of the coming optimizer step, where the recorder cannot tell them by itself.

    With gradient accumulation it is called for every micro-batch, before its backward pass. Does nothing while no
    recording is on, so a script that calls it also runs without trajrec's recorder.

    Args:
        ids: [B] integer sample ids, repeats allowed.
        weights: [B] the weight c of each sample's loss in the step's gradient; default 1/B (a mean loss).

    Raises:
        UnknownBatchError: if ids are not integers, or weights have another length.
    """
    named = _as_ids(ids.tolist() if hasattr(ids, "tolist") else ids)
    if named is None:
        raise UnknownBatchError("trajrec.set_batch needs integer sample ids.")
    shares = None if weights is None else np.asarray(weights, dtype=np.float64).reshape(-1)
    if shares is not None and len(shares) != len(named):
        raise UnknownBatchError(f"trajrec.set_batch got {len(named)} ids but {len(shares)} weights.")
    for ledger in _active:
        ledger.give(named, shares)

"""Which samples made this optimizer step: the books that are kept of what is seen (see `trajrec.capture`).

A batch that was drawn but never went through a forward pass with gradients and a backward pass is no training
batch: validation passes between steps drop out. What this cannot tell (iterable data sets, ids that are no
integers, loops without a DataLoader) is an error that says to call `trajrec.set_batch(ids)` before each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import IterableDataset

from trajrec import sums
from trajrec.batches import MicroBatch, States, StepBatch, alone, as_ids, samples_in, step_of
from trajrec.contents import contents_of
from trajrec.errors import RecordingError, UnknownBatchError
from trajrec.records import FloatArray, IntArray
from trajrec.seeding import Seeded, find_seeded
from trajrec.stopwatch import Stopwatch
from trajrec.sums import Sums
from trajrec.task import digest, sketch

if TYPE_CHECKING:
    from trajrec.lane import Lane

_MOST_DRAWN = 64
_HINT = "Call trajrec.set_batch(ids) with the sample ids of the step before optimizer.step()."


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
        self._steps = 0
        self._sums = Sums(lambda: len(self.dataset) if hasattr(self.dataset, "__len__") else 0)
        self._drawn: list[MicroBatch] = []
        self._ahead: list[MicroBatch] = []  # drawn before the last backward pass, and not used yet
        self._left: MicroBatch | None = None  # the last that went through the model before another was drawn
        self._lone: MicroBatch | None = None  # the batch in use, while there is no other
        self._last: MicroBatch | None = None  # of the last step, if that was such a batch
        self.lane: Lane | None = None  # where steps like the last one are taken (trajrec.straight)
        self._made_step: list[MicroBatch] = []
        self._given: list[MicroBatch] = []
        self._given_is_open = False
        self._losses: list[Tensor | float] = []
        self._passes: dict[int, int] = {}
        self._serial = 0
        self._last_serial = 0
        self.passes_before = 0  # over the training data, before the one that the first step was in
        self.seeded_pass: int | None = None  # that the last step's items were made for
        self._seeded: dict[int, Seeded | None] = {}  # by data set
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
        self._seeded[key] = seeded
        self._serial += 1
        return self._serial

    def draw(self, loader: Any, ids: Any, content: Any, serial: int = 0) -> None:
        """The loop has received a batch."""
        if self._drawn or self._made_step:
            self._put_away(loader)
        dataset = loader.dataset
        seeded = self._seeded.get(id(dataset))
        # As it is now: a pass over the same data in between (an evaluation) has told another one.
        made_for = None if seeded is None else seeded.epoch
        batch = MicroBatch(as_ids(ids), loader, serial=serial, seeded_pass=made_for, content=content)
        if self.dataset is None or dataset is self.dataset:
            self._look_at(batch, content)
        self._drawn.append(batch)
        self._lone = batch if self._is_alone() else None

    def _put_away(self, loader: Any) -> None:
        """What this loader handed out before is done with, if it has been used; and there is an end to waiting."""
        for batch in (*self._made_step, *self._drawn):
            batch.let_go()
        over = [self._is_over(batch, loader) for batch in self._drawn]
        left = [batch for batch, is_over in zip(self._drawn, over, strict=True) if is_over and not batch.evaluated]
        self._left = left[-1] if left else self._left
        self._drawn = [batch for batch, is_over in zip(self._drawn, over, strict=True) if not is_over]
        del self._drawn[: 1 - _MOST_DRAWN], self._ahead[:-_MOST_DRAWN]

    def _is_over(self, batch: MicroBatch, loader: Any) -> bool:
        """Whether a batch is done with now that its loader has handed out the next one.

        It was evaluated; or it went through the model and the loop went on without a backward pass: skipped, unless a
        backward pass comes before the next one through the model. (Losses of several batches of one loader that are
        added up before one backward pass look the same: they need `set_batch`.)
        """
        return batch.loader is loader and (batch.evaluated or batch.used_in_training_mode is not None)

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
        if self.lane is not None:
            self.lane.leave()
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
        size = samples_in(inputs)
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
        if self._lone is not None:
            return self._lone
        if self._ahead and not any(batch.holds(inputs) for batch in (*self._made_step, *self._drawn)):
            self._drawn, self._ahead = [*self._ahead, *self._drawn], []
        if not self._drawn:
            return self._made_step[-1] if self._made_step else None
        own = [batch for batch in self._drawn if self.dataset in (None, batch.loader.dataset)] or self._drawn
        fitting = [b for b in own if not b.evaluated and b.used_in_training_mode in (None, training)]
        if len(self._made_step) + len(own) > 1:
            fed = [batch for batch in (*self._made_step, *own) if batch.holds(inputs)]
            if fed:
                fed[-1].is_fed = True
                return fed[-1]
        if len(self._made_step) + len(fitting) > 1:
            self._is_unclear |= self._looks_like_two(fitting, samples_in(inputs))
        return (fitting or own)[-1]

    def _is_alone(self) -> bool:
        """Whether the batch that was drawn last is the only one, as in most loops always. Every step pays for this."""
        return len(self._drawn) == 1 and not self._ahead and not self._made_step

    def _looks_like_two(self, fitting: Sequence[MicroBatch], size: int) -> bool:
        """Whether the newest batch has been through the model, and now it may be the turn of another loader's."""
        if not any(batch.loader is not fitting[-1].loader for batch in fitting):
            return False
        ids, sizes = fitting[-1].ids, [size for size, _ in fitting[-1].passes]
        return ids is not None and sum(sizes) + size > len(ids)

    def cleared(self, by: Any) -> None:
        """An optimizer or a module has set its gradients to zero."""
        for known in self.owners:
            if by is known:
                self._cleared = True

    def backward(self, loss: Any) -> None:
        """A backward pass has begun: what was used so far belongs to the next step."""
        self.backwards += 1
        lone, self._lone = self._lone, None
        if lone is not None and lone.used_in_training_mode and self.dataset in (None, lone.loader.dataset):
            lone.spent = len(lone.passes)
            self._made_step, self._drawn, self._left = [lone], [], None
        else:
            self._book()
        self._cleared = self._given_is_open = False
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # A number that is at hand is read at once; from another device it is fetched with the weights.
            self._losses.append(loss.item() if loss.is_cpu else loss.detach())

    def _book(self) -> None:
        if self._made_step and (self._cleared or not self._accumulates()):
            self._start_anew()
        self._take_back_guesses()
        self._made_step += self._training_batches()
        for batch in self._made_step:
            batch.spent = len(batch.passes)
        self._lay_aside()

    def _lay_aside(self) -> None:
        """Done with what was drawn, but for the batches that wait for their turn."""
        waiting = (*self._ahead, *self._drawn_ahead())
        for batch in waiting:
            batch.let_go()
        self._ahead = [batch for batch in waiting if not batch.evaluated or batch.alive()]
        self._drawn, self._left = [], None

    def _drawn_ahead(self) -> list[MicroBatch]:
        """The batches that were drawn after the last one in use, and wait for their turn."""
        used = [batch.used_in_training_mode is not None for batch in self._drawn]
        if any(used):
            return self._drawn[len(used) - used[::-1].index(True) :]
        return self._drawn if self._calls_model() else self._drawn[:-1]

    def _calls_model(self) -> bool:
        """Whether the loop is known to call the model as a whole, so that a batch without a pass is not in use."""
        return any(batch.passes for batch in self._made_step)

    def _take_back_guesses(self) -> None:
        """A pass on inputs of no batch (noise, say) counts for the newest; not beside one that was fed itself."""
        known = [batch.loader for batch in (*self._made_step, *self._drawn) if batch.is_fed]
        for batch in self._drawn if known else ():
            if not batch.is_fed and any(batch.loader is loader for loader in known):
                batch.used_in_training_mode, batch.passes = None, []

    def _start_anew(self) -> None:
        """The gradients of earlier backward passes were thrown away without a step.

        A scaler skipped it, say: then a newer batch was drawn. Otherwise the pass was for something else (the gradient
        of the inputs, another model), and the batch is still in use.
        """
        self._losses = []
        self._given = self._given[-1:] if self._given_is_open else []
        if self._drawn:
            # What was in use only because it was drawn last may still be waiting.
            self._ahead += [batch for batch in self._made_step if not batch.passes]
            self._made_step = [batch for batch in self._made_step if len(batch.passes) > batch.spent]
        for batch in self._made_step:
            batch.passes = batch.passes[batch.spent :] or batch.passes

    def _training_batches(self) -> list[MicroBatch]:
        """Of the batches used with gradients, those of the training set and, if any, in training mode.

        Where no forward pass was seen (the loop calls parts of the model), the batch drawn last counts as used.
        """
        used = [batch for batch in self._drawn if batch.used_in_training_mode is not None]
        if not used and self._left is not None:
            used = [self._left]
        if not used and not self._calls_model():
            used = self._drawn[-1:]
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
        self._steps += 1
        if (step := self._take_lone()) is not None:
            return step
        self._lone = self._last = None
        batches: Sequence[MicroBatch] = self._made_step or self._training_batches()
        loose, losses, given, is_unclear = self._loose_rng, self._losses, self._given, self._is_unclear
        if self._drawn or self._ahead:
            self._lay_aside()
        self._left = None
        self._made_step, self._losses, self._loose_rng, self._is_unclear = [], [], None, False
        self._given, self._given_is_open = [], False
        if given:
            if len(given) == len(batches):
                for named, drawn in zip(given, batches, strict=True):
                    named.contents = drawn.contents
            if batches:
                self._count_epoch(batches[-1])
            self._first = False
            return step_of(given, losses, loose)
        self._check_known(batches)
        if is_unclear:
            raise UnknownBatchError(
                "Two loaders over the same data handed out a batch before this step, and it cannot be told which of "
                f"them the model was called on. {_HINT}"
            )
        self._count_epoch(batches[-1])
        self._first = False
        for batch in batches:
            if batch.sketch is not None:
                self._sums.note(batch.ids)
        return step_of(batches, losses, loose)

    def _take_lone(self) -> StepBatch | None:
        """The step where all of it is one batch that went through the model once, as most do; else None."""
        if len(self._made_step) != 1 or self._drawn or self._ahead or self._given or self._is_unclear:
            return None
        batch = self._made_step[0]
        if batch.ids is None or len(batch.passes) != 1:
            return None
        losses = self._losses
        self._made_step, self._losses, self._loose_rng = [], [], None
        if batch.serial != self._last_serial or self._first:
            self._count_epoch(batch)
            self._first = False
        self.seeded_pass = batch.seeded_pass
        if batch.sketch is not None:
            self._sums.note(batch.ids)
        self._last, batch.content = batch, None
        return alone(batch, losses)

    # ---- the straight way

    def straight(self) -> dict[str, Any] | None:
        """What the next batch must be like to go through the lane, as fields of it; None if it must not."""
        last = self._last
        is_busy = self._drawn or self._ahead or self._made_step or self._given
        if last is None or is_busy or self.keeps_contents or last.seeded_pass is not None or len(self._losses):
            return None
        return {
            "cleared": self._cleared,
            "loader": last.loader,
            "serial": last.serial,
            "look": self._look_again,
            "note": self._sums.note,
            # Python sums every batch of the first epoch.
            "summed": self._sums.is_whole and (self.epochs > 1 or last.serial != self._last_serial),
            "look_every": sums.EVERY,
            "steps": self._steps,
        }

    def _look_again(self, ids: list[int], content: Any, step: int) -> int | None:
        return self._sum(ids, content, self._last_serial, step)

    def went_straight(self, steps: int, cleared: bool) -> None:
        """Takes over from the lane how many steps there were, and whether gradients were set to zero since the last."""
        self._steps, self._cleared = steps, cleared

    def take_over(self, batch: MicroBatch, loss: float | None) -> None:
        """Goes on with a batch that the lane has seen drawn, and used in a backward pass if there is a loss."""
        if loss is None:
            self._drawn, self._lone = [batch], batch
        else:
            batch.spent = len(batch.passes)
            self._made_step, self._losses = [batch], [loss]

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

    def _check_known(self, batches: Sequence[MicroBatch]) -> None:
        if not batches:
            raise UnknownBatchError(
                "No batch of a DataLoader was seen that this optimizer step could have been made of: none was drawn, "
                f"or another step has used it. {_HINT}"
            )
        for batch in batches:
            if batch.ids is None:
                raise UnknownBatchError(_why_unknown(batch.loader))


def _why_unknown(loader: Any) -> str:
    dataset = type(loader.dataset).__name__
    if isinstance(loader.dataset, IterableDataset):
        return f"{dataset} is an iterable data set: its samples have no ids. {_HINT}"
    if not getattr(loader, "in_order", True):
        return f"The DataLoader over {dataset} has in_order=False: batches come in any order. {_HINT}"
    return f"The sampler of the DataLoader over {dataset} does not draw integer ids. {_HINT}"

"""The recorder: from PyTorch's own hooks to records, and from there to a sink.

    hooks on the loop    write down what they see as facts (`trajrec.capture.observing`)
    optimizer.step()     the facts tell its samples (`trajrec.capture.attribution`); with what the step uses and leaves
                         behind they become a record (`trajrec.capture.steps`)
    the first step       the model and its optimizers are found, if they were not given; the run's spec, the weights
                         w_0 and a keyframe of the state before training

Everything is read, nothing is written: the training and its random numbers are the same to the bit with and without a
recorder. What the recorder itself cost is timed and reported.

The recorder never ends a training. All its hooks are behind one guard (`trajrec.capture.guard`): what it cannot follow,
or fails at, is said once, recording stops there, and the steps that follow are counted as a gap. `strict` raises it.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from trajrec.capture import hooks
from trajrec.capture.attribution.batches import StepBatch
from trajrec.capture.closures import Closures, has_closure, is_no_step
from trajrec.capture.companions import is_within_step
from trajrec.capture.discovery import Discovery, companions, parameters_of, watch_model
from trajrec.capture.guard import Guard, not_compiled
from trajrec.capture.observing.observer import Observer
from trajrec.capture.observing.surroundings import described
from trajrec.capture.processes import refuse_several_processes, speaks
from trajrec.capture.steps import Steps
from trajrec.capture.stopwatch import Stopwatch
from trajrec.errors import RecordingError, TrajrecError
from trajrec.rules import check_recordable, rehearse
from trajrec.sink import Sink, Summary
from trajrec.snapshot.model import Snapshot
from trajrec.task.loading import absolute, file_sha256, task_file
from trajrec.task.seeding import find_seeded
from trajrec.tf32 import rounds_products

logger = logging.getLogger("trajrec")
_ARRIVAL = "order of arrival"


class Recorder:
    """Records one training run; a context manager around the unchanged training loop.

    Args:
        sink: where records go.
        model: the model being trained; None to find it at the first step.
        optimizer: its optimizer, or several that hold different parameters and step together; None to find them when
            the first one steps.
        loader: the training loader or loaders; None to watch all.
        task: "FILE.py:ATTR" to be noted in the recording.
        inputs: "store" to keep what the loader yielded, "digest" to keep checksums of it.
        ids: "found", or "order" to number samples without ids in the order in which the loop receives them.
        strict: raise what cannot be recorded into the training, instead of going on without recording.

    Attributes:
        problem: why recording has stopped, in words; None as long as it has not.
        summary: what was written, once the recording has ended.
        is_abandoned: whether this is the copy in a forked child, which records nothing.
        others: steps of optimizers of other models, which are not recorded, by the class of the optimizer.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        model: nn.Module | None = None,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        loader: Any = None,
        task: str | None = None,
        inputs: Literal["digest", "store"] = "digest",
        ids: Literal["found", "order"] = "found",
        strict: bool = False,
    ) -> None:
        if inputs not in ("digest", "store"):
            raise ValueError(f'inputs is "digest" or "store"; found {inputs!r}.')
        if ids not in ("found", "order"):
            raise ValueError(f'ids is "found" or "order"; found {ids!r}.')
        self.inputs = inputs
        self.sink = sink
        self.model = model
        self.optimizers = _listed(optimizer)
        self.task = None if task is None else absolute(task)
        self.summary: Summary | None = None
        self.problem: str | None = None
        self.is_abandoned = False
        self.others: Counter[str] = Counter()
        self._guard = Guard(self._fail, strict)
        self._watch = Stopwatch()
        self._observer = Observer(_loaders(loader), inputs == "store", ids == "order")
        self._discovery = Discovery(self._observer)
        self._closures = Closures(self._guard, self._prepare_closure)
        self._installed: list[Any] = []  # that has a `remove`
        self._steps: Steps | None = None
        self._folder = folder_now()  # the script may go elsewhere

    @property
    def seconds(self) -> float:
        """CPU seconds that recording has taken from the training thread, since the second step."""
        return self._watch.seconds

    @property
    def training_seconds(self) -> float:
        """CPU seconds of the training thread in the same time, recording included."""
        return self._watch.training_seconds

    # ---- beginning and end

    def __enter__(self) -> Recorder:
        try:
            self._guard.run(self._install)
        except BaseException:
            self._remove()
            raise
        if not self._guard.is_open:
            self._remove()
        return self

    def _install(self) -> None:
        refuse_several_processes()
        for optimizer in self.optimizers:
            check_recordable(optimizer)
        listener = Listening(self._observer, self._watch, self._guard, self.abandon)
        self._installed.append(hooks.watch(listener))
        if self.model is None:
            self._installed.append(self._discovery)
            self._discovery.install(self._guard.around)
        else:
            self._watch_model(self.model)
        before = self._guard.around(self._before_step)
        after = not_compiled(self._after_step_or_gap)
        for optimizer in self.optimizers:
            self._installed.append(optimizer.register_step_pre_hook(before))
            self._installed.append(optimizer.register_step_post_hook(after))
        if not self.optimizers:
            self._installed.append(register_optimizer_step_pre_hook(before))
            self._installed.append(register_optimizer_step_post_hook(after))

    def _watch_model(self, model: nn.Module) -> None:
        self._installed += watch_model(model, self._observer, self._guard, self._watch)
        self._observer.owners += [model, *self.optimizers]
        self._observer.ask_for_gradients(self._has_gradients)

    def _has_gradients(self) -> bool:
        """Whether gradients of an earlier backward pass are there."""
        held = [p for optimizer in self.optimizers for p in parameters_of(optimizer)]
        parameters = held or (self.model.parameters() if self.model else ())
        return any(p.grad is not None and bool(p.grad.any()) for p in parameters)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if self.is_abandoned:
            return
        self._watch.end()
        # `sys.exit(main())` is how many a script ends well.
        complete = error is None or (isinstance(error, SystemExit) and error.code in (None, 0))
        with suppress(Exception) if error is not None else nullcontext():  # the script's own error is the one to show
            self._guard.run(self._remove)
            if complete:
                self._guard.run(self._check_whole)
            self._guard.run(self.close, complete)

    def _check_whole(self) -> None:
        """Checks that what was made was recorded.

        Raises:
            RecordingError: it was not.
        """
        if not self._guard.is_open:
            return
        if self._steps is not None:
            self._steps.check_whole()
        elif self.optimizers:
            raise RecordingError(
                f"The {type(self.optimizers[0]).__name__} optimizer that was given made no step: nothing was recorded. "
                "Pass the optimizer that the loop steps: trajrec.record(optimizer=...)."
            )

    def _remove(self) -> None:
        for installed in self._installed:
            installed.remove()
        self._installed.clear()

    def close(self, complete: bool) -> Summary | None:
        """Ends the recording. Returns what was written, or None if there was no step."""
        if self._steps is None:
            return None
        try:
            if self.problem is None:
                self._guard.run(self._steps.finish)
        finally:  # whatever the last keyframe fails at, what was recorded is finished
            self.summary = self.sink.close(complete and self.problem is None)
        return self.summary

    def abandon(self) -> None:
        """Makes this the recorder of a forked child: it hears nothing, writes nothing and ends nothing."""
        self.is_abandoned, self._guard.is_open = True, False
        with suppress(Exception):
            self.sink.abandon()

    def _fail(self, error: Exception) -> None:
        """Says what recording has failed at, and stops it there; the steps from here on are a gap."""
        if self.is_abandoned:
            return
        known, steps = isinstance(error, TrajrecError), self._steps
        self.problem = str(error) if known else f"The recorder failed: {type(error).__name__}: {error}"
        done = 0 if steps is None else steps.number - steps.is_made
        logger.log(
            logging.ERROR if speaks() else logging.DEBUG,
            "trajrec: %s\nThe training goes on WITHOUT RECORDING from step %s on. %s(strict=True, or --strict, raises "
            "this instead.)",
            *(self.problem, f"{done + 1:,}", f"The {done:,} steps before are kept. " if done else ""),
        )
        logger.debug("Where it came from:", exc_info=error)
        with suppress(Exception):
            self.sink.stop(self.problem)
            if steps is not None:
                steps.give_up()

    # ---- steps

    def _before_step(self, optimizer: Optimizer, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Torch's hook before a step: what it returns is taken in place of the step's arguments."""
        if self.optimizers and not self._is_ours(optimizer):
            self._refuse_second(optimizer)
            self.others[type(optimizer).__name__] += 1
            return None
        if self._closures.is_within(optimizer) or (self._steps is not None and self._steps.is_within(optimizer)):
            return None
        self._closures.forget()
        if has_closure(arguments, options):
            check_recordable(optimizer)
            return self._closures.hand_on(optimizer, arguments, options)
        self._prepare(optimizer)
        return None

    def _prepare(self, optimizer: Optimizer, inner: int = 0) -> None:
        """The gradient is there, and the optimizer about to change the weights, within so many steps of a step."""
        began = self._watch.start()
        if self._steps is None:
            self._begin(optimizer)
        assert self._steps is not None
        self._steps.before(optimizer, inner)
        self._watch.stop(began)

    def _prepare_closure(self, optimizer: Optimizer, inner: int) -> None:
        if not is_no_step(self.optimizers or [optimizer]):
            self._prepare(optimizer, inner)

    def _is_ours(self, optimizer: Optimizer) -> bool:
        return optimizer is self.optimizers[0] or any(optimizer is known for known in self.optimizers[1:])

    def _refuse_second(self, optimizer: Optimizer) -> None:
        known = {id(p) for known in self.optimizers for p in parameters_of(known)}
        if any(id(p) in known for p in parameters_of(optimizer)):
            raise RecordingError(
                "A second optimizer has stepped on the parameters that are being recorded. trajrec records one "
                "optimizer of a parameter: pass it to trajrec.record(optimizer=...) in the part that is to be recorded."
            )

    def _after_step_or_gap(self, optimizer: Optimizer, *_: Any) -> None:
        if self._guard.is_open:
            self._guard.run(self._after_step, optimizer)
        elif self._steps is not None and not self.is_abandoned and optimizer is self.optimizers[-1]:
            with suppress(Exception):
                if not is_within_step(optimizer):
                    self._steps.pass_over()

    def _after_step(self, optimizer: Optimizer) -> None:
        if self.optimizers and not self._is_ours(optimizer):
            return
        try:
            is_seen = self._closures.ends(optimizer)
        except RecordingError:
            if self._steps is not None:
                self._steps.was_not_seen()
            raise
        steps = self._steps
        if steps is None or not is_seen:
            return
        began = self._watch.start()
        is_whole = steps.after(optimizer)
        self._watch.stop(began)
        if is_whole:
            self._watch.next_step()
            if steps.number == self.sink.resumed_at + 1:
                # Starting (a process, a file) is not what recording costs a step: the clocks begin with the second one.
                self._watch.restart()

    # ---- the first step

    def _begin(self, optimizer: Optimizer) -> None:
        self._watch.restart()
        refuse_several_processes()
        check_recordable(optimizer)
        if self.model is None:
            self.model = self._discovery.model_of(*(self.optimizers or [optimizer]))
            self._discovery.remove()
            self._watch_model(self.model)
        if not self.optimizers:
            self.optimizers = companions(optimizer, self.model)
            self._observer.owners += self.optimizers
        for known in self.optimizers:
            check_recordable(known)
        self._observer.know(self.model)
        batch = self._observer.take()
        snapshot = Snapshot(self.model, *self.optimizers)
        spec = snapshot.spec(self._describe(batch, snapshot.generators.device))
        rehearse(spec, snapshot.hyper())
        snapshot.copy(None)  # what cannot be read is found before anything is written
        self.sink.open(spec)
        # Only now: a sink that could not be opened must not be closed.
        kept = self.inputs == "store"
        self._steps = Steps(self.sink, snapshot, self._observer, self.optimizers, self._watch, keeps_inputs=kept)
        self._steps.begin(batch, spec.data.get("seeded_from"))

    def _describe(self, batch: StepBatch, device: torch.device) -> dict[str, Any]:
        """The fields of RunSpec that come from around the model."""
        dataset = self._observer.passes.dataset
        # Without a data set (ids named by the user) N is not known yet; the Task's data set tells it at replay.
        length = len(dataset) if hasattr(dataset, "__len__") else 0
        data: dict[str, Any] = {"dataset": type(dataset).__name__, "length": length}
        cut = self._observer.cut_out()
        if cut is not None:
            length = cut.samples
            data = {"dataset": cut.words, "length": length, "ids": cut.ids}
        elif self._observer.is_numbered:
            length, data["ids"] = 0, _ARRIVAL
        if find_seeded(dataset) is not None:
            data["seeded_from"] = self._observer.passes.before
        if batch.checksum is not None:
            data["first_batch_crc32"] = batch.checksum
        if device.type == "cuda" and self.model is not None:
            data["tf32"] = rounds_products(self.model)
        file = None if self.task is None else task_file(self.task)
        numbers = [drawn.source.loader for drawn in batch.drawn if not drawn.source.is_indexed]
        loader = self._observer.passes.loader(numbers[0]) if numbers else None
        return {
            "samples": length,
            "inputs": self.inputs,
            "data": data,
            "criteria": self._observer.criteria.close(),
            "autocast": self._observer.surroundings.autocast,
            "loader": None if loader is None else described(loader),
            "folder": self._folder,
            "task": self.task,
            "task_sha256": file_sha256(file) if file is not None and file.is_file() else None,
        }


class Listening:
    """What a recorder hears of the loop (`trajrec.capture.observing.listeners.Listener`), behind its guard."""

    def __init__(self, observer: Observer, watch: Stopwatch, guard: Guard, abandon: Callable[[], None]) -> None:
        around = guard.around
        self.abandon, self.failed = abandon, guard.give
        self.begin_pass = around(observer.passes.begin)
        self.end_pass = around(observer.end_pass)
        self.give = around(observer.give)
        self.cleared = around(observer.cleared, watch)
        self.draw = around(observer.draw, watch)
        self.stacked = around(observer.stacked, watch)
        self.wants_stacked = around(observer.wants_stacked)
        self.backward = around(observer.backward, watch)
        self.criterion = around(observer.criteria.called)
        self.clipped = around(observer.clippings.clipped, watch)


def folder_now() -> str | None:
    """The folder that relative paths are seen from; None where it is gone, or has a name that is no text."""
    try:
        folder = os.getcwd()
        folder.encode()
    except (OSError, UnicodeError):
        return None
    return folder


def _loaders(given: Any) -> list[Any] | None:
    """The training loaders as a list; None to watch all.

    Raises:
        RecordingError: if one is no DataLoader.
    """
    loaders = None if given is None else list(given) if isinstance(given, list | tuple) else [given]
    for loader in loaders or ():
        if not isinstance(loader, DataLoader):
            raise RecordingError(f"loader= takes the DataLoader of the training, not {type(loader).__name__}.")
    return loaders


def _listed(given: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    """The optimizers as a list; empty for none.

    Raises:
        RecordingError: if they are no optimizers, or two of them hold the same parameter.
    """
    optimizers = [] if given is None else [given] if isinstance(given, Optimizer) else list(given)
    if not all(isinstance(optimizer, Optimizer) for optimizer in optimizers):
        raise RecordingError(f"optimizer= takes one or several of torch.optim.Optimizer, not {given!r}.")
    held = [id(p) for optimizer in optimizers for p in parameters_of(optimizer)]
    if len(optimizers) > 1 and len(set(held)) < len(held):
        raise RecordingError("Two of the optimizers hold the same parameter: only one may step it.")
    return optimizers

"""The recorder: from PyTorch's own hooks to records, and from there to a sink.

    before optimizer.step()   the step's samples, loss and hyperparameters; at the first step also the run's spec,
                              the weights w_0 and a keyframe of the state before training
                              and where the model's modes change, or a rate of zero ends, a keyframe of the state so far
    after optimizer.step()    the weights w_t are copied into the row that the sink hands out; from a CUDA device they
                              travel on a stream of their own, and the step is handed over after the next one

Everything is read, nothing is written: the training and its random numbers are the same to the bit with and
without a recorder. Random generator states are compared before the first forward pass and before the step, and
recorded only for steps that consumed randomness. What the recorder itself cost is timed and reported.

The recorder never ends a training. All its hooks are behind one guard (`trajrec.capture.guard`): what it cannot
follow, or fails at, is said once, recording stops there, and the steps that follow are counted as a gap. `strict`
raises it.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from trajrec.capture import hooks
from trajrec.capture.batches import StepBatch
from trajrec.capture.companions import Round, is_within_step
from trajrec.capture.discovery import Discovery, companions, parameters_of
from trajrec.capture.guard import Guard
from trajrec.capture.ledger import BatchLedger
from trajrec.errors import RecordingError, TrajrecError
from trajrec.inputs import arrays_of
from trajrec.records import NO_IDS, FloatArray, Inputs, LiveKeyframe, StepRecord
from trajrec.rules import check_recordable, rehearse
from trajrec.sink import Sink, Summary
from trajrec.snapshot.devicecopy import RowCopy
from trajrec.snapshot.generators import Generators, consumed
from trajrec.snapshot.snapshot import Snapshot, copy_row
from trajrec.task.loading import absolute, file_sha256, task_file
from trajrec.task.seeding import find_seeded

logger = logging.getLogger("trajrec")


@dataclass(slots=True)
class Pending:
    """A step between its pre-hook and its post-hook: samples, hyperparameters [G, H], generator states, changes."""

    batch: StepBatch
    hyper: FloatArray
    rng: bytes = b""
    changes: bytes = b""


class ModelHook:
    """Stands in the model's hooks; copies and pickles of the model do not take the recorder along."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        """Before or after a forward pass."""
        self._call(*args)

    def __deepcopy__(self, _: Any) -> ModelHook:
        return self

    def __reduce__(self) -> Any:
        # A hook that hands everything on as it is, and needs nothing of ours where the model is loaded.
        return getattr, (nullcontext(), "__exit__")


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
        strict: bool = False,
    ) -> None:
        if inputs not in ("digest", "store"):
            raise ValueError(f'inputs is "digest" or "store"; found {inputs!r}.')
        self.inputs = inputs
        self.sink = sink
        self.model = model
        self.optimizers = _listed(optimizer)
        self._round = Round(self.optimizers)
        self.task = None if task is None else absolute(task)
        self.summary: Summary | None = None
        self.problem: str | None = None
        self.is_abandoned = False
        self.others: Counter[str] = Counter()
        self._strict = strict
        self._guard = Guard(self._fail, strict)
        loaders = None if loader is None else list(loader) if isinstance(loader, list | tuple) else [loader]
        for given in loaders or ():
            if not isinstance(given, DataLoader):
                raise RecordingError(f"loader= takes the DataLoader of the training, not {type(given).__name__}.")
        self.ledger = BatchLedger(loaders, keeps_contents=inputs == "store")
        self._watch = self.ledger.watch
        self._ear = Ear(self)
        self._discovery = Discovery(self.ledger) if model is None else None
        self._handles: list[Any] = []
        self._snapshot: Snapshot | None = None
        self._pending: Pending | None = None
        self._step = 0
        self._began = self._ended = 0.0
        self._last_keyframe = -1
        self._inner_steps = 0
        self._is_made = False  # the present step has changed the weights, and is not recorded yet
        self._last_crc32 = 0
        self._prepared_at = 0  # backward passes seen by then
        self._rates: list[float] = []
        self._hyper: FloatArray | None = None
        self._first_batch: StepBatch | None = None
        self._keeps_rows = True
        self._transfer: RowCopy | None = None
        self._travelling: StepRecord | None = None

    @property
    def seconds(self) -> float:
        """CPU seconds that recording has taken from the training thread, since the second step."""
        return self._watch.seconds

    @property
    def training_seconds(self) -> float:
        """CPU seconds of the training thread in the same time, recording included."""
        return (self._ended or time.thread_time()) - self._began

    def __enter__(self) -> Recorder:
        try:
            self._guard.run(self._install)
        except BaseException:
            self._detach()
            raise
        if not self._guard.is_open:
            self._detach()
        return self

    def _install(self) -> None:
        _refuse_several_processes()
        for optimizer in self.optimizers:
            check_recordable(optimizer)
        hooks.watch(self._ear)
        guarded = self._guard.around
        if self._discovery is not None:
            self._discovery.install(guarded)
        if self.model is not None:
            self._watch_model(self.model)
        before = guarded(self._before_step)
        after = torch.compiler.disable(self._after_step_or_gap)  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(before))
            self._handles.append(optimizer.register_step_post_hook(after))
        if not self.optimizers:
            self._handles.append(register_optimizer_step_pre_hook(before))
            self._handles.append(register_optimizer_step_post_hook(after))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if self.is_abandoned:
            return
        self._ended = time.thread_time()
        # `sys.exit(main())` is how many a script ends well.
        complete = error is None or (isinstance(error, SystemExit) and error.code in (None, 0))
        with suppress(Exception) if error is not None else nullcontext():  # the script's own error is the one to show
            self._guard.run(self._detach)
            if complete:
                self._guard.run(self._check_whole)
            self._guard.run(self.close, complete)

    def _check_whole(self) -> None:
        """Checks that what was made was recorded.

        Raises:
            RecordingError: it was not.
        """
        if self._guard.is_open and self._snapshot is None and self.optimizers:
            raise RecordingError(
                f"The {type(self.optimizers[0]).__name__} optimizer that was given made no step: nothing was recorded. "
                "Pass the optimizer that the loop steps: trajrec.record(optimizer=...)."
            )
        if self._guard.is_open:
            self._round.check_complete()
            self._check_pending()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        hooks.unwatch(self._ear)
        if self._discovery is not None:
            self._discovery.remove()

    def abandon(self) -> None:
        """Makes this the recorder of a forked child: it hears nothing, writes nothing and ends nothing."""
        self.is_abandoned, self._guard.is_open = True, False
        with suppress(Exception):
            self.sink.abandon()

    def _fail(self, error: Exception) -> None:
        """Says what recording has failed at, and stops it there; the steps from here on are a gap."""
        if self.is_abandoned:
            return
        known = isinstance(error, TrajrecError)
        self.problem = str(error) if known else f"The recorder failed: {type(error).__name__}: {error}"
        first = self._step if self._is_made else self._step + 1
        kept = f"The {first - 1:,} steps before are kept. " if first > 1 and self._snapshot is not None else ""
        logger.log(
            logging.ERROR if _speaks() else logging.DEBUG,
            "trajrec: %s\nThe training goes on WITHOUT RECORDING from step %s on. %s(strict=True, or --strict, raises "
            "this instead.)",
            *(self.problem, f"{first:,}", kept),
        )
        logger.debug("Where it came from:", exc_info=error)
        with suppress(Exception):
            self.sink.stop(self.problem)
            if self._is_made and self._snapshot is not None:
                self.sink.note_gap(self._step)
        self._pending = self._first_batch = self._travelling = None
        self._is_made = False

    def close(self, complete: bool) -> Summary | None:
        """Ends the recording. Returns what was written, or None if there was no step."""
        if self._snapshot is None:
            return None
        if self.problem is None:
            self._flush()
        if self.problem is None and self._last_keyframe != self._step:
            # Timed like one within a hook: what is rare is taken out of the hook that it happens in.
            began = self._watch.start()
            self._keyframe()
            self._watch.stop(began)
        self.summary = self.sink.close(complete and self.problem is None)
        return self.summary

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _watch_model(self, model: nn.Module) -> None:
        parameter = next(model.parameters(), None)
        if parameter is None:
            raise RecordingError(f"model= has no parameters: a {type(model).__name__} does not train.")
        self._generators = Generators(parameter.device)
        enter, leave = self._guard.around(self._on_forward), self._guard.around(self._on_forwarded)
        self._handles.append(model.register_forward_pre_hook(ModelHook(enter), with_kwargs=True))
        if getattr(model, "_compiled_call_impl", None) is None:  # else a compiler would look into the outputs
            self._handles.append(model.register_forward_hook(ModelHook(leave)))
        self.ledger.owners += [model, *self.optimizers]
        self.ledger.ask_for_gradients(self._has_gradients)

    def _has_gradients(self) -> bool:
        """Whether gradients of an earlier backward pass are there."""
        held = [p for optimizer in self.optimizers for p in parameters_of(optimizer)]
        parameters = held or (self.model.parameters() if self.model else ())
        return any(p.grad is not None and bool(p.grad.any()) for p in parameters)

    def _on_forward(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if module is not self.model:
            return  # a copy (an average of weights, say) brings its hooks along
        began = self._watch.start()
        given = (*inputs, named) if named else inputs
        self.ledger.forward(torch.is_grad_enabled(), module.training, given, self._generators.states)
        self._watch.stop(began)

    def _on_forwarded(self, module: nn.Module, _: Any, outputs: Any) -> None:
        if module is self.model and torch.is_grad_enabled():
            began = self._watch.start()
            self.ledger.forwarded(outputs)
            self._watch.stop(began)

    def _before_step(self, optimizer: Optimizer, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if self._is_made:
            raise RecordingError(f"Step {self._step} was interrupted while it was being recorded.")
        if self.optimizers and not self._is_ours(optimizer):
            self._refuse_second(optimizer)
            self.others[type(optimizer).__name__] += 1
            return
        if self._pending is not None and is_within_step(optimizer):
            self._inner_steps += 1
            return
        self._inner_steps = 0
        if (options or len(arguments) > 1) and any(map(callable, (*arguments[1:], *options.values()))):
            raise RecordingError(
                "optimizer.step(closure) cannot be recorded: the gradient is made inside the step. Call backward() "
                "yourself and then optimizer.step() without a closure (in Lightning: automatic_optimization = False)."
            )
        began = self._watch.start()
        if not self._round.is_open:
            self._check_pending()
        if self._snapshot is None:
            self._begin(optimizer)
        if self._round.begin(optimizer, self.ledger.backwards):
            self._pending = self._prepare()
        else:
            self._pending = self._with_hyper_of(optimizer)
        self._watch.stop(began)

    def _check_pending(self) -> None:
        """Checks that the step before has come to its end.

        Raises:
            RecordingError: it was made, but an error came out of it before it could be recorded.
        """
        if self._pending is None or self._snapshot is None:
            return
        pending, self._pending = self._pending, None
        self._flush()
        is_still = self._snapshot.copy(None) == self._last_crc32
        if is_still and all(self._snapshot.rates(pending.hyper) or [0.0]):
            # It failed before it had changed anything, and may be tried again.
            self._first_batch = pending.batch if self.ledger.backwards == self._prepared_at else None
            return
        self._step += 1
        self._is_made = True
        raise RecordingError(
            f"Step {self._step} changed the weights, but an error in optimizer.step(), or in a hook of yours on it, "
            "kept it from being recorded. Let hooks on the optimizer's step not raise."
        )

    def _is_ours(self, optimizer: Optimizer) -> bool:
        return optimizer is self.optimizers[0] or any(optimizer is known for known in self.optimizers[1:])

    def _prepare(self) -> Pending:
        """What the coming step uses."""
        assert self._snapshot is not None
        self._prepared_at = self.ledger.backwards
        batch = self._first_batch or self.ledger.take()
        self._first_batch = None
        made_for = self.ledger.seeded_pass
        self._snapshot.tell_pass(None if made_for is None else made_for - self._epoch())
        changes = self._snapshot.changes(self._step + 1)
        if self._snapshot.enters_other_modes and self._snapshot.has_buffers:
            self._keyframe()
        rng = b"" if batch.rng is None else consumed(batch.rng, self._snapshot.generators.states())
        hyper = self._snapshot.hyper()
        if self._hides_state(hyper):
            self._keyframe()
        return Pending(batch, hyper, rng, b"" if changes is None else changes.to_json())

    def _with_hyper_of(self, optimizer: Optimizer) -> Pending:
        """What the step in progress uses, with the options of another optimizer as they are now."""
        assert self._snapshot is not None
        assert self._pending is not None
        rows, hyper = self._snapshot.rows_of(optimizer), self._pending.hyper.copy()
        hyper[rows] = self._snapshot.hyper()[rows]
        return replace(self._pending, hyper=hyper)

    def _after_step_or_gap(self, optimizer: Optimizer, *rest: Any) -> None:
        if self._guard.is_open:
            self._guard.run(self._after_step, optimizer, *rest)
        elif not self.is_abandoned and optimizer is (self.optimizers or [optimizer])[-1]:
            self._step += 1
            if self._snapshot is not None:
                with suppress(Exception):
                    self.sink.note_gap(self._step)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._pending is None or self._snapshot is None or not self._is_ours(optimizer):
            return
        if self._inner_steps:
            self._inner_steps -= 1
            return
        if not self._round.end(optimizer):
            return
        began = self._watch.start()
        pending, self._pending = self._pending, None
        self._step += 1
        self._is_made = True
        self._commit(pending)
        self._is_made = False
        if self.sink.wants_keyframe(self._step):
            self._keyframe()
        self._watch.stop(began)
        self._watch.next_step()
        if self._step == self.sink.resumed_at + 1:
            # Starting (a process, a file) is not what recording costs a step: the clocks begin with the second one.
            self._watch.reset()
            self._began = time.thread_time()

    # -- the first step ------------------------------------------------------------------------------------------

    def _begin(self, optimizer: Optimizer) -> None:
        self._began = time.thread_time()
        _refuse_several_processes()
        check_recordable(optimizer)
        if self.model is None:
            assert self._discovery is not None
            self.model = self._discovery.model_of(*(self.optimizers or [optimizer]))
            self._discovery.remove()
            self._watch_model(self.model)
        if not self.optimizers:
            self.optimizers = companions(optimizer, self.model)
            self._round = Round(self.optimizers)
            self.ledger.owners += self.optimizers
        for known in self.optimizers:
            check_recordable(known)
        self.ledger.know(self.model)
        batch = self._first_batch = self.ledger.take()
        snapshot = Snapshot(self.model, *self.optimizers)
        spec = snapshot.spec(self._describe(batch))
        rehearse(spec, snapshot.hyper())
        snapshot.copy(None)  # what cannot be read is found before anything is written
        self.sink.open(spec)
        # Only now: a sink that could not be opened must not be closed.
        self._snapshot = snapshot
        self._transfer = self._snapshot.transfer()
        self._commit(Pending(StepBatch(NO_IDS, None, []), self._snapshot.hyper()))
        self._flush()
        self._step = self.sink.resumed_at
        if self._step == 0:
            snapshot.begin_seeded(spec.data.get("seeded_from"))
            self._keyframe()
        else:
            snapshot.begin_again()

    def _describe(self, batch: StepBatch) -> dict[str, Any]:
        """The fields of RunSpec that come from around the model."""
        dataset = self.ledger.dataset
        # Without a data set (ids named by the user) N is not known yet; the Task's data set tells it at replay.
        length = len(dataset) if hasattr(dataset, "__len__") else 0
        data: dict[str, Any] = {"dataset": type(dataset).__name__, "length": length}
        if find_seeded(dataset) is not None:
            data["seeded_from"] = self.ledger.passes_before
        if batch.digest is not None:
            data["first_batch_crc32"] = batch.digest
        if self._generators.device.type == "cuda":
            data["tf32"] = bool(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
        file = None if self.task is None else task_file(self.task)
        return {
            "samples": length,
            "inputs": self.inputs,
            "data": data,
            "task": self.task,
            "task_sha256": file_sha256(file) if file is not None and file.is_file() else None,
        }

    def _refuse_second(self, optimizer: Optimizer) -> None:
        known = {id(p) for known in self.optimizers for p in parameters_of(known)}
        if any(id(p) in known for p in parameters_of(optimizer)):
            raise RecordingError(
                "A second optimizer has stepped on the parameters that are being recorded. trajrec records one "
                "optimizer of a parameter: pass it to trajrec.record(optimizer=...) in the part that is to be recorded."
            )

    # -- records -------------------------------------------------------------------------------------------------

    def _commit(self, pending: Pending) -> None:
        assert self._snapshot is not None
        if self._transfer is None:
            self._store_inputs(pending.batch)
            row = self.sink.reserve()
            self._keeps_rows = row is not None
            self._last_crc32 = self._snapshot.copy(row)
            self.sink.commit(self._record(pending, pending.batch.loss, self._last_crc32))
            return
        self._flush()
        self._store_inputs(pending.batch)
        self._transfer.start(self._snapshot.flat(), pending.batch.losses)
        self._travelling = self._record(pending, float("nan"), 0)

    def _store_inputs(self, batch: StepBatch) -> None:
        if self.inputs != "store" or self._step == 0:
            return
        if not batch.contents:
            raise RecordingError(
                f'inputs="store" keeps the batches of a DataLoader, but those of step {self._step} came from none. '
                'Pass inputs="digest".'
            )
        self.sink.inputs(Inputs(self._step, arrays_of(batch.contents)))

    def _record(self, pending: Pending, loss: float, crc32: int) -> StepRecord:
        batch = pending.batch
        return StepRecord(
            self._step,
            self._epoch(),
            loss,
            time.time(),
            crc32,
            pending.hyper,
            batch.ids,
            batch.weights,
            pending.rng,
            np.array(batch.parts, dtype=np.int64) if len(batch.parts) > 1 else NO_IDS,
            NO_IDS if batch.sketches is None else np.array(batch.sketches, dtype=np.int64),
            pending.changes,
        )

    def _epoch(self) -> int:
        """The epoch of the last step whose samples are known, from 0."""
        return self.sink.resumed_epochs + max(self.ledger.epochs - 1, 0)

    def _flush(self) -> None:
        """Hands over the step whose weights are still on their way from the device."""
        if self._transfer is None or self._travelling is None:
            return
        source, loss = self._transfer.finish()
        record, self._travelling = self._travelling, None
        row = self.sink.reserve()
        self._keeps_rows = row is not None
        self._last_crc32 = copy_row(source, row)
        self.sink.commit(replace(record, loss=loss, crc32=self._last_crc32))

    def _hides_state(self, hyper: FloatArray) -> bool:
        """Whether a learning rate has just risen from zero.

        A step with a rate of zero does not show the momentum buffer in the weights, and from now on it counts.
        """
        if hyper is self._hyper or self._snapshot is None:
            return False
        self._hyper = hyper
        rates = self._snapshot.rates(hyper)
        last, self._rates = self._rates, rates
        return self._last_keyframe != self._step and any(a == 0 != b for a, b in zip(last, rates, strict=False))

    def _keyframe(self) -> None:
        assert self._snapshot is not None
        began = time.thread_time()
        self._flush()
        self.sink.keyframe(LiveKeyframe(self._step, self._snapshot.keyframe(with_weights=not self._keeps_rows)))
        self._last_keyframe = self._step
        self._watch.rare(began)


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


class Ear:
    """What a recorder hears of the loop (`trajrec.capture.hooks.Listener`), behind its guard."""

    def __init__(self, recorder: Recorder) -> None:
        ledger, watch, guarded = recorder.ledger, recorder.ledger.watch, recorder._guard.around
        self.abandon, self.failed = recorder.abandon, recorder._guard.give
        self.begin_pass = guarded(ledger.begin_pass)
        self.end_pass = guarded(ledger.end_pass)
        self.give = guarded(ledger.give)
        self.cleared = guarded(ledger.cleared)
        self.draw = guarded(_timed(watch, ledger.draw))
        self.backward = guarded(_timed(watch, ledger.backward))


def _timed(watch: Any, call: Callable[..., None]) -> Callable[..., None]:
    def timed(*args: Any) -> None:
        began = watch.start()
        call(*args)
        watch.stop(began)

    return timed


def _refuse_several_processes() -> None:
    """Refuses a training by several processes.

    Raises:
        RecordingError: this is one of several.
    """
    count = processes()
    if count > 1:
        raise RecordingError(SEVERAL_PROCESSES.format(count=count))


SEVERAL_PROCESSES = (
    "This training runs as {count} processes. Each step is made of the samples of all of them, and trajrec records "
    "trainings by one process only, for now: run the script with one process to record it."
)


def _speaks() -> bool:
    """Whether this process is the one of several that says what all of them would."""
    return processes() == 1 or os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """How many processes train together, as far as torch or its launcher says."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() else 1

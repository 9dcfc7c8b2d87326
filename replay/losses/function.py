"""The task's model as a function of its weights: per-sample losses at any recorded point.

The user's loss is called as it is, on the user's module; `torch.func.functional_call` puts the weights in for the time
of the call (tied parameters included). Training losses run in the mode that was recorded (train mode, but for modules
that were in eval mode then), with the random state of the recorded step, so dropout masks come back. Targets run in
eval mode with the run's last buffers (running statistics), which are held constant. Where modes change on the way, the
recorder has written a keyframe before the step, and the buffers of the last keyframe before a step are those in force.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from trajrec.errors import ModelMismatchError, ReplayError, TaskError, TrajrecError
from trajrec.records import Autocast, Keyframe, RunSpec
from trajrec.replay.losses.batches import OtherInputs, Samples
from trajrec.replay.losses.finite import check_finite
from trajrec.replay.losses.lazy import initialise
from trajrec.replay.losses.objective import Objective, reduced
from trajrec.replay.losses.parameters import load
from trajrec.replay.losses.seen import Seen
from trajrec.replay.losses.shapes import (
    COUNTED,
    broadcast_error,
    has_further,
    has_pairs,
    per_sample,
    per_token,
    without_last,
)
from trajrec.replay.losses.statistics import Noted, RunningStatistics
from trajrec.replay.machine.generators import generators_kept, set_generators
from trajrec.replay.machine.torch_switches import PlainCheckpoints, PlainRecurrence
from trajrec.replay.step import RecordedRun, Step
from trajrec.rules import FlatLayout
from trajrec.task.task import Batch, Loss, Task


class _LossModule(nn.Module):
    """The user's loss as a module's forward, so that functional_call reaches the model inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss: Loss, batch: Batch) -> Tensor:
        return loss(self.model, batch)


class LossFunction:
    """Per-sample losses of a task as a function of the trainable weights [P'].

    Attributes:
        seen: what the Task's loss was seen to do (`replay.losses.watching`).
        statistics: the running statistics of its normalisations, or None if none moves in the training.
        carries: whether these are carried along through the run (`replay.derivatives.statistics`).
        smoothing: whether kinks are given a second derivative (`replay.derivatives.kinks`).
        within: one of `shapes.WITHIN`: what is made of several values of one sample's loss.
        left_out: how many labels of a sample, the first, have no value of its loss; None where labels do not tell which
            of its values count.
        target_noise: what the target losses draw (`replay.losses.noise`); None as long as nobody has asked.
        has_further: whether the training loss has given several values a sample.
        autocast: that the Task's loss is computed under (`replay.losses.autocast`); None for none, or its own.
        enters_autocast: whether it enters one itself.
        kinks: operators in it whose derivative jumps, by name (`replay.losses.kinks`); None if that is not known.

    Args:
        task: the user's task.
        run: the recording; frozen parameters and buffers come from it.
        layout: the order of the trainable weights.
        dtype: floating type of the replay.
        device: where it computes.

    Raises:
        ModelMismatchError: if the task's model has other parameters than the recording.
        TaskError: if it is lazy, and gets no shapes.
    """

    def __init__(
        self, task: Task, run: RecordedRun, layout: FlatLayout, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.seen = Seen()
        self.smoothing = self.carries = False
        self._around: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.within, self.has_further = "mean", False
        self.left_out: int | None = None
        self.target_noise: Any = None
        self._is_no_broadcast: set[str] = set()
        self._fused = False
        self.kinks: tuple[str, ...] | None = None
        self.autocast: Autocast | None = None
        self.enters_autocast = False
        self._runs = False
        self.task = task
        self.layout = layout
        self.spec = run.spec
        self.device = device
        self.model = task.build_model()
        initialise(self.model, task, run, dtype, device)
        load(self.model, run, dtype, device)
        self._module = _LossModule(self.model)
        self._checkpoints = PlainCheckpoints(self.model)
        self._recurrence = PlainRecurrence(self.model, device)
        self._modes: tuple[str, ...] | None = None
        self._free: tuple[tuple[str, ...], Tensor] | None = None
        self.usual_parts = int(max(len(run.parts(t)) for t in range(1, run.steps + 1)))
        self._even: dict[tuple[int | str, ...], list[Tensor]] = {}
        self.reduction = task.reduction or "mean"
        self._train_buffers = _keyframe_buffers(run.keyframe(run.keyframe_steps[0]), self.model)
        self._final_buffers = _keyframe_buffers(run.keyframe(run.keyframe_steps[-1]), self.model)
        self._run = run
        self._modes_change = any(c.eval_modules != self.spec.eval_modules for c in run.changes.values())
        self._buffers_of: int | None = None
        statistics = RunningStatistics(self.model)
        modes = (self.spec.eval_modules, *(c.eval_modules for c in run.changes.values()))
        self.statistics = statistics if any(map(statistics.moved_in, modes)) else None
        self.train_mode()

    def train_mode(self) -> None:
        """The modes and buffers that training began with; inside of `running` the buffers stay."""
        self._set_modes(self.spec.eval_modules)
        if not self._runs:
            self._set_buffers(self._train_buffers)
        self._buffers_of = None

    def _set_modes(self, eval_modules: tuple[str, ...]) -> None:
        if eval_modules == self._modes:
            return
        self._modes = eval_modules
        self.model.train("" not in eval_modules)
        for name, module in self.model.named_modules():
            if name and name in eval_modules:
                # Children that are in eval mode are named themselves.
                module.training = False

    def eval_mode(self) -> None:
        """Eval mode, with the buffers at the end of the run; inside of `running` with what they have become."""
        self._set_modes(("",))
        if not self._runs:
            self._set_buffers(self._final_buffers)
        self._buffers_of = None

    @property
    def has_buffers(self) -> bool:
        """Whether the model has buffers at all."""
        return bool(self._final_buffers)

    def buffers_at_ends(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The recorded buffers by name, as training began with them and as it left them."""
        return self._train_buffers, self._final_buffers

    def buffers_at(self, t: int) -> dict[str, Tensor]:
        """The buffers by name that the keyframe of step t recorded."""
        return _keyframe_buffers(self._run.keyframe(t), self.model)

    @contextmanager
    def keeping_final_buffers(self) -> Iterator[None]:
        """Training losses computed inside go on from the last keyframe; what the buffers become is the run's end."""
        self._set_buffers(self._final_buffers)
        self._buffers_of = self._run.keyframe_steps[-1]
        yield
        self._final_buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.train_mode()

    @contextmanager
    def running(self) -> Iterator[Callable[[], None]]:
        """The buffers run on from the beginning of the run, through the training losses that are computed inside.

        So running statistics become what they would in another training, and targets are evaluated with those. The
        recorder reads the first buffers before the first step, that is after its forward pass: whoever has computed
        the losses of step 1 calls what this yields, and they are put there again.
        """

        def begin() -> None:
            self._set_buffers(self._train_buffers)

        begin()
        self._runs = True
        try:
            yield begin
        finally:
            self._runs = False
            self.train_mode()

    @contextmanager
    def on_a_copy(self) -> Iterator[None]:
        """Losses computed inside leave the model, its buffers and generators as they were, if it can be copied."""
        kept = self.model, self._module, self._modes, self._buffers_of
        with suppress(Exception):  # handles, locks: whatever a model holds
            self.model = copy.deepcopy(self.model)
        self._module = _LossModule(self.model)
        try:
            yield
        finally:
            self.model, self._module, self._modes, self._buffers_of = kept

    @contextmanager
    def fused(self) -> Iterator[None]:
        """Inside, attention may be computed by fused kernels, as in the training: for first derivatives only."""
        before, self._fused = self._fused, True
        try:
            yield
        finally:
            self._fused = before

    @contextmanager
    def evaluated(self, within: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """Inside, the user's code runs within what is given."""
        before = self._around

        @contextmanager
        def both() -> Iterator[None]:
            with before(), within():
                yield

        self._around = both
        try:
            yield
        finally:
            self._around = before

    @contextmanager
    def noting(self, b: Tensor | None = None, *, carried: bool = False) -> Iterator[Noted | None]:
        """Inside, what running statistics do is noted, with b [Q] in their places in eval mode.

        None if none moves; and where they are not carried along, unless it is said that they are, or b is given.
        """
        if self.statistics is None or (b is None and not (carried or self.carries)):
            yield None
            return
        noted = self.statistics.noted(self.model, b)
        with self.evaluated(lambda: noted):
            yield noted

    def counts(self) -> tuple[int, ...]:
        """How many forward passes each normalisation has seen at the end of the run."""
        assert self.statistics is not None
        return self.statistics.counts(self._final_buffers)

    def final_statistics(self) -> Tensor:
        """The running statistics b [Q] at the end of the run; Q is 0 where none moves."""
        if self.statistics is None:
            return torch.zeros(0)
        self.eval_mode()
        found = self.statistics.vector(self.model).detach().clone()
        self.train_mode()
        return found

    def _use_buffers_before(self, t: int) -> None:
        """Puts the buffers in force at step t into the model; only needed where modules come into eval mode."""
        if self._runs or not (self._modes_change and self.has_buffers):
            return
        steps = self._run.keyframe_steps
        keyframe = steps[bisect_right(steps, t - 1) - 1]
        if keyframe != self._buffers_of:
            self._buffers_of = keyframe
            self._set_buffers(_keyframe_buffers(self._run.keyframe(keyframe), self.model))

    def _set_buffers(self, values: dict[str, Tensor]) -> None:
        for name, buffer in self.model.named_buffers():
            if name not in values:
                continue
            if values[name].shape != buffer.shape:
                raise ModelMismatchError(
                    f"The buffer {name} has the shape {list(values[name].shape)} in the recording, and "
                    f"{list(buffer.shape)} in the task's model."
                )
            buffer.copy_(values[name])

    def objective(self, weights: Tensor, samples: Samples, step: Step) -> Objective:
        """What the gradient of a recorded step is of, at weights [P'], differentiable.

        Raises:
            NonFiniteError: if a loss is NaN or infinite.
        """
        return Objective.joined(list(self.parts(weights, samples, step)))

    def value(self, weights: Tensor, samples: Samples, step: Step) -> float:
        """The scalar that the gradient of a recorded step is of, at weights [P']."""
        # Weights with a gradient, as in the training: a loss may register hooks.
        with users_code("Task.loss", step.t):
            return float(self.objective(weights.detach().requires_grad_(), samples, step).total.detach())

    def parts(self, weights: Tensor | dict[str, Tensor], samples: Samples, step: Step) -> Iterator[Objective]:
        """The objective of one micro-batch after the other, at weights [P'] or by name; they add up to `objective`."""
        self._set_modes(step.conditions.eval_modules)
        self._use_buffers_before(step.t)
        named = self.layout.split(weights) if isinstance(weights, Tensor) else weights
        batches = [samples.part(step, part) for part in step.parts]
        shares = self._shares(batches, step, step.before)
        for part, batch, share in zip(step.parts, batches, shares, strict=True):
            with self._random_state(part.rng):
                losses = self._call(self.task.loss, "loss", named, batch, part.span.stop - part.span.start)
            check_finite(losses.detach(), "The training loss", step.t, step.ids[part.span], share)
            divisor = self.penalty_divisor(len(batches)) if part.penalty is None else part.penalty
            yield Objective(losses, share, self._penalty(named, divisor))

    def free(self, values: Tensor, step: Step) -> Tensor:
        """Values [..., P'] with zeros at weights that were frozen in a step, and stepped with a gradient of zeros."""
        frozen = step.conditions.frozen
        if not frozen:
            return values
        if self._free is None or self._free[0] != frozen:
            parts = {p.name: torch.full(p.shape, float(p.name not in frozen)) for p in self.layout.params}
            self._free = frozen, self.layout.join(parts).to(values.device, values.dtype)
        return values * self._free[1]

    def single_loss(self, weights: Tensor, batch: Batch) -> Tensor:
        """The training loss [] of a batch of one at weights [P'], differentiable and neither checked nor seeded."""
        return self._call(self.task.loss, "loss", self.layout.split(weights), batch, 1)[0]

    def shares(self, samples: Samples, step: Step) -> Tensor:
        """The c[t,i] [B] of a step."""
        return torch.cat(list(self._shares([samples.part(step, part) for part in step.parts], step, step.before)))

    def _shares(self, batches: Sequence[Batch], step: Step, like: Tensor) -> Sequence[Tensor]:
        """The c[t,i] of every micro-batch."""
        sizes = [part.span.stop - part.span.start for part in step.parts]
        if step.shares is not None:
            return torch.split(step.shares, sizes)
        counts = self._counts(batches, sizes, like)
        if counts is not None:
            return reduced(counts, self.reduction, self.usual_parts)
        key = (*sizes, self.reduction)
        if key not in self._even:
            self._even = {key: reduced([like.new_ones(size) for size in sizes], self.reduction, self.usual_parts)}
        return [share.detach() for share in self._even[key]]

    def _counts(self, batches: Sequence[Batch], sizes: Sequence[int], like: Tensor) -> list[Tensor] | None:
        """What the samples of every micro-batch count; None where that is the same for all."""
        if self.within == COUNTED and self.left_out is not None and self.task.label_counts is not None:
            return [self.task.label_counts.of(batch, self.left_out).to(like) for batch in batches]
        if self.task.weight is None:
            return None
        given = [self.task.weight(batch) for batch in batches]
        if all(values is None for values in given):
            return None
        return [
            like.new_ones(size) if values is None else _checked_weights(values, size, like)
            for values, size in zip(given, sizes, strict=True)
        ]

    def penalty_divisor(self, parts: int) -> int:
        """By what the Task's penalty is divided in each of so many micro-batches."""
        if self.reduction.startswith("sum"):
            return 1
        return self.usual_parts if self.reduction == "scaled-means" else parts

    def _penalty(self, named: dict[str, Tensor], divisor: int) -> Tensor | None:
        if self.task.penalty is None or not divisor:
            return None
        penalty = self.task.penalty
        return self._evaluate(lambda model, _: penalty(model), named, None) / divisor

    def measures(self, weights: Tensor, batch: Batch, count: int) -> Tensor:
        """Target losses [B] of a batch at weights [P'], differentiable. Call `eval_mode` before.

        Weights may be followed by running statistics [P' + Q].
        """
        b = weights[self.layout.size :] if len(weights) > self.layout.size else None
        named = self.layout.split(weights[: self.layout.size])
        with nullcontext() if b is None else self.noting(b):
            return self._call(self.task.measure, "measure", named, batch, count)

    def token_measures(self, weights: Tensor, batch: Batch, count: int) -> Tensor:
        """Target losses of the tokens [B, T] of a batch at weights [P'] or [P' + Q]. Call `eval_mode` before.

        Raises:
            TaskError: if the Task gives none.
        """
        b = weights[self.layout.size :] if len(weights) > self.layout.size else None
        named = self.layout.split(weights[: self.layout.size])
        with nullcontext() if b is None else self.noting(b):
            values = self._evaluate(self.task.tokens, named, batch)
        return per_token(values, count).to(next(iter(named.values())).dtype)

    def scores(self, weights: Tensor, batch: Batch) -> Tensor:
        """What `Task.predict` gives for a batch at weights [P']. Call `eval_mode` before.

        Raises:
            TaskError: if the task has no `predict`.
        """
        if self.task.predict is None:
            raise TaskError("The Task does not say what its model predicts: pass Task(predict=...).")
        return self._evaluate(self.task.predict, self.layout.split(weights), batch)

    def _evaluate(self, function: Loss, parameters: dict[str, Tensor], batch: Batch) -> Tensor:
        named = {f"model.{name}": value for name, value in parameters.items()}
        # The fused attention kernels have no second derivative; the plain one has. A loss may take derivatives itself
        # (physics, gradient penalties), also where nobody asks for its own: nothing else here requires a gradient.
        attention = nullcontext() if self._fused else sdpa_kernel(SDPBackend.MATH)
        plainly = (attention, self._checkpoints.active(), self._recurrence.active())
        cast = self._autocast() if function is self.task.loss else nullcontext()
        with torch.enable_grad(), plainly[0], plainly[1], plainly[2], self._around(), cast:
            return functional_call(self._module, named, (function, batch))  # type: ignore[no-any-return]

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.autocast.device, getattr(torch, self.autocast.dtype))

    def _call(self, loss: Loss, what: str, parameters: dict[str, Tensor], batch: Batch, count: int) -> Tensor:
        values = self._evaluate(loss, parameters, batch)
        if has_pairs(values, count) and what not in self._is_no_broadcast:
            self._check_broadcast(loss, what, parameters, batch, count)
        # A measure of its own need not be reduced as the training loss is.
        is_training = loss is self.task.loss
        counts = None
        if is_training and isinstance(values, Tensor) and has_further(values, count):
            self.has_further = True
            counts = self._label_counts(batch, values)
        losses = per_sample(values, count, what, self.within if is_training else "mean", counts)
        # Of mixed precision: what it gives in half of the bits is summed up in the weights' own type.
        return losses.to(next(iter(parameters.values())).dtype)

    def _label_counts(self, batch: Batch, values: Tensor) -> Tensor | None:
        """How many of several values of each sample count, [B]; None where that makes no difference."""
        of = self.task.label_counts
        if of is None:
            return None
        if self.left_out is None:
            self.left_out = of.left_out(batch, values)
        return None if self.left_out is None or self.within != COUNTED else of.of(batch, self.left_out)

    def _check_broadcast(self, loss: Loss, what: str, parameters: dict[str, Tensor], batch: Batch, count: int) -> None:
        """Tells a loss of pairs from one with as many further values as samples, by asking for a sample less.

        Raises:
            TaskError: if it is one of pairs.
        """
        found: Any = None
        with generators_kept(self.device), suppress(Exception):  # what a batch of one fails at, say
            found = self._evaluate(loss, parameters, without_last(batch, count))
        if isinstance(found, Tensor) and tuple(found.shape[:2]) == (count - 1, count - 1):
            raise broadcast_error(what, count)
        self._is_no_broadcast.add(what)

    @contextmanager
    def _random_state(self, rng: bytes) -> Iterator[None]:
        if not rng:
            yield
            return
        states = split_rng(self.spec, rng)
        with generators_kept(self.device):
            try:
                set_generators(states, self.device)
            except (RuntimeError, TypeError) as error:
                raise ReplayError(f"The recorded states of random generators are none ({error}).") from error
            yield


def _checked_weights(values: object, size: int, like: Tensor) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != (size,):
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise TaskError(f"Task.weight must return one value a sample, shape ({size},), but returned {found}.")
    return values.detach().to(like.device, like.dtype)


@contextmanager
def users_code(what: str, t: int) -> Iterator[None]:
    """Says of an error in the user's code which step's batch it was given.

    Raises:
        TaskError: for every other error than our own.
    """
    try:
        yield
    except (TrajrecError, OtherInputs, MemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise TaskError(f"{what} failed on the recorded batch of step {t}: {reason}") from error


def split_rng(spec: RunSpec, rng: bytes) -> dict[str, Tensor]:
    """Generator states by name, from their concatenation in a step record.

    Raises:
        ReplayError: it has another length.
    """
    if len(rng) != sum(size for _, size in spec.rng):
        raise ReplayError(
            f"A step's recorded generator states have {len(rng)} bytes, which the recording's spec denies."
        )
    states, offset = {}, 0
    for name, size in spec.rng:
        states[name] = torch.from_numpy(np.frombuffer(rng, np.uint8, size, offset).copy())
        offset += size
    return states


def _keyframe_buffers(keyframe: Keyframe, model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, buffer in model.named_buffers():
        array: Any = keyframe.arrays.get(f"buffers/{name}")
        if array is not None:
            found[name] = torch.from_numpy(np.array(array)).to(buffer.device, buffer.dtype)
    return found

"""A recording and a Task that fit each other: everything that one replay needs, put together.

This is where the two are held against each other before any mathematics: model, data, ids, optimizer. `proof.fit` says
what must agree, `proof.refusal` what is said where a replay does not reproduce the recording.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from trajrec.replay.derivatives.difference import STEP, Differences
from trajrec.replay.derivatives.pieces import Cutting
from trajrec.replay.derivatives.through import differentiating, hidden_parts
from trajrec.replay.losses.autocast import take_autocast
from trajrec.replay.losses.batches import LIMIT, Samples
from trajrec.replay.losses.buffers import Moved, check_targets, check_training, find_moved, losses_of
from trajrec.replay.losses.finite import check_gradients
from trajrec.replay.losses.function import LossFunction, users_code
from trajrec.replay.losses.gradient import gradient_of
from trajrec.replay.losses.noise import NOTE, Noise
from trajrec.replay.losses.reduction import found_reduction
from trajrec.replay.losses.seen import Seen
from trajrec.replay.losses.targets import Targets, target_gradients
from trajrec.replay.losses.watching import watch, watch_targets
from trajrec.replay.machine.memory import budget
from trajrec.replay.progress import Progress
from trajrec.replay.proof import fit
from trajrec.replay.proof.certificate import Certificate, StepChecks
from trajrec.replay.proof.derivative import Derivation, DerivativeProof, prove
from trajrec.replay.proof.keyframes import KeyframeChecks
from trajrec.replay.proof.place import is_here
from trajrec.replay.proof.refusal import Drifted, guarded
from trajrec.replay.proof.rounding import GradientAt, Rounding, on_a_copy, rounding_of
from trajrec.replay.proof.stepwise import StepwiseChecks
from trajrec.replay.proof.targets import prove_targets
from trajrec.replay.question import DTYPES, FloatName, Question, parse_device, parse_dtype
from trajrec.replay.step import RecordedRun, Step, Trajectory, initial_state, make_step, vector_of
from trajrec.replay.trajectory.clipping import ClippedRun, as_clipped
from trajrec.replay.trajectory.participation import as_seen
from trajrec.replay.trajectory.source import trajectory_of
from trajrec.rules import FlatLayout, rule_for
from trajrec.rules.composed.transformed import TransformedRule
from trajrec.rules.selftest import self_test
from trajrec.task.task import Task

T = TypeVar("T")
S = TypeVar("S", bound=Samples)
_BLOCK = 64  # test samples whose losses tell what they depend on


class Session:
    """A recording and a Task that fit each other.

    Args:
        run: an open recording.
        task: the user's task.
        dtype: "float32" or "float64"; default: the recording's.
        device: torch device; default: CPU.
        allow_drift: go on where the task does not describe the training.
        memory: bytes for blocks of targets or samples and for recomputed states; default a quarter of what is free.

    Raises:
        ModelMismatchError, DataMismatchError, UnsupportedOptimizerError, ReplayError: if they do not fit.
        DerivativeError: if the forward pass changes parameters in place.
    """

    def __init__(
        self,
        run: RecordedRun,
        task: Task,
        *,
        dtype: FloatName | torch.dtype | None = None,
        device: str | torch.device | None = None,
        allow_drift: bool = False,
        memory: int | None = None,
    ) -> None:
        fit.check_start(run)
        clipped = None if task.gradient is not None else as_clipped(as_seen(run))
        self.run: RecordedRun
        self.run = run = as_seen(run) if clipped is None else clipped
        self.task = task if len(run.spec.criteria) != 1 else task.learned_by(run.spec.criteria[0])
        self._takes_criterion, task = self.task is not task, self.task
        self.allow_drift, self.memory = allow_drift, memory
        self.dtype, self.device = parse_dtype(dtype, run.spec.dtype), parse_device(device)
        self.layout = FlatLayout(run.spec)
        self.rule = rule_for(run.spec, self.layout, task.optimizer)
        if task.gradient is not None:
            self.rule = TransformedRule(self.rule, task.gradient)
        if clipped is not None:
            self.rule = clipped.rule(self.rule)
        self.function = LossFunction(task, run, self.layout, self.dtype, self.device)
        self.train = self.training_samples(self.dtype)
        self._test: Samples | None = None
        self._native: GradientAt | None = None
        fit.check_trainable(run, self.layout, allow_drift)
        self.train.check_ids(fit.largest_id(run), "training")
        self.derivative: DerivativeProof | None = None
        self.difference_step = STEP
        take_autocast(self.function, self.train, self.step_at_start(), run.loss(1))
        self._watch()
        self.targets_seen: Seen | None = None
        self.moved = self._find_moved()
        self.reduction = found_reduction(run, self.function, self.train)
        self.checks = self.new_checks(allow_drift)
        self.trajectory = trajectory_of(self, self.checks)
        self.samples = run.spec.samples or len(self.train)
        self.data_changed = fit.data_changed(self)
        self.train.checks_inputs = not (self.data_changed or allow_drift)
        self.guarded(self._test_rule)
        self.guarded(self._finish_buffers)

    @classmethod
    def of(cls, run: RecordedRun, task: Task, question: Question, memory: int | None) -> Session:
        """The session that a question is answered in."""
        q = question
        return cls(run, task, dtype=q.dtype, device=q.device, allow_drift=q.allow_drift, memory=memory)

    def training_samples(self, dtype: torch.dtype, limit: int = LIMIT) -> Samples:
        """The training set, in a floating type; up to so many bytes of it are held."""
        first_pass = int(self.run.spec.data.get("seeded_from", 0))
        stored, task = self.run.inputs, self.task
        return Samples(
            *(task.train, task.collate, dtype, self.device),
            first_pass=first_pass,
            limit=limit,
            stored=stored,
            classes_in=task.classes_in,
            collated_by=fit.collated_by(self.run, task),
        )

    @property
    def test(self) -> Samples:
        """The test set."""
        if self._test is None:
            self._test = self.test_samples(Samples, self.dtype)
        return self._test

    def test_samples(self, kind: type[S], dtype: torch.dtype, **options: Any) -> S:
        """The test set in a floating type."""
        task = self.task
        fit.check_test(self.run, task)
        return kind(task.test, task.test_collate, dtype, self.device, classes_in=task.classes_in, **options)

    def step_at_start(self) -> Step:
        """Step 1, with the weights before it on both sides."""
        before = vector_of(self.run.row(0), 0, self.layout).to(self.device, self.dtype)
        return make_step(self.run, 1, before, before)

    def _find_moved(self) -> tuple[Moved, ...]:
        """What moves in forward passes, or in the run; no training loss depends on it.

        Raises:
            DerivativeError: if one does.
        """
        losses = losses_of(self.function, self.train, self.step_at_start())
        moved = find_moved(self.function, losses)
        if not self.allow_drift:
            check_training(self.function, losses, moved)
        return moved

    def _watch(self) -> None:
        """Sees what the loss does, at both ends of the run."""
        watch(self.function, self.train, self.step_at_start())
        run = self.run
        last = run.steps if run.stored(run.steps - 1) else run.keyframe_steps[-1]
        if last > 1 and run.stored(last - 1):
            before = vector_of(run.row(last - 1), last - 1, self.layout).to(self.device, self.dtype)
            watch(self.function, self.train, make_step(run, last, before, before))

    @property
    def cutting(self) -> Cutting:
        """How many samples of a batch are differentiated at once."""
        whole = budget(self.memory, self.device)
        return Cutting(whole if self.memory is None else whole // 4, self.memory)

    @cached_property
    def differences(self) -> Differences:
        """The gradient in float64, and its differences."""
        if self.dtype == torch.float64:
            return Differences(self.function, self.train)
        return Differences(self.another_function(torch.float64), self.training_samples(torch.float64, limit=0))

    def another_function(self, dtype: torch.dtype) -> LossFunction:
        """The Task's losses once more, in a floating type, with a model of their own and all that is known of them."""
        function = LossFunction(self.task, self.run, self.layout, dtype, self.device)
        function.reduction, function.within = self.function.reduction, self.function.within
        function.left_out = self.function.left_out
        function.seen, function.autocast = self.function.seen, self.function.autocast
        return function

    def prove_derivative(self, *, forwards: bool) -> None:
        """Makes the second proof, of a replay that takes the derivative of the gradient.

        Raises:
            DerivativeError: if no way of taking it is right.
        """
        self.derivative = prove(self, forwards=forwards)
        if self.derivative.verdict is not Derivation.DIFFERENCES:
            self.__dict__.pop("differences", None)  # a model in float64 is not kept through a replay

    def prove_targets(self, targets: Targets) -> None:
        """Makes the second proof of what contributions begin with.

        Raises:
            DerivativeError: if a target's gradient is not its own, or running statistics move otherwise.
        """
        assert self.derivative is not None
        self._meet_targets(targets)
        self.derivative = prove_targets(self, targets, self.derivative)

    def _test_rule(self) -> None:
        """Lets the rule prove itself at the first step."""
        step = self.step_at_start()
        with users_code("Task.loss", step.t):
            gradient = gradient_of(self.function, self.train, step)
        state = initial_state(self.trajectory, self.rule)
        self_test(self.rule, step.before, state, gradient, step.hyper, budget(self.memory, self.device))

    def _finish_buffers(self) -> None:
        """Makes the running statistics at the end of a run that was cut off after its last keyframe."""
        last = self.run.keyframe_steps[-1]
        if last == self.run.steps or not self.function.has_buffers:
            return
        with self.function.keeping_final_buffers():
            for step in self.trajectory.forwards(last + 1):
                self.loss(step)

    def loss(self, step: Step) -> float:
        """The loss of a step by the Task."""
        return self.function.value(step.before.to(self.dtype), self.train, step)

    @property
    def certifies_once(self) -> bool:
        """Whether one pass over the run certifies it; rows that are made again are compared in every pass."""
        return not self.is_keyframed

    def may_begin_at(self, t: int) -> bool:
        """Whether a pass forwards may begin with step t."""
        return not self.is_keyframed or t - 1 in self.run.keyframe_steps

    @property
    def is_keyframed(self) -> bool:
        """Whether the recording keeps keyframes, and the rows between are made again."""
        return self.run.keep != "steps"

    def new_checks(self, allow_drift: bool) -> StepChecks:
        """Checks that have seen no step."""
        here = is_here(self.run.spec, self.device, self.dtype)
        if self.is_keyframed:
            return KeyframeChecks(self.run, self.layout, self.rule, allow_drift, here)
        return StepwiseChecks(self.run, self.rule, self.dtype, allow_drift, self._rounding(), here)

    def _rounding(self) -> Rounding:
        """What rounding makes of a step, in the coarser of the recording's floating type and the replay's."""
        native = DTYPES[self.run.spec.dtype]
        if torch.finfo(native).eps <= torch.finfo(self.dtype).eps:
            return Rounding(self.rule, on_a_copy(self.function, self.train), rounding_of(self.run.spec, self.dtype))

        def gradient(step: Step) -> Tensor:
            if self._native is None:
                self._native = on_a_copy(self.another_function(native), self.training_samples(native))
            return self._native(replace(step, before=step.before.to(native)))

        return Rounding(self.rule, gradient, rounding_of(self.run.spec, native))

    def find_drift(self) -> Drifted | None:
        """The first step that differs from the recording, going forwards; None if none does."""
        checks = self.new_checks(allow_drift=False)
        try:
            self._certify(checks, trajectory_of(self, checks), lambda _: None)
        except Drifted as drifted:
            return drifted
        return None

    def certify(self, progress: Progress) -> Certificate:
        """Makes every step again, going forwards, and says what that proves.

        Raises:
            DriftError: if a step differs from the recorded one.
        """
        progress.start("certify", self.run.steps)
        self.guarded(lambda: self._certify(self.checks, self.trajectory, progress.advance))
        return self.certificate()

    def certificate(self) -> Certificate:
        """What has been proved so far."""
        return replace(self.checks.found.certificate(self.run.steps, self.checks.tolerance), derivative=self.derivative)

    def _certify(self, checks: StepChecks, trajectory: Trajectory, advance: Callable[[int], None]) -> None:
        state = initial_state(trajectory, self.rule)
        for step in trajectory.forwards():
            if not self.is_keyframed:
                state = checks.forwards(step, state, gradient_of(self.function, self.train, step))
            advance(1)

    def guarded(self, work: Callable[[], T]) -> T:
        """Does the work; what it fails at for a reason that is known becomes an explained refusal."""
        return guarded(self, work)

    def _meet_targets(self, targets: Targets) -> None:
        """Checks, once, that the target losses do not depend on what forward passes move, and watches them."""
        if self.targets_seen is not None:
            return
        if self.moved and not self.allow_drift:
            self.function.eval_mode()
            try:
                check_targets(self.function, self._first_targets(targets), self.moved)
            finally:
                self.function.train_mode()
        self.targets_seen = watch_targets(targets, self.function, self.test, self.trajectory.weights(self.run.steps))

    def _first_targets(self, targets: Targets) -> Callable[[], Tensor]:
        """Computes the target losses of some test samples."""
        weights = self.trajectory.weights(self.run.steps)
        ids, batch = next(self.test.batches(np.concatenate(targets.groups), _BLOCK))

        def losses() -> Tensor:
            with torch.no_grad():
                return self.function.measures(weights, batch, len(ids))

        return losses

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the numbers should know of the losses they are about, in sentences."""
        function, found = self.function, [self.run.note] if isinstance(self.run, ClippedRun) else []
        if self._takes_criterion:
            found.append(f"The criterion is the one that the training was seen to call, {self.run.spec.criteria[0]}.")
        if function.autocast is not None:
            found.append(f"The Task's loss was computed under {function.autocast}, as the training's was seen to be.")
        if function.has_further:
            found.append(f"The loss has several values a sample: their {function.within} was taken.")
        if function.target_noise is not None and function.target_noise is not Noise.NONE:
            found.append(NOTE)
        return tuple(found)

    def target_gradients(self, targets: Targets) -> tuple[Tensor, Tensor | None]:
        """Grad l_j(w_T) of every target, [M, P'], and that by the running statistics [M, Q] where these move.

        Raises:
            DerivativeError: if they depend on what forward passes move. NonFiniteError: if one is none.
        """
        self._meet_targets(targets)
        weights = self.trajectory.weights(self.run.steps)
        with hidden_parts(self.function), differentiating(self.function.seen.hides):
            found = target_gradients(targets, self.function, self.test, weights)
        check_gradients(found, targets.names, targets.called)
        size = self.layout.size
        return found[:, :size], found[:, size:] if self.function.statistics is not None else None

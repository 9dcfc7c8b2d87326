"""Everything that one replay needs, put together: the run, the task's losses, data, rule and certifier.

This is where a recording and a Task are held against each other before any mathematics: model, data set length,
fingerprint of the first batch. A drift found later is explained here, by going forwards from the first step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from trajrec.digest import digest
from trajrec.errors import DataMismatchError, DriftError, ReplayError
from trajrec.replay.derivatives.operators import derivative_error
from trajrec.replay.losses.batches import OtherInputs, Samples
from trajrec.replay.losses.function import LossFunction, users_code
from trajrec.replay.losses.gradient import gradient_of
from trajrec.replay.losses.reduction import found_reduction
from trajrec.replay.losses.targets import Targets, choose_targets, target_gradients, target_values
from trajrec.replay.losses.watching import watch
from trajrec.replay.machine.memory import budget
from trajrec.replay.machine.torch_switches import full_single_precision
from trajrec.replay.proof.certificate import Certificate, StepChecks
from trajrec.replay.proof.diagnosis import Diagnosis
from trajrec.replay.proof.keyframes import KeyframeChecks
from trajrec.replay.proof.refusal import Drifted, drift_error
from trajrec.replay.proof.stepwise import Certifier
from trajrec.replay.question import DTYPES, parse_device, parse_dtype
from trajrec.replay.step import RecordedRun, Step, Trajectory, initial_state, make_step, vector_of
from trajrec.replay.trajectory.participation import RegroupedRun, as_seen
from trajrec.replay.trajectory.recomputed import OtherState, RebuiltTrajectory, RecomputedTrajectory
from trajrec.replay.trajectory.stored import StoredTrajectory
from trajrec.rules import FlatLayout, rule_for
from trajrec.rules.composed.transformed import TransformedRule
from trajrec.rules.selftest import self_test
from trajrec.task.seeding import find_seeded
from trajrec.task.task import Task


class Progress(Protocol):
    """Is told how far a replay is; the command line draws it."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        """A piece of work of `total` steps begins, of which so many were done by an earlier replay."""

    def advance(self, count: int) -> None:
        """So many steps are done."""


class Silent:
    """Draws nothing."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Ignores it."""

    def advance(self, count: int) -> None:
        """Ignores it."""


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
        dtype: Any = None,
        device: Any = None,
        allow_drift: bool = False,
        memory: int | None = None,
    ) -> None:
        if run.steps == 0:
            raise ReplayError("The recording holds no step yet: there is nothing to replay.")
        if 0 not in run.keyframe_steps:
            raise ReplayError(
                "The recording lacks its keyframe of step 0 (buffers and optimizer state before the training), with "
                "which every replay begins. `trajrec verify` tells what else is missing; restore the file from a copy."
            )
        self.run = run = as_seen(run)
        self.task = task
        self.dtype = parse_dtype(dtype, run.spec.dtype)
        self.device = parse_device(device)
        self.allow_drift = allow_drift
        self.layout = FlatLayout(run.spec)
        self.rule = rule_for(run.spec, self.layout, task.optimizer)
        if task.gradient is not None:
            self.rule = TransformedRule(self.rule, task.gradient)
        self.memory = memory
        self.function = LossFunction(task, run, self.layout, self.dtype, self.device)
        self.train = self._training_samples(self.dtype)
        self._check_trainable()
        self.train.check_ids(self._largest_id(), "training")
        watch(self.function, self.train, self.step_at_start())
        self.reduction = found_reduction(run, self.function, self.train)
        self.checks = self._checks(allow_drift)
        self.trajectory = self._trajectory(self.checks)
        self._test: Samples | None = None
        self.samples = run.spec.samples or len(self.train)
        self._check_data()
        self.guarded(self._test_rule)
        self.guarded(self._finish_buffers)

    def _training_samples(self, dtype: torch.dtype) -> Samples:
        first_pass = int(self.run.spec.data.get("seeded_from", 0))
        return Samples(
            self.task.train, self.task.collate, dtype, self.device, first_pass=first_pass, stored=self.run.inputs
        )

    @property
    def test(self) -> Samples:
        """The test set."""
        if self._test is None:
            self._test = Samples(self.task.test, self.task.collate, self.dtype, self.device)
        return self._test

    def _largest_id(self) -> int:
        largest = -1
        for t in range(1, self.run.steps + 1):
            ids = self.run.sample_ids(t)
            if not len(ids):
                raise ReplayError(f"The recording names no sample of step {t}: its gradient cannot be made again.")
            largest = max(largest, int(ids.max()))
        return largest

    def _check_data(self) -> None:
        recorded = self.run.spec.data.get("first_batch_crc32")
        self.data_changed = recorded is not None and digest(self.train.raw_step(self.step_at_start())) != recorded
        # Other data that give the same first loss (inputs prepared elsewhere, say) are the same to the mathematics.
        if self.data_changed and not self.allow_drift and not self._same_first_loss():
            raise DataMismatchError(
                "The training data changed since the recording: the first batch has other contents (CRC-32 "
                f"{recorded:08x} recorded), and the first loss is another. Give the Task the data set that the run "
                f"was trained on, or go on with --allow-drift. {self._about_augmentation()}"
            )
        self.train.checks_inputs = not (self.data_changed or self.allow_drift)

    def _about_augmentation(self) -> str:
        was, is_now = "seeded_from" in self.run.spec.data, find_seeded(self.task.train) is not None
        if was != is_now:
            return f"It was {'' if was else 'not '}recorded with trajrec.seeded(...), and the Task's is{' not' * was}."
        return "Items with random augmentation come back only if both are wrapped in trajrec.seeded(...)."

    def step_at_start(self) -> Step:
        """Step 1, with the weights before it on both sides."""
        before = vector_of(self.run.row(0), 0, self.layout).to(self.device, self.dtype)
        return make_step(self.run, 1, before, before)

    def _check_trainable(self) -> None:
        """Parameters that the optimizer never stepped are held constant; they must have been."""
        if not self.layout.params:
            raise ReplayError("No parameter ever had a gradient in this recording: there is nothing to replay.")
        last = self.run.steps if self.run.stored(self.run.steps) else self.run.keyframe_steps[-1]
        first_row, last_row = self.run.row(0), self.run.row(last)
        moved = [
            p.name for p in self.run.spec.params if not p.trainable and (first_row[p.span] != last_row[p.span]).any()
        ]
        if moved and not self.allow_drift:
            raise DriftError(
                f"Parameter {moved[0]} is not in the optimizer and was changed by step {last}. Weights that change "
                "outside the optimizer are not replayed: an exponential average of weights, say, belongs into a copy."
            )

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
                self._loss(step)

    def _same_first_loss(self) -> bool:
        recorded, computed = self.run.loss(1), self._loss(self.step_at_start())
        return abs(recorded - computed) <= 1e-4 * abs(recorded)

    def _loss(self, step: Step) -> float:
        """The loss of a step by the Task."""
        return self.function.value(step.before.to(self.dtype), self.train, step)

    @property
    def certifies_once(self) -> bool:
        """Whether one pass over the run certifies it; rows that are made again are compared in every pass."""
        return not self._keyframed

    def may_begin_at(self, t: int) -> bool:
        """Whether a pass forwards may begin with step t."""
        return not self._keyframed or t - 1 in self.run.keyframe_steps

    @property
    def _keyframed(self) -> bool:
        return self.run.keep != "steps"

    def _checks(self, allow_drift: bool) -> StepChecks:
        if self._keyframed:
            return KeyframeChecks(self.run, self.layout, self.rule, allow_drift)
        return Certifier(self.run, self.rule, self.dtype, allow_drift)

    def _trajectory(self, checks: StepChecks) -> Trajectory:
        stored = StoredTrajectory(self.run, self.layout, self.dtype, self.device)
        # Where groups rest now and then, the weights do not imply the states.
        if not self._keyframed and not self.rule.needs_state and not isinstance(self.run, RegroupedRun):
            return stored
        native = DTYPES[self.run.spec.dtype]
        # A model of its own: a forward pass changes running statistics.
        function = LossFunction(self.task, self.run, self.layout, native, self.device)
        function.reduction = self.function.reduction
        same = native == self.dtype
        samples = self.train if same else self._training_samples(native)
        of_rows = checks if isinstance(checks, KeyframeChecks) else None
        recomputed = RecomputedTrajectory(
            self.run,
            self.layout,
            function,
            samples,
            self.rule,
            self.dtype,
            of_rows,
            budget(self.memory, self.device) // 4,
            self.allow_drift,
        )
        return recomputed if of_rows is not None else RebuiltTrajectory(stored, recomputed)

    def find_drift(self) -> Drifted | None:
        """The first step that differs from the recording, going forwards; None if none does."""
        checks = self._checks(allow_drift=False)
        try:
            self._certify(checks, self._trajectory(checks), lambda _: None)
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
        return self.checks.certificate()

    def _certify(self, checks: StepChecks, trajectory: Trajectory, advance: Callable[[int], None]) -> None:
        state = initial_state(trajectory, self.rule)
        for step in trajectory.forwards():
            if not self._keyframed:
                state = checks.forwards(step, state, gradient_of(self.function, self.train, step))
            advance(1)

    def explain(self, drifted: Drifted) -> DriftError:
        """The refusal to raise for a drift: names the first bad step and the likely cause."""
        first = self.find_drift() or drifted
        tolerance = self._checks(allow_drift=True).certificate().tolerance
        found = Diagnosis(self.run, self.function, self.train, self.rule, first).cause()
        cause = found.sentence if found else ""
        if self.data_changed:
            cause += " The first batch also differs from the recorded one."
        return drift_error(first, self.run.loss(first.probe.t), self._loss(first.probe), tolerance, cause)

    def guarded(self, work: Callable[[], Any]) -> Any:
        """Does the work; a drift in it becomes an explained refusal."""
        try:
            return self._explained(work)
        except OtherInputs as other:
            raise DriftError(
                f"Replay drifted at step {self._first_other_inputs(other.t)}: the inputs of its batch are not those "
                "that the training loop received (their CRC-32 differs). Data were changed, or augmented at random. "
                f"{self._about_augmentation()} Mend the Task, or go on with --allow-drift."
            ) from None

    def _explained(self, work: Callable[[], Any]) -> Any:
        try:
            with full_single_precision():
                return self._derivable(work)
        except Drifted as drifted:
            raise self.explain(drifted) from None
        except OtherState as other:
            first = self.find_drift()
            raise (DriftError(str(other)) if first is None else self.explain(first)) from None

    def _derivable(self, work: Callable[[], Any]) -> Any:
        """Does the work; what torch says of a derivative that it has not becomes a refusal that names the operator."""
        try:
            return work()
        except RuntimeError as error:
            refusal = derivative_error(error, self.function.model)
            if refusal is None:
                raise
            raise refusal from error

    def _first_other_inputs(self, seen_at: int) -> int:
        """The first step whose inputs differ from the recorded ones, `seen_at` being one."""
        before = torch.empty(0)
        for t in range(1, seen_at):
            step = make_step(self.run, t, before, before)
            try:
                for part in step.parts:
                    self.train.part(step, part)
            except OtherInputs:
                return t
        return seen_at

    def told_losses(self, targets: Any) -> list[str]:
        """The loss of the first step and the mean target loss at the end, to five digits: other data show in them."""
        wanted = choose_targets(targets, self.test)
        values = target_values(wanted, self.function, self.test, self.trajectory.weights(self.run.steps))
        return [f"{value:.5g}" for value in (self._loss(self.step_at_start()), float(values.mean()))]

    def target_gradients(self, targets: Targets) -> Tensor:
        """Grad l_j(w_T) of every target, [M, P']."""
        return target_gradients(targets, self.function, self.test, self.trajectory.weights(self.run.steps))

"""The steps of a run that keeps keyframes only: the weights between are made again from the keyframe before.

A keyframe holds the weights and the optimizer state; the step records hold everything else that a step used. Going
forwards is one gradient a step. Going backwards follows `replay.trajectory.schedule`, which holds as many states as
memory allows. Weights are always recomputed in the recording's own dtype, and cast afterwards if the replay computes in
another.

The certificate comes with it. Every recomputed row is compared with the CRC-32 that was recorded at its step: equal
means bit for bit. Where they differ (another thread count, processor or torch version; a fused optimizer; a mean taken
in another order), the rows drift apart by rounding until the next keyframe sets them right. There the distance is
measured, and must be no more than rounding makes of it: the way is gone again with the gradients off by rounding to
either side (`replay.proof.rounding`). More means that the Task does not describe the training.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.gradient import gradient_of
from trajrec.replay.machine.torch_switches import tolerance_of
from trajrec.replay.proof.drift import STATE_TOLERANCE
from trajrec.replay.proof.keyframes import KeyframeChecks
from trajrec.replay.proof.rounding import Rounding, on_a_copy, rounding_of
from trajrec.replay.step import OtherState, Point, RecordedRun, Step, make_step, vector_of
from trajrec.replay.trajectory.schedule import Advance, Drop, Hold, Load, Recall, Visit, backward_plan
from trajrec.replay.trajectory.stored import StoredTrajectory
from trajrec.rules import FlatLayout, Rule
from trajrec.rules.step import State

Spread = Callable[[], tuple[Tensor, State]]


class RecomputedTrajectory:
    """The steps of a run, recomputed from its keyframes.

    Args:
        run: the recording.
        layout: the order of the trainable weights.
        function: per-sample losses in the recording's dtype.
        samples: the training set in the recording's dtype.
        rule: the optimizer.
        dtype: floating type of the replay.
        checks: takes every recomputed row; None where the recording holds the rows and only states are made again.
        memory: bytes that held states may take.
        allow_drift: do not compare states with the keyframes.
    """

    def __init__(
        self,
        run: RecordedRun,
        layout: FlatLayout,
        function: LossFunction,
        samples: Samples,
        rule: Rule,
        dtype: torch.dtype,
        checks: KeyframeChecks | None,
        memory: int,
        allow_drift: bool = False,
    ) -> None:
        self.run = run
        self.layout = layout
        self.dtype = dtype
        self.device = samples.device
        self.checks = checks
        self._function = function
        self._samples = samples
        self._rule = rule
        self._memory = memory
        self._allow_drift = allow_drift
        self._rounding = Rounding(rule, on_a_copy(function, samples), rounding_of(run.spec, self._native))
        self._last: tuple[int, Tensor] | None = None

    def weights(self, t: int) -> Tensor:
        """w_t [P']."""
        if self.checks is None:
            return self._weights_at(t).to(self.dtype)
        if self._last is None or self._last[0] != t:
            point = self._load(self._keyframe_before(t))
            while point.t < t:
                point = self._next(point)
            self._last = t, point.weights
        return self._last[1].to(self.dtype)

    def forwards(self, first: int = 1) -> Iterator[Step]:
        """Steps first, first + 1, ..., T; `first` follows a keyframe."""
        start = point = self._load(first - 1)
        while point.t < self.run.steps:
            after = made = self._next(point)
            if made.t in self.run.keyframe_steps:
                after = self._load(made.t)
                if self.checks is not None:
                    self.checks.keyframe(made, start, after.weights, self._weights_of(self._spread(start, made.t)))
                start = after
            yield self._step(made.t, point, after.weights)
            point = after

    def backwards(self, first: int | None = None) -> Iterator[Step]:
        """Steps first, first - 1, ..., 1; from T by default."""
        last = self.run.steps if first is None else first
        keyframes = [t for t in self.run.keyframe_steps if t < last]
        after = self.weights(last).to(self._native)
        for start, end in reversed(list(pairwise([*keyframes, last]))):
            if start < end:
                after = yield from self._interval(start, end, after)

    @property
    def _native(self) -> torch.dtype:
        return torch.float64 if self.run.spec.dtype == "float64" else torch.float32

    def _interval(self, start: int, end: int, after: Tensor) -> Generator[Step, None, Tensor]:
        """Steps end..start+1, by the plan. Returns w_start."""
        first = current = self._load(start)
        held: dict[int, Point] = {}
        for action in backward_plan(end - start, self._slots(first)):
            match action:
                case Load():
                    current = first
                case Recall(t):
                    current = self._stored(held[t])
                case Hold(t):
                    held[t] = self._to_be_held(current)
                case Drop(t):
                    del held[t]
                case Advance(t):
                    while current.t < start + t:
                        current = self._next(current)
                case Visit(t):
                    if start + t == end and end in self.run.keyframe_steps:
                        self._check_end(self._next(current), first, after)
                    yield self._step(start + t, current, after)
                    after = current.weights
        return after

    def _check_end(self, made: Point, first: Point, after: Tensor) -> None:
        """Compares what was made again since the keyframe before with the next one."""
        spread = self._spread(first, made.t)
        if self.checks is not None:
            self.checks.keyframe(made, first, after, self._weights_of(spread))
        if not self._allow_drift:
            self._check_state(made, first.t, spread)

    def _spread(self, start: Point, end: int) -> Spread:
        """What rounding makes of the weights [P'] and of the state on the way from a keyframe on; found when asked."""

        @cache
        def found() -> tuple[Tensor, State]:
            first = make_step(self.run, start.t + 1, start.weights, start.weights)
            gradient = gradient_of(self._function, self._samples, first)
            return self._rounding.between(first, gradient, again)

        def again(change: Tensor) -> Point:
            point = start
            while point.t < end:
                point = self._stored(self._made(point, change))
            return point

        return found

    @staticmethod
    def _weights_of(spread: Spread) -> Callable[[], Tensor]:
        return lambda: spread()[0]

    def _check_state(self, made: Point, start: int, spread: Spread) -> None:
        recorded = self._load(made.t).state
        tolerance = max(STATE_TOLERANCE, self._rule.tolerance, tolerance_of(self.run.spec))
        for name, value in recorded.items():
            if name not in made.state:
                continue
            error, size = (made.state[name] - value).abs(), float(value.abs().max()) or 1.0
            if float(error.max()) > tolerance * size:
                error = (error - spread()[1][name]).clamp_min(0)
            drift = float(error.max()) / size
            if drift > tolerance:
                raise OtherState(
                    f"Replay drifted at step {made.t}: the optimizer's {name.partition('/')[0]}, made again since the "
                    f"keyframe of step {start}, differs from the recorded one by {drift:.1e} of its size, tolerance "
                    f"{tolerance:.0e}. The state was changed outside optimizer.step(), reset or loaded say: begin a "
                    "new recording there. Or go on with --allow-drift."
                )

    def _slots(self, point: Point) -> int:
        held = self._to_be_held(point)
        # The first keyframe may not have the buffers yet: about as much as the weights.
        size = held.weights.nbytes + (point.weights.nbytes or 1)
        return max(1, int(self._memory // max(size, held.weights.nbytes + sum(v.nbytes for v in held.state.values()))))

    def _keyframe_before(self, t: int) -> int:
        steps = self.run.keyframe_steps
        return steps[bisect_right(steps, t) - 1]

    def _load(self, t: int) -> Point:
        weights = self._weights_at(t)
        hyper = self.run.hyper(min(t + 1, self.run.steps))
        return Point(t, weights, self._rule.initial_state(self.run.keyframe(t), hyper, weights.dtype, self.device))

    def _next(self, point: Point) -> Point:
        """The next step, made again."""
        made = self._made(point)
        if self.checks is not None:
            self.checks.row(made)
        return self._stored(made)

    def _made(self, point: Point, change: Tensor | None = None) -> Point:
        step = make_step(self.run, point.t + 1, point.weights, point.weights)
        gradient = gradient_of(self._function, self._samples, step)
        if change is not None:
            gradient = gradient + self._function.free(change * self._rounding.taken(gradient), step)
        with torch.no_grad():
            weights, state = self._rule.step(point.weights, point.state, gradient, step.hyper)
        return Point(step.t, weights.detach(), {name: value.detach() for name, value in state.items()})

    def _stored(self, made: Point) -> Point:
        """With the recorded weights in place of those that were made again, where all are stored."""
        return replace(made, weights=self._weights_at(made.t)) if self.checks is None else made

    def _to_be_held(self, point: Point) -> Point:
        """Without the weights, where all are stored."""
        return replace(point, weights=point.weights.new_empty(0)) if self.checks is None else point

    def _step(self, t: int, before: Point, after: Tensor) -> Step:
        scalars = self._rule.scalars
        state = {n: v if n in scalars else v.to(self.dtype) for n, v in before.state.items()}
        return make_step(self.run, t, before.weights.to(self.dtype), after.to(self.dtype), state)

    def _weights_at(self, t: int) -> Tensor:
        return vector_of(self.run.row(t), t, self.layout).to(self.device)


class RebuiltTrajectory:
    """The steps of a run that holds every row, with the optimizer states that going backwards needs.

    Forwards the rows suffice: whoever goes forwards carries the state along. Backwards it is made again between
    keyframes, at the price of one gradient a step.
    """

    def __init__(self, stored: StoredTrajectory, recomputed: RecomputedTrajectory) -> None:
        self.run = stored.run
        self.layout = stored.layout
        self.dtype = stored.dtype
        self.device = stored.device
        self.weights = stored.weights
        self.forwards = stored.forwards
        self.backwards = recomputed.backwards

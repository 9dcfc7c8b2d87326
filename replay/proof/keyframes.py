"""The proof where only keyframes are kept: what is recomputed must arrive at the next one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from trajrec.checksum import crc32
from trajrec.records import Json, Row
from trajrec.replay.machine.torch_switches import tolerance_of
from trajrec.replay.proof.certificate import Certificate, verdict_of
from trajrec.replay.proof.drift import TOLERANCE
from trajrec.replay.proof.refusal import Drifted
from trajrec.replay.step import Point, RecordedRun, Step, make_step
from trajrec.rules import FlatLayout, Rule
from trajrec.rules.step import State


class KeyframeChecks:
    """Which recomputed rows were bit for bit as recorded, and how far off the others were at the keyframes."""

    def __init__(self, run: RecordedRun, layout: FlatLayout, rule: Rule, allow_drift: bool) -> None:
        self.run = run
        self.layout = layout
        self.rule = rule
        self.allow_drift = allow_drift
        self.tolerance = max(TOLERANCE, rule.tolerance, tolerance_of(run.spec))
        # Every row that is made again is compared, whatever the stride, and none has to wait.
        self.stride = 1
        self.waiting: tuple[Step, Tensor | None] | None = None
        self._row: Row = run.row(0).copy()
        self._equal: dict[int, bool] = {}
        self._worst, self._worst_step = 0.0, 0
        self._first_bad: int | None = None

    def row(self, point: Point) -> None:
        """Compares the checksum of a recomputed row."""
        self.layout.fill(self._row, point.weights.cpu().numpy())
        self._equal[point.t] = crc32(self._row.data) == self.run.crc32(point.t)

    def keyframe(self, made: Point, start: Point, recorded: Tensor, left_out: Callable[[], Tensor]) -> None:
        """Compares recomputed weights with a keyframe's, `start` being the keyframe before.

        `left_out` tells the weights [P'] that are made of rounding; it is asked only where the others do not suffice.

        Raises:
            Drifted: if they differ by more than the tolerance.
        """
        moved = float((recorded - start.weights).abs().max())
        error = float((made.weights - recorded).abs().max())
        if error > self.tolerance * moved:
            error = float(((made.weights - recorded) * ~left_out()).abs().max())
        drift = error / moved if moved else float(error > 0)
        if drift > self._worst:
            self._worst, self._worst_step = drift, made.t
        if drift > self.tolerance:
            first = min((t for t, equal in self._equal.items() if not equal), default=made.t)
            self._first_bad = min(first, self._first_bad or first)
            if not self.allow_drift:
                probe = make_step(self.run, start.t + 1, start.weights, start.weights)
                raise Drifted(first, drift, probe, made.t, start.state, recorded)

    def progress(self) -> Json:
        """What has been found so far, JSON-ready."""
        return {
            "equal": sorted(self._equal.items()),
            "worst": [self._worst, self._worst_step],
            "first_bad": self._first_bad,
        }

    def resume(self, progress: Json) -> None:
        """Takes up what another has found."""
        self._equal = {int(t): bool(equal) for t, equal in progress["equal"]}
        self._worst, self._worst_step = progress["worst"]
        self._first_bad = progress["first_bad"]

    def certificate(self) -> Certificate:
        """What has been proved so far."""
        checked = len(self._equal)
        verdict = verdict_of(checked, all(self._equal.values()), self._first_bad)
        return Certificate(
            verdict, self.run.steps, checked, self._worst, self._worst_step, self.tolerance, self._first_bad
        )

    # A replay's own steps start from the recomputed weights, which have been compared already.

    def forwards(self, step: Step, state: State, gradient: Tensor) -> State:
        """The state after a step."""
        return self.rule.step(step.before, state, gradient, step.hyper)[1]

    def wants(self, step: Step) -> bool:
        """Never."""
        return False

    def backwards(self, step: Step, gradient: Tensor | None) -> None:
        """Does nothing."""

    def finish_backwards(self, initial: State) -> None:
        """Does nothing."""

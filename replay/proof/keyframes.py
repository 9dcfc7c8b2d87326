"""The proof where only keyframes are kept: what is recomputed must arrive at the next one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from trajrec.checksum import crc32
from trajrec.records import Row
from trajrec.replay.machine.torch_switches import tolerance_of
from trajrec.replay.proof.certificate import Comparisons
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
        self.found = Comparisons()

    def row(self, point: Point) -> None:
        """Compares the checksum of a recomputed row."""
        self.layout.fill(self._row, point.weights.cpu().numpy())
        self.found.checked.add(point.t)
        if crc32(self._row.data) != self.run.crc32(point.t):
            self.found.unequal.add(point.t)

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
        self.found.drifted(made.t, drift)
        if drift > self.tolerance:
            first = min(self.found.unequal, default=made.t)
            self.found.bad(first)
            if not self.allow_drift:
                probe = make_step(self.run, start.t + 1, start.weights, start.weights)
                raise Drifted(first, drift, probe, made.t, start.state, recorded)

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

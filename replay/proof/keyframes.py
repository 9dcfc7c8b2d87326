"""The proof where only keyframes are kept: what is recomputed must arrive at the next one."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor

from trajrec.checksum import crc32
from trajrec.records import Row
from trajrec.replay.proof.certificate import Comparisons
from trajrec.replay.proof.drift import ROUNDING, Comparison, tolerance
from trajrec.replay.proof.refusal import Drifted
from trajrec.replay.step import Point, RecordedRun, Step, make_step
from trajrec.rules import FlatLayout, Rule
from trajrec.rules.step import State


class KeyframeChecks:
    """Which recomputed rows were bit for bit as recorded, and how far off the others were at the keyframes.

    A row whose checksum differs counts as checked once the next keyframe has shown by how much. Where the last rows
    have no keyframe behind them (a recording that was cut off), the checksum is all there is: it tells no distance.

    Args:
        run: the recording.
        layout: the order of the trainable weights.
        rule: the optimizer.
        allow_drift: go on after drift, and say so in the certificate.
        here: whether the replay computes where the training did.
    """

    def __init__(self, run: RecordedRun, layout: FlatLayout, rule: Rule, allow_drift: bool, here: bool) -> None:
        self.run = run
        self.layout = layout
        self.rule = rule
        self.allow_drift = allow_drift
        self._eps = float(np.finfo(run.spec.dtype).eps)
        self.tolerance = tolerance(rule, run.spec, self._eps, here=here)
        # Every row that is made again is compared, whatever the stride, and none has to wait.
        self.stride = 1
        self.waiting: tuple[Step, Tensor | None] | None = None
        self._row: Row = run.row(0).copy()
        self.found = Comparisons()

    def row(self, point: Point) -> None:
        """Compares the checksum of a recomputed row."""
        self.layout.fill(self._row, point.weights.cpu().numpy())
        same = crc32(self._row[: self.run.spec.width(point.t)].data) == self.run.crc32(point.t)
        (self.found.checked if same else self.found.unequal).add(point.t)

    def keyframe(self, made: Point, start: Point, recorded: Tensor, allowance: Callable[[], Tensor]) -> None:
        """Compares recomputed weights with a keyframe's, `start` being the keyframe before.

        `allowance` tells what rounding makes of the weights [P'] on the way; it is asked only where it matters.

        Raises:
            Drifted: if they differ by more than the tolerance.
        """
        way = make_step(self.run, start.t + 1, start.weights, recorded)
        last_places = ROUNDING * self._eps * math.sqrt(made.t - start.t) * recorded.abs()
        compared = Comparison(self.rule, way, made.weights, last_places, self.tolerance)
        judged, proves = compared.judged(), compared.proves()
        if not judged.within and (self.found.first_bad is None or not self.allow_drift):
            allowed = allowance()
            judged, proves = compared.judged(allowed), compared.proves(allowed)
        self.found.drifted(made.t, judged.drift)
        unequal = {t for t in self.found.unequal if start.t < t <= made.t}
        if proves or not judged.within:
            self.found.checked |= unequal
        if not judged.within:
            first = min(unequal, default=made.t)
            self.found.bad(first)
            if not self.allow_drift:
                probe = make_step(self.run, start.t + 1, start.weights, start.weights)
                raise Drifted(first, judged.drift, probe, made.t, start.state, recorded)

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

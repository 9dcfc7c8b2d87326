r"""The certificate: proof, step by step, that a replay replays THIS run.

From w_{t-1}, s_{t-1} and the recorded batch the step is made again and compared with the recorded w_t:

    drift_t = ||w_t(recomputed) - w_t|| / ||w_t - w_{t-1}||

Rounding is allowed for, weight by weight: a few units in its last place, and what rounding of the gradient makes of it
through the optimizer (`replay.proof.rounding`). What is left is held against what moved, by the norm of every parameter
and by the largest weight of every group (`replay.proof.drift`). A step that is itself no larger than rounding proves
nothing and counts as unchecked. Drift beyond the tolerance means that the Task does not describe the training. The
replay then refuses, names the first bad step and the cause that was found by trying (`replay.proof.diagnosis`).

Going forwards the optimizer state is simply carried along. Going backwards, s_{t-1} follows from the rows w_{t-2},
w_{t-1} and the gradient of step t-1 (`Rule.implied_state`), which the replay computes one step later: so each check
waits for the next step. A step whose state is hidden by a learning rate of zero and not in a keyframe counts as
unchecked.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Protocol

from torch import Tensor

from trajrec.records import Json
from trajrec.replay.proof.derivative import DerivativeProof
from trajrec.replay.step import Step
from trajrec.rules.step import State


class Verdict(StrEnum):
    """What steps that were made again come to."""

    BIT_EXACT = "bit-exact"
    WITHIN_ROUNDING = "within rounding"
    DRIFTED = "drifted"
    UNCHECKED = "unchecked"


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a replay has proved.

    Attributes:
        verdict: what they come to.
        steps: T.
        steps_checked: how many steps were made again and compared.
        max_drift: largest drift_t of the checked steps (no unit).
        at_step: step of the largest drift; 0 if none was checked.
        tolerance: rtol.
        first_bad_step: first step found beyond tolerance, or None.
        derivative: what the second proof found; None where no derivative of the gradient was taken.
    """

    verdict: Verdict
    steps: int
    steps_checked: int
    max_drift: float
    at_step: int
    tolerance: float
    first_bad_step: int | None = None
    derivative: DerivativeProof | None = None

    @property
    def sentence(self) -> str:
        """The certificate in words."""
        if self.verdict is Verdict.UNCHECKED:
            return "No step could be checked: they are hidden, or as small as rounding."
        checked = f"{self.steps_checked:,} of {self.steps:,} steps were made again"
        if self.verdict is Verdict.BIT_EXACT:
            return f"{checked}, every one bit for bit as recorded."
        drift = f"largest drift {self.max_drift:.1e} at step {self.at_step:,}"
        if self.verdict is Verdict.DRIFTED:
            return f"{checked}, but from step {self.first_bad_step:,} on they differ ({drift}): NOT the recorded run."
        return f"{checked} and agree with the recording within rounding ({drift})."

    def to_json(self) -> Json:
        """JSON-ready values, with the sentences."""
        values = asdict(self) | {"sentence": self.sentence, "derivative": None}
        if (found := self.derivative) is None:
            return values
        named = {"derivative": found.sentence, "derivative_verdict": found.verdict, "derivative_steps": found.steps}
        return values | named | {"derivative_worst": found.worst if math.isfinite(found.worst) else None}


@dataclass(slots=True)
class Comparisons:
    """What has been found of the steps that were made again so far; as JSON in the file of a replay in progress.

    Attributes:
        checked: the steps that count as made again.
        unequal: the steps that did not come out to the last bit.
        worst: the largest drift, and worst_step: where.
        first_bad: the first step beyond tolerance, or None.
    """

    checked: set[int] = field(default_factory=set)
    unequal: set[int] = field(default_factory=set)
    worst: float = 0.0
    worst_step: int = 0
    first_bad: int | None = None

    def drifted(self, t: int, drift: float) -> None:
        """Notes the drift of a step."""
        if drift > self.worst:
            self.worst, self.worst_step = drift, t

    def bad(self, t: int) -> None:
        """Notes a step beyond tolerance."""
        self.first_bad = t if self.first_bad is None else min(t, self.first_bad)

    @property
    def verdict(self) -> Verdict:
        """The verdict so far."""
        if self.first_bad is not None:
            return Verdict.DRIFTED
        if not self.checked:
            return Verdict.UNCHECKED
        return Verdict.WITHIN_ROUNDING if self.unequal else Verdict.BIT_EXACT

    def certificate(self, steps: int, tolerance: float) -> Certificate:
        """The certificate of a run of so many steps."""
        checked = len(self.checked)
        return Certificate(self.verdict, steps, checked, self.worst, self.worst_step, tolerance, self.first_bad)

    def to_json(self) -> Json:
        """JSON-ready values."""
        return asdict(self) | {"checked": sorted(self.checked), "unequal": sorted(self.unequal)}

    def resume(self, values: Json) -> None:
        """Takes up what `to_json` gave."""
        for name, value in values.items():
            setattr(self, name, set(value) if name in ("checked", "unequal") else value)


class StepChecks(Protocol):
    """Checks the steps that a replay makes again.

    Attributes:
        stride: check the first, the last and every so many steps; 1 checks all.
        tolerance: on the drift of a step.
        found: what the steps so far have come to.
    """

    stride: int
    tolerance: float
    found: Comparisons

    @property
    def waiting(self) -> tuple[Step, Tensor | None] | None:
        """A step that waits for the one before it, going backwards, with its gradient."""

    @waiting.setter
    def waiting(self, waiting: tuple[Step, Tensor | None] | None) -> None: ...

    def forwards(self, step: Step, state: State, gradient: Tensor) -> State:
        """Takes a step going forwards, with the optimizer's state before it. Returns the state after it."""

    def wants(self, step: Step) -> bool:
        """Whether `backwards` needs the gradient of this step."""

    def backwards(self, step: Step, gradient: Tensor | None) -> None:
        """Takes a step going backwards."""

    def finish_backwards(self, initial: State) -> None:
        """The backward pass has ended; `initial` is the state before step 1."""

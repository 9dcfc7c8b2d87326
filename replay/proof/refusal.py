"""What a replay says that does not reproduce its recording."""

from __future__ import annotations

import math

from torch import Tensor

from trajrec.errors import DriftError
from trajrec.replay.step import Step
from trajrec.rules.step import State

_COMPILED = (
    " The step drew random numbers: a compiled model draws others for its dropout than the model itself, unless "
    "torch._inductor.config.fallback_random is set before training."
)


class Drifted(Exception):  # noqa: N818
    """Drift, before its cause has been looked for.

    Attributes:
        t: the first step known to differ.
        drift: drift_t.
        probe: a step at recorded weights whose loss can be held against the recorded loss.
        seen_at: the step at which it was seen; later than t where only keyframes are stored.
        state: the optimizer's state before the probe, where it is known.
        recorded: the weights [P'] after step `seen_at`.
    """

    def __init__(
        self,
        t: int,
        drift: float,
        probe: Step,
        seen_at: int,
        state: State | None = None,
        recorded: Tensor | None = None,
    ) -> None:
        super().__init__(t)
        self.t = t
        self.drift = drift
        self.probe = probe
        self.seen_at = seen_at
        self.state = state
        self.recorded = recorded


def drift_error(first: Drifted, recorded_loss: float, computed_loss: float, tolerance: float, cause: str) -> DriftError:
    """The refusal, with the first bad step and its cause, or what the losses tell about it where none was found."""
    where = "" if first.seen_at == first.t else f" (measured at the keyframe of step {first.seen_at})"
    if not cause:
        cause = _cause(recorded_loss, computed_loss) + _COMPILED * any(part.rng for part in first.probe.parts)
    return DriftError(
        f"Replay drifted at step {first.t}: the recomputed weights differ from the recorded ones by "
        f"{first.drift:.1e} of what they moved{where}, tolerance {tolerance:.0e}. "
        f"{cause} Mend the Task, or go on with --allow-drift."
    )


def _cause(recorded: float, computed: float) -> str:
    if math.isnan(recorded):
        return "The Task does not describe the recorded training (loss, clipping, augmentation, dropout, data)."
    if abs(recorded - computed) <= 1e-3 * max(abs(recorded), 1e-12):
        return (
            f"The loss agrees ({recorded:.6g}), so the gradient was changed after the loss: clipping, loss scaling, "
            "or weights changed outside the optimizer."
        )
    ratio = computed / recorded if recorded else math.inf
    return (
        f"The loss differs: recorded {recorded:.6g}, by the Task {computed:.6g} (ratio {ratio:.4g}). Another loss or "
        "reduction, other data or labels, augmentation, or another train/eval mode."
    )

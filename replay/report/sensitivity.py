"""How sensitive a training was, from the growth of its adjoint: a sentence on how far first-order numbers go.

The adjoint lam_t says how much the target loss moves when the weights after step t are moved. Where its norm grows on
the way back through the run, small changes early in the training are amplified by later steps; beyond some size the
change that a single sample makes is no longer small, and its contribution, a derivative, says little about leaving it
out.

The bounds are taken from trainings in which contributions were held against the removal of samples
(`benchmarks/sensitivity.py`): up to a growth of about 5 they came true within some per cent, from 10 on they did not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CALM, WILD = 5.0, 50.0


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The sensitivity of a training to small changes.

    Attributes:
        growth: the largest norm of the adjoint on the way back over its norm at the end of the run (no unit).
    """

    growth: float

    @property
    def verdict(self) -> Literal["calm", "rough", "wild"]:
        """In a word."""
        return "calm" if self.growth <= CALM else "rough" if self.growth <= WILD else "wild"

    @property
    def sentence(self) -> str:
        """In a sentence."""
        grew = f"going back through the run the adjoint grew to at most {self.growth:.3g} times its size"
        return {
            "calm": f"Calm: {grew}. Single samples are small changes for this training.",
            "rough": f"Rough: {grew}. Check a few samples with --taylor before trusting single numbers.",
            "wild": f"Wild: {grew}. This training is so sensitive that first-order numbers should not be trusted; "
            "smaller learning rates, smooth activations or --curvature ggn tame it.",
        }[self.verdict]

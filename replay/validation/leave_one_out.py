"""Leave-one-out on the recorded schedule: does a single sample do what its contribution says?

K random samples are taken out, each alone. Spearman's and Pearson's correlation over the samples are those of the mean
over the targets' own; slope (of a line through zero, real over predicted change) and sign error (how often the two have
different signs) are over all samples and targets. Ideal 1, 1, 1 and 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from trajrec.records import FloatArray, Json
from trajrec.replay.validation.correlations import pearson, spearman
from trajrec.replay.validation.removals import Removals, number


@dataclass(frozen=True, slots=True)
class LeaveOneOut:
    """How well the contributions of single samples came true.

    Attributes:
        removals: what was done, with sets of one sample.
        spearman, pearson: over the samples, mean over the targets.
        slope: of the real over the predicted change.
        sign_error: share of changes with another sign than predicted.
    """

    removals: Removals = field(repr=False)
    spearman: float
    pearson: float
    slope: float
    sign_error: float

    @classmethod
    def of(cls, removals: Removals) -> LeaveOneOut:
        """Of what was done."""
        predicted, happened = removals.predicted, removals.happened
        pairs = list(zip(predicted.T, happened.T, strict=True))
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = float((predicted * happened).sum() / np.square(predicted).sum())
        wrong = float((predicted * happened < 0).mean())
        return cls(removals, _mean([spearman(*p) for p in pairs]), _mean([pearson(*p) for p in pairs]), slope, wrong)

    @property
    def sentence(self) -> str:
        """In a sentence."""
        return (
            f"Leaving out {self.removals.described}: predicted and real changes have Spearman {self.spearman:.2f}, "
            f"Pearson {self.pearson:.2f}, slope {self.slope:.2f} (ideal 1), other signs {100 * self.sign_error:.0f} %."
        )

    def to_json(self) -> Json:
        """As it stands in validation.json."""
        scores = {name: number(getattr(self, name)) for name in ("spearman", "pearson", "slope", "sign_error")}
        return {"samples": len(self.removals.sets), **scores, "sentence": self.sentence}


def _mean(values: list[float]) -> float:
    found: FloatArray = np.array(values)
    found = found[np.isfinite(found)]
    return float(found.mean()) if len(found) else np.nan

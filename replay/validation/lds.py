"""The linear datamodeling score on the recorded schedule: do contributions rank sets of samples by what they do?

K random sets of a fraction of the samples are taken out, one after the other. The score of a target is Spearman's
correlation, over the sets, of the predicted with the real change of its loss; the score is the mean over the targets.
Ideal 1. Batches, order and random states stay those of the recording: this is another question than that of Park et al.
2023 (TRAK), who train each subset with seeds of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from trajrec.records import Json
from trajrec.replay.validation.correlations import spearman
from trajrec.replay.validation.removals import Removals, number


@dataclass(frozen=True, slots=True)
class DatamodelingScore:
    """The score of sets [K] on targets [M].

    Attributes:
        removals: what was done.
        fraction: of the samples, in a set.
        score: mean over the targets; NaN if no target's loss changed.
        targets: how many targets it is the mean of.
    """

    removals: Removals = field(repr=False)
    fraction: float
    score: float
    targets: int

    @classmethod
    def of(cls, removals: Removals, fraction: float) -> DatamodelingScore:
        """Of what was done."""
        pairs = zip(removals.predicted.T, removals.happened.T, strict=True)
        found = np.array([spearman(*pair) for pair in pairs])
        found = found[np.isfinite(found)]
        return cls(removals, fraction, float(found.mean()) if len(found) else np.nan, len(found))

    @property
    def sentence(self) -> str:
        """In a sentence."""
        return (
            f"Linear datamodeling score {self.score:.2f} (ideal 1): Spearman's correlation of predicted and real "
            f"changes over {len(self.removals.sets)} random sets of {100 * self.fraction:g} % of the samples"
            f"{f', mean over {self.targets:,} targets' if self.targets > 1 else ''}."
        )

    def to_json(self) -> Json:
        """As it stands in validation.json."""
        facts = {"score": number(self.score), "sets": len(self.removals.sets), "fraction": self.fraction}
        return facts | {"targets": self.targets, "sentence": self.sentence}

r"""Removals: sets of samples are taken out, the training is made again, and prediction is held against what happened.

For a set D of samples the prediction is linear, and what happened is known once the schedule has been run again:

    predicted(D, j) = sum over i in D of C(i, j)          happened(D, j) = l_j(w_T without D) - l_j(w_T)

What `validate` does first is K = 5 random sets of 1 % of the samples, and Pearson's correlation of the two, pooled over
all sets and targets. Of 14 trainings in which much more was trained again, those where sets of 1 % rank truly (the
linear datamodeling score at 1 %, .91 and more) had .92 to 1.0, the others .68 and less. So at .9 the numbers hold, and
below .7 they do not; between is weak, and nobody has seen much of it.

Letters: K sets, M targets, N training samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from trajrec.records import FloatArray, IntArray, Json
from trajrec.replay.validation.correlations import bootstrap, pearson
from trajrec.replay.validation.retrain import Retraining

HOLDS, WEAK = 0.9, 0.7
_MOST_PAIRS = 500

Verdict: TypeAlias = Literal["holds", "weak", "does not hold"]


@dataclass(frozen=True, slots=True)
class Removals:
    """What taking out sets of samples did.

    Attributes:
        sets: K times the ids of the samples that were taken out.
        predicted: [K, M] sums of their contributions.
        happened: [K, M] changes of the target losses.
    """

    sets: tuple[IntArray, ...]
    predicted: FloatArray
    happened: FloatArray

    @classmethod
    def made(cls, again: Retraining, sets: Sequence[IntArray], predicted: FloatArray) -> Removals:
        """Trains again without each of the sets."""
        return cls(tuple(sets), predicted, np.array([again.change(ids) for ids in sets]))

    @property
    def described(self) -> str:
        """What was taken out, in words."""
        count, size = len(self.sets), len(self.sets[0])
        return f"each of {count} random " + ("samples" if size == 1 else f"sets of {size:,} samples")


@dataclass(frozen=True, slots=True)
class Pooled:
    """Whether sets that were taken out did what their contributions say, over all sets and targets.

    Attributes:
        removals: what was done.
        correlation: Pearson's, over K x M pairs.
        interval: of it, at 95 %, by a bootstrap over sets and targets.
    """

    removals: Removals = field(repr=False)
    correlation: float
    interval: tuple[float, float]

    @classmethod
    def of(cls, removals: Removals, seed: int) -> Pooled:
        """Of what was done; `seed` is that of the bootstrap."""
        predicted, happened = removals.predicted, removals.happened
        return cls(removals, pearson(predicted, happened), bootstrap(predicted, happened, seed))

    @property
    def verdict(self) -> Verdict:
        """In a word."""
        if self.correlation >= HOLDS:
            return "holds"
        return "weak" if self.correlation >= WEAK else "does not hold"

    @property
    def sentence(self) -> str:
        """In a sentence."""
        targets = self.removals.predicted.shape[1]
        losses = f"{targets:,} target losses" if targets > 1 else "the target loss"
        what = f"trained again without {self.removals.described} on the recorded schedule, predicted and real changes "
        what += f"of {losses} {self._correlate}"
        return {
            "holds": f"The numbers hold: {what}.",
            "weak": f"The numbers hold weakly: {what}. Ranks of many samples mean something, single numbers little.",
            "does not hold": f"The numbers do not hold: {what}. They do not say what removing samples does here.",
        }[self.verdict]

    @property
    def _correlate(self) -> str:
        if not np.isfinite(self.correlation):
            return "cannot be correlated: one of them does not vary"
        low, high = self.interval
        return f"correlate at {self.correlation:.2f} (95 % interval {low:.2f} to {high:.2f})"

    def to_json(self) -> Json:
        """As it stands in validation.json; of many pairs the first of each target."""
        done = self.removals
        predicted, happened = (values.T.ravel()[:_MOST_PAIRS] for values in (done.predicted, done.happened))
        pairs = [[float(f"{p:.6g}"), float(f"{h:.6g}")] for p, h in zip(predicted, happened, strict=True)]
        return {
            "verdict": self.verdict,
            "correlation": number(self.correlation),
            "interval": [number(end) for end in self.interval],
            "sets": len(done.sets),
            "samples_each": len(done.sets[0]),
            "targets": done.predicted.shape[1],
            "sentence": self.sentence,
            "pairs": pairs,
        }


def number(value: float) -> float | None:
    """A number as JSON has it; None where it is not defined."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def random_sets(total: int, count: int, fraction: float, seed: int) -> list[IntArray]:
    """So many random sets of a fraction of the samples, one sample at least; within a set none is twice."""
    size = max(1, round(fraction * total))
    rng = np.random.default_rng(seed)
    return [np.sort(rng.choice(total, size, replace=False)) for _ in range(count)]

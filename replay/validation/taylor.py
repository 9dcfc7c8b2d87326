r"""Taylor check: what a contribution predicts, held against what happens when the training is made again.

C(i, j) is the first-order prediction of l_j(without i) - l_j. For a few samples the recorded schedule is run again,
from the last keyframe before the sample first appears, with the sample's loss taken out (eps_i = -1/N) and taken out by
half (eps_i = -1/(2N)). With d(h) the change of l_j at h of the way and r(h) = d(h) - h C(i, j),

    ratio = d(1) / C(i, j)              ideal 1: the prediction came true
    rate  = log2(|r(1)| / |r(1/2)|)     ideal 2: what is missing is of second order

A rate far below 2 says that one sample is not small for this training: it is chaotic, or has kinks, and first-order
numbers are not to be trusted.

Letters: M targets, N training samples, S samples checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trajrec.records import FloatArray, IntArray, Json
from trajrec.replay.losses.targets import Targets
from trajrec.replay.session import Session
from trajrec.replay.validation.retrain import Retraining

REMOVED = (1.0, 0.5)


@dataclass(frozen=True, slots=True)
class TaylorCheck:
    """What removing samples did.

    Attributes:
        samples: [S] ids.
        predicted: [S, M] contributions.
        removed: [S, M] change of the target losses without the sample.
        halved: [S, M] the same with half of its loss taken out.
    """

    samples: IntArray
    predicted: FloatArray
    removed: FloatArray
    halved: FloatArray

    @property
    def ratios(self) -> FloatArray:
        """What happened over what was predicted [S, M]; ideal 1."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.removed / self.predicted

    @property
    def rates(self) -> FloatArray:
        """Order of the remainder [S, M]; ideal 2. NaN where it is lost in rounding."""
        whole, half = np.abs(self.removed - self.predicted), np.abs(self.halved - self.predicted / 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where((whole > 0) & (half > 0), np.log2(whole / half), np.nan)

    @property
    def sentence(self) -> str:
        """The check in words."""
        ratio = float(np.nanmedian(self.ratios))
        what = f"Removing each of {len(self.samples)} samples on the recorded schedule did {ratio:.2f} times what its "
        what += "contribution says (median; ideal 1)"
        if 0.5 <= ratio <= 2:
            return what + "."
        return what + ": first-order numbers should not be trusted for single samples of this training."

    def to_json(self) -> Json:
        """As it stands in validation.json."""
        medians = float(np.nanmedian(self.ratios)), float(np.nanmedian(self.rates))
        ratio, rate = (round(value, 4) if np.isfinite(value) else None for value in medians)
        return {"samples": len(self.samples), "ratio": ratio, "rate": rate, "sentence": self.sentence}


def taylor_check(
    session: Session, targets: Targets, samples: IntArray, predicted: FloatArray, advance: Callable[[int], None]
) -> TaylorCheck:
    """Trains again without each of the samples [S], and holds the changes against predictions [S, M].

    Costs one training for all and two for each sample, from the sample's first appearance on.
    """
    again = Retraining(session, targets, advance)
    changes = np.array([[again.change(ids, part) for part in REMOVED] for ids in sets_of(samples)])
    return TaylorCheck(np.asarray(samples), predicted, changes[:, 0], changes[:, 1])


def taylor_steps(session: Session, samples: Sequence[int]) -> int:
    """How many steps `taylor_check` makes."""
    return Retraining(session, None, lambda _: None).steps(sets_of(samples), times=len(REMOVED))


def sets_of(samples: IntArray | Sequence[int]) -> list[IntArray]:
    """Each sample as a set of its own."""
    return list(np.asarray(samples)[:, None])


def spread(values: FloatArray, count: int) -> IntArray:
    """Rows of values [S, M]: the most influential, the median one, and others evenly between."""
    ranks = np.argsort(-np.abs(values).sum(axis=1))
    found: IntArray = ranks[np.linspace(0, (len(ranks) - 1) // 2, min(count, len(ranks))).astype(int)]
    return found

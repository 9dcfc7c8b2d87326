r"""Taylor check: what a contribution predicts, held against what happens when the training is made again.

C(i, j) is the first-order prediction of l_j(without i) - l_j. For a few samples the recorded schedule is run again,
from the last keyframe before the sample first appears, with the sample's loss taken out (eps_i = -1/N) and taken out by
half (eps_i = -1/(2N)). With d(h) the change of l_j at h of the way and r(h) = d(h) - h C(i, j),

    ratio = d(1) / C(i, j)              ideal 1: the prediction came true
    rate  = log2(|r(1)| / |r(1/2)|)     ideal 2: what is missing is of second order

A rate far below 2 says that one sample is not small for this training: it is chaotic, or has kinks, and first-order
numbers are not to be trusted. BatchNorm's running statistics are those of the run, as they are for the contributions.

Letters: M targets, N training samples, S samples checked.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trajrec.records import FloatArray, IntArray
from trajrec.replay.linearize import gradient_of
from trajrec.replay.session import Session
from trajrec.replay.targets import Targets, target_values
from trajrec.replay.trajectory import Step, make_step

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


def taylor_check(
    session: Session, targets: Targets, samples: IntArray, predicted: FloatArray, advance: Callable[[int], None]
) -> TaylorCheck:
    """Trains again without each of the samples [S], and holds the changes against predictions [S, M].

    Costs one training for all and two for each sample, from the sample's first appearance on.
    """
    again = _Again(session, targets, advance)
    changes = np.array([[again.change(int(sample), part) for part in REMOVED] for sample in samples])
    return TaylorCheck(np.asarray(samples), predicted, changes[:, 0], changes[:, 1])


def taylor_steps(session: Session, samples: Sequence[int]) -> int:
    """How many steps `taylor_check` makes."""
    again = _Again(session, None, lambda _: None)
    starts = [again.start(sample) for sample in samples]
    # Samples with the same start share the training that nothing is taken out of.
    steps = [session.run.steps - start for start in (*set(starts), *starts * len(REMOVED))]
    return sum(steps)


class _Again:
    """Trains again from keyframes, with samples taken out by a part."""

    def __init__(self, session: Session, targets: Targets | None, advance: Callable[[int], None]) -> None:
        self.session = session
        self.targets = targets
        self.advance = advance
        self._base: dict[int, FloatArray] = {}
        self._starts: dict[int, int] = {}

    def start(self, sample: int) -> int:
        """The last keyframe before the first step that used a sample; T if none did."""
        if sample not in self._starts:
            self._starts[sample] = self._find_start(sample)
        return self._starts[sample]

    def _find_start(self, sample: int) -> int:
        run = self.session.run
        used = (t for t in range(1, run.steps + 1) if sample in run.sample_ids(t))
        first = next(used, None)
        return run.steps if first is None else run.keyframe_steps[bisect_left(run.keyframe_steps, first) - 1]

    def change(self, sample: int, part: float) -> FloatArray:
        """The change of the target losses [M] with a part of a sample's loss taken out."""
        start = self.start(sample)
        if start not in self._base:
            self._base[start] = self._values(start, None, 0.0)
        return self._values(start, sample, part) - self._base[start]

    def _values(self, start: int, sample: int | None, part: float) -> FloatArray:
        s = self.session
        weights = s.trajectory.weights(start)
        state = s.rule.initial_state(s.run.keyframe(start), s.run.hyper(min(start + 1, s.run.steps)), s.dtype, s.device)
        for t in range(start + 1, s.run.steps + 1):
            step = make_step(s.run, t, weights, weights)
            gradient = self._gradient(step, sample, part)
            with torch.no_grad():
                weights, state = s.rule.step(weights, state, gradient, step.hyper)
            self.advance(1)
        assert self.targets is not None
        return target_values(self.targets, s.function, s.test, weights)

    def _gradient(self, step: Step, sample: int | None, part: float) -> Tensor:
        factors = torch.ones(len(step.ids), dtype=self.session.dtype, device=self.session.device)
        factors[torch.as_tensor(step.ids == sample)] = 1.0 - part
        return gradient_of(self.session.function, self.session.train, step, factors)

"""Do the numbers of a replay come true? `validate` trains again on the recorded schedule, and says.

First, and alone if nothing else is asked: without each of K random sets of 1 % of the samples (`removals`), which costs
K + 1 trainings. On request single samples are left out (`leave_one_out`), sets are ranked (`lds`), and single samples
are taken out by half (`taylor`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trajrec.errors import ReplayError
from trajrec.records import IntArray, Json
from trajrec.replay.machine.memory import kept
from trajrec.replay.methods.contributions import Contributions
from trajrec.replay.progress import Progress, Silent
from trajrec.replay.question import Curvature, FloatName, Question, TargetChoice
from trajrec.replay.session import Session
from trajrec.replay.step import RecordedRun
from trajrec.replay.validation.lds import DatamodelingScore
from trajrec.replay.validation.leave_one_out import LeaveOneOut
from trajrec.replay.validation.predictions import Predictions, predictions
from trajrec.replay.validation.removals import Pooled, Removals, Verdict, random_sets
from trajrec.replay.validation.retrain import Retraining
from trajrec.replay.validation.taylor import TaylorCheck, sets_of, spread, taylor_check, taylor_steps
from trajrec.task.task import Task


@dataclass(frozen=True, slots=True)
class Validation:
    """What training again said of the numbers of a replay; None where it was not asked.

    Attributes:
        removals: random sets of samples, and the correlation over all of them.
        leave_one_out: single samples.
        lds: the linear datamodeling score.
        taylor: the order of what is missing.
        curvature: of the contributions that were tried: "hessian", "ggn", "kinks" or "none".
        seed: by which sets and samples were chosen.
    """

    removals: Pooled | None
    leave_one_out: LeaveOneOut | None
    lds: DatamodelingScore | None
    taylor: TaylorCheck | None
    curvature: Curvature
    seed: int

    @property
    def verdict(self) -> Verdict | None:
        """In a word: "holds" (a correlation of .9 and more), "weak" (.7 and more) or "does not hold"."""
        return None if self.removals is None else self.removals.verdict

    @property
    def correlation(self) -> float | None:
        """Of predicted and real changes, Pearson's, over all sets and targets."""
        return None if self.removals is None else self.removals.correlation

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the correlation, at 95 %."""
        return None if self.removals is None else self.removals.interval

    @property
    def sentence(self) -> str:
        """In words."""
        parts = self.removals, self.leave_one_out, self.lds, self.taylor
        return " ".join(part.sentence for part in parts if part is not None)

    def to_json(self) -> Json:
        """As it stands in validation.json, without what was not asked."""
        parts = {"removals": self.removals, "leave_one_out": self.leave_one_out, "lds": self.lds, "taylor": self.taylor}
        said = {name: part.to_json() for name, part in parts.items() if part is not None}
        return said | {"curvature": self.curvature, "seed": self.seed}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trials:
    """How much is trained again.

    Attributes:
        subsets: random sets for the correlation over all; 0 leaves it out.
        fraction: of the samples, in such a set.
        loo: random samples to be left out, each alone.
        lds: random sets for the linear datamodeling score.
        lds_fraction: of the samples, in such a set.
        taylor: samples to be taken out whole and by half: the most influential, the median one, others between.
        seed: by which sets and samples are chosen.

    Raises:
        ReplayError: if there is nothing to do, or a number makes no sense.
    """

    subsets: int = 5
    fraction: float = 0.01
    loo: int = 0
    lds: int = 0
    lds_fraction: float = 0.1
    taylor: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        counts = self.subsets, self.loo, self.lds, self.taylor
        if min(counts) < 0 or not any(counts):
            raise ReplayError("Nothing is to be trained again: ask for subsets, loo, lds or taylor.")
        for share in (self.fraction, self.lds_fraction):
            if not 0 < share < 1:
                raise ReplayError(f"A subset takes out a fraction of the samples between 0 and 1, not {share:g}.")
        if 0 < self.loo < 2 or 0 < self.lds < 2:
            raise ReplayError("A rank correlation needs two trainings at least, and says little of fewer than ten.")


def validate(
    run: RecordedRun,
    task: Task,
    *,
    contributions: Contributions | None = None,
    targets: TargetChoice | None = None,
    curvature: Curvature = "hessian",
    subsets: int = 5,
    fraction: float = 0.01,
    loo: int = 0,
    lds: int = 0,
    lds_fraction: float = 0.1,
    taylor: int = 0,
    seed: int = 0,
    dtype: FloatName | torch.dtype | None = None,
    device: str | torch.device | None = None,
    allow_drift: bool = False,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Trains again on the recorded schedule without some samples: do contributions say what that does?

    Args:
        run: an open recording (`trajrec.open`).
        task: describes the training.
        contributions: those to be tried; default exact ones, made for the sets that are taken out.
        targets: as `contributions`; default those of the contributions that are given, if several, else up to 50 test
            samples.
        curvature: "hessian", "ggn", "kinks" or "none", where no contributions are given.
        subsets: random sets of samples that are taken out, one after the other; each costs a training.
        fraction: of the samples, in such a set, at least one.
        loo: random samples that are taken out, each alone.
        lds: random sets for the linear datamodeling score.
        lds_fraction: of the samples, in such a set.
        taylor: samples that are taken out whole and by half.
        seed: by which sets and samples are chosen.
        dtype: as `contributions`.
        device: as `contributions`.
        allow_drift: go on where the Task does not reproduce the recording.
        memory: as `contributions`.
        progress: is told how far it is.

    Raises:
        TaskError, DriftError, DerivativeError, ReplayError: as `contributions`.
        NonFiniteError: if a training diverges without a set.
    """
    trials = Trials(
        subsets=subsets, fraction=fraction, loo=loo, lds=lds, lds_fraction=lds_fraction, taylor=taylor, seed=seed
    )
    question = Question(curvature=curvature, dtype=dtype, device=device, allow_drift=allow_drift)
    session = Session.of(run, task, question, memory)
    return tried(session, trials, contributions, targets, curvature, progress or Silent())


def tried(
    session: Session,
    trials: Trials,
    found: Contributions | None,
    targets: TargetChoice | None,
    curvature: Curvature,
    progress: Progress,
) -> Validation:
    """`validate` for a session that stands already, with the same errors."""

    def work() -> Validation:
        with kept():
            return _Work(session, trials, found, targets, curvature, progress).all()

    done: Validation = session.guarded(work)
    return done


@dataclass(frozen=True, slots=True)
class _Work:
    """One trial after the other."""

    session: Session
    trials: Trials
    found: Contributions | None
    targets: TargetChoice | None
    curvature: Curvature
    progress: Progress

    def all(self) -> Validation:
        """Everything that was asked for."""
        asked = self.trials
        return Validation(
            removals=self._pooled(asked.subsets, asked.fraction) if asked.subsets else None,
            leave_one_out=LeaveOneOut.of(self._singles(asked.loo)) if asked.loo else None,
            lds=self._ranked(asked.lds, asked.lds_fraction) if asked.lds else None,
            taylor=self._taylor(asked.taylor) if asked.taylor else None,
            curvature=self._predictions(False).curvature,
            seed=asked.seed,
        )

    def _predictions(self, several: bool) -> Predictions:
        return predictions(self.session, self.found, self.targets, self.curvature, several)

    def _pooled(self, count: int, fraction: float) -> Pooled:
        sets = random_sets(self.session.samples, count, fraction, self.trials.seed)
        return Pooled.of(self._removed(sets, True, f"training again without {count} random sets"), self.trials.seed)

    def _ranked(self, count: int, fraction: float) -> DatamodelingScore:
        sets = random_sets(self.session.samples, count, fraction, self.trials.seed)
        removed = self._removed(sets, False, f"training again without {count} random sets, for their ranks")
        return DatamodelingScore.of(removed, fraction)

    def _singles(self, count: int) -> Removals:
        ids = np.random.default_rng(self.trials.seed).permutation(self.session.samples)[:count]
        return self._removed(sets_of(ids), False, f"training again without {len(ids)} samples")

    def _removed(self, sets: list[IntArray], several: bool, what: str) -> Removals:
        predictions = self._predictions(several)
        predicted = predictions.of(sets, self.progress)
        again = Retraining(self.session, predictions.targets, self.progress.advance)
        self.progress.start(what, again.steps(sets))
        return Removals.made(again, sets, predicted)

    def _taylor(self, count: int) -> TaylorCheck:
        predictions = self._predictions(False)
        if predictions.stored is not None:
            ids = predictions.stored.samples[spread(predictions.stored.values, count)]
        else:
            ids = np.random.default_rng(self.trials.seed).permutation(self.session.samples)[:count]
        predicted = predictions.of(sets_of(ids), self.progress)
        self.progress.start("taylor check", taylor_steps(self.session, ids.tolist()))
        return taylor_check(self.session, predictions.targets, ids, predicted, self.progress.advance)

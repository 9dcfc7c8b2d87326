"""What is predicted for sets of samples: by contributions that are there, or going forwards with the sets themselves.

Contributions of all N samples only have to be summed. Where there are none, or they are about one target and several
are needed, the hypergradient of a set costs as much as that of a sample, for all targets (`methods.tangent`): K sets
are K directions. Both are the same numbers to rounding (`methods.adjoint` and `methods.tangent` are dual).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trajrec.errors import ReplayError
from trajrec.records import FloatArray, IntArray
from trajrec.replay.losses.targets import Targets, choose_targets
from trajrec.replay.methods.blocks import Execution
from trajrec.replay.methods.contributions import Contributions, answer
from trajrec.replay.progress import Progress
from trajrec.replay.question import Curvature, Scope, TargetChoice
from trajrec.replay.session import Session

MOST_TARGETS = 50
_SAME = 0.2  # of the largest: rounding of a rough training in float32 is below


@dataclass(frozen=True, slots=True)
class Predictions:
    """Predictions for sets of samples and these targets.

    Attributes:
        stored: contributions of all samples to them, or None to go forwards with the sets.
        beside: contributions of all samples to one other target, which going forwards must come to, too.
    """

    session: Session
    targets: Targets
    curvature: Curvature
    stored: Contributions | None = None
    beside: Contributions | None = None

    def of(self, sets: Sequence[IntArray], progress: Progress) -> FloatArray:
        """The predicted changes [K, M].

        Raises:
            ReplayError: if going forwards comes to other numbers than contributions that are there.
        """
        if self.stored is not None:
            return summed(self.stored, sets)
        if self.beside is None:
            return self._forwards(self.targets, sets, progress)
        other = targets_of(self.beside, self.session)
        if other.asked is not None:  # parts of losses and differences: another computation than losses
            _check_same(self._forwards(other, sets, progress), summed(self.beside, sets))
            return self._forwards(self.targets, sets, progress)
        found = self._forwards(_joined(self.targets, other), sets, progress)
        _check_same(found[:, -1:], summed(self.beside, sets))
        return found[:, :-1]

    def _forwards(self, targets: Targets, sets: Sequence[IntArray], progress: Progress) -> FloatArray:
        names, window = np.array([ids[0] for ids in sets]), (1, self.session.run.steps)
        scope = Scope(targets, names, "tangent", self.curvature, False, window, 1, tuple(sets))
        return answer(self.session, scope, Execution(progress)).values


def summed(found: Contributions, sets: Sequence[IntArray]) -> FloatArray:
    """Sums of contributions of all samples over sets of them, [K, M]."""
    rows = np.argsort(found.samples)
    return np.array([found.values[rows[ids]].sum(axis=0) for ids in sets])


def _joined(first: Targets, second: Targets) -> Targets:
    names = np.concatenate([first.names, second.names])
    return Targets("several", names, (*first.groups, *second.groups))


def _check_same(made: FloatArray, stored: FloatArray) -> None:
    largest = max(np.abs(made).max(), np.abs(stored).max())
    if np.abs(made - stored).max() > _SAME * largest:
        raise ReplayError(
            "The contributions that are to be validated are not those of this run and Task: for the sets that are "
            f"taken out they predict up to {np.abs(stored).max():.3g}, and going forwards {np.abs(made).max():.3g}, "
            f"{np.abs(made - stored).max():.3g} apart. Replay again, in float64 if the training is chaotic."
        )


def is_whole(found: Contributions, session: Session) -> bool:
    """Whether contributions are those of all samples and steps."""
    every_step = found.window in (None, (1, session.run.steps))
    return every_step and np.array_equal(np.sort(found.samples), np.arange(session.samples))


def targets_of(found: Contributions, session: Session) -> Targets:
    """The targets that contributions were asked for.

    Raises:
        ReplayError: if they are those of a shard.
    """
    asked = found.targets if found.target_kind == "chosen" else found.asked or found.target_kind
    targets = choose_targets(asked, session.test)
    if not np.array_equal(targets.names, found.targets):
        raise ReplayError("These contributions are to some of the targets that were asked for: merge the shards first.")
    return targets


def predictions(
    session: Session, found: Contributions | None, targets: TargetChoice | None, curvature: Curvature, several: bool
) -> Predictions:
    """What predicts: the contributions that were found, where they answer, else going forwards.

    Args:
        session: the run and the Task.
        found: contributions, or None.
        targets: what is asked for; None takes those of the contributions, or at most 50 test samples.
        curvature: where there are no contributions.
        several: whether one target is not enough.
    """
    curvature = curvature if found is None else found.curvature  # type: ignore[assignment]
    if targets is not None:
        return Predictions(session, choose_targets(targets, session.test), curvature)
    whole = found is not None and is_whole(found, session)
    if whole and found is not None and (len(found.targets) > 1 or not several):
        return Predictions(session, targets_of(found, session), curvature, found)
    count = len(session.test)
    ids = np.unique(np.linspace(0, count - 1, min(count, MOST_TARGETS)).round().astype(np.int64))
    return Predictions(session, choose_targets(ids, session.test), curvature, beside=found if whole else None)

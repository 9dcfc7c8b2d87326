"""Where the steps of a recording come from, by what it keeps and what its optimizer needs.

stored      the weights of every step, and a rule whose derivative needs no state, or states that are implied
rebuilt     the weights of every step; the states between keyframes are made again
recomputed  keyframes only; everything between is made again

States that are made again are held up to a few times the weights, that a replay stays within a few times the memory of
its training: of AdamW five of 64 states, and each step is made again up to four times. More is held where the user
gives more memory than there would be taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trajrec.replay.machine.memory import budget
from trajrec.replay.proof.certificate import StepChecks
from trajrec.replay.proof.keyframes import KeyframeChecks
from trajrec.replay.question import DTYPES
from trajrec.replay.step import Trajectory
from trajrec.replay.trajectory.participation import RegroupedRun
from trajrec.replay.trajectory.recomputed import RebuiltTrajectory, RecomputedTrajectory
from trajrec.replay.trajectory.stored import StoredTrajectory

if TYPE_CHECKING:
    from trajrec.replay.session import Session

_LEAST, _VECTORS = 64 << 20, 10  # bytes, or as large as so many times the weights, for states that are held


def trajectory_of(session: Session, checks: StepChecks) -> Trajectory:
    """The steps of a session's run; those that are made again are held against the recording by `checks`."""
    run, layout, rule = session.run, session.layout, session.rule
    stored = StoredTrajectory(run, layout, session.dtype, session.device)
    # Where groups rest now and then, the weights do not imply the states.
    if not session.is_keyframed and not rule.needs_state and not isinstance(run, RegroupedRun):
        return stored
    native = DTYPES[run.spec.dtype]
    # A model of its own: a forward pass changes running statistics.
    function = session.another_function(native)
    samples = session.train if native == session.dtype else session.training_samples(native)
    of_rows = checks if isinstance(checks, KeyframeChecks) else None
    memory = budget(session.memory, session.device) // 4
    if session.memory is None:
        memory = min(memory, max(_LEAST, _VECTORS * layout.size * native.itemsize))
    recomputed = RecomputedTrajectory(
        run, layout, function, samples, rule, session.dtype, of_rows, memory, session.allow_drift
    )
    return recomputed if of_rows is not None else RebuiltTrajectory(stored, recomputed)

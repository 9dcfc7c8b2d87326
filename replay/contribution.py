r"""Contributions of training samples to target losses: the first public question.

    C(i, j) = -(1/N) d l_j(w_T) / d eps_i          (paper, equation (8))

Positive: removing sample i would raise loss l_j, so the sample helps. Unit: that of l_j; to first order it is
l_j(without i) - l_j on the same schedule. Adjoint and tangent give the same numbers; `mode="auto"` takes the cheaper:
adjoint costs a pass per block of targets, tangent one per block of samples.

Letters: E epochs, M targets, N training samples, S samples asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trajrec.errors import ReplayError
from trajrec.records import FloatArray, IntArray
from trajrec.replay.adjoint import adjoint
from trajrec.replay.certificate import Certificate
from trajrec.replay.session import Progress, Session, Silent, blocks, check_mode
from trajrec.replay.tangent import tangent
from trajrec.replay.targets import Targets, check_ids, choose_targets
from trajrec.replay.trajectory import RecordedRun, Step
from trajrec.task import Task

if TYPE_CHECKING:
    import polars


@dataclass(frozen=True, slots=True)
class Contributions:
    """C(i, j) for S samples and M targets.

    Attributes:
        values: [S, M] float64.
        samples: [S] training sample ids.
        targets: [M] target names: -1 for the mean, class numbers, or test ids.
        certificate: what the replay has proved.
        exact: with the Hessian.
        mode: "adjoint" or "tangent".
        target_kind: "mean", "class", "each" or "chosen".
        epochs: [E] epochs, and by_epoch: [E, S, M] the part of each; both None unless asked for.
    """

    values: FloatArray
    samples: IntArray
    targets: IntArray
    certificate: Certificate
    exact: bool
    mode: str
    target_kind: str
    epochs: IntArray | None = None
    by_epoch: FloatArray | None = field(default=None, repr=False)

    def frame(self) -> polars.LazyFrame:
        """Columns sample, target, contribution, and epoch if asked for: one row for each."""
        import polars as pl

        if self.by_epoch is None or self.epochs is None:
            grid = np.meshgrid(self.samples, self.targets, indexing="ij")
            columns = dict(zip(("sample", "target"), map(np.ravel, grid), strict=True))
            return pl.LazyFrame(columns | {"contribution": self.values.ravel()})
        cube = np.meshgrid(self.epochs, self.samples, self.targets, indexing="ij")
        columns = dict(zip(("epoch", "sample", "target"), map(np.ravel, cube), strict=True))
        frame = pl.LazyFrame(columns | {"contribution": self.by_epoch.ravel()})
        return frame.select("sample", "target", "contribution", "epoch")


def contributions(
    run: RecordedRun,
    task: Task,
    targets: Any = "mean",
    samples: Any = None,
    exact: bool = False,
    mode: str = "auto",
    dtype: Any = None,
    device: Any = None,
    by_epoch: bool = False,
    allow_drift: bool = False,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Contributions:
    """Contributions of training samples to target losses.

    Args:
        run: an open recording (`trajrec.open`).
        task: describes the training.
        targets: "mean" (of the test set), "each" test sample, "class" (mean of each class), or [M] test ids.
        samples: [S] training sample ids; default all N.
        exact: with Hessian-vector products; otherwise the paper's Hessian-free approximation.
        mode: "adjoint" (all samples at once, cost by targets), "tangent" (cost by samples), or "auto".
        dtype: "float32" or "float64"; default the recording's.
        device: torch device; default CPU.
        by_epoch: also give the part of each epoch (adjoint only).
        allow_drift: go on where the task does not reproduce the recording; the certificate says so.
        memory: bytes that states recomputed between keyframes may take; default 1 GiB.
        progress: is told how far the replay is.

    Raises:
        TaskError: if the task does not fit the recording, or an id does not exist.
        DriftError: if recomputed steps differ from the recorded ones.
        ReplayError: if the question cannot be answered from this recording.
    """
    check_mode(mode)
    session = Session(run, task, dtype=dtype, device=device, allow_drift=allow_drift, memory=memory)
    return solve(session, targets, samples, exact=exact, mode=mode, by_epoch=by_epoch, progress=progress)


def solve(
    session: Session,
    targets: Any = "mean",
    samples: Any = None,
    *,
    exact: bool = False,
    mode: str = "auto",
    by_epoch: bool = False,
    progress: Progress | None = None,
) -> Contributions:
    """`contributions` for a session that stands already; arguments and errors are the same."""
    check_mode(mode)
    count = session.samples
    chosen = np.arange(count) if samples is None else check_ids(samples, count, "training")
    wanted = choose_targets(targets, session.test)
    if mode == "auto":
        mode = "adjoint" if by_epoch or len(wanted.names) <= len(chosen) else "tangent"
    if by_epoch and mode == "tangent":
        raise ReplayError('Contributions by epoch need mode="adjoint".')
    direction = _by_adjoint if mode == "adjoint" else _by_tangent
    return session.guarded(  # type: ignore[no-any-return]
        lambda: direction(session, wanted, chosen, exact, by_epoch, progress or Silent())
    )


class _Table:
    """Sums contributions by sample and target, and by epoch if asked for, in float64."""

    def __init__(self, session: Session, targets: int, by_epoch: bool) -> None:
        self.epochs = np.unique(session.run.epochs) if by_epoch else np.zeros(1, dtype=np.int64)
        self._of_step = session.run.epochs if by_epoch else None
        shape = (len(self.epochs), session.samples, targets)
        self.values = torch.zeros(shape, dtype=torch.float64, device=session.device)

    def add(self, columns: slice, step: Step, values: Tensor) -> None:
        """Adds a step's contributions [K, B] to the targets of these columns."""
        epoch = 0 if self._of_step is None else int(np.searchsorted(self.epochs, self._of_step[step.t - 1]))
        ids = torch.as_tensor(step.ids, device=values.device)
        self.values[epoch, :, columns].index_add_(0, ids, values.T.double())


def _by_adjoint(
    session: Session, wanted: Targets, chosen: IntArray, exact: bool, by_epoch: bool, progress: Progress
) -> Contributions:
    pieces = blocks(len(wanted.names), session.layout.size * 8)
    table = _Table(session, len(wanted.names), by_epoch)
    progress.start("adjoint", session.run.steps * len(pieces))
    for number, piece in enumerate(pieces):
        part = Targets(wanted.kind, wanted.names[piece], wanted.groups[piece])
        adjoint(
            session.trajectory,
            session.function,
            session.train,
            session.rule,
            session.target_gradients(part),
            exact=exact,
            certifier=session.checks if number == 0 else None,
            collect=lambda step, values, piece=piece: table.add(piece, step, values),  # type: ignore[misc]
            advance=progress.advance,
        )
    parts = table.values[:, torch.as_tensor(chosen, device=session.device)].cpu().numpy()
    return Contributions(
        parts.sum(axis=0),
        chosen,
        wanted.names,
        session.checks.certificate(),
        exact,
        "adjoint",
        wanted.kind,
        table.epochs if by_epoch else None,
        parts if by_epoch else None,
    )


def _by_tangent(
    session: Session, wanted: Targets, chosen: IntArray, exact: bool, by_epoch: bool, progress: Progress
) -> Contributions:
    pieces = blocks(len(chosen), session.layout.size * 8)
    gradients = session.target_gradients(wanted).double()
    values = np.empty((len(chosen), len(wanted.names)))
    progress.start("tangent", session.run.steps * len(pieces))
    for piece in pieces:
        d = tangent(
            session.trajectory,
            session.function,
            session.train,
            session.rule,
            chosen[piece],
            total=session.samples,
            exact=exact,
            certifier=session.checks,
            advance=progress.advance,
        )
        values[piece] = -(d.double() @ gradients.T).cpu().numpy() / session.samples
    certificate = session.checks.certificate()
    return Contributions(values, chosen, wanted.names, certificate, exact, "tangent", wanted.kind)

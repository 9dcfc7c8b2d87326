r"""Contributions of training samples to target losses: the first public question.

    C(i, j) = -(1/N) d l_j(w_T) / d eps_i          (paper, equation (8))

Positive: removing sample i would raise loss l_j, so the sample helps. Unit: that of l_j; to first order it is
l_j(without i) - l_j on the same schedule. Adjoint and tangent give the same numbers; `mode="auto"` takes the cheaper:
adjoint costs a pass per block of targets, tangent one per block of samples.

Letters: E epochs, M targets, N training samples, S samples asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trajrec.errors import ReplayError
from trajrec.records import FloatArray, IntArray
from trajrec.replay.derivatives.choice import Forms
from trajrec.replay.losses.targets import check_ids, choose_targets
from trajrec.replay.machine.memory import kept
from trajrec.replay.methods.blocks import AdjointPasses, Means, TangentPasses, sampled_stride
from trajrec.replay.methods.resume import ProgressFile
from trajrec.replay.proof.certificate import Certificate
from trajrec.replay.question import Question, certification_of, check_mode, curvature_of, cut, window_of
from trajrec.replay.session import Progress, Session, Silent
from trajrec.replay.step import RecordedRun
from trajrec.task.task import Task

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
        growth: [n], adjoint only: the norm of the adjoint |lam_t| over that at the end of the run, at n <= 100 evenly
            spaced points from the last step back to the first, the largest over the first block of targets. What it
            grows by, so do rounding errors of the late steps.
        window: first and last step whose contributions were summed.
        curvature: "hessian", "ggn" or "none".
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
    growth: FloatArray | None = field(default=None, repr=False)
    window: tuple[int, int] | None = None
    curvature: str = "none"

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
    steps: tuple[int, int] | None = None,
    certify: str | None = None,
    curvature: str | None = None,
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
        memory: bytes for blocks of targets or samples and for recomputed states; default a quarter of what is free.
        steps: (a, b): only what steps a to b contribute; default all.
        certify: "all" steps are made again, or a "sampled" few (32 or more, the first and the last among them, up
            to every 32nd; each costs a gradient). "turns": all, but where one target is asked for the large tensors
            are compared in turns, an eighth at a step (`trajrec.replay.proof.turns`). Default: all if exact,
            else sampled.
        curvature: "hessian" is what `exact` stands for, "none" the approximation; "ggn" is the Gauss-Newton form
            between them (`trajrec.replay.derivatives.gauss_newton`), tamer than the Hessian on ReLU networks.
        progress: is told how far the replay is.

    Raises:
        TaskError: if the task does not fit the recording, or an id does not exist.
        DriftError: if recomputed steps differ from the recorded ones.
        ReplayError: if the question cannot be answered from this recording.
    """
    check_mode(mode)
    session = Session(run, task, dtype=dtype, device=device, allow_drift=allow_drift, memory=memory)
    return solve(
        session,
        targets,
        samples,
        exact=exact,
        mode=mode,
        by_epoch=by_epoch,
        steps=steps,
        certify=certify,
        curvature=curvature,
        progress=progress,
    )


def solve(
    session: Session,
    targets: Any = "mean",
    samples: Any = None,
    *,
    exact: bool = False,
    mode: str = "auto",
    by_epoch: bool = False,
    steps: tuple[int, int] | None = None,
    certify: str | None = None,
    curvature: str | None = None,
    shard: tuple[int, int] | None = None,
    file: ProgressFile | None = None,
    forms: Forms | None = None,
    block: int | None = None,
    progress: Progress | None = None,
) -> Contributions:
    """`contributions` for a session that stands already; arguments and errors are the same, and a few more.

    Args:
        session: a recording and a Task that fit each other.
        targets: as `contributions`.
        samples: as `contributions`.
        exact: as `contributions`.
        mode: as `contributions`.
        by_epoch: as `contributions`.
        steps: as `contributions`.
        certify: as `contributions`.
        curvature: as `contributions`.
        shard: (i, n): only piece i of n, by targets (adjoint) or by samples (tangent).
        file: where the progress is kept, and taken up from.
        forms: how derivatives are computed; default: chosen by trial.
        block: targets or samples at once; default: as the memory allows.
        progress: as `contributions`.
    """
    check_mode(mode)
    curvature = curvature_of(exact, curvature)
    exact = curvature != "none"
    count = session.samples
    chosen = np.arange(count) if samples is None else check_ids(samples, count, "training")
    wanted = choose_targets(targets, session.test)
    if mode == "auto":
        mode = "adjoint" if by_epoch or len(wanted.names) <= len(chosen) else "tangent"
    if by_epoch and mode == "tangent":
        raise ReplayError('Contributions by epoch need mode="adjoint".')
    window, certify = window_of(steps, session.run.steps), certification_of(certify, exact)
    question = Question(*cut(wanted, chosen, mode, shard), exact, by_epoch, window, certify)
    forms = forms or Forms()
    forms.gauss_newton = curvature == "ggn"
    means = Means(progress or Silent(), forms, file, block)
    found: Contributions = session.guarded(lambda: _answer(session, question, mode, means))
    return replace(found, exact=curvature == "hessian", curvature=curvature)


def _answer(session: Session, question: Question, mode: str, means: Means) -> Contributions:
    session.checks.stride = sampled_stride(session.run.steps) if question.certify == "sampled" else 1
    costly = mode == "adjoint" and len(question.wanted.names) == 1 and session.rule.constant
    in_turns = question.certify == "turns" and costly and not means.forms.gauss_newton
    session.checks.take_turns(in_turns)
    with kept():
        return (_by_adjoint if mode == "adjoint" else _by_tangent)(session, question, means)


def _by_adjoint(session: Session, question: Question, means: Means) -> Contributions:
    table, growth = AdjointPasses(session, question, means).run()
    parts = table.values[:, torch.as_tensor(question.chosen, device=session.device)].cpu().numpy()
    return Contributions(
        parts.sum(axis=0),
        question.chosen,
        question.wanted.names,
        session.checks.certificate(),
        question.exact,
        "adjoint",
        question.wanted.kind,
        table.epochs if question.by_epoch else None,
        parts if question.by_epoch else None,
        growth,
        question.window,
    )


def _by_tangent(session: Session, question: Question, means: Means) -> Contributions:
    gradients = session.target_gradients(question.wanted).double()
    values = np.zeros((len(question.chosen), len(question.wanted.names)))

    def take(piece: slice, d: Tensor) -> None:
        values[piece] = -(d.double() @ gradients.T).cpu().numpy() / session.samples

    TangentPasses(session, question, means).run(take, values)
    return Contributions(
        values,
        question.chosen,
        question.wanted.names,
        session.checks.certificate(),
        question.exact,
        "tangent",
        question.wanted.kind,
        window=question.window,
    )

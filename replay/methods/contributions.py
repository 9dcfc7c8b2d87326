r"""Contributions of training samples to target losses: the first public question.

    C(i, j) = -(1/N) d l_j(w_T) / d eps_i          (paper, equation (8))

Positive: removing sample i would raise loss l_j, so the sample helps. Unit: that of l_j; to first order it is
l_j(without i) - l_j on the same schedule. Adjoint and tangent give the same numbers; `mode="auto"` takes the cheaper:
adjoint costs a pass per block of targets, tangent one per block of samples.

Letters: E epochs, M targets, N training samples, S samples asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trajrec.records import FloatArray, IntArray
from trajrec.replay.label import APPROXIMATION, EXACT
from trajrec.replay.losses.chosen import Contrasts, Tokens
from trajrec.replay.machine.memory import kept
from trajrec.replay.methods.blocks import AdjointPasses, Execution, TangentPasses
from trajrec.replay.positional import by_position
from trajrec.replay.progress import Progress, Silent
from trajrec.replay.proof.certificate import Certificate
from trajrec.replay.question import (
    Certify,
    Curvature,
    FloatName,
    Mode,
    Question,
    Scope,
    TargetChoice,
    curvature_of,
)
from trajrec.replay.session import Session
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
        targets: [M] target names: -1 for the mean, class numbers, test ids, or rows of `asked`.
        certificate: what the replay has proved.
        exact: with the whole Hessian; everything else is an approximation, and `label` says so.
        mode: "adjoint" or "tangent".
        target_kind: "mean", "class", "each", "chosen", "tokens" or "contrasts".
        epochs: [E] epochs, and by_epoch: [E, S, M] the part of each; both None unless asked for.
        growth: [n], adjoint only: the norm of the adjoint |lam_t| over that at the end of the run, at n <= 100 evenly
            spaced points from the last step back to the first, the largest over the first block of targets. What it
            grows by, so do rounding errors of the late steps. Without the Hessian it says nothing about the training.
        window: first and last step whose contributions were summed.
        curvature: "hessian", "ggn", "kinks" or "none".
        notes: what else should be known of the losses that the numbers are about, in sentences.
        accuracy: adjoint in float32 only: what the numbers of the first block of targets are good to, relative to the
            largest (`trajrec.replay.proof.accuracy`); None where that was not tried.
        asked: the `Tokens` or `Contrasts` that were asked for; None for other targets.
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
    curvature: str = "hessian"
    notes: tuple[str, ...] = ()
    accuracy: float | None = None
    asked: Tokens | Contrasts | None = None

    @property
    def label(self) -> str:
        """What the numbers are: "exact", or "approximation, not checked against exact"."""
        return EXACT if self.exact else APPROXIMATION

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


@by_position("targets", "samples", "exact", "mode", "dtype", "device", "by_epoch", "allow_drift", "memory")
def contributions(
    run: RecordedRun,
    task: Task,
    *,
    targets: TargetChoice = "mean",
    samples: IntArray | None = None,
    exact: bool = True,
    curvature: Curvature | None = None,
    mode: Mode = "auto",
    by_epoch: bool = False,
    steps: tuple[int, int] | None = None,
    certify: Certify | None = None,
    dtype: FloatName | torch.dtype | None = None,
    device: str | torch.device | None = None,
    allow_drift: bool = False,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Contributions:
    """Contributions of training samples to target losses.

    Args:
        run: an open recording (`trajrec.open`).
        task: describes the training.
        targets: "mean" (of the test set), "each" test sample, "class" (mean of each class), [M] test ids, or
            `trajrec.replay.Tokens` (spans of tokens of test samples) or `trajrec.replay.Contrasts` (differences of two
            test losses).
        samples: [S] training sample ids; default all N.
        exact: with Hessian-vector products; exact=False is the paper's Hessian-free approximation.
        curvature: by name: "hessian" is exact, "none" Hessian-free; "ggn" is the Gauss-Newton form between them
            (`trajrec.replay.derivatives.gauss_newton`), tamer than the Hessian on ReLU networks; "kinks" spreads
            kinks out (`trajrec.replay.derivatives.kinks`); both are approximations.
        mode: "adjoint" (all samples at once, cost by targets), "tangent" (cost by samples), or "auto".
        by_epoch: also give the part of each epoch (adjoint only).
        steps: (a, b): only what steps a to b contribute; default all.
        certify: "all" steps are made again, or a "sampled" few (32 or more, the first and the last among them, up
            to every 32nd; each costs a gradient). Default: all with a curvature, else sampled.
        dtype: "float32" or "float64"; default the recording's.
        device: torch device; default CPU.
        allow_drift: go on where the task does not reproduce the recording; the certificate says so.
        memory: bytes for blocks of targets or samples and for recomputed states; default a quarter of what is free.
        progress: is told how far the replay is.

    Raises:
        TaskError: if the task does not fit the recording, or an id does not exist.
        DriftError: if recomputed steps differ from the recorded ones.
        DerivativeError: if the training has no derivative of the kind that is asked for.
        ReplayError: if the question cannot be answered from this recording.
    """
    question = Question(
        targets=targets,
        samples=samples,
        curvature=curvature_of(exact, curvature),
        mode=mode,
        by_epoch=by_epoch,
        steps=steps,
        certify=certify,
        dtype=dtype,
        device=device,
        allow_drift=allow_drift,
    )
    return solve(Session.of(run, task, question, memory), question, Execution(progress or Silent()))


def solve(session: Session, question: Question, execution: Execution | None = None) -> Contributions:
    """`contributions` for a session that stands already, with the same errors."""
    scope = question.scope(session.samples, session.run.steps, lambda: session.test)
    found: Contributions = session.guarded(lambda: answer(session, scope, execution or Execution()))
    return found


def answer(session: Session, scope: Scope, execution: Execution) -> Contributions:
    """The contributions of a scope, by going through the run."""
    session.checks.stride = scope.stride
    if scope.curvature == "hessian":
        session.prove_derivative(forwards=scope.mode == "tangent")
        session.prove_targets(scope.targets)
    with kept():
        return (_by_adjoint if scope.mode == "adjoint" else _by_tangent)(session, scope, execution)


def _by_adjoint(session: Session, scope: Scope, execution: Execution) -> Contributions:
    passes = AdjointPasses(session, scope, execution)
    table, growth = passes.run()
    parts = table.values()
    found = _contributions(session, scope, parts.sum(axis=0))
    if scope.by_epoch:
        found = replace(found, epochs=table.epochs, by_epoch=parts)
    accuracy = passes.accuracy.of(found.values, scope.window[0], session.run.steps)
    return replace(found, growth=growth, accuracy=accuracy)


def _by_tangent(session: Session, scope: Scope, execution: Execution) -> Contributions:
    gradients, statistics = session.target_gradients(scope.targets)
    values = np.zeros((len(scope.samples), len(scope.targets.names)))

    def take(piece: slice, d: Tensor, moved: Tensor | None) -> None:
        changes = d.double() @ gradients.double().T
        if moved is not None and statistics is not None:
            changes += moved.double() @ statistics.double().T
        values[piece] = -changes.cpu().numpy() / session.samples

    TangentPasses(session, scope, execution).run(take, values)
    return _contributions(session, scope, values)


def _contributions(session: Session, scope: Scope, values: FloatArray) -> Contributions:
    return Contributions(
        values=values,
        samples=scope.samples,
        targets=scope.targets.names,
        certificate=session.certificate(),
        exact=scope.curvature == "hessian",
        mode=scope.mode,
        target_kind=scope.targets.kind,
        window=scope.window,
        curvature=scope.curvature,
        notes=session.notes,
        asked=scope.targets.asked,
    )

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
from trajrec.replay.certificate import Certificate
from trajrec.replay.choice import Forms
from trajrec.replay.heap import kept
from trajrec.replay.passes import AdjointPasses, Means, Question, TangentPasses, sampled_stride
from trajrec.replay.progress import ProgressFile
from trajrec.replay.session import Progress, Session, Silent, check_mode
from trajrec.replay.targets import Targets, check_ids, choose_targets
from trajrec.replay.trajectory import RecordedRun
from trajrec.task.task import Task

if TYPE_CHECKING:
    import polars


CURVATURES = ("hessian", "ggn", "none")


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
            are compared in turns, an eighth at a step (`trajrec.replay.turns`). Default: all if exact, else sampled.
        curvature: "hessian" is what `exact` stands for, "none" the approximation; "ggn" is the Gauss-Newton form
            between them (`trajrec.replay.gaussnewton`), tamer than the Hessian on ReLU networks.
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
    window, certify = _window(steps, session.run.steps), _certification(certify, exact)
    question = Question(*cut(wanted, chosen, mode, shard), exact, by_epoch, window, certify)
    forms = forms or Forms()
    forms.gauss_newton = curvature == "ggn"
    means = Means(progress or Silent(), forms, file, block)
    found: Contributions = session.guarded(lambda: _answer(session, question, mode, means))
    return replace(found, exact=curvature == "hessian", curvature=curvature)


def curvature_of(exact: bool, curvature: str | None) -> str:
    """The curvature that was asked for, by one name or the other.

    Raises:
        ReplayError: if there is none of that name, or the two contradict each other.
    """
    if curvature not in (None, *CURVATURES):
        raise ReplayError(f"curvature must be one of {', '.join(CURVATURES)}, not {curvature!r}.")
    if exact and curvature not in (None, "hessian"):
        raise ReplayError(f'exact stands for curvature "hessian"; ask for one of the two, not also for {curvature!r}.')
    return curvature or ("hessian" if exact else "none")


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


def _certification(certify: str | None, exact: bool) -> str:
    if certify not in (None, "sampled", "turns", "all"):
        raise ReplayError(f'certify must be "sampled", "turns" or "all", not {certify!r}.')
    return certify or ("all" if exact else "sampled")


def _window(steps: tuple[int, int] | None, last: int) -> tuple[int, int]:
    first, end = steps or (1, last)
    if not 1 <= first <= end <= last:
        raise ReplayError(f"Steps {first}:{end} are not steps of this run: it has steps 1 to {last}.")
    return int(first), int(end)


def shard_of(count: int, shard: tuple[int, int] | None, what: str, hint: str = "") -> slice:
    """The part of `count` targets or samples that is piece i of n, counted from 1.

    Raises:
        ReplayError: if there is no such piece, or it would be empty.
    """
    if shard is None:
        return slice(0, count)
    i, n = shard
    if not 1 <= i <= n:
        raise ReplayError(f"There is no shard {i}/{n}: shards count from 1/{n} to {n}/{n}.")
    if n > count:
        raise ReplayError(f"{count} {what} cannot be cut into {n} shards: ask for at most {count}. {hint}".rstrip())
    edges = np.linspace(0, count, n + 1).astype(int)
    return slice(int(edges[i - 1]), int(edges[i]))


def cut(wanted: Targets, chosen: IntArray, mode: str, shard: tuple[int, int] | None) -> tuple[Targets, IntArray]:
    """The targets (adjoint) or samples (tangent) of a shard, and all of the other."""
    if mode == "tangent":
        return wanted, chosen[shard_of(len(chosen), shard, "samples")]
    hint = "Samples are cut with --mode tangent; backwards, one replay answers for any number of them."
    piece = shard_of(len(wanted.names), shard, "target(s)", hint)
    return Targets(wanted.kind, wanted.names[piece], wanted.groups[piece]), chosen

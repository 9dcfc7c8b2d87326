r"""The passes over a run that answer a question, block by block, with progress that survives a kill.

Backwards (adjoint) a block is a number of targets, forwards (tangent) a number of samples. How many fit follows from
the memory that a replay may take (`replay.heap`): a target needs lam, sigma, gamma and H gamma, a sample D, R and the
two forces, each as large as the weights. Without the Hessian a target of a constant rule needs its gradient only.

A `ProgressFile` is written between two steps: the block, the step, the vectors carried along, the sums so far, what the
certificate has seen, the sizes and forms that were chosen. A replay that reads it goes on to the same bits.

Letters: E epochs, K targets or samples at once, M targets, N training samples, P' trainable weights, S samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trajrec.records import FloatArray
from trajrec.replay.derivatives.choice import Forms, Problem
from trajrec.replay.losses.targets import Targets
from trajrec.replay.machine.memory import budget
from trajrec.replay.methods.adjoint import Adjoint
from trajrec.replay.methods.growth import Norms
from trajrec.replay.methods.resume import Arrays, ProgressFile
from trajrec.replay.methods.tangent import Tangent
from trajrec.replay.question import Question
from trajrec.replay.session import Progress, Session
from trajrec.replay.step import Step

_SAMPLED = 32
_VECTORS = {"exact": 6, "free": 2, "tangent": 8}
_MOST = {"exact": 256, "free": 4096, "tangent": 256}


@dataclass(slots=True)
class Means:
    """With what a question is answered.

    Attributes:
        progress: is told how far the replay is.
        forms: chosen, or to be chosen.
        file: where progress is kept, or None.
        block: targets or samples at once, or None to follow from the memory.
    """

    progress: Progress
    forms: Forms
    file: ProgressFile | None = None
    block: int | None = None

    def restore(self) -> tuple[dict[str, Any], Arrays]:
        """The values and arrays of an earlier replay, or nothing."""
        found = None if self.file is None else self.file.load()
        if found is None:
            return {}, {}
        self.forms.names.update(found[0]["forms"])
        self.forms.chunk = found[0]["chunk"]
        self.forms.cutting.sizes.update(found[0]["pieces"])
        self.block = found[0]["block"]
        return found


class Table:
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


class AdjointPasses:
    """All samples' contributions to the targets of a question, by going backwards once a block of targets."""

    def __init__(self, session: Session, question: Question, means: Means) -> None:
        self._session, self._question, self._means = session, question, means
        self._problem = problem_of(session, question.exact, means.forms)
        self._table = Table(session, len(question.wanted.names), question.by_epoch)
        self._growth: list[float] = []

    def run(self) -> tuple[Table, FloatArray]:
        """The sums, and the growth of the adjoint's norm (`Contributions.growth`)."""
        values, arrays = self._means.restore()
        pieces = self._pieces()
        start = self._take_up(values, arrays)
        steps = self._session.run.steps - self._question.window[0] + 1
        begin(self._means.progress, "adjoint", steps, len(pieces), start, self._done_in_block(values))
        for number in range(start, len(pieces)):
            self._block(number, pieces[number], values if number == start else {}, arrays)
        if start == len(pieces):
            self._session.checks.go_on(values["checks"])
        self._finish(len(pieces))
        return self._table, np.asarray(self._growth)

    def _pieces(self) -> list[slice]:
        kind = "exact" if self._question.exact or not self._session.rule.constant else "free"
        self._means.block = self._means.block or block_size(self._session, kind)
        return blocks(len(self._question.wanted.names), most=self._means.block)

    def _take_up(self, values: dict[str, Any], arrays: Arrays) -> int:
        if not values:
            return 0
        self._table.values.copy_(torch.from_numpy(arrays["sums"]))
        self._growth = values["growth"]
        return int(values["number"])

    def _block(self, number: int, piece: slice, values: dict[str, Any], arrays: Arrays) -> None:
        session, wanted = self._session, self._question.wanted
        part = Targets(wanted.kind, wanted.names[piece], wanted.groups[piece])
        adjoint = Adjoint.begin(self._problem, session.target_gradients(part), part.names, self._question.window[0])
        norms = Norms(adjoint, session, self._growth, keep=number == 0)
        certifier = session.checks if number == 0 or not session.certifies_once else None
        if values:
            self._restore(adjoint, values, arrays)

        def after_step(count: int) -> None:
            norms.note()
            self._means.progress.advance(count)
            if self._means.file is not None and self._means.file.due:
                self._save(number, adjoint)

        adjoint.go(certifier, lambda step, found: self._collect(piece, step, found), after_step)

    def _done_in_block(self, values: dict[str, Any]) -> int:
        """Steps of the first block that an earlier replay has done."""
        return self._session.run.steps - values["first"] if values else 0

    def _collect(self, piece: slice, step: Step, found: Tensor) -> None:
        if step.t <= self._question.window[1]:
            self._table.add(piece, step, found)

    def _save(self, number: int, adjoint: Adjoint) -> None:
        assert self._means.file is not None
        arrays = carried_arrays(lam=adjoint.puller.lam, sigma=adjoint.puller.sigma, sums=self._table.values)
        values = common_values(self._session, self._means, arrays)
        values |= {"number": number, "first": adjoint.first, "growth": self._growth}
        self._means.file.save(values, arrays)

    def _finish(self, pieces: int) -> None:
        """Hands the last state over, from which an answer can be made without a step."""
        if self._means.file is not None:
            arrays = carried_arrays(sums=self._table.values)
            values = common_values(self._session, self._means, {})
            values |= {"number": pieces, "first": self._session.run.steps, "growth": self._growth}
            self._means.file.finish(values, arrays)

    def _restore(self, adjoint: Adjoint, values: dict[str, Any], arrays: Arrays) -> None:
        adjoint.puller.lam = torch.from_numpy(arrays["lam"]).to(adjoint.puller.lam.device)
        adjoint.puller.sigma = vectors_in(arrays, "sigma/", self._session.device)
        adjoint.first = values["first"]
        take_up_checks(self._session, values, arrays, backwards=True)


class TangentPasses:
    """The hypergradients of a question's samples, by going forwards once a block of samples."""

    def __init__(self, session: Session, question: Question, means: Means) -> None:
        self._session, self._question, self._means = session, question, means
        self._problem = problem_of(session, question.exact, means.forms)
        self._values: FloatArray = np.zeros(0)

    def run(self, take: Callable[[slice, Tensor], None], values_so_far: FloatArray) -> None:
        """Hands over the D_T [K, P'] of one block after the other; `values_so_far` is what progress keeps beside."""
        self._values = values_so_far
        values, arrays = self._means.restore()
        self._means.block = self._means.block or block_size(self._session, "tangent")
        pieces = blocks(len(self._question.chosen), most=self._means.block)
        start = 0
        if values:
            start = int(values["number"])
            self._values[:] = arrays["sums"]
        done = values["first"] - 1 if values else 0
        begin(self._means.progress, "tangent", self._session.run.steps, len(pieces), start, done)
        for number in range(start, len(pieces)):
            take(pieces[number], self._block(number, pieces[number], values if number == start else {}, arrays))
        if start == len(pieces):
            self._session.checks.go_on(values["checks"])
        if self._means.file is not None:
            values = common_values(self._session, self._means, {}) | {"number": len(pieces), "first": 1}
            self._means.file.finish(values, {"sums": self._values})

    def _block(self, number: int, piece: slice, values: dict[str, Any], arrays: Arrays) -> Tensor:
        session, question = self._session, self._question
        tangent = Tangent.begin(self._problem, question.chosen[piece], session.samples, question.window)
        if values:
            tangent.d = torch.from_numpy(arrays["d"]).to(session.device)
            tangent.r = vectors_in(arrays, "r/", session.device)
            tangent.state = vectors_in(arrays, "state/", session.device)
            tangent.first = values["first"]
            take_up_checks(session, values, arrays, backwards=False)

        def after_step(count: int) -> None:
            self._means.progress.advance(count)
            if self._means.file is not None and self._means.file.due and session.may_begin_at(tangent.first):
                self._save(number, tangent)

        return tangent.go(session.checks, after_step)

    def _save(self, number: int, tangent: Tangent) -> None:
        assert self._means.file is not None
        arrays = carried_arrays(d=tangent.d, r=tangent.r, state=tangent.state) | {"sums": self._values}
        values = common_values(self._session, self._means, arrays)
        self._means.file.save(values | {"number": number, "first": tangent.first}, arrays)


def begin(progress: Progress, what: str, steps: int, blocks: int, block: int, done: int) -> None:
    """Tells how many steps so many blocks have, and how many of them an earlier replay has done."""
    before = steps * block + done
    if before:
        progress.start(what, steps * blocks, done=before)
    else:
        progress.start(what, steps * blocks)


def sampled_stride(steps: int) -> int:
    """One step in so many is certified: 32 of the run at least, and every 32nd of a long one."""
    return max(1, min(_SAMPLED, steps // _SAMPLED))


def problem_of(session: Session, exact: bool, forms: Forms) -> Problem:
    """The session as the mathematics sees it."""
    whole = budget(session.memory, session.device)
    forms.memory = whole // 4
    forms.cutting.memory, forms.cutting.most = (whole if session.memory is None else whole // 4), session.memory
    return Problem(session.trajectory, session.function, session.train, session.rule, exact, forms)


def block_size(session: Session, kind: str) -> int:
    """Targets or samples at once: half of the memory is for their vectors."""
    item = torch.finfo(session.dtype).bits // 8
    each = max(1, session.layout.size * item * _VECTORS[kind])
    return max(1, min(_MOST[kind], budget(session.memory, session.device) // 2 // each))


def carried_arrays(**carried: Any) -> Arrays:
    """Tensors and dicts of tensors as arrays by name."""
    arrays: Arrays = {}
    for name, value in carried.items():
        named = {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        arrays |= {key: tensor.detach().cpu().numpy() for key, tensor in named.items()}
    return arrays


def vectors_in(arrays: Arrays, prefix: str, device: torch.device) -> dict[str, Tensor]:
    """The dict of tensors that `carried_arrays` was given."""
    names = [name for name in arrays if name.startswith(prefix)]
    return {name.removeprefix(prefix): torch.from_numpy(arrays[name]).to(device) for name in names}


def common_values(session: Session, means: Means, arrays: Arrays) -> dict[str, Any]:
    """What progress of both directions holds; the gradient that a check waits with joins the arrays."""
    waiting = session.checks.waiting
    if waiting is not None and waiting[1] is not None:
        arrays["waiting"] = waiting[1].cpu().numpy()
    return {
        "forms": means.forms.names,
        "chunk": means.forms.chunk,
        "pieces": means.forms.cutting.sizes,
        "block": means.block,
        "checks": session.checks.progress(),
        "waiting": None if waiting is None else waiting[0].t,
    }


def take_up_checks(session: Session, values: dict[str, Any], arrays: Arrays, *, backwards: bool) -> None:
    """Gives the certifier what it had found, and the step that waited."""
    session.checks.go_on(values["checks"])
    if backwards and values["waiting"] is not None:
        gradient = torch.from_numpy(arrays["waiting"]).to(session.device) if "waiting" in arrays else None
        session.checks.waiting = next(iter(session.trajectory.backwards(values["waiting"]))), gradient


def blocks(count: int, most: int) -> list[slice]:
    """Pieces of at most `most` out of `count` vectors, as even as possible."""
    pieces = -(-count // most)
    edges = np.linspace(0, count, pieces + 1).astype(int).tolist()
    return [slice(a, b) for a, b in pairwise(edges)]

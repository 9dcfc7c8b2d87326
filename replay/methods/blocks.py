r"""The passes over a run that answer a question, block by block, with progress that survives a kill.

Backwards (adjoint) a block is a number of targets, forwards (tangent) a number of samples. How many fit follows from
the memory that a replay may take (`replay.machine.memory`): a target needs lam, sigma, gamma and H gamma, a
sample D, R and the two forces, each as large as the weights. Without the Hessian a target of a constant rule needs its
gradient only.

A `ResumeFile` is written between two steps: the block, the step, the vectors carried along, the sums so far, what the
certificate has seen, the sizes and forms that were chosen. A replay that reads it goes on to the same bits.

Letters: E epochs, K targets or samples at once, M targets, N training samples, P' trainable weights, S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trajrec.records import FloatArray, IntArray, Json
from trajrec.replay.derivatives.choice import DIFFERENCE, FIRST_ORDER, FORMS, Chosen, Plan, Problem
from trajrec.replay.derivatives.difference import difference
from trajrec.replay.derivatives.pieces import Form
from trajrec.replay.machine.memory import budget
from trajrec.replay.methods.adjoint import Adjoint
from trajrec.replay.methods.growth import Norms
from trajrec.replay.methods.resume import Arrays, ResumeFile
from trajrec.replay.methods.tangent import Tangent
from trajrec.replay.progress import Progress, Silent
from trajrec.replay.proof.accuracy import Accuracy
from trajrec.replay.proof.derivative import Derivation
from trajrec.replay.question import Curvature, Scope
from trajrec.replay.session import Session
from trajrec.replay.step import Step

_VECTORS = {"exact": 6, "hessian-free": 2, "tangent": 8}
_MOST = {"exact": 256, "hessian-free": 4096, "tangent": 256}


@dataclass(frozen=True, slots=True)
class Execution:
    """How a question is worked on; decides no number but by rounding.

    Attributes:
        progress: is told how far the replay is.
        file: where progress is kept, or None.
        block: targets or samples at once, or None to follow from the memory.
        form: of the derivatives, wherever it may serve; None chooses by trial.
        forms: by name; a benchmark may put timed ones in their places.
    """

    progress: Progress = field(default_factory=Silent)
    file: ResumeFile | None = None
    block: int | None = None
    form: str | None = None
    forms: Mapping[str, Form] = field(default_factory=lambda: FORMS)


class Table:
    """Sums contributions by sample and target, and by epoch if asked for, in float64: [E, S, M]."""

    def __init__(self, session: Session, samples: IntArray, targets: int, by_epoch: bool) -> None:
        self.epochs = np.unique(session.run.epochs) if by_epoch else np.zeros(1, dtype=np.int64)
        self._of_step = session.run.epochs if by_epoch else None
        tracked, self._rows = np.unique(samples, return_inverse=True)
        # Of samples that nobody asked for the place is one behind the last, whose sums are thrown away.
        places = np.full(session.samples, len(tracked))
        places[tracked] = np.arange(len(tracked))
        self._places = torch.as_tensor(places, device=session.device)
        shape = (len(self.epochs), len(tracked) + 1, targets)
        self.sums = torch.zeros(shape, dtype=torch.float64, device=session.device)

    def add(self, columns: slice, step: Step, values: Tensor) -> None:
        """Adds a step's contributions [K, B] to the targets of these columns."""
        epoch = 0 if self._of_step is None else int(np.searchsorted(self.epochs, self._of_step[step.t - 1]))
        places = self._places[torch.as_tensor(step.ids, device=values.device)]
        self.sums[epoch, :, columns].index_add_(0, places, values.T.double())

    def values(self) -> FloatArray:
        """The sums [E, S, M], in the order in which the samples were asked for."""
        return self.sums.cpu().numpy()[:, self._rows]


class AdjointPasses:
    """All samples' contributions to the targets of a question, by going backwards once a block of targets."""

    def __init__(self, session: Session, scope: Scope, execution: Execution) -> None:
        self._session, self._scope, self._execution = session, scope, execution
        self._problem = problem_of(session, scope.curvature, execution)
        self._table = Table(session, scope.samples, len(scope.targets.names), scope.by_epoch)
        self._growth: list[float] = []
        self.accuracy = Accuracy()

    def run(self) -> tuple[Table, FloatArray]:
        """The sums, and the growth of the adjoint's norm (`Contributions.growth`)."""
        values, arrays = resumed(self._execution.file, self._problem.chosen)
        pieces = self._pieces()
        start = 0
        if values:
            self._table.sums.copy_(torch.from_numpy(arrays["sums"]))
            self._growth, start = values["growth"], int(values["number"])
            self.accuracy.resume(values.get("accuracy", {}))
        steps = self._session.run.steps - self._scope.window[0] + 1
        begin(self._execution.progress, "adjoint", steps, len(pieces), start, self._done_in_block(values))
        for number in range(start, len(pieces)):
            self._block(number, pieces[number], values if number == start else {}, arrays)
        if start == len(pieces):
            self._session.checks.found.resume(values["checks"])
        self._finish(len(pieces))
        return self._table, np.asarray(self._growth)

    def _pieces(self) -> list[slice]:
        kind = "exact" if self._problem.plan.exact or not self._session.rule.constant else "hessian-free"
        chosen = self._problem.chosen
        chosen.block = chosen.block or self._execution.block or block_size(self._session, kind)
        return blocks(len(self._scope.targets.names), most=chosen.block)

    def _block(self, number: int, piece: slice, values: Json, arrays: Arrays) -> None:
        session, targets = self._session, self._scope.targets
        part = targets.at(np.arange(len(targets.names))[piece])
        gradients, statistics = session.target_gradients(part)
        adjoint = Adjoint.begin(self._problem, gradients, part.names, self._scope.window[0], statistics)
        adjoint.called = part.called
        adjoint.accuracy = self.accuracy if number == 0 and session.dtype == torch.float32 else None
        norms = Norms(adjoint, session, self._growth, keep=number == 0)
        checks = session.checks if number == 0 or not session.certifies_once else None
        if values:
            self._restore(adjoint, values, arrays)

        def after_step(count: int) -> None:
            norms.note()
            self._execution.progress.advance(count)
            if self._execution.file is not None and self._execution.file.due:
                self._save(number, adjoint)

        adjoint.go(checks, lambda step, found: self._collect(piece, step, found), after_step)

    def _done_in_block(self, values: Json) -> int:
        """Steps of the first block that an earlier replay has done."""
        return self._session.run.steps - values["first"] if values else 0

    def _collect(self, piece: slice, step: Step, found: Tensor) -> None:
        if step.t <= self._scope.window[1]:
            self._table.add(piece, step, found)

    def _save(self, number: int, adjoint: Adjoint) -> None:
        assert self._execution.file is not None
        arrays = carried_arrays(lam=adjoint.puller.lam, sigma=adjoint.puller.sigma, sums=self._table.sums)
        values = common_values(self._session, self._problem.chosen, arrays) | save_statistics(adjoint, arrays)
        values |= {"number": number, "first": adjoint.first} | self._seen
        self._execution.file.save(values, arrays)

    def _finish(self, pieces: int) -> None:
        """Hands the last state over, from which an answer can be made without a step."""
        if self._execution.file is not None:
            arrays = carried_arrays(sums=self._table.sums)
            values = common_values(self._session, self._problem.chosen, {})
            values |= {"number": pieces, "first": self._session.run.steps} | self._seen
            self._execution.file.finish(values, arrays)

    @property
    def _seen(self) -> Json:
        """What the steps so far have told beside the sums."""
        return {"growth": self._growth, "accuracy": self.accuracy.to_json()}

    def _restore(self, adjoint: Adjoint, values: Json, arrays: Arrays) -> None:
        adjoint.puller.lam = torch.from_numpy(arrays["lam"]).to(adjoint.puller.lam.device)
        adjoint.puller.sigma = vectors_in(arrays, "sigma/", self._session.device)
        adjoint.first = values["first"]
        restore_statistics(adjoint, values, arrays)
        resume_checks(self._session, values, arrays, backwards=True)


class TangentPasses:
    """The hypergradients of a question's samples, by going forwards once a block of samples."""

    def __init__(self, session: Session, scope: Scope, execution: Execution) -> None:
        self._session, self._scope, self._execution = session, scope, execution
        self._problem = problem_of(session, scope.curvature, execution)
        self._values: FloatArray = np.zeros(0)

    def run(self, take: Callable[[slice, Tensor, Tensor | None], None], values_so_far: FloatArray) -> None:
        """Hands over the D_T [K, P'] of one block after the other, with the tangents of the statistics [K, Q] if any.

        `values_so_far` is what progress keeps beside.
        """
        self._values, chosen = values_so_far, self._problem.chosen
        values, arrays = resumed(self._execution.file, chosen)
        chosen.block = chosen.block or self._execution.block or block_size(self._session, "tangent")
        pieces = blocks(len(self._scope.samples), most=chosen.block)
        start = 0
        if values:
            start = int(values["number"])
            self._values[:] = arrays["sums"]
        done = values["first"] - 1 if values else 0
        begin(self._execution.progress, "tangent", self._session.run.steps, len(pieces), start, done)
        for number in range(start, len(pieces)):
            tangent = self._block(number, pieces[number], values if number == start else {}, arrays)
            take(pieces[number], tangent.d, None if tangent.carried is None else tangent.carried.values)
        if start == len(pieces):
            self._session.checks.found.resume(values["checks"])
        if self._execution.file is not None:
            values = common_values(self._session, self._problem.chosen, {}) | {"number": len(pieces), "first": 1}
            self._execution.file.finish(values, {"sums": self._values})

    def _block(self, number: int, piece: slice, values: Json, arrays: Arrays) -> Tangent:
        session, scope = self._session, self._scope
        sets = None if scope.sets is None else scope.sets[piece]
        tangent = Tangent.begin(self._problem, scope.samples[piece], session.samples, scope.window, sets)
        if values:
            tangent.d = torch.from_numpy(arrays["d"]).to(session.device)
            tangent.r = vectors_in(arrays, "r/", session.device)
            tangent.state = vectors_in(arrays, "state/", session.device)
            tangent.first = values["first"]
            restore_statistics(tangent, values, arrays)
            resume_checks(session, values, arrays, backwards=False)

        def after_step(count: int) -> None:
            self._execution.progress.advance(count)
            if self._execution.file is not None and self._execution.file.due and session.may_begin_at(tangent.first):
                self._save(number, tangent)

        tangent.go(session.checks, after_step)
        return tangent

    def _save(self, number: int, tangent: Tangent) -> None:
        assert self._execution.file is not None
        arrays = carried_arrays(d=tangent.d, r=tangent.r, state=tangent.state) | {"sums": self._values}
        values = common_values(self._session, self._problem.chosen, arrays) | save_statistics(tangent, arrays)
        self._execution.file.save(values | {"number": number, "first": tangent.first}, arrays)


def begin(progress: Progress, what: str, steps: int, blocks: int, block: int, done: int) -> None:
    """Tells how many steps so many blocks have, and how many of them an earlier replay has done."""
    before = steps * block + done
    if before:
        progress.start(what, steps * blocks, done=before)
    else:
        progress.start(what, steps * blocks)


def problem_of(session: Session, curvature: Curvature, execution: Execution) -> Problem:
    """The session as the mathematics sees it."""
    whole = budget(session.memory, session.device)
    forms = dict(execution.forms)
    if session.derivative is not None and session.derivative.verdict is Derivation.DIFFERENCES:
        differences = replace(session.differences, step=session.difference_step)
        forms |= {f"{DIFFERENCE}{name}": difference(differences, forms[name]) for name in FIRST_ORDER}
    session.function.smoothing, session.function.carries = curvature == "kinks", curvature != "none"
    plan = Plan(curvature, execution.form, whole // 4, session.cutting, forms)
    return Problem(session.trajectory, session.function, session.train, session.rule, plan)


def resumed(file: ResumeFile | None, chosen: Chosen) -> tuple[Json, Arrays]:
    """The values and arrays of an earlier replay, or nothing; what it chose is chosen again."""
    found = None if file is None else file.load()
    if found is None:
        return {}, {}
    for name in asdict(chosen):
        setattr(chosen, name, found[0][name])
    return found


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


def save_statistics(carrier: Adjoint | Tangent, arrays: Arrays) -> Json:
    """What is carried of the running statistics: its values join the arrays."""
    if carrier.carried is None:
        return {}
    arrays["statistics"] = carrier.carried.values.cpu().numpy()
    return {"statistics_counts": list(carrier.carried.counts)}


def restore_statistics(carrier: Adjoint | Tangent, values: Json, arrays: Arrays) -> None:
    """Takes up what `save_statistics` gave."""
    if carrier.carried is not None:
        found = torch.from_numpy(arrays["statistics"]).to(carrier.carried.values.device)
        carrier.carried = replace(carrier.carried, values=found, counts=tuple(values["statistics_counts"]))


def vectors_in(arrays: Arrays, prefix: str, device: torch.device) -> dict[str, Tensor]:
    """The dict of tensors that `carried_arrays` was given."""
    names = [name for name in arrays if name.startswith(prefix)]
    return {name.removeprefix(prefix): torch.from_numpy(arrays[name]).to(device) for name in names}


def common_values(session: Session, chosen: Chosen, arrays: Arrays) -> Json:
    """What progress of both directions holds; the gradient that a check waits with joins the arrays."""
    waiting = session.checks.waiting
    if waiting is not None and waiting[1] is not None:
        arrays["waiting"] = waiting[1].cpu().numpy()
    return asdict(chosen) | {
        "checks": session.checks.found.to_json(),
        "waiting": None if waiting is None else waiting[0].t,
    }


def resume_checks(session: Session, values: Json, arrays: Arrays, *, backwards: bool) -> None:
    """Gives the certifier what it had found, and the step that waited."""
    session.checks.found.resume(values["checks"])
    if backwards and values["waiting"] is not None:
        gradient = torch.from_numpy(arrays["waiting"]).to(session.device) if "waiting" in arrays else None
        session.checks.waiting = next(iter(session.trajectory.backwards(values["waiting"]))), gradient


def blocks(count: int, most: int) -> list[slice]:
    """Pieces of at most `most` out of `count` vectors, as even as possible."""
    pieces = -(-count // most)
    edges = np.linspace(0, count, pieces + 1).astype(int).tolist()
    return [slice(a, b) for a, b in pairwise(edges)]

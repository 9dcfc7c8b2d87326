"""Targets: the scalars of the final weights that contributions are measured on, and their gradients at w_T.

    mean    the mean loss over the test set                 one target, named -1
    class   the mean loss over the test samples of a class  one target a class, named by the class
    each    the loss of every test sample                   one target a sample, named by its id
    ids     the loss of chosen test samples                 the same
    tokens, contrasts    parts and differences of such losses (`replay.losses.chosen`), named by their rows

Most are means over groups of test samples, so a target is a name and the ids of its group. What the final model
predicts for single test samples is told here too, where the Task knows its outputs. The model is in eval mode, with the
running statistics that the run ended with; these are held constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trajrec.errors import SampleRangeError, TaskError
from trajrec.records import FloatArray, IntArray
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.chosen import Contrasts, Tokens
from trajrec.replay.losses.finite import check_finite
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.gradient import rows_of
from trajrec.replay.losses.noise import Noise, noise_of, seeded_by
from trajrec.rules.step import pull_batched
from trajrec.task.criterion import IGNORED
from trajrec.task.reading import found_in
from trajrec.task.task import Batch

MEAN = -1
_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Targets:
    """The targets of a question, or some of them.

    Attributes:
        kind: as asked: "mean", "each", "class", "chosen", "tokens", "contrasts".
        names: [M].
        groups: the test ids that each is the mean over.
        spans: [M, 2] the tokens (start, stop) of the group's one sample that each is about; None for its whole loss.
        against: [M] test ids whose losses are subtracted; None for nothing.
        asked: all targets of these two kinds, as they were named.
    """

    kind: str
    names: IntArray
    groups: tuple[IntArray, ...]
    spans: IntArray | None = None
    against: IntArray | None = None
    asked: Tokens | Contrasts | None = None

    def at(self, places: Sequence[int] | IntArray, most: int | None = None) -> Targets:
        """The targets at these places, of groups their first samples only, if it is said how many."""
        spans, against = (None if part is None else part[places] for part in (self.spans, self.against))
        groups = tuple(self.groups[k][:most] for k in places)
        return Targets(self.kind, self.names[places], groups, spans, against, self.asked)

    def called(self, name: int) -> str:
        """A target of this name in words, for messages."""
        return "the mean target" if self.kind == "mean" else f"target {name}"


NO_TARGETS = Targets("", np.zeros(0, dtype=np.int64), ())


def choose_targets(question: Any, samples: Samples) -> Targets:
    """The targets of "mean", "each", "class" or an array of test ids.

    Raises:
        TaskError: if the question is none of these, or the data set gives no class labels.
        SampleRangeError: if a test id does not exist.
    """
    everything = np.arange(len(samples))
    if not len(everything):
        raise TaskError("The Task's test set is empty: there is no loss to measure contributions on.")
    if isinstance(question, Tokens | Contrasts):
        return _rows(question, len(samples))
    if isinstance(question, str):
        if question == "mean":
            return Targets("mean", np.array([MEAN]), (everything,))
        if question == "each":
            return Targets("each", everything, tuple(everything[:, None]))
        if question == "class":
            return _classes(samples, everything)
        raise TaskError(
            f'targets must be "mean", "each", "class", an array of test ids, Tokens or Contrasts, not {question!r}.'
        )
    chosen = check_ids(question, len(samples), "test")
    return Targets("chosen", chosen, tuple(chosen[:, None]))


def _rows(asked: Tokens | Contrasts, length: int) -> Targets:
    check_ids(asked.rows[:, 0], length, "test")
    names, groups = np.arange(len(asked)), tuple(asked.rows[:, :1])
    if isinstance(asked, Tokens):
        return Targets(asked.kind, names, groups, spans=asked.rows[:, 1:], asked=asked)
    return Targets(asked.kind, names, groups, against=check_ids(asked.rows[:, 1], length, "test"), asked=asked)


def _classes(samples: Samples, everything: IntArray) -> Targets:
    found = samples.labels(everything)
    if found is None:
        raise TaskError(
            'targets="class" needs the classes of the test samples, whole numbers, one a sample. A test batch is '
            f"{found_in(samples.batch(everything[:1]))}: say where they are with Task(labels=KEY) or "
            'Task.supervised(labels=KEY). Or choose "mean", "each" or ids.'
        )
    labels = np.asarray(found, dtype=np.int64)
    classes = np.unique(labels[labels != IGNORED])
    if not len(classes):
        raise TaskError(f'targets="class" needs classes, but every test sample has the label {IGNORED}, which is none.')
    return Targets("class", classes, tuple(np.flatnonzero(labels == c) for c in classes))


def check_ids(ids: Any, length: int, what: str) -> IntArray:
    """Sample ids as an int64 array.

    Raises:
        SampleRangeError: if they are not integers, or one does not exist.
    """
    array = np.asarray(ids)
    if array.size == 0:
        raise SampleRangeError(f"No {what} ids were given: name at least one, or leave them out to ask about all.")
    if array.dtype == np.bool_ or array.dtype.kind not in "iu" or array.ndim != 1:
        raise SampleRangeError(
            f"{what.capitalize()} ids must be a one-dimensional array of integers, not {array.dtype} of shape "
            f"{array.shape}."
        )
    outside = array[(array < 0) | (array >= length)]
    if len(outside):
        raise SampleRangeError(
            f"There is no {what} sample {outside[0]}: the {what} set has {length} samples, ids 0 to {length - 1}."
        )
    return array.astype(np.int64)


def target_gradients(targets: Targets, function: LossFunction, samples: Samples, weights: Tensor) -> Tensor:
    """Grad l_j(w_T) of every target, [M, P'], followed by that of the running statistics that move [M, P' + Q].

    Raises:
        NonFiniteError: if a target loss is NaN or infinite.
    """
    weights = torch.cat([weights, function.final_statistics().to(weights)])
    function.eval_mode()
    try:
        if not all(len(group) == 1 for group in targets.groups):
            return torch.stack([_mean_gradient(group, function, samples, weights) for group in targets.groups])
        found = _single_gradients(np.concatenate(targets.groups), function, samples, weights, targets.spans)
        if targets.against is not None:
            found -= _single_gradients(targets.against, function, samples, weights)
        return found
    finally:
        function.train_mode()


def target_values(targets: Targets, function: LossFunction, samples: Samples, weights: Tensor) -> FloatArray:
    """The target losses l_j [M] at weights [P'].

    Raises:
        NonFiniteError: if one is NaN or infinite.
    """
    function.eval_mode()
    try:
        with torch.no_grad():
            if targets.asked is not None:
                return _single_losses(targets, function, samples, weights).double().cpu().numpy()
            return np.array([_mean_loss(group, function, samples, weights) for group in targets.groups])
    finally:
        function.train_mode()


def target_losses(targets: Targets, function: LossFunction, samples: Samples, weights: Tensor) -> Tensor:
    """The target losses l_j [M] at weights [P'], or [P' + Q], in the batches that `target_gradients` takes.

    Raises:
        NonFiniteError: if one is NaN or infinite.
    """
    w = weights.detach().requires_grad_()  # a loss may register hooks
    function.eval_mode()
    try:
        with torch.enable_grad():
            if all(len(group) == 1 for group in targets.groups):
                return _single_losses(targets, function, samples, w)
            return w.detach().new_tensor([_mean_loss(group, function, samples, w) for group in targets.groups])
    finally:
        function.train_mode()


def _single_losses(targets: Targets, function: LossFunction, samples: Samples, weights: Tensor) -> Tensor:
    """The losses [M] of targets of one sample each, or two."""

    def all_of(ids: IntArray, spans: IntArray | None = None) -> Tensor:
        return torch.cat([part.detach() for part in _losses(ids, function, samples, weights, spans)])

    found = all_of(np.concatenate(targets.groups), targets.spans)
    return found if targets.against is None else found - all_of(targets.against)


def _mean_loss(ids: IntArray, function: LossFunction, samples: Samples, weights: Tensor) -> float:
    losses = (part.detach() for part in _losses(ids, function, samples, weights))
    return sum(float(part.double().sum()) for part in losses) / len(ids)


def predictions(ids: IntArray, function: LossFunction, samples: Samples, weights: Tensor) -> list[int] | None:
    """The class [M] that the model with these weights gives each test sample the highest score.

    None if the Task does not say what the outputs are, if they are not scores [B, classes], or if the labels are not
    numbers of such classes.
    """
    labels = samples.labels(ids)
    if function.task.predict is None or not labels or min(labels) < 0:
        return None
    function.eval_mode()
    try:
        with torch.no_grad():
            found = [(function.scores(weights, batch), len(block)) for block, batch in samples.batches(ids, _BLOCK)]
    finally:
        function.train_mode()
    if not all(_are_scores(part, count, max(labels)) for part, count in found):
        return None
    return torch.cat([part for part, _ in found]).argmax(dim=1).tolist()


def _are_scores(outputs: object, count: int, largest: int) -> bool:
    return (
        isinstance(outputs, Tensor)
        and outputs.dim() == 2
        and len(outputs) == count
        and outputs.shape[1] > max(1, largest)
        and outputs.is_floating_point()
        and bool(torch.isfinite(outputs).all())
    )


def _losses(
    ids: IntArray, function: LossFunction, samples: Samples, weights: Tensor, spans: IntArray | None = None
) -> Iterator[Tensor]:
    """The target losses of these samples, one batch after the other; differentiable where gradients are enabled."""
    for block, batch, span in _blocks(ids, function, samples, weights, spans):
        yield _checked(function, weights, batch, block, span)


def _blocks(
    ids: IntArray, function: LossFunction, samples: Samples, weights: Tensor, spans: IntArray | None
) -> Iterator[tuple[IntArray, Batch, IntArray | None]]:
    """Batches of these samples, each with its ids and their spans of tokens."""
    done = 0
    for block, batch in samples.batches(ids, _most(function, weights, samples, ids)):
        yield block, batch, None if spans is None else spans[done : done + len(block)]
        done += len(block)


def _most(function: LossFunction, weights: Tensor, samples: Samples, ids: IntArray) -> int:
    """How many test samples are computed at once."""
    return 1 if noise_of(function, weights, samples, ids) is Noise.OF_SAMPLES else _BLOCK


def _checked(
    function: LossFunction, weights: Tensor, batch: Batch, ids: IntArray, spans: IntArray | None = None
) -> Tensor:
    with seeded_by(ids, function):
        losses = (
            function.measures(weights, batch, len(ids))
            if spans is None
            else _of_spans(function.token_measures(weights, batch, len(ids)), ids, spans)
        )
    check_finite(losses.detach(), "A target loss", None, ids)
    if weights.requires_grad and torch.is_grad_enabled() and not losses.requires_grad:
        raise TaskError(
            "The target loss has no derivative: nothing in it depends on the weights by a computation that can be "
            "differentiated (it is made in torch.inference_mode, outside of torch, or counts what is right). Give "
            "Task(measure=...) a loss that has one."
        )
    return losses


def _of_spans(values: Tensor, ids: IntArray, spans: IntArray) -> Tensor:
    """The mean [B] of each sample's losses of tokens [B, T] over its span [B, 2].

    Raises:
        SampleRangeError: if a sample has no such tokens.
    """
    for sample, (start, stop) in zip(ids.tolist(), spans.tolist(), strict=True):
        if stop > values.shape[1]:
            raise SampleRangeError(
                f"Test sample {sample} has losses of {values.shape[1]} tokens, 0 to {values.shape[1] - 1}: there are "
                f"no tokens {start}:{stop}."
            )
    first, behind = (torch.from_numpy(edge.copy()).to(values.device)[:, None] for edge in spans.T)
    place = torch.arange(values.shape[1], device=values.device)
    inside = (place >= first) & (place < behind)
    return torch.where(inside, values, 0).sum(1) / (behind - first)[:, 0]


def _mean_gradient(ids: IntArray, function: LossFunction, samples: Samples, weights: Tensor) -> Tensor:
    total = torch.zeros_like(weights)
    w = weights.detach().requires_grad_()
    with torch.enable_grad():
        for losses in _losses(ids, function, samples, w):
            total += torch.autograd.grad(losses.sum(), w, materialize_grads=True)[0]
    return total / len(ids)


def _single_gradients(
    ids: IntArray, function: LossFunction, samples: Samples, weights: Tensor, spans: IntArray | None = None
) -> Tensor:
    w = weights.detach().requires_grad_()
    with torch.enable_grad():
        blocks = _blocks(ids, function, samples, w, spans)
        found = [_gradients(partial(_checked, function, w, batch, block, span), w) for block, batch, span in blocks]
        return torch.cat(found)


def _gradients(losses: Callable[[], Tensor], w: Tensor) -> Tensor:
    """The gradients [B, P'] of losses [B]; one after the other where an operator's cannot be taken together."""
    try:
        made = losses()
        return pull_batched([made], [w], [torch.eye(len(made), dtype=w.dtype, device=w.device)])[0]
    except RuntimeError:
        return torch.cat(list(rows_of(losses(), w, 1)))

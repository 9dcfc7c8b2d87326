"""Targets: the scalars of the final weights that contributions are measured on, and their gradients at w_T.

    mean    the mean loss over the test set                 one target, named -1
    class   the mean loss over the test samples of a class  one target a class, named by the class
    each    the loss of every test sample                   one target a sample, named by its id
    ids     the loss of chosen test samples                 the same

All are means over groups of test samples, so a target is a name and the ids of its group. What the final model predicts
for single test samples is told here too, where the Task knows its outputs. The model is in eval mode,
with the running statistics that the run ended with; these are held constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trajrec.errors import SampleRangeError, TaskError
from trajrec.records import FloatArray, IntArray
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.finite import check_finite
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.gradient import rows_of
from trajrec.replay.losses.noise import Noise, noise_of, seeded_by
from trajrec.rules.step import pull_batched
from trajrec.task.task import Batch

MEAN = -1
_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Targets:
    """Names [M] of the targets and the test ids that each is the mean over; `kind` as asked."""

    kind: str
    names: IntArray
    groups: tuple[IntArray, ...]


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
    if isinstance(question, str):
        if question == "mean":
            return Targets("mean", np.array([MEAN]), (everything,))
        if question == "each":
            return Targets("each", everything, tuple(everything[:, None]))
        if question == "class":
            return _classes(samples, everything)
        raise TaskError(f'targets must be "mean", "each", "class" or an array of test ids, not {question!r}.')
    chosen = check_ids(question, len(samples), "test")
    return Targets("chosen", chosen, tuple(chosen[:, None]))


def _classes(samples: Samples, everything: IntArray) -> Targets:
    labels = samples.labels(everything)
    if labels is None:
        raise TaskError(
            'targets="class" needs test batches that are pairs (inputs, integer labels). Choose "mean", "each" or ids.'
        )
    classes = np.unique(np.asarray(labels, dtype=np.int64))
    return Targets("class", classes, tuple(np.flatnonzero(np.asarray(labels) == c) for c in classes))


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
        if all(len(group) == 1 for group in targets.groups):
            return _single_gradients(np.concatenate(targets.groups), function, samples, weights)
        return torch.stack([_mean_gradient(group, function, samples, weights) for group in targets.groups])
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
                found = list(_losses(np.concatenate(targets.groups), function, samples, w))
                return torch.cat([part.detach() for part in found])
            return w.detach().new_tensor([_mean_loss(group, function, samples, w) for group in targets.groups])
    finally:
        function.train_mode()


def _mean_loss(ids: IntArray, function: LossFunction, samples: Samples, weights: Tensor) -> float:
    losses = (part.detach() for part in _losses(ids, function, samples, weights))
    return sum(float(part.double().sum()) for part in losses) / len(ids)


def predictions(ids: IntArray, function: LossFunction, samples: Samples, weights: Tensor) -> list[int] | None:
    """The class [M] that the model with these weights gives each test sample the highest score.

    None if the Task does not say what the outputs are, if they are not scores [B, classes], or if the labels are not
    numbers of such classes.
    """
    labels = samples.labels(ids)
    if function.task.predict is None or not labels:
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


def _losses(ids: IntArray, function: LossFunction, samples: Samples, weights: Tensor) -> Iterator[Tensor]:
    """The target losses of these samples, one batch after the other; differentiable where gradients are enabled."""
    for block, batch in samples.batches(ids, _most(function, weights, samples, ids)):
        yield _checked(function, weights, batch, block)


def _most(function: LossFunction, weights: Tensor, samples: Samples, ids: IntArray) -> int:
    """How many test samples are computed at once."""
    return 1 if noise_of(function, weights, samples, ids) is Noise.OF_SAMPLES else _BLOCK


def _checked(function: LossFunction, weights: Tensor, batch: Batch, ids: IntArray) -> Tensor:
    with seeded_by(ids, function):
        losses = function.measures(weights, batch, len(ids))
    check_finite(losses.detach(), "A target loss", None, ids)
    if weights.requires_grad and torch.is_grad_enabled() and not losses.requires_grad:
        raise TaskError(
            "The target loss has no derivative: nothing in it depends on the weights by a computation that can be "
            "differentiated (it is made in torch.inference_mode, outside of torch, or counts what is right). Give "
            "Task(measure=...) a loss that has one."
        )
    return losses


def _mean_gradient(ids: IntArray, function: LossFunction, samples: Samples, weights: Tensor) -> Tensor:
    total = torch.zeros_like(weights)
    w = weights.detach().requires_grad_()
    with torch.enable_grad():
        for losses in _losses(ids, function, samples, w):
            total += torch.autograd.grad(losses.sum(), w, materialize_grads=True)[0]
    return total / len(ids)


def _single_gradients(ids: IntArray, function: LossFunction, samples: Samples, weights: Tensor) -> Tensor:
    w = weights.detach().requires_grad_()
    with torch.enable_grad():
        batches = samples.batches(ids, _most(function, w, samples, ids))
        return torch.cat([_rows(partial(_checked, function, w, batch, block), w) for block, batch in batches])


def _rows(losses: Callable[[], Tensor], w: Tensor) -> Tensor:
    """The gradients [B, P'] of losses [B]; one after the other where an operator's cannot be taken together."""
    try:
        made = losses()
        return pull_batched([made], [w], [torch.eye(len(made), dtype=w.dtype, device=w.device)])[0]
    except RuntimeError:
        return torch.cat(list(rows_of(losses(), w, 1)))

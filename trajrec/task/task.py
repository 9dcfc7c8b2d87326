"""A Task says what was trained: how to build the model, the data sets, and the loss of every sample.

A recording holds what happened (weights, ids, hyperparameters), never code. The Task is the user's own code
and supplies what replay has to differentiate:

    model     () -> nn.Module                     the architecture; its initial values do not matter
    train     map-style data set                  item i is the sample with id i in the recording
    test      map-style data set                  what contributions are measured on
    loss      (model, batch) -> Tensor [B]        the training loss of every sample, no reduction; of several values
                                                  a sample (tokens, outputs), [B, ...], the mean is taken
    measure   (model, batch) -> Tensor [B]        the same for targets; default: loss
    collate   [item] -> batch                     default: torch's default_collate
    predict   (model, batch) -> Tensor [B, classes]   scores of the classes; only so that reports can name predictions

A step's gradient is that of sum_i c_i l_i + penalty. What a loop may do beyond a mean of losses has its own place:

    weight    (batch) -> Tensor [B]               what each sample counts in the mean: weights of classes or samples,
                                                  numbers of tokens; default: 1
    reduction "mean", "sum", and for micro-batches "mean-of-means", "scaled-means", "sum-of-means";
              default: found from the recorded losses
    penalty   (model) -> scalar Tensor            a term without samples, such as an L1 norm
    gradient  {name: Tensor} -> {name: Tensor}    what happens to the gradient before the step: `trajrec.clip_norm`
    optimizer class                               of the training, where it is not one of torch.optim's

That the Task describes the recorded training is not taken on trust: the certificate of every replay proves it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sized
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import default_collate

from trajrec.errors import TaskError, first_line
from trajrec.records import Criterion
from trajrec.task.criterion import cross_entropies, label_counts
from trajrec.task.gradients import Gradients
from trajrec.task.seen import made_of

Batch = Any
Loss = Callable[[nn.Module, Batch], Tensor]
Collate = Callable[[list[Any]], Batch]
REDUCTIONS = ("mean", "mean-of-means", "scaled-means", "sum-of-means", "sum")


class Task:
    """What was trained: model, data sets and per-sample loss.

    Args:
        model: builds the model; called once a replay. A module instance is copied.
        train: the training set, with `__getitem__` and `__len__`, or a function that returns it.
        test: the same for the test set; only needed for questions about test losses.
        loss: training loss of every sample: (model, batch) -> [B], without reduction; or [B, ...], whose mean over
            the further dimensions is taken (their sum, where that gives the recorded loss).
        measure: loss of every test sample, [B]; default: `loss`.
        collate: makes a batch of a list of items; default: torch's.
        predict: scores of the classes for every sample, [B, classes]; reports show the highest as the prediction.
        weight: what each sample of a batch counts in the mean, [B] (a_i below); default ones, which None stands for.
        reduction: how the loop makes one number of the losses of a step, over all of its samples ("mean":
            c_i = a_i / sum a; "sum": c_i = a_i) or over its micro-batches, each of which is averaged by itself:
            "mean-of-means" divides by how many there are, "scaled-means" by how many there usually are (an
            epoch's last step may have fewer), "sum-of-means" adds. Default: the one that gives the recorded losses.
        penalty: a scalar that is added to the loss of every step, without samples.
        gradient: what the loop does to the gradients between backward() and step(), by parameter name.
        optimizer: the class of the training's optimizer, where it is not one of torch.optim's.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module] | nn.Module,
        train: Any,
        test: Any = None,
        *,
        loss: Loss,
        measure: Loss | None = None,
        collate: Collate | None = None,
        predict: Loss | None = None,
        weight: Callable[[Batch], Tensor | None] | None = None,
        reduction: str | None = None,
        penalty: Callable[[nn.Module], Tensor] | None = None,
        gradient: Callable[[Gradients], Gradients] | None = None,
        optimizer: type[Optimizer] | None = None,
    ) -> None:
        if reduction not in (None, *REDUCTIONS):
            raise TaskError(f"Task.reduction is one of {', '.join(map(repr, REDUCTIONS))}, not {reduction!r}.")
        if optimizer is not None and not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
            raise TaskError(f"Task.optimizer is a class of optimizers, not {optimizer!r}.")
        self._model = model
        self._train = train
        self._test = test
        self.loss = loss
        self.measure = measure or loss
        self.collate: Collate = collate or default_collate
        self.predict = predict
        self.weight = weight
        self.reduction = reduction
        self.penalty = penalty
        self.gradient = gradient
        self.optimizer = optimizer
        self._learned_by: Callable[[Any, Any], Task] | None = None  # of `supervised`, if it was given no criterion

    @classmethod
    def supervised(
        cls,
        model: Callable[[], nn.Module] | nn.Module,
        train: Any,
        test: Any = None,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        collate: Collate | None = None,
        **options: Any,
    ) -> Task:
        """A task whose batches are pairs (x, y), with criterion(model(x), y) -> [B] as loss and measure.

        The default criterion is cross entropy without reduction: of scores [B, classes] beside labels [B], or of
        scores [B, T, classes] (or [B, classes, T], as torch takes them) beside labels [B, T] the mean over a sample's
        labels that are not -100. In a batch every label then counts the same, as in torch's mean. Outputs of shape
        [B, classes] beside integer labels are taken for scores of the classes. `options` are those of `Task`.
        """
        score, given = criterion or cross_entropies, {**options, "collate": collate}

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            inputs, labels = batch
            return score(model(inputs), labels)

        def predict(model: nn.Module, batch: Batch) -> Tensor:
            outputs: Tensor = model(batch[0])
            return outputs

        if criterion is None and options.get("weight") is None:
            options["weight"] = label_counts
        task = cls(model, train, test, loss=loss, collate=collate, predict=predict, **options)
        if criterion is None:
            task._learned_by = lambda seen, weight: cls.supervised(
                model, task._train, task._test, seen, **(given if weight is None else {"weight": weight, **given})
            )
        return task

    def learned_by(self, noted: Criterion) -> Task:
        """This task by the criterion that the training was seen to call; itself where it has been given another."""
        made = None if self._learned_by is None else made_of(noted)
        if self._learned_by is None or made is None:
            return self
        score, counts = made
        task = self._learned_by(score, None if counts is None else lambda batch: counts(batch[1]))
        task.gradient, task.penalty = self.gradient, self.penalty
        task.optimizer, task.reduction = self.optimizer, self.reduction
        return task

    def build_model(self) -> nn.Module:
        """A new model.

        Raises:
            TaskError: if `model` does not give an nn.Module, or is one that cannot be copied.
        """
        model = self._copied() if isinstance(self._model, nn.Module) else self._model()
        if not isinstance(model, nn.Module):
            raise TaskError(f"Task.model must return an nn.Module, but returned {type(model).__name__}.")
        return model

    def _copied(self) -> Any:
        try:
            return copy.deepcopy(self._model)
        except Exception as error:  # lazy buffers, weights that were computed, handles: whatever a model holds
            raise TaskError(
                f"Task.model is a {type(self._model).__name__} that cannot be copied ({type(error).__name__}: "
                f"{first_line(error)}). Pass a function that builds the model: Task(model=lambda: ...)."
            ) from error

    @property
    def train(self) -> Any:
        """The training set."""
        self._train = _resolve(self._train, "train")
        return self._train

    @property
    def test(self) -> Any:
        """The test set.

        Raises:
            TaskError: if the task has none.
        """
        if self._test is None:
            raise TaskError("This question is about test losses, but the Task has no test set: pass Task(test=...).")
        self._test = _resolve(self._test, "test")
        return self._test


def _resolve(data: Any, name: str) -> Any:
    """The data set itself, from a data set or a function that returns one."""
    if not hasattr(data, "__getitem__") and callable(data):
        data = data()
    if not hasattr(data, "__getitem__") or not isinstance(data, Sized):
        raise TaskError(
            f"Task.{name} must be a map-style data set (with __getitem__ and __len__) or a function that "
            f"returns one, but is {type(data).__name__}."
        )
    return data

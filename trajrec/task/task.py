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
    test_collate                                  the same for the test set; default: collate
    labels    a key or position in the batch      of the classes, for reports and targets by class; default: the second
                                                  of a pair, or "labels", "label", "targets", "target", "y"
    tokens    (model, batch) -> Tensor [B, T]     a test sample's losses of single tokens; default: measure
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
from torch.nn.modules.loss import _Loss
from torch.optim import Optimizer
from torch.utils.data import default_collate

from trajrec.errors import TaskError, first_line
from trajrec.records import Criterion
from trajrec.task.criterion import CrossEntropies, LabelCounts, cross_entropies
from trajrec.task.gradients import Gradients
from trajrec.task.reading import Inputs, Key, Reading, scores_in
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
        collate: makes a batch of a list of items; default: torch's. `trajrec.unbatched` where the training's loader has
            batch_size=None.
        test_collate: the same for the test set; default: `collate`.
        labels: key or position of the labels in a batch, for reports and targets="class"; default: the second part of
            a pair, or in a dictionary whole numbers under "labels", "label", "targets", "target" or "y".
        tokens: losses of the single tokens of every test sample, [B, T], for targets that are tokens
            (`trajrec.replay.Tokens`); default: `measure`, where it has several values a sample.
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
        test_collate: Collate | None = None,
        labels: Key | None = None,
        tokens: Loss | None = None,
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
        self.test_collate: Collate = test_collate or self.collate
        self.reading = Reading(labels=labels)
        self.tokens = tokens or self.measure
        self.label_counts: LabelCounts | None = None
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
        criterion: Callable[[Any, Any], Tensor] | None = None,
        *,
        inputs: Inputs | None = None,
        labels: Key | None = None,
        **options: Any,
    ) -> Task:
        """A task with criterion(model(x), y) as loss and measure, for batches (x, y), dictionaries and longer tuples.

        The default criterion is cross entropy without reduction: of scores [B, classes] beside labels [B], or of
        scores [B, T, classes] (or [B, classes, T], as torch takes them) beside labels [B, T] the mean over a sample's
        labels that are not -100. In a batch every label then counts the same, as in torch's mean. For language models
        that predict the next token, whose labels are not shifted, `criterion=trajrec.next_tokens`. Of what a model
        returns these, and the criteria of torch.nn, take the `logits`, where it has some; your own criterion takes it
        as it is. Outputs of shape [B, classes] beside integer labels are taken for scores of the classes.

        Args:
            model: as of `Task`.
            train: as of `Task`.
            test: as of `Task`.
            criterion: (outputs, y) -> [B], [B, 1] or [B, tokens] without reduction. Of several values the mean, the
                sum, or the mean over those whose labels are not -100 is taken: what gives the recorded losses.
            inputs: what the model is called with, where batches are no pairs: a key of the batch or a position in it;
                several positions, which become positional arguments; several keys, which become keywords; or a
                dictionary from keys to keywords.
            labels: key or position of y in the batch.
            options: as those of `Task`.

        Raises:
            TaskError: `inputs` or `labels` cannot be keys or positions.
        """
        score, reading = criterion or cross_entropies, Reading(inputs, labels)
        given = {**options, "inputs": inputs, "labels": labels}
        takes_scores = isinstance(score, CrossEntropies | _Loss)

        def outputs(model: nn.Module, batch: Batch) -> Any:
            made = reading.call(model, batch)
            return scores_in(made) if takes_scores else made

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return score(outputs(model, batch), reading.labels_in(batch))

        def predict(model: nn.Module, batch: Batch) -> Tensor:
            scores: Tensor = scores_in(reading.call(model, batch))
            return scores

        if isinstance(score, CrossEntropies):
            options = _of_labels(score, outputs, reading, options)
        task = cls(model, train, test, loss=loss, **{"predict": predict, **options})
        task.reading = reading
        if options.get("weight") is None:
            task.label_counts = LabelCounts(reading.labels_in)
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
        labels_in = self.reading.labels_in
        task = self._learned_by(score, None if counts is None else lambda batch: counts(labels_in(batch)))
        task.gradient, task.penalty = self.gradient, self.penalty
        task.optimizer, task.reduction = self.optimizer, self.reduction
        return task

    def classes_in(self, batch: Batch) -> Tensor | None:
        """The labels [B] of a batch, where they are whole numbers, one a sample; else None."""
        return self.reading.classes_in(batch)

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
    def has_test(self) -> bool:
        """Whether a test set was given."""
        return self._test is not None

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


def _of_labels(
    score: CrossEntropies, outputs: Callable[[nn.Module, Batch], Any], reading: Reading, options: dict[str, Any]
) -> dict[str, Any]:
    """Options of a Task whose every label that counts, counts the same; a user's own come first."""

    def weight(batch: Batch) -> Tensor | None:
        return score.counts(reading.labels_in(batch))

    def tokens(model: nn.Module, batch: Batch) -> Tensor:
        return score.values(outputs(model, batch), reading.labels_in(batch))

    own = {name: value for name, value in options.items() if value is not None}
    return {"weight": weight, **({} if "measure" in own else {"tokens": tokens}), **own}


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

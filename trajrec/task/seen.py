"""The criterion that a training was seen to call, without its reduction: for `Task.supervised` where none is given.

Only the classes of a table are made, from the numbers that were noted: nothing in a recording is executed. Of weights
of classes w, torch's mean is sum_i w[y_i] l_i / sum_i w[y_i]: the losses l_i, and what each sample counts in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss

from trajrec.records import Criterion
from trajrec.task.criterion import IGNORED, _classes_second

Score = Callable[[Any, Any], Tensor]
Counts = Callable[[Any], Tensor | None]


def made_of(noted: Criterion) -> tuple[Score, Counts | None] | None:
    """The criterion (outputs, labels) -> [B, ...], and what samples count by their labels; None for the default one."""
    if noted.kind in ("CrossEntropyLoss", "NLLLoss"):
        options = dict(noted.options)
        smoothing, ignored = options.get("label_smoothing", 0.0), int(options.get("ignore_index", IGNORED))
        if noted.kind == "CrossEntropyLoss" and not noted.weight and not smoothing and ignored == IGNORED:
            return None
        of_classes = OfClasses(noted.kind, noted.weight, ignored, smoothing)
        return of_classes, of_classes.counts
    return Elementwise(noted), None


class OfClasses(_Loss):
    """Cross entropy, or the negative logarithm of a probability, of every sample's labels."""

    def __init__(self, kind: str, weight: tuple[float, ...], ignored: int, smoothing: float) -> None:
        super().__init__(reduction="none")
        self.kind, self.ignored, self.smoothing = kind, ignored, smoothing
        self.weight = torch.tensor(weight, dtype=torch.float64) if weight else None

    def _weight(self, like: Tensor) -> Tensor | None:
        return None if self.weight is None else self.weight.to(like.device, like.dtype)

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean over a sample's labels that count, [B]."""
        weight = self._weight(outputs)
        if labels.is_floating_point():
            return F.cross_entropy(outputs, labels, weight, reduction="none", label_smoothing=self.smoothing)
        scores, whole = _classes_second(outputs, labels), labels.long()
        if self.kind == "NLLLoss":
            found = F.nll_loss(scores, whole, weight, ignore_index=self.ignored, reduction="none")
        else:
            options: Any = {"ignore_index": self.ignored, "label_smoothing": self.smoothing}
            found = F.cross_entropy(scores, whole, weight, reduction="none", **options)
        shares = self._shares(labels, outputs)
        summed = found if labels.dim() == 1 else found.flatten(1).sum(1)
        return summed / torch.where(shares > 0, shares, 1.0)

    def counts(self, labels: Any) -> Tensor | None:
        """The weights of a sample's labels that count, added up, [B]; None of probabilities."""
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return None
        return self._shares(labels, torch.empty(0, dtype=torch.float64, device=labels.device))

    def _shares(self, labels: Tensor, like: Tensor) -> Tensor:
        counted, weight = labels != self.ignored, self._weight(like)
        one = counted.to(like.dtype) if weight is None else weight[labels.long().where(counted, 0)] * counted
        return one.reshape(len(labels), -1).sum(1)


class Elementwise(_Loss):
    """A criterion of every output beside the label in its place."""

    def __init__(self, noted: Criterion) -> None:
        super().__init__(reduction="none")
        truths = {name: bool(value) for name, value in noted.options if name == "log_target"}
        options: dict[str, Any] = dict(noted.options) | truths
        for name in ("weight", "pos_weight"):
            values = getattr(noted, name)
            if values:
                options[name] = torch.tensor(values, dtype=torch.float64)
        self.inner = getattr(nn, noted.kind)(reduction="none", **options)

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The values [B, ...]; labels are taken in the type and shape of the outputs, as loops do."""
        self.inner.to(outputs.device, outputs.dtype)
        labels = labels.to(outputs.dtype)
        if labels.shape != outputs.shape and labels.numel() == outputs.numel():
            labels = labels.reshape(outputs.shape)
        found: Tensor = self.inner(outputs, labels)
        return found

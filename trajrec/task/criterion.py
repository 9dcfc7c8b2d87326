"""Cross entropy of every sample: the criteria of `Task.supervised` that need not be written.

    cross_entropies   labels one a sample, [B], or several, [B, T]: of tokens, pixels, whatever the model scores;
                      the default
    next_tokens       language models: the scores at a token are those of the token after it

torch wants the classes in the second dimension of the scores; language models give them in the last. Labels of -100 do
not count: a sample's loss is the mean over those that do, and in a batch every label counts the same, as in torch's
mean. A criterion may have two more functions, as these do: `values`, its loss of every label [B, T], for targets that
are tokens, and `counts`, how many labels of each sample its mean is over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from trajrec.errors import TaskError

IGNORED = -100


class CrossEntropies:
    """The mean cross entropy of every sample's labels, [B]; 0 where none of them counts."""

    def __call__(self, outputs: Any, labels: Any) -> Tensor:
        """The losses of samples [B].

        Args:
            outputs: scores [B, C], [B, C, T, ...] or [B, T, ..., C].
            labels: classes [B] or [B, T, ...]; or probabilities of the shape of the scores [B, C].

        Raises:
            TaskError: if the shapes do not fit each other.
        """
        losses = self.values(outputs, labels)
        if losses.dim() < 2 or labels.is_floating_point():
            return losses
        return losses.flatten(1).sum(1) / self._counted(labels).clamp(min=1)

    def values(self, outputs: Any, labels: Any) -> Tensor:
        """The loss of every label, [B] or [B, T, ...]; 0 for those that do not count.

        Raises:
            TaskError: if the shapes do not fit each other.
        """
        if not isinstance(outputs, Tensor) or not isinstance(labels, Tensor):
            raise TaskError(
                "Task.supervised's cross entropy takes scores and labels that are tensors, not "
                f"{type(outputs).__name__} and {type(labels).__name__}. Give it a criterion: (outputs, labels) -> [B]."
            )
        if labels.is_floating_point() and labels.shape == outputs.shape:
            return cross_entropy(outputs, labels, reduction="none")
        return cross_entropy(_classes_second(outputs, labels), labels.long(), reduction="none", ignore_index=IGNORED)

    def counts(self, labels: Any) -> Tensor | None:
        """How many labels of each sample count, [B]; None where that is one for each."""
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return None
        counts = self._counted(labels)
        return None if labels.dim() < 2 and bool((counts == 1).all()) else counts

    def _counted(self, labels: Tensor) -> Tensor:
        return (labels != IGNORED).reshape(len(labels) if labels.dim() else 1, -1).sum(1)


class NextTokens(CrossEntropies):
    """The mean cross entropy of every sample's tokens given those before them, [B]; the first is given to the model.

    Scores [B, T, V] at token t are those of token t + 1; labels [B, T] are the tokens themselves, not shifted, as
    Hugging Face's causal language models take them.
    """

    def values(self, outputs: Any, labels: Any) -> Tensor:
        """The loss of every token, [B, T], in its own place: 0 for the first, and for those that do not count.

        Raises:
            TaskError: if the shapes do not fit each other.
        """
        if not isinstance(outputs, Tensor) or not isinstance(labels, Tensor) or outputs.shape[:-1] != labels.shape:
            found = [f"{list(v.shape)}" if isinstance(v, Tensor) else type(v).__name__ for v in (outputs, labels)]
            raise TaskError(f"trajrec.next_tokens takes scores [B, T, V] and tokens [B, T], not {' and '.join(found)}.")
        return pad(super().values(outputs[:, :-1].movedim(-1, 1), labels[:, 1:]), (1, 0))

    def counts(self, labels: Any) -> Tensor | None:
        """How many tokens of each sample count, [B]."""
        return super().counts(labels) if isinstance(labels, Tensor) else None

    def _counted(self, labels: Tensor) -> Tensor:
        return super()._counted(labels[:, 1:])


cross_entropies = CrossEntropies()
next_tokens = NextTokens()


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """How many of the values that a user's own criterion gives belong to labels that count.

    Attributes:
        labels_in: the labels of a batch.
    """

    labels_in: Callable[[Any], Any]

    def left_out(self, batch: Any, values: Tensor) -> int | None:
        """How many labels of each sample, the first, have no value: 0, or 1 where the next token is predicted.

        None where values [B, T] are not those of labels [B, T] that are classes.
        """
        labels = self.labels_in(batch)
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() < 2:
            return None
        return next((first for first in (0, 1) if values.shape == labels[:, first:].shape), None)

    def of(self, batch: Any, left_out: int) -> Tensor:
        """How many values of each sample of a batch count, [B]."""
        labels = self.labels_in(batch)[:, left_out:]
        counts: Tensor = (labels != IGNORED).reshape(len(labels), -1).sum(1)
        return counts


def _classes_second(outputs: Tensor, labels: Tensor) -> Tensor:
    """Scores with the classes in their second dimension; of a single sample [C] as they are."""
    if not labels.dim() and outputs.dim() == 1:
        return outputs
    if outputs.dim() == labels.dim() + 1:
        if outputs.shape[:-1] == labels.shape and (labels.dim() == 1 or outputs.shape[2:] != labels.shape[1:]):
            return outputs.movedim(-1, 1)
        if outputs.shape[:1] + outputs.shape[2:] == labels.shape:
            return outputs
    raise TaskError(
        f"Task.supervised's cross entropy takes scores [B, C] beside labels [B], or [B, T, C] beside [B, T]; found the "
        f"shapes {tuple(outputs.shape)} and {tuple(labels.shape)}. Give it a criterion: (outputs, labels) -> [B]."
    )

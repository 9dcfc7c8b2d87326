"""Cross entropy of every sample: the criterion of `Task.supervised` where none is given.

Labels may be one a sample, [B], or several, [B, T]: of tokens, pixels, whatever the model scores. torch wants the
classes in the second dimension of the scores then; language models give them in the last. Labels of -100 do not count.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from trajrec.errors import TaskError

IGNORED = -100


def cross_entropies(outputs: Any, labels: Any) -> Tensor:
    """The mean cross entropy of every sample's labels, [B]; 0 where none of them counts.

    Args:
        outputs: scores [B, C], [B, C, T, ...] or [B, T, ..., C].
        labels: classes [B] or [B, T, ...]; or probabilities of the shape of the scores [B, C].

    Raises:
        TaskError: if the shapes do not fit each other.
    """
    if not isinstance(outputs, Tensor) or not isinstance(labels, Tensor):
        raise TaskError(
            f"Task.supervised's cross entropy takes scores and labels that are tensors, not {type(outputs).__name__} "
            f"and {type(labels).__name__}. Give it a criterion: (outputs, labels) -> [B]."
        )
    if labels.is_floating_point() and labels.shape == outputs.shape:
        return cross_entropy(outputs, labels, reduction="none")
    scores = _classes_second(outputs, labels)
    losses = cross_entropy(scores, labels.long(), reduction="none", ignore_index=IGNORED)
    if labels.dim() == 1:
        return losses
    return losses.flatten(1).sum(1) / (labels != IGNORED).flatten(1).sum(1).clamp(min=1)


def label_counts(batch: Any) -> Tensor | None:
    """How many labels of each sample of a batch (inputs, labels) count, [B]; None where that is one for each."""
    labels = batch[1]
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    counts = (labels != IGNORED).reshape(len(labels), -1).sum(1)
    return None if labels.dim() == 1 and bool((counts == 1).all()) else counts


def _classes_second(outputs: Tensor, labels: Tensor) -> Tensor:
    """Scores with the classes in their second dimension."""
    if outputs.dim() == labels.dim() + 1:
        if outputs.shape[:-1] == labels.shape and (labels.dim() == 1 or outputs.shape[2:] != labels.shape[1:]):
            return outputs.movedim(-1, 1)
        if outputs.shape[:1] + outputs.shape[2:] == labels.shape:
            return outputs
    raise TaskError(
        f"Task.supervised's cross entropy takes scores [B, C] beside labels [B], or [B, T, C] beside [B, T]; found the "
        f"shapes {tuple(outputs.shape)} and {tuple(labels.shape)}. Give it a criterion: (outputs, labels) -> [B]."
    )

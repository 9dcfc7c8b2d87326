"""What a loss gives for a batch, as one value a sample.

    [B]               as it is
    [B, 1, 1, ...]    squeezed
    [B, L, ...]       a value for each token, output or pixel: their mean over the further dimensions, their sum, or
                      the mean over those whose labels count, whichever gives the recorded loss
                      (`replay.losses.reduction`)
    any, B = 1        the one sample's own, also where its dimension was squeezed away

A [B, B] may be neither: outputs [B, 1] beside labels [B] are broadcast to every pair of an output and a label. With a
sample less both dimensions of such a loss are another, of one with further dimensions only the first; so it is tried.
"""

from __future__ import annotations

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from trajrec.errors import TaskError
from trajrec.task.task import Batch

COUNTED = "mean of those that count"
WITHIN = ("mean", "sum", COUNTED)


def per_sample(values: object, count: int, what: str, within: str, counts: Tensor | None = None) -> Tensor:
    """The values of a loss of `count` samples as [B]; further dimensions are reduced `within` each sample.

    `counts` [B] says how many of the values of each sample count, the others being 0.

    Raises:
        TaskError: if they are not one value, or one row of values, a sample.
    """
    if isinstance(values, Tensor) and values.dim() == 1 and len(values) == count:
        return values
    if not isinstance(values, Tensor) or not (count == 1 or (values.dim() and len(values) == count)):
        raise TaskError(
            f"Task.{what} must return one value for each of the {count} samples of a batch, shape ({count},), or "
            f"further dimensions behind that of the samples, but {_returned(values)}"
        )
    rows = values.reshape(count, -1)
    if within == COUNTED and counts is not None:
        return rows.sum(1) / counts.clamp(min=1).to(rows.device)
    return rows.sum(1) if within == "sum" else rows.mean(1)


def per_token(values: object, count: int) -> Tensor:
    """The losses of the tokens of `count` samples, [B, T].

    Raises:
        TaskError: if they are none.
    """
    if isinstance(values, Tensor) and count == 1 and values.dim() == 1 and values.numel() > 1:
        return values[None]
    if not isinstance(values, Tensor) or values.dim() != 2 or len(values) != count:
        found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise TaskError(
            f"Targets that are tokens need the losses of the tokens of {count} samples, shape ({count}, tokens); the "
            f"Task gives {found}. Let Task(tokens=...) return them: (model, batch) -> [B, tokens], without a mean."
        )
    return values


def _returned(values: object) -> str:
    if not isinstance(values, Tensor):
        return f"returned {type(values).__name__}."
    if values.dim() == 0:
        return "returned a single number, (). Use reduction='none' in the criterion."
    return (
        f"returned {tuple(values.shape)}. Where samples and tokens are in one dimension: "
        "values.view(len(x), -1).mean(1)."
    )


def has_further(values: Tensor, count: int) -> bool:
    """Whether a loss has several values a sample."""
    return values.numel() > count


def has_pairs(values: object, count: int) -> bool:
    """Whether a loss may have a value for every pair of samples."""
    return isinstance(values, Tensor) and count > 1 and tuple(values.shape[:2]) == (count, count)


def without_last(batch: Batch, count: int) -> Batch:
    """A batch of `count` samples without the last one."""
    leaves, form = tree_flatten(batch)
    cut = [leaf[:-1] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == count else leaf for leaf in leaves]
    return tree_unflatten(cut, form)


def broadcast_error(what: str, count: int) -> TaskError:
    """The refusal of a loss that compares every output with every label."""
    return TaskError(
        f"Task.{what} gives {count} x {count} values for {count} samples: outputs of shape [B, 1] beside labels of "
        "shape [B], or the other way round, were broadcast to [B, B], so that every output is compared with the labels "
        "of all samples. Give both one shape: model(x).squeeze(1), or labels.unsqueeze(1). If the training's loss was "
        "broadcast, too, its model has learned the mean of the labels: mend the loop and record again. Where pairs "
        "are meant, return their mean: values.mean(1)."
    )

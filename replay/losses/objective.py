"""The losses of a batch, their shares in the step's gradient, and the number that is differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Objective:
    """What a step's gradient is of: sum_i shares[i] losses[i] + penalty.

    Attributes:
        losses: [B], in the order of the step's ids.
        shares: [B], the c[t,i]; constant.
        penalty: a term without samples (regularisation), or None.
    """

    losses: Tensor
    shares: Tensor
    penalty: Tensor | None

    @property
    def total(self) -> Tensor:
        """The scalar itself."""
        weighted = torch.dot(self.shares, self.losses)
        return weighted if self.penalty is None else weighted + self.penalty

    @classmethod
    def joined(cls, parts: Sequence[Objective]) -> Objective:
        """The objective of micro-batches together."""
        if len(parts) == 1:
            return parts[0]
        penalties = [part.penalty for part in parts if part.penalty is not None]
        penalty = torch.stack(penalties).sum() if penalties else None
        return cls(torch.cat([p.losses for p in parts]), torch.cat([p.shares for p in parts]), penalty)


def reduced(counts: Sequence[Tensor], reduction: str, usual: int) -> list[Tensor]:
    """The c of every micro-batch, from what each sample counts ([B_m] each) and the name of a reduction.

    `usual` is the number of micro-batches that a step usually has.
    """
    match reduction:
        case "scaled-means":
            return [count / count.sum() / usual for count in counts]
        case "sum":
            return list(counts)
        case "sum-of-means":
            return [count / count.sum() for count in counts]
        case "mean-of-means":
            return [count / count.sum() / len(counts) for count in counts]
        case _:
            total = torch.stack([count.sum() for count in counts]).sum()
            return [count / total for count in counts]

r"""A batch that does not fit, taken in pieces: the sums over its samples are sums over the pieces.

    g_t = sum_p g_p,   H_t gamma = sum_p H_p gamma,   inner = the pieces' inner products side by side

with the samples' own c[t,i], and the penalty in one piece. That is the same to rounding where the samples of a batch do
not touch each other, and nonsense where they do (BatchNorm in training mode) or where random numbers were drawn for the
batch as a whole (dropout). So before a kind of step is cut, the losses of its pieces are held against those of the
whole.

How many samples a piece may have follows from the bytes that a recorded pass over a few of them keeps, which grow by
the same amount with every sample; a form takes about twice as much in all (measured: 2.0 for DenseNet-40). Where a
batch cannot be cut, a replay that was told how much memory it may take is refused if that is too little; one that was
not told goes on with the whole batch. The training's own pass over a batch is never cut: it fitted where the training
ran.

Letters: B batch, K directions, P' trainable weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from trajrec.errors import ReplayError
from trajrec.replay.derivatives.derivatives import Derivatives, Point
from trajrec.replay.derivatives.reverse import saved_bytes
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.gradient import gradient_of
from trajrec.replay.machine.generators import generators_kept
from trajrec.replay.step import Part, Step

Form = Callable[[LossFunction, Samples, Step, int], Point]
_TEMPORARY = 2
_FEW = 2


def cut(function: LossFunction, samples: Samples, step: Step, size: int) -> Iterator[Step]:
    """The step as steps of at most `size` samples each, whose gradients add up to its own."""
    shares = function.shares(samples, step)
    divisor = function.penalty_divisor(len(step.parts))
    for part in step.parts:
        batch = samples.part(step, part)
        for start in range(part.span.start, part.span.stop, size):
            stop = min(start + size, part.span.stop)
            rows = slice(start - part.span.start, stop - part.span.start)
            mine = tree_map(lambda value, rows=rows: value[rows], batch)
            penalty = 0 if rows.start else divisor
            piece = Part(slice(0, stop - start), batch=mine, penalty=penalty)
            yield replace(step, ids=step.ids[start:stop], shares=shares[start:stop], parts=(piece,))


class CutPoint:
    """A step in pieces; each piece is computed in the form, and forgotten before the next."""

    def __init__(self, form: Form, function: LossFunction, samples: Samples, step: Step, chunk: int, size: int) -> None:
        self._form, self._function, self._samples, self._chunk = form, function, samples, chunk
        self._pieces = list(cut(function, samples, step, size))
        self._gradient: Tensor | None = None

    @property
    def shares(self) -> Tensor:
        """The c[t,i] [B] of the batch."""
        return torch.cat([piece.shares for piece in self._pieces if piece.shares is not None])

    def gradient(self) -> Tensor:
        """g_t [P'], by passes of its own."""
        if self._gradient is None:
            self._gradient = _sum(gradient_of(self._function, self._samples, piece) for piece in self._pieces)
        return self._gradient

    def along(self, directions: Tensor, *, hessian: bool, gradient: bool) -> Derivatives:
        """Derivatives along directions [K, P']."""
        wanted = gradient if self._gradient is None else False
        inners, hvp, total = [], None, None
        for piece in self._pieces:
            found = self._at(piece).along(directions, hessian=hessian, gradient=wanted)
            inners.append(found.inner)
            hvp, total = _plus(hvp, found.hvp), _plus(total, found.gradient if wanted else None)
        self._gradient = total if wanted else self._gradient
        return Derivatives(torch.cat(inners, dim=1), self.shares, hvp, self._gradient)

    def forced(self, directions: Tensor | None, multipliers: Tensor) -> Tensor:
        """As `ReversePoint.forced`, of all pieces."""
        counts = [len(piece.ids) for piece in self._pieces]
        pairs = zip(self._pieces, torch.split(multipliers, counts, dim=1), strict=True)
        return _sum(self._at(piece).forced(directions, mine) for piece, mine in pairs)

    def _at(self, piece: Step) -> Any:
        return self._form(self._function, self._samples, piece, self._chunk)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _sum(values: Iterator[Tensor]) -> Tensor:
    total = next(values)
    for value in values:
        total = total + value
    return total


@dataclass(frozen=True, slots=True)
class Cutting:
    """How many samples a form takes at once.

    Attributes:
        memory: bytes that one step may take.
        most: bytes that the user gave the replay, or None.
    """

    memory: int = 1 << 62
    most: int | None = None

    def size(self, function: LossFunction, samples: Samples, step: Step, known: dict[str, int]) -> int:
        """The size for a step, at most its batch; tried out at the first of its kind, and `known` from then on.

        Raises:
            ReplayError: if the batch does not fit into the memory that the user gave, and cannot be cut.
        """
        modes, random = ",".join(step.conditions.eval_modules), any(part.rng for part in step.parts)
        kind = f"{len(step.ids)}/{len(step.parts)}/{random}/{modes}"
        if kind not in known:
            known[kind] = self._fitting(function, samples, step)
        return min(known[kind] or len(step.ids), len(step.ids))

    def _fitting(self, function: LossFunction, samples: Samples, step: Step) -> int:
        count = len(step.ids)
        if not has_rows(samples, step) or count < 2 * _FEW:
            return 0
        try:
            fixed, each = _bytes(function, samples, step)
        except Exception:  # whatever a loss says of a batch that is smaller than it thinks
            return 0
        if fixed + count * each <= self.memory:
            return 0
        size = max(1, int((self.memory - fixed) // each))
        reason = _why_whole(function, samples, step, size)
        if reason is None:
            return size
        if self.most is not None and fixed + count * each > self.most:
            raise ReplayError(
                f"Step {step.t} with its batch of {count} needs about {(fixed + count * each) / 1e9:.2g} GB, and "
                f"--memory gives {self.most / 1e9:.2g} GB. The batch cannot be taken in pieces: {reason}. Give the "
                "replay more memory, or record with smaller batches."
            )
        return 0


def has_rows(samples: Samples, step: Step) -> bool:
    """Whether the batches of a step are made of tensors with one row a sample, so that they can be cut."""
    for part in step.parts:
        count = part.span.stop - part.span.start
        leaves = tree_leaves(samples.part(step, part))
        if not all(isinstance(v, Tensor) and v.dim() and len(v) == count for v in leaves):
            return False
    return True


def _bytes(function: LossFunction, samples: Samples, step: Step) -> tuple[float, float]:
    """The bytes that a form takes whatever the batch, and for each sample of it."""
    # The random numbers of these passes are nobody's.
    with generators_kept(function.device):
        found = []
        for size in (_FEW, 2 * _FEW):
            piece = max(cut(function, samples, step, size), key=lambda piece: len(piece.ids))
            found.append((len(piece.ids), _TEMPORARY * saved_bytes(function, samples, piece)))
    (a, few), (b, more) = found
    each = (more - few) / (b - a) if b > a else few / a
    return max(0.0, few - a * each), max(1.0, each)


def _why_whole(function: LossFunction, samples: Samples, step: Step, size: int) -> str | None:
    """Why a step cannot be cut; None if it can."""
    if any(part.rng for part in step.parts):
        return "random numbers (of dropout, say) were drawn for the batch as a whole"
    for name, module in function.model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            return (
                f"{type(module).__name__} {name!r} is in training mode, where the samples of a batch touch each other"
            )
    with torch.no_grad():
        whole = function.objective(step.before, samples, step).losses
        parts = [function.objective(step.before, samples, piece).losses for piece in cut(function, samples, step, size)]
    close = torch.allclose(torch.cat(parts), whole, rtol=torch.finfo(whole.dtype).eps ** 0.5, atol=1e-6)
    return None if close else "the loss of a sample depends on the others of its batch"

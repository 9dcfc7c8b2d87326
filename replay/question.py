"""Everything that decides the numbers of a replay, one frozen value that is checked once.

    Question    what a user asks, of any recording
    Scope       what it comes to in one: which targets and samples, in which direction, over which steps

What decides rounding only (how many targets at once, which form of the derivatives) is no part of it.

Letters: M targets, N training samples, S samples asked for, T steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch

from trajrec.errors import ReplayError
from trajrec.records import IntArray, Json
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.chosen import Contrasts, Tokens
from trajrec.replay.losses.targets import NO_TARGETS, Targets, check_ids, choose_targets

Curvature: TypeAlias = Literal["hessian", "ggn", "kinks", "none"]
Mode: TypeAlias = Literal["auto", "adjoint", "tangent"]
Certify: TypeAlias = Literal["all", "sampled"]
TargetChoice: TypeAlias = Literal["mean", "each", "class"] | IntArray | Tokens | Contrasts
FloatName: TypeAlias = Literal["float32", "float64"]
DTYPES = {"float32": torch.float32, "float64": torch.float64}
_SAMPLED = 32


def curvature_of(exact: bool, curvature: Curvature | None) -> Curvature:
    """The curvature that was asked for: by its name, or by `exact`, which is the default and gives way to a name.

    Raises:
        ReplayError: if there is none of that name, or it is exact and the answer should not be.
    """
    if curvature not in (None, *get_args(Curvature)):
        raise ReplayError(f"curvature must be one of {', '.join(get_args(Curvature))}, not {curvature!r}.")
    if curvature == "hessian" and not exact:
        raise ReplayError('curvature "hessian" is the exact form: leave out exact=False, or ask for another curvature.')
    return ("hessian" if exact else "none") if curvature is None else curvature


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Question:
    """What is asked of a recording.

    Attributes:
        targets: "mean" (of the test set), "each" test sample, "class" (mean of each class), [M] test ids, `Tokens` or
            `Contrasts`.
        samples: [S] training sample ids; None for all N.
        curvature: "hessian" (exact), or an approximation: "ggn" (its Gauss-Newton form), "kinks" (kinks with a second
            derivative), "none" (the paper's).
        mode: "adjoint" (all samples at once, cost by targets), "tangent" (cost by samples), or "auto".
        by_epoch: the part of each epoch, too (adjoint only).
        steps: (a, b): only what steps a to b contribute; None for all.
        certify: which steps are made again, "all" or a "sampled" few; None for all if there is a curvature.
        shard: (i, n): only piece i of n, by targets (adjoint) or by samples (tangent).
        dtype: "float32" or "float64"; None for the recording's.
        device: torch device; None for the CPU.
        allow_drift: go on where the task does not reproduce the recording.

    Raises:
        ReplayError: if a choice has no such name, or two do not go together.
    """

    targets: TargetChoice = "mean"
    samples: IntArray | None = None
    curvature: Curvature = "hessian"
    mode: Mode = "auto"
    by_epoch: bool = False
    steps: tuple[int, int] | None = None
    certify: Certify | None = None
    shard: tuple[int, int] | None = None
    dtype: FloatName | torch.dtype | None = None
    device: str | torch.device | None = None
    allow_drift: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ReplayError(f'mode must be "auto", "adjoint" or "tangent", not {self.mode!r}.')
        curvature_of(True, self.curvature)
        if self.certify not in (None, *get_args(Certify)):
            raise ReplayError(f'certify must be "sampled" or "all", not {self.certify!r}.')
        if self.by_epoch and self.mode == "tangent":
            raise ReplayError('Contributions by epoch need mode="adjoint".')

    def options(self) -> Json:
        """All that decides the numbers but targets, samples and shard, by name."""
        left_out = ("targets", "samples", "shard")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in left_out}

    def scope(self, samples: int, steps: int, test: Callable[[], Samples] | None) -> Scope:
        """What the question comes to in a recording of so many samples and steps, measured on a test set if any.

        Raises:
            TaskError: if there are no such targets.
            SampleRangeError: if an id does not exist.
            ReplayError: if there are no such steps, or no such shard.
        """
        chosen = np.arange(samples) if self.samples is None else check_ids(self.samples, samples, "training")
        targets = NO_TARGETS if test is None else choose_targets(self.targets, test())
        mode: Literal["adjoint", "tangent"] = "adjoint"
        if self.mode == "tangent" or (self.mode == "auto" and not self.by_epoch and len(targets.names) > len(chosen)):
            mode = "tangent"
        certify = self.certify or ("sampled" if self.curvature == "none" else "all")
        stride = max(1, min(_SAMPLED, steps // _SAMPLED)) if certify == "sampled" else 1
        window = _window(self.steps, steps)
        return Scope(*_cut(targets, chosen, mode, self.shard), mode, self.curvature, self.by_epoch, window, stride)


@dataclass(frozen=True, slots=True)
class Scope:
    """What a question comes to in a recording.

    Attributes:
        targets: what is measured.
        samples: [S] training sample ids.
        mode: "adjoint" or "tangent".
        curvature: as in the question.
        by_epoch: as in the question.
        window: first and last step whose contributions count.
        stride: the certificate makes one step in so many again.
        sets: forwards only: sets of samples that are weighed together, one for each of `samples`, which then are names.
    """

    targets: Targets
    samples: IntArray
    mode: Literal["adjoint", "tangent"]
    curvature: Curvature
    by_epoch: bool
    window: tuple[int, int]
    stride: int
    sets: tuple[IntArray, ...] | None = None


def _window(steps: tuple[int, int] | None, last: int) -> tuple[int, int]:
    first, end = steps or (1, last)
    if not 1 <= first <= end <= last:
        raise ReplayError(f"Steps {first}:{end} are not steps of this run: it has steps 1 to {last}.")
    return int(first), int(end)


def _shard_of(count: int, shard: tuple[int, int] | None, what: str, hint: str = "") -> slice:
    """The part of `count` targets or samples that is piece i of n, counted from 1.

    Raises:
        ReplayError: if there is no such piece, or it would be empty.
    """
    if shard is None:
        return slice(0, count)
    i, n = shard
    if not 1 <= i <= n:
        raise ReplayError(f"There is no shard {i}/{n}: shards count from 1/{n} to {n}/{n}.")
    if n > count:
        raise ReplayError(f"{count} {what} cannot be cut into {n} shards: ask for at most {count}. {hint}".rstrip())
    edges = np.linspace(0, count, n + 1).astype(int)
    return slice(int(edges[i - 1]), int(edges[i]))


def _cut(targets: Targets, chosen: IntArray, mode: str, shard: tuple[int, int] | None) -> tuple[Targets, IntArray]:
    """The targets (adjoint) or samples (tangent) of a shard, and all of the other."""
    if mode == "tangent":
        return targets, chosen[_shard_of(len(chosen), shard, "samples")]
    hint = "Samples are cut with --mode tangent; backwards, one replay answers for any number of them."
    piece = _shard_of(len(targets.names), shard, "target(s)", hint)
    return targets.at(np.arange(len(targets.names))[piece]), chosen


def parse_dtype(dtype: FloatName | torch.dtype | None, default: str) -> torch.dtype:
    """A floating type by name or torch dtype.

    Raises:
        ReplayError: if it is not float32 or float64.
    """
    name = default if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ReplayError(
            f"A replay computes in float32 or float64, not {name}: second derivatives in half precision are wrong "
            "without a warning."
        )
    return DTYPES[name]


def parse_device(device: str | torch.device | None) -> torch.device:
    """A torch device that is there; None is the CPU.

    Raises:
        ReplayError: if there is no such device.
    """
    try:
        return torch.empty(0, device=device or "cpu").device
    except (RuntimeError, AssertionError) as error:
        raise ReplayError(f"Device {device} cannot be used: {str(error).splitlines()[0]}") from None

"""Everything that decides the numbers of a replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trajrec.errors import ReplayError
from trajrec.records import IntArray
from trajrec.replay.losses.targets import Targets

CURVATURES = ("hessian", "ggn", "none")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def curvature_of(exact: bool, curvature: str | None) -> str:
    """The curvature that was asked for, by one name or the other.

    Raises:
        ReplayError: if there is none of that name, or the two contradict each other.
    """
    if curvature not in (None, *CURVATURES):
        raise ReplayError(f"curvature must be one of {', '.join(CURVATURES)}, not {curvature!r}.")
    if exact and curvature not in (None, "hessian"):
        raise ReplayError(f'exact stands for curvature "hessian"; ask for one of the two, not also for {curvature!r}.')
    return curvature or ("hessian" if exact else "none")


def certification_of(certify: str | None, exact: bool) -> str:
    """Which steps are certified.

    Raises:
        ReplayError: there is no choice of that name.
    """
    if certify not in (None, "sampled", "turns", "all"):
        raise ReplayError(f'certify must be "sampled", "turns" or "all", not {certify!r}.')
    return certify or ("all" if exact else "sampled")


def window_of(steps: tuple[int, int] | None, last: int) -> tuple[int, int]:
    """The first and the last step whose contributions are asked for.

    Raises:
        ReplayError: they are no steps of the run.
    """
    first, end = steps or (1, last)
    if not 1 <= first <= end <= last:
        raise ReplayError(f"Steps {first}:{end} are not steps of this run: it has steps 1 to {last}.")
    return int(first), int(end)


def shard_of(count: int, shard: tuple[int, int] | None, what: str, hint: str = "") -> slice:
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


def cut(wanted: Targets, chosen: IntArray, mode: str, shard: tuple[int, int] | None) -> tuple[Targets, IntArray]:
    """The targets (adjoint) or samples (tangent) of a shard, and all of the other."""
    if mode == "tangent":
        return wanted, chosen[shard_of(len(chosen), shard, "samples")]
    hint = "Samples are cut with --mode tangent; backwards, one replay answers for any number of them."
    piece = shard_of(len(wanted.names), shard, "target(s)", hint)
    return Targets(wanted.kind, wanted.names[piece], wanted.groups[piece]), chosen


def parse_dtype(dtype: Any, default: str) -> torch.dtype:
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


def parse_device(device: Any) -> torch.device:
    """A torch device that is there; None is the CPU.

    Raises:
        ReplayError: if there is no such device.
    """
    try:
        return torch.empty(0, device=device or "cpu").device
    except (RuntimeError, AssertionError) as error:
        raise ReplayError(f"Device {device} cannot be used: {str(error).splitlines()[0]}") from None


def check_mode(mode: str) -> None:
    """Raises ReplayError for an unknown mode."""
    if mode not in ("auto", "adjoint", "tangent"):
        raise ReplayError(f'mode must be "auto", "adjoint" or "tangent", not {mode!r}.')


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a session.

    Attributes:
        wanted: the targets.
        chosen: [S] sample ids.
        exact: with the Hessian.
        by_epoch: the part of each epoch, too.
        window: first and last step whose contributions count.
        certify: which steps the certificate checks: "all", or a "sampled" few; "turns": all where one target is asked
            for and the gradient is not at hand, a part of the weights each (`replay.turns`).
    """

    wanted: Targets
    chosen: IntArray
    exact: bool
    by_epoch: bool
    window: tuple[int, int]
    certify: str

"""The recorded steps of a run, forwards or backwards, as tensors ready for the mathematics.

A step carries what U and the losses need: w_{t-1} and w_t (trainable weights only, [P']), the batch's ids and shares,
hyperparameters and the random state of its forward pass. How the rows come to be (read from the file, recomputed from
keyframes) is the run's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trajrec.errors import NonFiniteError
from trajrec.records import Conditions, FloatArray, IntArray, Keyframe, Row, RunSpec
from trajrec.rules import FlatLayout, Rule
from trajrec.rules.step import State
from trajrec.task.task import Batch


class RecordedRun(Protocol):
    """What replay needs of a run; `trajrec.open` gives one."""

    @property
    def spec(self) -> RunSpec: ...  # noqa: D102
    @property
    def steps(self) -> int: ...  # noqa: D102
    @property
    def epochs(self) -> IntArray: ...  # noqa: D102
    @property
    def changes(self) -> dict[int, Conditions]: ...  # noqa: D102
    @property
    def keep(self) -> str: ...  # noqa: D102
    @property
    def keyframe_steps(self) -> tuple[int, ...]: ...  # noqa: D102
    def keyframe(self, t: int) -> Keyframe: ...  # noqa: D102
    def stored(self, t: int) -> bool: ...  # noqa: D102
    def crc32(self, t: int) -> int: ...  # noqa: D102
    def row(self, t: int) -> Row: ...  # noqa: D102
    def walk(self, first: int, last: int) -> Iterator[tuple[int, Row]]: ...  # noqa: D102
    def sample_ids(self, t: int) -> IntArray: ...  # noqa: D102
    def parts(self, t: int) -> IntArray: ...  # noqa: D102
    def digests(self, t: int) -> IntArray: ...  # noqa: D102
    def recorded_weights(self, t: int) -> FloatArray | None: ...  # noqa: D102
    def hyper(self, t: int) -> FloatArray: ...  # noqa: D102
    def loss(self, t: int) -> float: ...  # noqa: D102
    def rng(self, t: int) -> bytes: ...  # noqa: D102
    def inputs(self, t: int) -> list[Batch] | None: ...  # noqa: D102


class OtherState(Exception):  # noqa: N818
    """An optimizer state that was made again is not the recorded one; the message is the refusal."""


@dataclass(frozen=True, slots=True)
class Part:
    """What went through the model in one forward pass.

    Attributes:
        span: slice of the step's ids.
        rng: generator states before the pass, or b"" where it drew no random numbers.
        digest: CRC-32 of the inputs (`trajrec.digest.sampled_digest`), or None if it was not recorded.
        batch: the inputs, where they are at hand (`replay.derivatives.pieces`).
        penalty: what the Task's penalty is divided by here, 0 leaves it out; None: as the reduction says.
    """

    span: slice
    rng: bytes = b""
    digest: int | None = None
    batch: Batch | None = field(default=None, compare=False, repr=False)
    penalty: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """Step t.

    Attributes:
        t: from 1.
        before: w_{t-1} [P'].
        after: w_t [P'].
        ids: [B] sample ids.
        shares: [B] the c[t,i] that were recorded, or None where the Task's reduction says them.
        hyper: [G, H].
        parts: the micro-batches, in order.
        epoch: from 0.
        conditions: modes of the model, and parameters without a gradient.
        state: s_{t-1} where it had to be made, else None.
    """

    t: int
    before: Tensor
    after: Tensor
    ids: IntArray
    shares: Tensor | None
    hyper: FloatArray
    parts: tuple[Part, ...]
    epoch: int
    conditions: Conditions
    state: State | None = None


class Trajectory(Protocol):
    """The steps 1..T of a run, wherever their weights come from."""

    @property
    def run(self) -> RecordedRun: ...  # noqa: D102
    @property
    def layout(self) -> FlatLayout: ...  # noqa: D102
    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102
    @property
    def device(self) -> torch.device: ...  # noqa: D102

    def weights(self, t: int) -> Tensor:
        """w_t [P']."""

    def forwards(self, first: int = 1) -> Iterator[Step]:
        """Steps first, first + 1, ..., T; `first` follows a keyframe."""

    def backwards(self, first: int | None = None) -> Iterator[Step]:
        """Steps first, first - 1, ..., 1; from T by default."""


def vector_of(row: Row, t: int, layout: FlatLayout) -> Tensor:
    """The trainable weights [P'] of row t, in the recording's dtype.

    Raises:
        NonFiniteError: if the training diverged there.
    """
    values = layout.select(row)
    if not np.isfinite(values).all():
        raise NonFiniteError(
            f"The recorded weights after step {t} are not finite: the training diverged there. Contributions to "
            "a loss of such weights do not exist; record a run that converges."
        )
    return torch.tensor(values)


def make_step(run: RecordedRun, t: int, before: Tensor, after: Tensor, state: State | None = None) -> Step:
    """Step t between two weight vectors [P']."""
    recorded = run.recorded_weights(t)
    shares = None if recorded is None else torch.as_tensor(recorded).to(before.device, before.dtype)
    return Step(
        t,
        before,
        after,
        run.sample_ids(t),
        shares,
        run.hyper(t),
        _parts(run, t),
        int(run.epochs[t - 1]),
        _conditions(run, t),
        state,
    )


def _parts(run: RecordedRun, t: int) -> tuple[Part, ...]:
    sizes, rng, digests = run.parts(t).tolist(), run.rng(t), run.digests(t).tolist()
    edges, length = [0, *accumulate(sizes)], len(rng) // len(sizes)
    states = [rng[k * length : (k + 1) * length] for k in range(len(sizes))]
    spans = [slice(a, b) for a, b in pairwise(edges)]
    made = [None if digest < 0 else digest for digest in digests] or [None] * len(sizes)
    return tuple(Part(*part) for part in zip(spans, states, made, strict=True))


def _conditions(run: RecordedRun, t: int) -> Conditions:
    """The conditions in force at step t."""
    changed = [step for step in run.changes if step <= t]
    return run.changes[changed[-1]] if changed else Conditions(run.spec.eval_modules)


@dataclass(frozen=True, slots=True)
class Point:
    """The training after step t: weights [P'] in the recording's dtype, and the optimizer state."""

    t: int
    weights: Tensor
    state: State


def initial_state(trajectory: Trajectory, rule: Rule) -> State:
    """s_0: the optimizer's state before the first recorded step."""
    run = trajectory.run
    return rule.initial_state(run.keyframe(0), run.hyper(1), trajectory.dtype, trajectory.device)

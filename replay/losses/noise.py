"""Target losses that draw random numbers, in eval mode, too: a VAE's, dropout that is always on.

A target is one function of the weights. The adjoint's gradient, the tangent's, the Taylor check's values and a replay
that is taken up again must see the same one. So the generators are seeded for every test sample by its id, and samples
are computed one by one: which numbers a sample gets then depends on nothing that it is asked together with.

Losses that also compare the samples of a batch with each other cannot be computed one by one; there a batch is seeded
as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum

import torch
from torch import Tensor

from trajrec.records import IntArray
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.machine.generators import generators_kept
from trajrec.task.seeding import seeded_generators

NOTE = (
    "The target loss draws random numbers, in eval mode, too (as a VAE does): they are seeded by the id of the test "
    "sample, so that every pass sees the same. Another seed would give other contributions."
)


class Noise(Enum):
    """Whether target losses draw random numbers, and whether they couple the samples of a batch, too."""

    NONE = 0
    OF_SAMPLES = 1
    OF_BATCHES = 2


def noise_of(function: LossFunction, weights: Tensor, samples: Samples, ids: IntArray) -> Noise:
    """What the target losses draw, found once by computing a few of them; the function is in eval mode."""
    if function.target_noise is None:
        function.target_noise = _found(function, weights.detach(), samples, ids[:3])
    found: Noise = function.target_noise
    return found


def _found(function: LossFunction, weights: Tensor, samples: Samples, ids: IntArray) -> Noise:
    def losses(seed: int, chosen: IntArray) -> Tensor:
        with torch.no_grad(), _seeded(seed, function.device):
            return function.measures(weights, samples.batch(chosen), len(chosen))

    try:
        if torch.equal(losses(0, ids[:2]), losses(1, ids[:2])):
            return Noise.NONE
        # The first sample gets the same numbers beside whichever second.
        is_coupled = len(ids) == 3 and not torch.equal(losses(0, ids[[0, 1]])[0], losses(0, ids[[0, 2]])[0])
    except Exception:  # samples that make no batch, and what a loss may raise: it does so again, where it is told
        with suppress(Exception):
            return Noise.NONE if torch.equal(losses(0, ids[:1]), losses(1, ids[:1])) else Noise.OF_SAMPLES
        return Noise.NONE
    return Noise.OF_BATCHES if is_coupled else Noise.OF_SAMPLES


@contextmanager
def seeded_by(ids: IntArray, function: LossFunction) -> Iterator[None]:
    """Inside, the generators are those of a batch of these test samples, if target losses draw from any."""
    if function.target_noise in (None, Noise.NONE):
        yield
        return
    with _seeded(int(ids[0]), function.device):
        yield


@contextmanager
def _seeded(number: int, device: torch.device) -> Iterator[None]:
    with seeded_generators(number), generators_kept(device):
        if device.type == "cuda":
            torch.cuda.manual_seed_all(number)
        yield

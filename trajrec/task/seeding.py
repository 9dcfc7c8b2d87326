"""Random augmentation that a replay can repeat: an item becomes a function of (seed, epoch, index).

    train_set = trajrec.seeded(ImageFolder(root, transform=augment))

While the random generators of Python, numpy and torch are drawn from for an item, they are seeded from those three
numbers, and put back afterwards; so it makes no difference which worker process fetches it, in which order, or how
often. The epoch is told by the recorder, and by the replay. Without a recorder nobody tells it and the items are as
random as they were: wrapping a data set changes nothing then.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


class Seeded(Dataset[Any]):
    """A map-style data set whose items are functions of (seed, epoch, index) once the epoch is known.

    Args:
        dataset: any map-style data set.
        seed: another one gives other augmentations.
    """

    def __init__(self, dataset: Any, seed: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed
        # In shared memory, so that worker processes that live longer than an epoch see it too.
        self._epoch = torch.full((), -1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Tells the epoch, from 0; -1 for items as random as the data set makes them."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """The epoch that was told; -1 for none."""
        return int(self._epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        epoch = self.epoch
        if epoch < 0:
            return self.dataset[index]
        with seeded_generators(self.seed, epoch, int(index)):
            return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Several items; a loader asks for them at once."""
        return [self[index] for index in indices]

    def __getattr__(self, name: str) -> Any:
        # "dataset" is not there yet while a copy is being made; special methods would go round `__getitem__`.
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)


def seeded(dataset: Any, seed: int = 0) -> Seeded:
    """The data set with random augmentation that a replay can repeat; see the module's docstring.

    Args:
        dataset: a map-style data set whose items may be random.
        seed: of the augmentation.
    """
    return Seeded(dataset, seed)


def find_seeded(dataset: Any) -> Seeded | None:
    """The seeded data set in a data set, under wrappers such as `Subset`; None if there is none."""
    while dataset is not None:
        if isinstance(dataset, Seeded):
            return dataset
        dataset = getattr(dataset, "dataset", None)
    return None


@contextmanager
def seeded_generators(*numbers: int) -> Iterator[None]:
    """Inside, the generators of Python, numpy and torch (on the CPU) are seeded from these numbers; put back after."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence([number % 2**32 for number in numbers]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])

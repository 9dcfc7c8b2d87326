"""The loaders of a training as numbers, and the passes over them.

A loader that is no more, and another one in its place in memory, are two; so are data sets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

from torch.utils.data import IterableDataset

from trajrec.capture.attribution.batches import Source
from trajrec.task.seeding import Seeded, find_seeded


class Passes:
    """Passes over the loaders that are watched.

    Args:
        loaders: those of the training, or None to watch every loader.
        forgotten: called with the number of a loader that is there no more.

    Attributes:
        dataset: the training data set; None as long as it is not known.
        before: passes over the training data before the one that the first step was in.
    """

    def __init__(self, loaders: Sequence[Any] | None, forgotten: Callable[[int], None]) -> None:
        self.loaders = loaders
        self.dataset: Any = None if loaders is None else loaders[0].dataset
        self.before = 0
        self._forgotten = forgotten
        self._sources: dict[int, tuple[ref[Any], Source]] = {}  # by the id of the loader
        self._last_loader = self._last_dataset = self._last_serial = 0
        self._training = 0  # number of the training data set
        self._counts: dict[int, int] = {}  # of passes, by data set
        self._seeded: dict[int, Seeded | None] = {}

    def begin(self, loader: Any, around: Sequence[Any] = ()) -> int | None:
        """A new pass over a loader has begun, for those `around` it. Returns its number; None if none is watched."""
        if not any(map(self._watches, (loader, *around))):
            return None
        dataset = self.source(loader).dataset
        count = self._counts.get(dataset, 0)
        self._counts[dataset] = count + 1
        seeded = find_seeded(loader.dataset)
        # Another loader over the same items (validation, say) does not tell the epoch of the training.
        if seeded is not None and self.is_training(loader):
            seeded.set_epoch(count)
        self._seeded[dataset] = seeded
        self._last_serial += 1
        return self._last_serial

    def _watches(self, loader: Any) -> bool:
        """Whether batches of this loader can be training batches."""
        return self.loaders is None or any(loader is known for known in self.loaders)

    def is_training(self, loader: Any) -> bool:
        """Whether a loader is one over the training data, as far as they are known."""
        return self.dataset is None or loader.dataset is self.dataset

    def seeded_pass(self, source: Source) -> int | None:
        """The epoch that seeded data are told at present: a pass over the same data in between has told another one."""
        seeded = self._seeded.get(source.dataset)
        return None if seeded is None else seeded.epoch

    def source(self, loader: Any) -> Source:
        """A loader as numbers."""
        known = self._sources.get(id(loader))
        if known is not None and known[0]() is loader:
            return known[1]
        self._last_loader += 1
        key, number, dataset = id(loader), self._last_loader, loader.dataset
        is_iterable, in_order = isinstance(dataset, IterableDataset), bool(getattr(loader, "in_order", True))
        source = Source(number, self._dataset(dataset), type(dataset).__name__, is_iterable, in_order)

        def gone(_: Any) -> None:
            if key in self._sources and self._sources[key][1] is source:
                del self._sources[key]
            self._forgotten(number)

        self._sources[key] = ref(loader, gone), source
        return source

    def loader(self, number: int) -> Any:
        """The loader with this number; None if it is there no more."""
        return next((mark() for mark, source in [*self._sources.values()] if source.loader == number), None)

    def new_source(self, name: str) -> Source:
        """A data set without a loader, that batches are cut out of."""
        self._last_loader += 1
        self._last_dataset += 1
        return Source(self._last_loader, self._last_dataset, name, is_indexed=True)

    def _dataset(self, dataset: Any) -> int:
        """The number of a data set: that of a loader which is over the same one."""
        if self._training and dataset is self.dataset:
            return self._training
        for mark, source in [*self._sources.values()]:
            loader = mark()
            if loader is not None and loader.dataset is dataset:
                return source.dataset
        self._last_dataset += 1
        return self._last_dataset

    def train_on(self, number: int) -> None:
        """The first step was made, of batches of the data set with this number."""
        self.before = self._counts.get(number, 1) - 1
        self._training = number
        for mark, source in [*self._sources.values()]:
            loader = mark()
            if loader is not None and source.dataset == number:
                self.dataset = loader.dataset

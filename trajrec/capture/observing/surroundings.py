"""What the model is called under and on, for a Task: autocast, and the loaders of the training and of evaluations."""

from __future__ import annotations

from typing import Any

import torch

from trajrec.records import AUTOCAST_DEVICES, HALF_DTYPES, Autocast, LoaderSpec

_MOST = 8  # loaders


class Surroundings:
    """What was seen around the forward passes.

    Attributes:
        autocast: of the last pass with gradients that was looked at.
        evaluated: the loaders of evaluations, in the order in which they came.
    """

    def __init__(self) -> None:
        self.autocast: Autocast | None = None
        self.evaluated: tuple[LoaderSpec, ...] = ()
        self._known: set[int] = set()

    def evaluates(self, number: int, loader: Any) -> None:
        """The model is called in eval mode, without gradients, on a batch of the loader with this number."""
        if number in self._known:
            return
        self._known.add(number)
        spec = None if loader is None else described(loader)
        if spec is not None and spec not in self.evaluated and len(self.evaluated) < _MOST:
            self.evaluated = (*self.evaluated, spec)

    def look(self) -> None:
        """The model is called with gradients."""
        self.autocast = autocast_now()


def autocast_now() -> Autocast | None:
    """The autocast that is on, if one is."""
    for device in AUTOCAST_DEVICES:
        if torch.is_autocast_enabled(device):
            dtype = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
            return Autocast(device, dtype) if dtype in HALF_DTYPES else None
    return None


def described(loader: Any) -> LoaderSpec:
    """A loader in words."""
    dataset, size = loader.dataset, loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    collate = loader.collate_fn
    kind = collate if hasattr(collate, "__qualname__") else type(collate)
    return LoaderSpec(
        _text(type(dataset).__qualname__),
        len(dataset) if hasattr(dataset, "__len__") else 0,
        size if type(size) is int else 0,
        _text(f"{getattr(kind, '__module__', None)}.{kind.__qualname__}"),
    )


def _text(name: str) -> str:
    """A name that can be written down."""
    return name[:200].encode(errors="replace").decode()

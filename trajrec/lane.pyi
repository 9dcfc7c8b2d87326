"""What lane.c offers; see trajrec/straight.py."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

class Lane:
    stage: int
    loader: Any
    serial: Any
    entry: int
    ids: list[int]
    content: Any
    inputs: tuple[Any, ...]
    before: Tensor
    sketch: int | None
    loss: float
    rng: bytes | None
    hyper: bytes
    groups: int
    names: int
    def draw(self, loader: Any, ids: Any, content: Any, serial: int, /) -> bool: ...
    def leave(self) -> None: ...
    def arm(self, **fields: Any) -> None: ...
    def attach(self, map: Any, /) -> None: ...
    def detach(self) -> None: ...

class Hook:
    def __init__(
        self, lane: Lane, kind: int, otherwise: Callable[..., Any], original: Callable[..., Any] | None = None
    ) -> None: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

__all__: Sequence[str]

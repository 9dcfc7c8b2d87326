"""What lane.c offers; see trajrec/straight.py."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from torch import Tensor

def copy_crc32(to: Any, source: Any, crc: int = 0, /) -> int: ...

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
    before_us: int
    arena_head: int
    counted: int
    looked: int
    seconds: float
    cleared: int
    def leave(self) -> None: ...
    def settle(self) -> None: ...
    def arm(self, **fields: Any) -> None: ...
    def attach(self, map: Any, /) -> None: ...
    def detach(self) -> None: ...

class Hook:
    def __init__(
        self, lane: Lane, kind: int, otherwise: Callable[..., Any], original: Callable[..., Any] | None = None
    ) -> None: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

class Draws:
    def __init__(
        self, lane: Lane, iterator: Iterator[Any], loader: Any, drawn: deque[Any] | None, serial: int
    ) -> None: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> Any: ...

__all__: Sequence[str]

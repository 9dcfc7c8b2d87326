"""What a loss was seen to do that its values do not show (`replay.losses.watching`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Seen:
    """What the watched passes showed.

    Attributes:
        derivatives: the loss takes derivatives itself (physics, gradient penalties).
        stops: a part of it that depends on the weights is a constant to its gradient (`detach`, `.data`, `no_grad`).
        functions: the user's own autograd functions that it goes through, by name.
        hooks: backward hooks may change its gradient.
        called: the functions of torch that it called.
        exits: where values left the graph (`.item()`, numpy), each as "what in FILE, line N".
        raised: a watched pass ended in an error: there is more than was seen.
    """

    derivatives: bool = False
    stops: bool = False
    functions: tuple[str, ...] = ()
    hooks: bool = False
    called: frozenset[Any] = frozenset()
    exits: tuple[str, ...] = ()
    raised: bool = False

    @property
    def hides(self) -> bool:
        """Whether the training's gradient is not the plain gradient of the loss."""
        return self.stops or self.hooks or bool(self.functions)

    def __or__(self, other: Seen) -> Seen:
        """What either showed."""
        return Seen(
            self.derivatives or other.derivatives,
            self.stops or other.stops,
            tuple(dict.fromkeys(self.functions + other.functions)),
            self.hooks or other.hooks,
            self.called | other.called,
            tuple(dict.fromkeys(self.exits + other.exits)),
            self.raised or other.raised,
        )

r"""The plan of a backward pass over steps that are not stored: what to recompute, what to hold, what to visit.

Between two keyframes only the first is on disk. Going backwards through the n steps after it needs the states n-1,
n-2, ..., 0 in this order (relative to the keyframe), with at most `slots` states held in memory at a time. A plan is a
list of actions, integers only; whoever carries it out needs no thought:

    Load        current := the keyframe (state 0)
    Recall(t)   current := the held state t
    Advance(t)  recompute forwards from the current state to t
    Hold(t)     keep the current state, which is t
    Drop(t)     forget the held state t
    Visit(t)    hand over step t: it leads from the current state t-1 to t

With slots for all states each step is recomputed once. With fewer, the split with the least recomputation is chosen by
dynamic programming, as in binomial checkpointing (Griewank and Walther 2000, algorithm 799):

    cost(n, s) = min over m of  m + cost(n - m, s - 1) + cost(m, s),   cost(1, s) = 0,   cost(n, 0) = n (n - 1) / 2
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, slots=True)
class Load:
    """Current := the keyframe."""


@dataclass(frozen=True, slots=True)
class Recall:
    """Current := the held state t."""

    t: int


@dataclass(frozen=True, slots=True)
class Advance:
    """Recompute forwards to state t."""

    t: int


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep the current state t."""

    t: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget the held state t."""

    t: int


@dataclass(frozen=True, slots=True)
class Visit:
    """Hand over step t, from the current state t-1."""

    t: int


Action = Load | Recall | Advance | Hold | Drop | Visit


def backward_plan(n: int, slots: int) -> Iterator[Action]:
    """The actions that visit steps n, n-1, ..., 1 after a keyframe, holding at most `slots` states."""
    yield from _reverse(0, n, slots)


def _reverse(start: int, end: int, slots: int) -> Iterator[Action]:
    """Visits steps end..start+1. State `start` is held already, or is the keyframe's."""
    if slots >= end - start - 1 > 0:
        yield from _reverse_holding_all(start, end)
        return
    while end > start:
        yield Recall(start) if start else Load()
        if end - start == 1:
            yield Visit(end)
            return
        if slots == 0:
            yield Advance(end - 1)
            yield Visit(end)
            end -= 1
            continue
        middle = start + _split(end - start, slots)
        yield Advance(middle)
        yield Hold(middle)
        yield from _reverse(middle, end, slots - 1)
        yield Drop(middle)
        end = middle


def _reverse_holding_all(start: int, end: int) -> Iterator[Action]:
    yield Recall(start) if start else Load()
    for t in range(start + 1, end):
        yield Advance(t)
        yield Hold(t)
    yield Visit(end)
    for t in range(end - 1, start, -1):
        yield Drop(t)
        yield Recall(t - 1) if t - 1 else Load()
        yield Visit(t)


@cache
def cost(n: int, slots: int) -> int:
    """The least number of recomputed steps that a backward pass over n steps needs."""
    if n <= 1:
        return 0
    if slots == 0:
        return n * (n - 1) // 2
    if slots >= n - 1:
        return n - 1
    return min(m + cost(n - m, slots - 1) + cost(m, slots) for m in range(1, n))


@cache
def _split(n: int, slots: int) -> int:
    """How far to advance before holding a state."""
    return min(range(1, n), key=lambda m: m + cost(n - m, slots - 1) + cost(m, slots))

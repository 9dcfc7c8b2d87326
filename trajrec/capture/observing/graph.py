"""Which forward passes a gradient comes from: marks in autograd's graph.

The nodes that made the outputs of a forward pass are given a token each. A backward pass comes from the passes whose
tokens are found from its loss on. A token lives as long as the nodes, so that a graph that is gone is seen, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any
from weakref import ref

from torch import Tensor

from trajrec.capture.observing.traces import tensors_of

_MARK = "trajrec"


class _Token:
    """Lives as long as the nodes of autograd's graph that it was given to; says who marked them, and for which pass."""

    __slots__ = ("__weakref__", "marks", "number")

    def __init__(self, marks: GraphMarks, number: int) -> None:
        self.marks = ref(marks)
        self.number = number


class GraphMarks:
    """Marks of the forward passes that a backward pass may come from.

    Args:
        released: called with the number of a forward pass whose graph is gone.
    """

    def __init__(self, released: Callable[[int], None]) -> None:
        self._released = released
        self._tokens: dict[int, ref[_Token]] = {}
        self._reached: set[int] = set()

    def mark(self, number: int, outputs: Any) -> bool:
        """Marks the outputs of the forward pass with this number; whether there is anything to mark."""
        found = [outputs] if type(outputs) is Tensor else tensors_of(outputs)
        bases = [tensor._base for tensor in found if tensor._base is not None]
        nodes = [tensor.grad_fn for tensor in (*found, *bases) if tensor.grad_fn is not None]
        if not nodes:
            return False
        token = _Token(self, number)
        for node in nodes:
            _metadata(node).setdefault(_MARK, []).append(token)
        self._tokens[number] = ref(token, lambda _: self._release(number))
        return True

    def _release(self, number: int) -> None:
        if self._tokens.pop(number, None) is not None:
            self._released(number)

    def reached_from(self, loss: Any) -> frozenset[int]:
        """The numbers of the forward passes that the gradient of a loss comes from.

        The search ends where all those are found that no backward pass was seen to come from since `begin_anew`.
        """
        marked = {*self._tokens}
        sought = marked - self._reached or marked
        found: set[int] = set()
        for node in graph_of(loss) if marked else ():
            tokens = _metadata(node).get(_MARK)
            if tokens is not None:
                found |= {token.number for token in tokens if token.number in marked and token.marks() is self}
                if sought <= found:
                    break
        self._reached |= found
        return frozenset(found)

    def numbers_at(self, node: Any) -> set[int]:
        """The numbers of the forward passes whose outputs a node of the graph made."""
        tokens = _metadata(node).get(_MARK) or ()
        return {token.number for token in tokens if token.number in self._tokens and token.marks() is self}

    def begin_anew(self) -> None:
        """The gradients of earlier backward passes were thrown away."""
        self._reached.clear()

    @property
    def are_none(self) -> bool:
        """Whether there are no marked outputs that the next step may come from."""
        return not self._tokens and not self._reached

    def keep(self, numbers: Collection[int], reached: Collection[int]) -> None:
        """Forgets all passes but those with these numbers, and takes some of them for reached."""
        if not numbers:
            self._reached.clear()
            self._tokens.clear()
            return
        self._reached = {*reached}
        self._tokens = {number: mark for number, mark in [*self._tokens.items()] if number in numbers}


def roots_of(loss: Any) -> list[Any]:
    """The nodes of autograd's graph that made a loss, or several."""
    losses = [loss] if type(loss) is Tensor else tensors_of(loss)
    return [tensor.grad_fn for tensor in losses if tensor.grad_fn is not None]


def graph_of(loss: Any) -> Iterator[Any]:
    """The nodes of autograd's graph behind a loss, nearest first."""
    nodes = roots_of(loss)
    seen: set[Any] = {None, *nodes}
    for node in nodes:  # which grows meanwhile
        yield node
        for after, _ in node.next_functions:
            if after not in seen:
                seen.add(after)
                nodes.append(after)


def leaves_of(loss: Any) -> dict[int, Tensor]:
    """The tensors that a gradient is taken of, by their ids."""
    return {id(node.variable): node.variable for node in graph_of(loss) if hasattr(node, "variable")}


def _metadata(node: Any) -> dict[str, Any]:
    """A dictionary that lives as long as a node of autograd's graph (torch's stubs take it for a method)."""
    found: dict[str, Any] = node.metadata
    return found

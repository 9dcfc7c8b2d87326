"""What is seen of a training loop: facts, in the order in which they came about.

    Drawn       the loop has received a batch of a loader         Ended       a pass over a loader has come to its end
    Evaluated   the model is called without gradients             Forgotten   a loader is there no more
    Forward     the model is called with gradients                Named       the user has named samples
    Returned    its outputs are marked in autograd's graph        Cleared     gradients were set to zero
    Released    that part of the graph is gone                    Backward    a backward pass has begun
    Shared      the gradient is another model's, too              Stepped     the optimizer is about to step

Hooks (`trajrec.capture.observing`) only write facts down. What needs a tensor at hand (whose values are these? where
does this gradient come from?) is looked at then, and stands in the fact as a batch or a number; so a list of facts can
be made up and read without torch. `trajrec.capture.attribution.reading` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from trajrec.capture.attribution.batches import Batch, States
from trajrec.records import FloatArray, IntArray


class Drawn(NamedTuple):
    """The loop has received a batch; `is_over` if the pass that it is of has come to its end by then."""

    batch: Batch
    is_over: bool = False


class Ended(NamedTuple):
    """Nothing more comes from a pass over a loader."""

    serial: int


class Forgotten(NamedTuple):
    """A loader is there no more."""

    loader: int


class Named(NamedTuple):
    """The user has named the samples [B] of the next step, or of its next micro-batch, and perhaps their weights."""

    ids: IntArray
    weights: FloatArray | None = None


class Evaluated(NamedTuple):
    """The model is called without gradients; `shown` is the batch whose tensors, or copies of them, it is called on."""

    shown: Batch | None = None


class Forward(NamedTuple):
    """The model is called with gradients.

    Attributes:
        number: of the forward pass.
        thread: that calls.
        training: whether the model is in training mode.
        size: samples that go in.
        shape: of the first tensor that goes in.
        states: of the generators before it.
        shown: the batch whose tensors, views of them or copies the model is called on; None if nothing tells.
        why: why no rows of a tensor were found in what the model is called on, where that was looked for.
    """

    number: int
    thread: int
    training: bool = True
    size: int = 0
    shape: tuple[int, ...] = ()
    states: States | None = None
    shown: Batch | None = None
    why: str = ""


class Returned(NamedTuple):
    """The outputs of a forward pass are there, and a backward pass will be seen to come from them."""

    number: int


class Released(NamedTuple):
    """The graph of a forward pass is gone: no backward pass can come from it any more."""

    number: int


class Cleared(NamedTuple):
    """Something by this name (the model, an optimizer) has set the gradients to zero."""

    by: str = ""


class Backward(NamedTuple):
    """A backward pass has begun.

    Attributes:
        thread: that runs it.
        reaches: the forward passes that the gradient comes from.
        adds: whether gradients of an earlier one are there, to which it adds; looked at after the first of a step.
        is_nested: whether it runs within another one.
        loss: what it is called on, if that is a number.
        picked: positions of the samples that the loss is of among those of a forward pass, by its number, where it is
            of some of them only (a mask of a graph's nodes); None in their place if they cannot be told.
    """

    thread: int
    reaches: frozenset[int] = frozenset()
    adds: bool = True
    is_nested: bool = False
    loss: Any = None
    picked: Mapping[int, IntArray | None] = MappingProxyType({})


class Shared(NamedTuple):
    """The gradient is that of another model, too: that a batch is there does not say that it was used."""

    by: str = ""


class Stepped(NamedTuple):
    """The optimizer is about to step."""

    thread: int


Fact = (
    Drawn
    | Ended
    | Forgotten
    | Named
    | Evaluated
    | Forward
    | Returned
    | Released
    | Cleared
    | Backward
    | Shared
    | Stepped
)

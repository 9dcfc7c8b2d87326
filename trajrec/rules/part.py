r"""A part of a run's weights on which its rule can prove itself, of the same size for every model.

The part takes a block of every trainable parameter: all of a small one, of a large one some rows, columns and so on,
so that a matrix stays a matrix, in its own place and group. Half of the slices along a dimension are those with the
largest gradient (the rows of an embedding that the batch has seen), the others lie evenly. State of the parameter's
shape, or of its rows or columns, is cut in the same way; a parameter whose state has any other shape begins anew.

A step that looks at norms (clipping, trust ratios) should do in the part what it does in the whole, so weights and
gradient of each block are scaled to the norm of their parameter. The part is a point at which the rule could well be.

Letters: G groups, P' trainable weights, Q weights of the part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from trajrec.records import ParamSpec, RunSpec
from trajrec.rules.flat import FlatLayout

Block = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the weights.

    Attributes:
        spec: of a run with these weights only.
        shapes: of the whole parameters, by place in the table.
        blocks: for each trainable parameter, by place in the table, its indices along every dimension.
        index: [Q] places of its weights in a vector [P'].
        scales: [Q] what brings each block of weights, and of the gradient, to the norm of its parameter.
    """

    spec: RunSpec
    shapes: tuple[tuple[int, ...], ...]
    blocks: dict[int, Block]
    index: Tensor
    scales: tuple[Tensor, Tensor]

    def vector(self, values: Tensor, span: slice) -> Tensor:
        """The part of a piece of a vector [P'], `span` being the piece."""
        inside = self.index[(self.index >= span.start) & (self.index < span.stop)] - span.start
        return values[inside.to(values.device)]

    def state(self, state: Mapping[str, Tensor], span: slice) -> dict[str, Tensor]:
        """The part of a rule's state, whose vectors are of a piece of the weights.

        Raises:
            ValueError: if a value is neither of all weights, nor of a parameter, nor a number for each group.
        """
        cut = {name: self._of(name, value, span) for name, value in state.items()}
        anew = {name.rpartition("/")[2] for name, value in cut.items() if value is None}
        return {name: v for name, v in cut.items() if v is not None and name.rpartition("/")[2] not in anew}

    def _of(self, name: str, value: Tensor, span: slice) -> Tensor | None:
        _, slash, place = name.rpartition("/")
        if slash:
            return self._of_parameter(int(place), value)
        if value.shape == (span.stop - span.start,):
            return self.vector(value, span)
        if value.numel() > self.spec.groups:
            raise ValueError(f"the state {name!r} of shape {tuple(value.shape)} cannot be cut")
        return value

    def _of_parameter(self, place: int, value: Tensor) -> Tensor | None:
        """A parameter's state; None where it does not follow the parameter's dimensions."""
        shape = self.shapes[place]
        if value.numel() == 1:
            return value
        if value.ndim != len(shape) or not all(n in (1, size) for n, size in zip(value.shape, shape, strict=True)):
            return None
        for dim, chosen in enumerate(self.blocks[place]):
            if value.shape[dim] == shape[dim]:
                value = value.index_select(dim, chosen.to(value.device))
        return value


def part_of(spec: RunSpec, layout: FlatLayout, weights: Tensor, gradient: Tensor, most: int) -> Part:
    """A part of about `most` weights at a point: weights [P'] and gradient [P']; at least one of each parameter."""
    shapes = _block_shapes([param.shape for param in layout.params], most)
    w, g = layout.split(weights), layout.split(gradient)
    blocks: dict[int, Block] = {}
    index: list[Tensor] = []
    scales: tuple[list[Tensor], list[Tensor]] = ([], [])
    start = 0
    for (place, param), shape in zip(layout.table(spec), shapes, strict=True):
        block = _choose(g[param.name], shape)
        blocks[place] = block
        index.append(start + _flat(block, param.shape))
        for values, found in zip((w, g), scales, strict=True):
            found.append(_scale(values[param.name], block).expand(len(index[-1])))
        start += param.size
    cut = replace(spec, params=_params(spec.params, {place: tuple(map(len, b)) for place, b in blocks.items()}))
    return Part(
        cut,
        tuple(param.shape for param in spec.params),
        blocks,
        torch.cat(index),
        (torch.cat(scales[0]), torch.cat(scales[1])),
    )


def _block_shapes(shapes: Sequence[tuple[int, ...]], most: int) -> list[tuple[int, ...]]:
    """Shapes of blocks of about `most` weights together; what small ones leave is for the larger."""
    found = list(shapes)
    order = sorted(range(len(shapes)), key=lambda i: math.prod(shapes[i]))
    for done, i in enumerate(order):
        # Never one weight of several: rules take a state of one number for a constant.
        found[i] = _shrunk(shapes[i], max(2, most // (len(order) - done)))
        most -= math.prod(found[i])
    return found


def _shrunk(shape: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The shape with its longest dimensions halved until it holds at most so many."""
    sizes = list(shape)
    while math.prod(sizes) > most:
        longest = max(range(len(sizes)), key=lambda dim: sizes[dim])
        sizes[longest] = -(-sizes[longest] // 2)
    return tuple(sizes)


def _choose(gradient: Tensor, shape: Sequence[int]) -> Block:
    return tuple(_along(gradient, dim, count) for dim, count in enumerate(shape))


def _along(gradient: Tensor, dim: int, count: int) -> Tensor:
    """So many indices along a dimension: half by the size of the gradient, the others evenly."""
    size = gradient.shape[dim]
    if count == size:
        return torch.arange(size)
    others = [d for d in range(gradient.ndim) if d != dim]
    norms = torch.linalg.vector_norm(gradient, dim=others) if others else gradient.abs()
    largest = torch.topk(norms, (count + 1) // 2).indices.cpu()
    rest = torch.ones(size, dtype=torch.bool)
    rest[largest] = False
    free = rest.nonzero()[:, 0]
    evenly = free[torch.linspace(0, len(free) - 1, count - len(largest)).long()] if count > len(largest) else free[:0]
    return torch.cat([largest, evenly]).sort().values


def _flat(block: Block, shape: Sequence[int]) -> Tensor:
    """Places [q] of a block in the flattened parameter."""
    found = torch.zeros((), dtype=torch.long)
    for chosen, size in zip(block, shape, strict=True):
        found = found[..., None] * size + chosen
    return found.reshape(-1)


def _scale(values: Tensor, block: Block) -> Tensor:
    whole = torch.linalg.vector_norm(values).double()
    for dim, chosen in enumerate(block):
        values = values.index_select(dim, chosen.to(values.device))
    some = torch.linalg.vector_norm(values).double()
    return torch.where(some > 0, whole / some, 1.0).reshape(1).cpu()


def _params(params: Sequence[ParamSpec], shapes: dict[int, tuple[int, ...]]) -> tuple[ParamSpec, ...]:
    cut = [replace(param, shape=shapes.get(place, param.shape)) for place, param in enumerate(params)]
    offsets = accumulate((param.size for param in cut), initial=0)
    return tuple(replace(param, offset=offset) for param, offset in zip(cut, offsets, strict=False))

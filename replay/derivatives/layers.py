r"""Per-sample gradients layer by layer, from one forward and one backward pass over the whole batch.

Where samples do not touch each other, the gradient of the summed losses with respect to what a layer gave out holds,
row by row, that of every sample's own loss. With the layer's input x [B, T, I] and this gradient u [B, T, O] (T places:
of a sequence, of an image), the gradient of sample i for the weight is u_i^T x_i, and what a replay wants of it is

    <u_i^T x_i, V_k> = sum_t u_it^T V_k x_it            for K directions V_k [O, I]

either by way of u_i^T x_i or without it, whichever takes fewer operations. Scales, shifts and embeddings likewise.

`Tape` watches the calls in which weights are used. In a call it knows it hands on a twin of the weight and notes what
is needed; every other use is left to autograd, through which the weight then gets a gradient, and the pass is refused.
So a weight that is used twice counts twice, and none can be used unnoticed. Samples that do touch each other are not
noticed here: that is found by comparison with another form (`replay.derivatives.choice`).

Letters: B batch, I inputs, K directions, n numbers of a weight, O outputs, T places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Of single samples' gradients for a weight, so many numbers are formed at once.
_MOST_NUMBERS = 1 << 24


class Piece(Protocol):
    """The gradients of all samples for one use of a weight."""

    def inner(self, directions: Tensor) -> Tensor:
        """Inner products [K, B] with directions [K, n]."""

    def summed(self, shares: Tensor) -> Tensor:
        """The sum [n] over the samples, each times its share [B]."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The gradients themselves, [B, n]."""

    rows: Tensor

    def inner(self, directions: Tensor) -> Tensor:
        """Inner products [K, B] with directions [K, n]."""
        return directions @ self.rows.T

    def summed(self, shares: Tensor) -> Tensor:
        """The sum [n] over the samples, each times its share [B]."""
        return shares @ self.rows


@dataclass(frozen=True, slots=True)
class Product:
    """u_i^T x_i, of x [B, T, I] and u [B, T, O]; n = O I."""

    x: Tensor
    u: Tensor

    def inner(self, directions: Tensor) -> Tensor:
        """Inner products [K, B] with directions [K, n]."""
        (_, places, width), outputs, count = self.x.shape, self.u.shape[2], len(directions)
        if count * places * (width + 1) >= (count + places) * width:
            size = max(1, _MOST_NUMBERS // (outputs * width))
            groups = zip(torch.split(self.u, size), torch.split(self.x, size), strict=True)
            return torch.cat([directions @ torch.bmm(u.mT, x).flatten(1).T for u, x in groups], 1)
        through = torch.matmul(self.x.flatten(0, 1), directions.view(count, outputs, width).mT)
        return through.view(count, *self.u.shape).mul_(self.u).sum((2, 3))

    def summed(self, shares: Tensor) -> Tensor:
        """The sum [n] over the samples, each times its share [B]."""
        (_, places, width), outputs, u = self.x.shape, self.u.shape[2], self.u * shares[:, None, None]
        if outputs * width <= places * (outputs + width):
            return torch.bmm(u.mT, self.x).sum(0).flatten()
        return torch.mm(u.flatten(0, 1).T, self.x.flatten(0, 1)).flatten()


@dataclass(frozen=True, slots=True)
class Lookup:
    """Rows u [B, T, D] of a table of so many, at places ids [B, T]; n = size D."""

    ids: Tensor
    u: Tensor
    size: int

    def inner(self, directions: Tensor) -> Tensor:
        """Inner products [K, B] with directions [K, n]."""
        tables = directions.reshape(len(directions), self.size, -1)
        return torch.stack([torch.einsum("btd,btd->b", table[self.ids], self.u) for table in tables])

    def summed(self, shares: Tensor) -> Tensor:
        """The sum [n] over the samples, each times its share [B]."""
        rows = (self.u * shares[:, None, None]).flatten(0, 1)
        return rows.new_zeros(self.size, rows.shape[1]).index_add_(0, self.ids.flatten(), rows).flatten()


# A weight, or whatever stands in its place in a call; and its piece, from the gradient u of what the call gave out.
Sizes = int | Sequence[int]
Factor = Tensor | float
Use = tuple[Any, Callable[[Tensor], Piece]]


class Tape(TorchFunctionMode):
    """Inside, the uses of some weights are noted, for the losses that are computed.

    Args:
        weights: by name; leaves that require gradients. The losses are to be computed from these very tensors.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = weights
        self._names = {id(weight): name for name, weight in weights.items()}
        self._noted: list[tuple[Any, list[Use]]] = []
        self._ends = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, with twins of weights whose use is noted."""
        kwargs = kwargs or {}
        if func is torch.autograd.grad and not self._ends:
            # What comes out of it depends on twins, unseen.
            raise NotImplementedError("The loss takes derivatives itself.")
        given = sum(self._is_weight(value) for value in (*args, *kwargs.values()))
        uses = self._known(LAYERS[func](*args, **kwargs)) if given and func in LAYERS else []
        if not uses or len(uses) != given or torch.is_autocast_enabled(uses[0][0].device.type):
            return func(*args, **kwargs)
        y = func(*map(self._twin, args), **{key: self._twin(value) for key, value in kwargs.items()})
        self._noted.append((get_gradient_edge(y), uses))
        return y

    def _is_weight(self, value: object) -> bool:
        return id(value) in self._names

    def _known(self, uses: Iterable[Use]) -> list[Use]:
        return [use for use in uses if self._is_weight(use[0])]

    def _twin(self, value: Any) -> Any:
        """What stands in for a weight: it makes the call part of the graph, and nobody asks for its gradient."""
        return value.detach().requires_grad_() if self._is_weight(value) else value

    def pieces(self, losses: Tensor) -> list[tuple[str, Callable[[], Piece]]]:
        """The pieces of the gradients of losses [B], with the names of their weights; what was noted is forgotten.

        Raises:
            NotImplementedError: if a weight was used in another way, or not for a batch of samples.
        """
        noted, self._noted = self._noted, []
        wanted = [edge for edge, _ in noted] + list(self.weights.values())
        self._ends = True
        found = torch.autograd.grad(losses.sum(), wanted, allow_unused=True)
        self._ends = False
        for name, gradient in zip(self.weights, found[len(noted) :], strict=True):
            if gradient is not None:
                raise NotImplementedError(f"{name} is used otherwise than as the weight of a known layer.")
        pieces: list[tuple[str, Callable[[], Piece]]] = []
        for (_, uses), u in zip(noted, found, strict=False):
            if u is None:
                continue
            if u.dim() < 2 or len(u) != len(losses):
                raise NotImplementedError(f"A layer gave {tuple(u.shape)} for a batch of {len(losses)} samples.")
            pieces += [(self._names[id(weight)], partial(make, u)) for weight, make in uses]
        return pieces


def _spread(values: Tensor, shape: Iterable[int]) -> Rows:
    """Values [B, ...] summed to a weight of this shape that was spread over them."""
    kept = list(shape)
    if len(kept) == values.dim() and kept.pop(0) != 1:
        raise NotImplementedError("A weight has rows of its own for the samples of a batch.")
    ones = [1] * (values.dim() - 1 - len(kept))
    return Rows(values.sum_to_size(len(values), *ones, *kept).flatten(1))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterable[Use]:
    x = x.detach()
    yield weight, lambda u: Product(x.reshape(len(x), -1, x.shape[-1]), u.reshape(len(u), -1, u.shape[-1]))
    yield bias, lambda u: _spread(u, u.shape[-1:])


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Iterable[Use]:
    if isinstance(padding, str) or groups != 1 or x.dim() != 4:
        return
    x, kernel = x.detach(), list(weight.shape[2:])
    steps, edges, holes = _pair(stride), _pair(padding), _pair(dilation)

    def product(u: Tensor) -> Product:
        return Product(_windows(x, kernel, list(u.shape[2:]), steps, edges, holes).mT, u.flatten(2).mT)

    yield weight, product
    yield bias, lambda u: _spread(u, _channels(u))


def _pair(value: Sizes) -> list[int]:
    """An option of a convolution for both dimensions of an image."""
    return [value, value] if isinstance(value, int) else list(value)


def _windows(
    x: Tensor, kernel: list[int], places: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """The inputs [B, I, T] of a convolution at all its places; `functional.unfold` takes several times as long."""
    x = functional.pad(x, (padding[1], padding[1], padding[0], padding[0])).contiguous()
    of_sample, of_channel, *of_place = x.stride()
    strides = [step * jump for jumps in (dilation, stride) for step, jump in zip(of_place, jumps, strict=True)]
    windows = x.as_strided((*x.shape[:2], *kernel, *places), (of_sample, of_channel, *strides))
    return windows.reshape(len(x), -1, places[0] * places[1])


def _embedding(
    ids: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Iterable[Use]:
    if max_norm is not None or scale_grad_by_freq:
        return
    size = len(weight)

    def lookup(u: Tensor) -> Lookup:
        if padding_idx is not None:
            u = u.masked_fill((ids == padding_idx % size)[..., None], 0)
        return Lookup(ids.reshape(len(ids), -1), u.reshape(len(u), -1, u.shape[-1]), size)

    yield weight, lookup


def _affine(
    weight: Tensor | None, bias: Tensor | None, shape: Iterable[int], normal: Callable[[], Tensor]
) -> Iterable[Use]:
    """A weight that scales and a bias that shifts normalised values, both of this shape."""
    yield weight, lambda u: _spread(u * normal(), shape)
    yield bias, lambda u: _spread(u, shape)


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Iterable[Use]:
    return _affine(weight, bias, shape, lambda: functional.layer_norm(x.detach(), shape, eps=eps))


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Iterable[Use]:
    return _affine(weight, None, shape, lambda: functional.rms_norm(x.detach(), shape, eps=eps))


def _group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Iterable[Use]:
    return _affine(weight, bias, _channels(x), lambda: functional.group_norm(x.detach(), groups, eps=eps))


def _batch_norm(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Iterable[Use]:
    if training:
        return ()
    return _affine(
        weight, bias, _channels(x), lambda: functional.batch_norm(x.detach(), mean, var, training=False, eps=eps)
    )


def _channels(x: Tensor) -> list[int]:
    """The shape that spreads a value a channel over the places of a sample."""
    return [x.shape[1]] + [1] * (x.dim() - 2)


def _sum(x: Factor, other: Factor) -> Iterable[Use]:
    for weight in (x, other):
        yield weight, partial(_spread, shape=getattr(weight, "shape", ()))


def _scaled(x: Any, other: Any) -> Iterable[Use]:
    return [(x, partial(_times, other, x)), (other, partial(_times, x, other))]


def _times(factor: Factor, weight: Tensor, u: Tensor) -> Rows:
    return _spread(u * (factor.detach() if isinstance(factor, Tensor) else factor), weight.shape)


def _expanded(x: Tensor, *_sizes: object) -> Iterable[Use]:
    yield x, lambda u: _spread(u, x.shape)


LAYERS: dict[Any, Callable[..., Iterable[Use]]] = {
    functional.linear: _linear,
    functional.conv2d: _conv2d,
    functional.embedding: _embedding,
    functional.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    functional.group_norm: _group_norm,
    functional.batch_norm: _batch_norm,
    torch.add: _sum,
    Tensor.add: _sum,
    torch.mul: _scaled,
    Tensor.mul: _scaled,
    Tensor.expand: _expanded,
}

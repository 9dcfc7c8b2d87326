"""The kinks of a loss as a function of the weights: places where its derivative, or it itself, jumps.

A contribution is a derivative, and no derivative sees that another training would have come to lie on the other side of
a kink. So a report must know whether there are any. One forward pass is watched below autograd, where what the user
wrote has become ATen operators: relu, max_pool2d, clamp, abs, the L1 and Huber losses, a comparison of floating numbers
that something is chosen by. Only what depends on the weights counts; a batch may be clamped as it likes.

Not counted: functions that are smooth but for their second derivative (ELU with alpha 1, softsign), and lower bounds
that guard a division and bound nothing here (`x / x.norm().clamp_min(1e-12)`). Not seen: what an operator of another
library does; one that is given something that depends on the weights is named as what it is. The optimizer's own kinks
(clipping) are none of the model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ACTIVATIONS = "relu leaky_relu prelu rrelu_with_noise threshold hardtanh hardswish hardsigmoid softshrink hardshrink"
_POOLINGS = "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d"
_MORE_POOLINGS = "adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d"
_LOSSES = "smooth_l1_loss huber_loss multi_margin_loss multilabel_margin_loss_forward"
_PIECEWISE = "abs sign sgn clamp clamp_min clamp_max clip maximum minimum fmax fmin gt ge lt le fmod remainder"
_CHOICES = "max min amax amin aminmax topk sort kthvalue median nanmedian mode argsort cummax cummin"
_STEPS = "round floor ceil trunc fix frac heaviside quantize_per_tensor fake_quantize_per_tensor"
_KINKED = frozenset(" ".join([_ACTIVATIONS, _POOLINGS, _MORE_POOLINGS, _LOSSES, _PIECEWISE, _CHOICES, _STEPS]).split())
_CLAMPS = frozenset({"clamp", "clamp_min", "clip"})
_GUARD = 1e-3  # a lower bound up to this guards a division or a logarithm
_KNOWN = frozenset({"aten", "prim", "prims"})
# Made of operators with kinks, and have none themselves, or only look whether numbers are in order.
SMOOTH = frozenset({torch.isfinite, Tensor.isfinite, functional.softsign, functional.gaussian_nll_loss})


class Kinks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operators with kinks that are given something that depends on the weights.

    Attributes:
        names: of the operators, as users know them.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        # Storages by their place; held, so that no other takes the place of one that was freed.
        self._depend: dict[int, Any] = {}
        self._mark(weights)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Notes no operators inside."""
        names = self.names.copy()
        yield
        self.names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operator."""
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        depends = any(_place(value) in self._depend for value in given)
        if depends and any(value.is_floating_point() for value in given):
            self.names |= _kinks_of(func, args, kwargs)
        found = func(*args, **kwargs)
        if depends:
            # What is written to was given.
            self._mark([*_tensors(found), *(given if func._schema.is_mutable else ())])
        return found

    def _mark(self, tensors: Iterable[Tensor]) -> None:
        self._depend |= {_place(value): value.untyped_storage() for value in tensors if value.numel()}


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.layout is torch.strided]


def _place(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _kinks_of(func: Any, args: Any, kwargs: Any) -> set[str]:
    """The name of an operator, if it has kinks or nobody knows whether it has."""
    if func.namespace not in _KNOWN:
        return {f"{func.namespace}::{func.overloadpacket.__name__}"}
    name = func.overloadpacket.__name__.removesuffix("_")
    name = name.removeprefix("_").removesuffix("_kernel") if name == "_prelu_kernel" else name
    if name == "elu":
        return {name} if _is_bent(*args[1:]) else set()
    if name not in _KINKED or (name in _CLAMPS and _guards(*args, **kwargs)):
        return set()
    return {name.removesuffix("_with_indices").removesuffix("_with_noise").removesuffix("_forward")}


def _is_bent(alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> bool:
    """Whether the slopes of an ELU differ on both sides of zero, as those of a SELU do."""
    return alpha * input_scale != 1


def _guards(values: Tensor, low: Any = None, *_: Any, **named: Any) -> bool:
    """Whether a clamp keeps a number from zero, and changes none."""
    low = named.get("min", low)
    if low is None or (isinstance(low, Tensor) and low.numel() != 1):
        return False
    return 0 < float(low) <= _GUARD and bool((values >= low).all())

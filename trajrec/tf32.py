"""TensorFloat-32: whether torch may round the inputs of products to ten bits on a GPU, and computing without it.

Torch allows it for convolutions and recurrent layers by default, for matrix products on request. There are two ways to
say so, `allow_tf32` and (since torch 2.9) `fp32_precision`; where a script has used the second, the first cannot always
be read any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_CONVOLUTION = 3  # dimensions of its weights, at least


def rounds_products(model: nn.Module) -> bool:
    """Whether some of a model's products are rounded on a GPU, as torch is set now."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if _is_allowed(matmul, matmul):
        return True
    convolves = any(p.dim() >= _CONVOLUTION for p in model.parameters())
    recurs = any(isinstance(module, nn.RNNBase) for module in model.modules())
    return (convolves and _is_allowed(cudnn, "conv")) or (recurs and _is_allowed(cudnn, "rnn"))


@contextmanager
def full_single_precision() -> Iterator[None]:
    """Inside, float32 means float32 on a GPU, too."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    places: list[tuple[Any, str, Any]] = [(matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]
    if _is_said_newly():
        places = [(place, "fp32_precision", "ieee") for place in (matmul, cudnn.conv, cudnn.rnn)]  # type: ignore[attr-defined]
    before = [getattr(place, name) for place, name, _ in places]
    try:
        for place, name, value in places:
            setattr(place, name, value)
        yield
    finally:
        for (place, name, _), value in zip(places, before, strict=True):
            setattr(place, name, value)


def _is_said_newly() -> bool:
    """Whether `fp32_precision` was used, so that `allow_tf32` may not be read, or does not decide."""
    try:
        _ = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return True
    return getattr(torch.backends, "fp32_precision", "none") == "tf32"


def _is_allowed(backend: Any, part: Any) -> bool:
    try:
        return bool(backend.allow_tf32)
    except RuntimeError:  # said by `fp32_precision`, of each operation for itself
        place = getattr(backend, part) if isinstance(part, str) else part
        return bool(place.fp32_precision == "tf32")

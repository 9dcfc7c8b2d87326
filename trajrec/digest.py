"""CRC-32 of what a loader yields: of all of it, or of a sample that is cheap enough for every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from trajrec.checksum import crc32

_SMALL, _SAMPLED = 256 * 1024, 64


def digest(batch: Any) -> int:
    """CRC-32 of everything in a batch: tensors (dtype, shape, values), numbers, strings, nested or not."""
    return _digest(batch, 0)


def sampled_digest(batch: Any) -> int | None:
    """CRC-32 of a sample of a batch's contents, cheap enough for every step; None if nothing of it is in host memory.

    Of every tensor up to 256 kB all bytes; of larger ones 64 bytes from the middle of each row along the first
    dimension, of 64 rows at most.
    """
    crc, known = 0, False
    flat = type(batch) in (list, tuple) and {*map(type, batch)} == {Tensor}
    for value in batch if flat else tree_leaves(batch):
        if not isinstance(value, Tensor):
            crc = crc32(_text(value), crc)
        elif value.is_cpu and value.layout is torch.strided and value.numel():
            known = True
            crc = crc32(_sampled(value), crc)
    return crc if known else None


def _sampled(tensor: Tensor) -> Any:
    try:
        values = np.ascontiguousarray(tensor.numpy())
    except (RuntimeError, TypeError):  # a gradient is wanted, or a dtype that numpy lacks
        count = tensor.shape[:1].numel()
        values = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().reshape(count, -1)
    if values.nbytes <= _SMALL:
        return values
    rows = values.reshape(len(values), -1).view(np.uint8)
    middle = max(0, rows.shape[1] - _SAMPLED) // 2
    return rows[:: -(-len(rows) // 64), middle : middle + _SAMPLED].tobytes()


def _digest(value: Any, crc: int) -> int:
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous()
        crc = crc32(f"{array.dtype}{tuple(array.shape)}".encode(), crc)
        content = array.reshape(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b""
        return crc32(content, crc)
    if isinstance(value, dict):
        return _digest([item for pair in value.items() for item in pair], crc)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            crc = _digest(item, crc)
        return crc
    return crc32(_text(value), crc)


def _text(value: Any) -> bytes:
    """A value's repr; of an object without one (it would show an address) the name of its class."""
    shown = repr(value)
    return (type(value).__qualname__ if " object at 0x" in shown else shown).encode()

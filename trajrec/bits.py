"""Tensors of any dtype as arrays of their bits, and back.

numpy knows no bfloat16 and no float8: their bits are kept as unsigned integers of as many bits. A tensor that is made
of others (a quantized weight with its scales) is kept as those, each under a name of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trajrec.checksum import crc32

Array = npt.NDArray[Any]
_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


def is_composed(tensor: Tensor) -> bool:
    """Whether a tensor is made of others."""
    return hasattr(tensor, "__tensor_flatten__")


def leaves(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The plain tensors that a tensor consists of, by the name of their array; mostly itself."""
    if not is_composed(tensor):
        return {name: tensor.detach()}
    inner, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    found: dict[str, Tensor] = {}
    for part in inner:
        found |= leaves(f"{name}:{part}", getattr(tensor, part))
    return found


def bits_of(tensor: Tensor) -> Array:
    """The values of a plain tensor, or their bits as unsigned integers; a view where the tensor lies in the host.

    Raises:
        TypeError: it has no values, as on the meta device.
    """
    with torch._C.DisableTorchFunctionSubclass():
        if tensor.is_meta or tensor.is_quantized or tensor.layout is not torch.strided:
            raise TypeError(f"a tensor of {tensor.dtype} on {tensor.device} has no values to be kept")
        plain = tensor.detach().cpu().contiguous()
        try:
            return plain.numpy()
        except TypeError:
            return plain.view(_UNSIGNED[plain.element_size()]).numpy()


def values_of(array: Array, dtype: torch.dtype) -> Tensor:
    """The tensor of a dtype that `bits_of` has made this array of.

    Raises:
        ValueError: it has another size.
    """
    found = torch.from_numpy(np.array(array))
    if found.dtype == dtype:
        return found
    if found.element_size() != dtype.itemsize:
        raise ValueError(f"values of {array.dtype} are no bits of {dtype}")
    return found.view(dtype)


def checksum(tensors: dict[str, Tensor]) -> int:
    """The CRC-32 of the bits of tensors, one behind the other in the order of their names."""
    crc = 0
    for name in sorted(tensors):
        crc = crc32(bits_of(tensors[name]).reshape(-1).view(np.uint8), crc)
    return crc


def is_known(dtype: torch.dtype) -> bool:
    """Whether numpy knows a dtype."""
    return dtype in (torch.float16, torch.float32, torch.float64) or not dtype.is_floating_point


def widest(tensor: Tensor) -> Array:
    """The values as an array that numpy knows: those of less than 32 bits in float32, which has them all."""
    plain = tensor.detach().cpu()
    found: Array = (plain if is_known(plain.dtype) else plain.float()).numpy()
    return found

"""Whether a replay computes where the training ran: the same processor, versions and number of threads.

There, making a step again mostly gives the recorded bits, and what differs does so by the order of summation: a fused
optimizer, a mean over tokens where the Task takes one over samples first. Elsewhere kernels differ, too. A recording
that does not name its processor (older versions) counts as made elsewhere.
"""

from __future__ import annotations

import torch

from trajrec.processor import processor
from trajrec.records import RunSpec

_NAMES = ("torch", "processor")


def is_here(spec: RunSpec, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a replay on this device, in this floating type, computes as the training did."""
    now = {"torch": str(torch.__version__), "processor": processor(device)}
    same = all(spec.versions.get(name) == now[name] for name in _NAMES)
    kind = torch.device(spec.device).type == device.type
    return same and kind and spec.threads == torch.get_num_threads() and str(dtype) == f"torch.{spec.dtype}"

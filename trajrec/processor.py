"""Which processor computes, in words: runs of one give the same bits."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

import torch


def processor(device: torch.device) -> str:
    """The device's name, with the instructions that torch uses where it is the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_model()}, {torch.backends.cpu.get_cpu_capability()}"


@lru_cache(1)
def _model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()

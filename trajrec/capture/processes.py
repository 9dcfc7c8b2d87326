"""Trainings by several processes, which are not recorded."""

from __future__ import annotations

import os

import torch

from trajrec.errors import RecordingError

SEVERAL_PROCESSES = (
    "This training runs as {count} processes. Each step is made of the samples of all of them, and trajrec records "
    "trainings by one process only, for now: run the script with one process to record it."
)


def processes() -> int:
    """How many processes train together, as far as torch or its launcher says."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() else 1


def refuse_several_processes() -> None:
    """Refuses a training by several processes.

    Raises:
        RecordingError: this is one of several.
    """
    count = processes()
    if count > 1:
        raise RecordingError(SEVERAL_PROCESSES.format(count=count))


def speaks() -> bool:
    """Whether this process is the one of several that says what all of them would."""
    return processes() == 1 or os.environ.get("RANK", "0") == "0"

"""How a run is to be recorded, as its user said it: checked once, and never changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from trajrec.records import RunSpec
from trajrec.runfile.format.geometry import Geometry, Limits, geometry_for

OnFull = Literal["wait", "stop-recording", "raise"]


@dataclass(frozen=True, slots=True)
class Options:
    """How a run is to be recorded.

    Attributes:
        keep: "steps", or K for keyframes every K steps; None is "steps" up to a share of the disk, keyframes then.
        compression: "zstd" or "none".
        on_full: "wait", "stop-recording" or "raise".
        budget: bytes on disk; None for no limit.
        keyframe_every: keyframe interval with keep="steps".
        limits: how large segments, ring and raw inputs get.

    Raises:
        ValueError: an option has none of these values.
    """

    keep: Literal["steps"] | int | None
    compression: Literal["zstd", "none"]
    on_full: OnFull
    budget: int | None
    keyframe_every: int
    limits: Limits

    def __post_init__(self) -> None:
        if (isinstance(self.keep, str) and self.keep != "steps") or self.interval < 1:
            raise ValueError(f'keep is "steps" or a number of steps from 1; found {self.keep!r}.')
        if self.compression not in ("zstd", "none"):
            raise ValueError(f'compression is "zstd" or "none"; found {self.compression!r}.')
        if self.on_full not in ("wait", "stop-recording", "raise"):
            raise ValueError(f'on_full is "wait", "stop-recording" or "raise"; found {self.on_full!r}.')

    @property
    def keeps_rows(self) -> bool:
        """Whether the rows of all steps are kept, to begin with."""
        return self.keep is None or self.keep == "steps"

    @property
    def chooses(self) -> bool:
        """Whether a recording that would fill the disk goes over to keyframes by itself."""
        return self.keep is None and self.budget is None

    @property
    def interval(self) -> int:
        """Steps between keyframes, to begin with."""
        return self.keep if isinstance(self.keep, int) else self.keyframe_every

    def geometry(self, spec: RunSpec, keeps_rows: bool) -> Geometry:
        """The sizes of a recording of this run."""
        return geometry_for(spec.row_length, np.dtype(spec.dtype).itemsize, keeps_rows, self.limits)

"""What a recording is going to need of the disk, told after a few steps; and a limit where nobody has given one.

How long a training will be is not known. So it is told what 1,000, 10,000 and 100,000 steps come to, as the first ones
went: what has been sealed of them, and where nothing has, their rows as they are. Nothing is said where 10,000 steps
take less than the limit, which is three quarters of what was free at the beginning.

Where the user has not said what to keep, the limit is a budget (`trainer.budget`): rows of every step are kept up to
there, and keyframes from then on. As a budget does, it counts all files but the ring twice, because packing makes the
run once more before the folder goes.
"""

from __future__ import annotations

from dataclasses import dataclass

from trajrec.runfile.folder import Folder
from trajrec.runfile.format.geometry import Geometry

AFTER = 20
LIKELY = 10_000
_SHARE = 0.75
_LENGTHS = 1_000, 10_000, 100_000
_EXAMPLE = 64


def limit_of(free: int) -> int:
    """Bytes that a recording may take of so many that are free when it begins."""
    return int(_SHARE * free)


def is_far(step: int, geometry: Geometry, limit: int) -> bool:
    """Whether steps that are not compressed at all, and keyframes beside them, leave the limit far away."""
    return geometry.row_length > 0 and 4 * (step + geometry.slots) * geometry.row_bytes < limit


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a recording takes, as its first steps went.

    Attributes:
        step_bytes: of a step, its share of keyframes included.
        keyframe_bytes: of a keyframe that holds the weights.
        free: bytes that are free.
        limit: bytes that are to be kept to.
    """

    step_bytes: float
    keyframe_bytes: int
    free: int
    limit: int

    @classmethod
    def of(cls, folder: Folder, geometry: Geometry, sealed: int, interval: int, free: int, limit: int) -> Outlook:
        """Looks at a folder of which so many steps are sealed, with a keyframe every `interval` steps."""
        sizes = [s.path.stat().st_size for s in folder.segments() if s.stop <= sealed]
        if folder.rows.exists():
            sizes.append(sealed * geometry.row_bytes)
        rows = sum(sizes) / sealed if sealed and sizes else geometry.row_bytes
        # The first has no state yet, and that of Adam is twice the weights.
        state = max([2 * geometry.row_bytes, *(path.stat().st_size for path in folder.keyframes().values())])
        return cls(rows + state / interval, geometry.row_bytes + state, free, limit)

    @property
    def is_too_much(self) -> bool:
        """Whether a training of usual length passes the limit."""
        return 2 * LIKELY * self.step_bytes > self.limit

    def sentence(self, *, chooses: bool) -> str:
        """What is coming, and what to do about it; or what will be done, where the recording `chooses`."""
        coming = ", ".join(f"{size_text(n * self.step_bytes)} at {n:,} steps" for n in _LENGTHS)
        keyframes = f"`--keep {_EXAMPLE}` is {size_text(LIKELY / _EXAMPLE * self.keyframe_bytes)} at {LIKELY:,}"
        text = (
            f"Recording takes {size_text(self.step_bytes)} a step: {coming} (twice that while it is packed); "
            f"{size_text(self.free)} are free. {keyframes}."
        )
        if not chooses:
            return f"{text} Every step is kept, as you said."
        steps = int(self.limit / 2 / self.step_bytes)
        return (
            f"{text} About step {steps:,} the recording will go over to keyframes by itself; `--keep steps` keeps "
            "every step, `--budget SIZE` sets the limit."
        )


def size_text(size: float) -> str:
    """A size for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if size >= 9.95 or unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"

"""Taking a recording up again: where training starts with, told by its weights, and what must not be thrown away.

Training may go on at the last step, or at an earlier one of a training that was cut off: what comes after that will be
computed anew. A training that is complete, or all of one, is kept as it is, and a second part begins beside it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from trajrec.records import RunSpec
from trajrec.runfile.place import Place
from trajrec.runfile.trainer.process import rework

logger = logging.getLogger("trajrec")


@dataclass(frozen=True, slots=True)
class Resumption:
    """A step that has the weights that training starts with.

    Attributes:
        step: the step; epochs: how many had begun with it.
        last: the last step that is recorded.
        is_complete: whether that training came to its end.
    """

    step: int
    epochs: int
    last: int
    is_complete: bool


def find(place: Place, checksum: int, keep: str, spec: RunSpec) -> Resumption | None:
    """Where the row with this checksum is, of the parameters of a training that begins; None: nowhere.

    Raises:
        RecordingError: the recording keeps something else. DiskFullError: no room to seal what was left in its ring.
    """
    found = rework(place.folder, place.lock, "find", str(checksum), keep, spec.inputs, str(spec.rows_crc32))
    if found is None:
        return None
    step, epochs, last, is_complete = found
    return Resumption(step, epochs, last, bool(is_complete))


def why_kept(output: Path, found: Resumption | None) -> str:
    """Why a recording is kept as it is; "" where it goes on."""
    if found is None:
        return f"No step of {output} has the weights that training starts with"
    step, last = found.step, found.last
    if step == last or (step and not found.is_complete):
        return ""
    what = f"the {last} steps of a training that is complete" if found.is_complete else f"{last} steps"
    return (
        f"{output} holds {what}, and training starts with the weights of step {step}; going on there would throw away "
        f"{last - step} of them, so they are kept"
    )


def cut(place: Place, found: Resumption) -> None:
    """Makes the recording a folder that ends at the step; what goes is said before it goes."""
    if found.step < found.last:
        logger.warning(
            "Training starts again with the weights of step %d of %s: the %d step(s) recorded after it go now.",
            *(found.step, place.output, found.last - found.step),
        )
    rework(place.folder, place.lock, "cut", str(found.step))

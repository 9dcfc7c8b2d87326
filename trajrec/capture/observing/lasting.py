"""Whether a tensor stays the same while a loop runs, or is made anew in every round of it.

A batch that was cut out, data that are shuffled for an epoch, states of an episode: all are tensors at hand, and ids of
their rows would mean nothing in the next round. What lasts was given its name outside of the loops that are running, or
is held by an object.
"""

from __future__ import annotations

import dis
import gc
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

from trajrec.capture.observing.at_hand import scripts_frames


def lasts(data: Any, frame: FrameType | None) -> bool:
    """Whether data last, as seen from this frame on."""
    frames = [*scripts_frames(frame)]
    return _is_named_outside(data, frames) or _is_held(data, frames)


def _is_named_outside(data: Any, frames: list[FrameType]) -> bool:
    """Whether a variable holds data that was given its value outside of the loops that are running."""
    holding = [(place, names) for place, each in enumerate(frames) if (names := _names(each, data))]
    if not holding:
        return False
    place, names = holding[-1]
    outermost = frames[place]
    if any(_running_loops(each) for each in frames[place + 1 :]):
        return False
    loops = _running_loops(outermost)
    made = [offset for offset, name in _stores(outermost.f_code) if name in names]
    return not any(start <= offset <= end for offset in made for start, end in loops)


def _names(frame: FrameType, data: Any) -> set[str]:
    return {name for name, value in frame.f_locals.items() if value is data}


def _is_held(data: Any, frames: list[FrameType]) -> bool:
    """Whether an object, a dictionary or another module holds it; lists and tuples hold the arguments of calls, too."""
    own = {id(each.f_locals) for each in frames}
    for holder in gc.get_referrers(data):
        if id(holder) in own or isinstance(holder, FrameType | list | tuple):
            continue
        if type(holder) is dict:
            beyond = [each for each in gc.get_referrers(holder) if id(each) not in own]
            if any(not isinstance(each, FrameType | list | tuple) for each in beyond):
                return True  # not what Python keeps of a function's variables
        elif hasattr(holder, "__dict__") and not _is_ours(holder):
            return True
    return False


def _is_ours(holder: Any) -> bool:
    """Whether this is an object of the recorder, or of torch."""
    return type(holder).__module__.partition(".")[0] in ("trajrec", "torch", "builtins")


def _running_loops(frame: FrameType) -> list[tuple[int, int]]:
    """The places of the loops in a function's code that it is in at present."""
    return [(start, end) for start, end in _loops(frame.f_code) if start <= frame.f_lasti <= end]


@lru_cache(maxsize=256)
def _loops(code: CodeType) -> list[tuple[int, int]]:
    return [(step.argval, step.offset) for step in dis.get_instructions(code) if "JUMP_BACKWARD" in step.opname]


@lru_cache(maxsize=256)
def _stores(code: CodeType) -> list[tuple[int, str]]:
    """Where in a function's code variables are given values, and which."""
    steps = [step for step in dis.get_instructions(code) if step.opname.startswith("STORE_")]
    found = []
    for step in steps:
        names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        found += [(step.offset, name) for name in names if isinstance(name, str)]
    return found

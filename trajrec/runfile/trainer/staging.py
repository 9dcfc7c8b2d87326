"""Keyframes on their way to files of their own: training copies one into mapped memory, the writer makes the file.

Making a file takes the training thread as long as all else of a keyframe. `staged.bin` has a few places for one each:

    page 0      for each place: step + 1 (0: it is free), bytes (uint64)
    places      a keyframe file (keyfile.py) from the beginning of each

The training process fills a place and gives it its step last; the writer makes `keyframe-STEP.bin` of it, if its
checksums fit, and frees it. A place that training does not find free, or that is too small, is no fault: it writes the
file itself then. Who reads a recording does not look here: what is lost with it is a shorter way to some steps.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

from trajrec.records import LiveKeyframe
from trajrec.runfile import files
from trajrec.runfile.folder import Folder
from trajrec.runfile.format.arrays import is_whole, put_pieces, write_pieces
from trajrec.runfile.format.geometry import PAGE
from trajrec.runfile.ring import allocate

LARGEST = 16 * 1024**2  # a keyframe that is staged; copying a larger one takes longer than making a file
PLACES = 4
_HEAD = struct.Struct("<QQ")


class Staging:
    """The training process's side: `PLACES` of `size` bytes each at least.

    Raises:
        OSError: no room (ENOSPC).
    """

    def __init__(self, path: Path, size: int) -> None:
        self._size = -(-size // PAGE) * PAGE
        with allocate(path, PAGE + PLACES * self._size) as file:
            self._map = mmap.mmap(file.fileno(), 0)
        for start in range(0, len(self._map), PAGE):
            self._map[start] = 0  # no step of the training is to wait for a page
        self._view = memoryview(self._map)
        self._heads = self._view[: PLACES * _HEAD.size].cast("Q")
        self._next = 0

    def put(self, keyframe: LiveKeyframe) -> bool:
        """Takes a keyframe; False where there is no place for it."""
        place = self._next
        if self._heads[2 * place]:
            return False
        start = PAGE + place * self._size
        size = put_pieces(keyframe, self._view[start : start + self._size])
        if not size:
            return False
        self._heads[2 * place + 1] = size
        self._heads[2 * place] = keyframe.step + 1
        self._next = (place + 1) % PLACES
        return True


def save(folder: Folder) -> None:
    """Makes files of the keyframes that are staged in a folder, as far as they are whole.

    Raises:
        OSError: no room (ENOSPC); they stay where they are.
    """
    try:
        fd = files.in_place(folder.staged)
    except FileNotFoundError:
        return
    try:
        size = (os.fstat(fd).st_size - PAGE) // PLACES
        for place in range(PLACES):
            _save_one(folder, fd, place, size)
    finally:
        os.close(fd)


def _save_one(folder: Folder, fd: int, place: int, size: int) -> None:
    head = os.pread(fd, _HEAD.size, place * _HEAD.size)
    step, length = _HEAD.unpack(head) if len(head) == _HEAD.size else (0, 0)
    if not step or length > size:
        return
    data = os.pread(fd, length, PAGE + place * size)
    if not is_whole(data, step - 1):
        return
    path = folder.keyframe(step - 1)
    own = folder.path / f"staged-{step - 1:010d}.tmp"  # not the name that training writes under
    write_pieces(own, [data])
    _publish(own, path)
    os.pwrite(fd, bytes(8), place * _HEAD.size)


def _publish(own: Path, path: Path) -> None:
    """Gives a file its name, unless training has written a newer keyframe of the same step meanwhile."""
    try:
        os.link(own, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not path.exists():
            own.replace(path)
    own.unlink(missing_ok=True)

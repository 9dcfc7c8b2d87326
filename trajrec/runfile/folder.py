"""The folder `run.h5.rec` beside the output, where a recording lives until it is packed.

    lock                              held by whoever records (lock.py)
    manifest.json                     spec and options, with a CRC-32
    ring.bin                          steps that are not sealed yet (ring.py)
    segment-FIRST-LAST.h5             sealed steps; complete, because renamed only after fsync
    rows.bin                          their rows, where there is no compression (rowfile.py)
    keyframe-STEP.bin                 raw keyframes (arrays.py)
    inputs-STEP.bin                   inputs of steps that are not sealed yet (arrays.py)
    record-STEP.bin                   a record too large for the ring
    writer.log                        what the writer process said
    *.tmp, *.part                     unfinished; deleted by whoever comes next
    staged.bin                        keyframes on their way, of an older version: deleted, and not looked at

A segment's name says which steps it holds, so the state of a recording can be told without opening a file.

Only files of these names are ever deleted, and only regular ones are written to (files.py): a folder may hold
something of the user's, or come from a stranger.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from trajrec.errors import DamagedRunError, NotARunError
from trajrec.runfile import files
from trajrec.runfile.durable import durable
from trajrec.runfile.manifest import Manifest, parse_manifest

SUFFIX = ".rec"
_SEGMENT = re.compile(r"segment-(\d{10})-(\d{10})\.h5")
_KEYFRAME = re.compile(r"keyframe-(\d{10})\.bin")
_RECORD = re.compile(r"record-(\d{10})\.bin")
_INPUTS = re.compile(r"inputs-(\d{10})\.bin")
_STEP = r"(keyframe|record|inputs|staged)-\d{10}"
_UNFINISHED = re.compile(rf"(manifest\.json|packed\.h5|ring\.bin|{_SEGMENT.pattern}|{_STEP})\.tmp|{_STEP}\.part")
_ALONE = ("lock", "ring.bin", "staged.bin", "writer.log")  # what says nothing without a manifest
_IN_PLACE = ("lock", "ring.bin", "rows.bin", "writer.log")


@dataclass(frozen=True, slots=True)
class Segment:
    """A sealed segment: steps [first, stop)."""

    path: Path
    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class Folder:
    """Paths inside a recording's folder."""

    path: Path

    @classmethod
    def of(cls, output: Path) -> Folder:
        """The folder of an output."""
        return cls(output.with_name(output.name + SUFFIX))

    @property
    def output(self) -> Path:
        """The packed file that this folder becomes."""
        return self.path.with_name(self.path.name.removesuffix(SUFFIX))

    @property
    def lock(self) -> Path:
        """The lock file."""
        return self.path / "lock"

    @property
    def ring(self) -> Path:
        """The ring."""
        return self.path / "ring.bin"

    @property
    def rows(self) -> Path:
        """The rows of an uncompressed recording."""
        return self.path / "rows.bin"

    @property
    def manifest(self) -> Path:
        """The manifest."""
        return self.path / "manifest.json"

    @property
    def log(self) -> Path:
        """What the writer said."""
        return self.path / "writer.log"

    def segment(self, first: int, stop: int) -> Path:
        """Path of the segment of steps [first, stop)."""
        return self.path / f"segment-{first:010d}-{stop - 1:010d}.h5"

    def keyframe(self, step: int) -> Path:
        """Path of a keyframe."""
        return self.path / f"keyframe-{step:010d}.bin"

    def inputs(self, step: int) -> Path:
        """Path of the inputs of a step."""
        return self.path / f"inputs-{step:010d}.bin"

    def segments(self) -> list[Segment]:
        """The sealed segments in order.

        Of two that begin with the same step the shorter counts: a recording was taken up again inside the longer one,
        and the recorder was killed before it deleted that.
        """
        found = [(p, _SEGMENT.fullmatch(p.name)) for p in self._entries()]
        segments = [Segment(p, int(m[1]), int(m[2]) + 1) for p, m in found if m]
        by_first = {s.first: s for s in sorted(segments, key=lambda s: -s.stop)}
        return [by_first[first] for first in sorted(by_first)]

    def keyframes(self) -> dict[int, Path]:
        """The raw keyframes by step, in order."""
        return self._by_step(_KEYFRAME)

    def raw_inputs(self) -> dict[int, Path]:
        """The raw inputs by step, in order."""
        return self._by_step(_INPUTS)

    def drop_sealed(self, stop: int) -> None:
        """Deletes raw inputs and records of their own of steps before `stop`, which are in segments now."""
        for path in [p for name in (_INPUTS, _RECORD) for step, p in self._by_step(name).items() if step < stop]:
            path.unlink(missing_ok=True)

    def _by_step(self, name: re.Pattern[str]) -> dict[int, Path]:
        found = [(p, name.fullmatch(p.name)) for p in self._entries()]
        return {int(m[1]): p for p, m in sorted(found, key=lambda x: x[0].name) if m}

    def _entries(self) -> list[Path]:
        return list(self.path.iterdir()) if self.path.is_dir() else []

    def size(self) -> int:
        """Bytes of what is recorded: rows, segments, keyframes and inputs."""
        return _size(self.rows) + self.packing_size()

    def packing_size(self) -> int:
        """Bytes that packing needs, about: all of it but the rows that need not be moved."""
        paths = [s.path for s in self.segments()] + [*self.keyframes().values(), *self.raw_inputs().values()]
        return sum(_size(path) for path in paths)

    def write_manifest(self, manifest: Manifest) -> None:
        """Writes the manifest, durably."""
        with durable(self.manifest) as tmp, open(files.fresh(tmp), "w") as file:
            file.write(manifest.to_json())

    def read_manifest(self) -> Manifest:
        """The manifest.

        Raises:
            NotARunError: there is none. DamagedRunError: its checksum does not match. NewerFormatError: as it says.
        """
        try:
            head, _, body = files.read(self.manifest).decode().partition("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise NotARunError(f"{self.path} is not a recording of trajrec: it has no readable manifest.") from error
        try:
            return parse_manifest(head, body, self.path)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedRunError(f"{self.manifest} is damaged ({error}).") from error

    # ---- what may be written to, and deleted

    def is_bare(self) -> bool:
        """Whether nothing in the folder belongs to a recording that could be read: at most what a failed start left."""
        return all(path.name in _ALONE or _UNFINISHED.fullmatch(path.name) for path in self._entries())

    def foreign(self) -> list[Path]:
        """What is in the folder and no file of a recording, in order."""
        irregular = self.irregular()
        return sorted(path for path in self._entries() if path in irregular or not _is_known(path.name))

    def irregular(self) -> set[Path]:
        """What has a name in the folder and is no regular file, or one written in place that has a second name."""
        if not self.path.is_dir():
            return set()
        with os.scandir(self.path) as entries:
            return {self.path / entry.name for entry in entries if not _is_regular(entry)}

    def check_regular(self) -> None:
        """Refuses a folder in which writing could end elsewhere.

        Raises:
            DamagedRunError: it is a link, or something in it is no regular file.
        """
        if files.kind(self.path) == "link":
            raise files.refusal(self.path, "the folder itself is a link")
        for path in sorted(self.irregular()):
            raise files.refusal(path, f"it is {_ARTICLES[files.kind(path)]}")

    def check_readable(self) -> None:
        """Refuses a folder in which reading could end elsewhere.

        Raises:
            DamagedRunError: a file of the recording is a link, or no regular file.
        """
        for path in sorted(path for path in self.irregular() if _is_known(path.name)):
            if files.kind(path) not in ("file", ""):
                raise files.refusal(path, f"it is {_ARTICLES[files.kind(path)]}")

    def clear(self) -> None:
        """Deletes the recording, but not the lock."""
        for path in self._entries():
            if path != self.lock and _is_known(path.name):
                path.unlink()

    def sweep(self) -> None:
        """Deletes unfinished files of an earlier writer."""
        for path in self._entries():
            if path.suffix == ".tmp" and _is_known(path.name):
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Deletes the recording, and the folder unless there is something else in it.

        The manifest goes last but the lock, so that what is left of a folder says what it belonged to.
        """
        last = (self.manifest, self.lock)
        for path in [*(p for p in self._entries() if p not in last and _is_known(p.name)), *last]:
            with contextlib.suppress(OSError):
                path.unlink()
        with contextlib.suppress(OSError):
            self.path.rmdir()


_ARTICLES = {
    "link": "a link",
    "folder": "a folder",
    "other": "no file",
    "file": "one that has a second name",
    "": "gone",
}


def _is_known(name: str) -> bool:
    """Whether a file of a recording has this name."""
    patterns = (_SEGMENT, _KEYFRAME, _RECORD, _INPUTS, _UNFINISHED)
    return name in (*_IN_PLACE, "manifest.json", "staged.bin") or any(pattern.fullmatch(name) for pattern in patterns)


def _is_regular(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(FileNotFoundError):
        if not entry.is_file(follow_symlinks=False):
            return False
        return entry.name not in _IN_PLACE or entry.stat(follow_symlinks=False).st_nlink <= 1
    return True


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0

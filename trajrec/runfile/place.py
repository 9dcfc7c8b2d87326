"""Where a recording goes: what may be replaced for it, and what becomes of a start that fails.

    Place.check()       before training, and again when it begins: may a recording begin here?
    Place.claim()       takes the lock; whoever else wants to record here is refused from now on
    Place.make_room()   sets an earlier recording aside, by a new name of its folder (run.h5.old.rec)
    Place.begun()       the new one has a ring and a writer: only now the earlier one goes
    Place.give_up()     the new one could not begin: nothing of it is left, and the earlier one is back

Nothing that trajrec has not made is replaced or deleted. A packed run is known by its HDF5 signature and the trailer
behind its end, which takes two short reads and no HDF5; a folder by the names of its files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from trajrec.errors import DamagedRunError, OutputExistsError, RecorderBusyError, RecordingError
from trajrec.runfile import files
from trajrec.runfile.folder import SUFFIX, Folder
from trajrec.runfile.format import trailer
from trajrec.runfile.lock import Lock, holder
from trajrec.runfile.ring import Ring

_SIGNATURE = b"\x89HDF\r\n\x1a\n"


@dataclass(slots=True)
class Place:
    """The place of one recording.

    Attributes:
        output: the run file to be.
        force: whether an earlier recording may be replaced.
        resume: whether one may be gone on with.
    """

    output: Path
    force: bool
    resume: bool
    _lock: Lock | None = None
    _old: Folder | None = None
    _old_lock: Lock | None = None
    _is_new: bool = False

    @property
    def folder(self) -> Folder:
        """The folder of the recording."""
        return Folder.of(self.output)

    @property
    def lock(self) -> Lock:
        """The lock, which has been taken."""
        assert self._lock is not None
        return self._lock

    # ---- what is there

    def is_taken(self) -> bool:
        """Whether there is a recording already; what a failed start has left is none, nor is an empty file."""
        return not _is_empty(self.output) or not _holds_nothing(self.folder)

    def check(self) -> None:
        """Refuses a place where recording would harm something.

        Raises:
            OutputExistsError: there is something that must not be replaced.
            RecorderBusyError: another recorder writes there.
            RecordingError: nothing can be written there.
        """
        try:
            self._check()
        except OSError as error:
            raise RecordingError(
                f"{self.output} cannot be recorded to: {error.strerror}. Name another file."
            ) from error

    def _check(self) -> None:
        pid = None if self._lock is not None else holder(self.folder.lock)
        if pid is not None:
            raise RecorderBusyError(f"{self.output} is being recorded by process {pid}. Record to another file.")
        why = _no_run(self.output, is_replaced=self.force)
        if why:
            raise _untouchable(self.output, why)
        if self.is_taken() and not self.force and not self.resume:
            found = self.output if files.kind(self.output) else self.folder.path
            raise OutputExistsError(
                f"{found} exists already and would be overwritten. Record to another file, pass --resume "
                "(resume=True) to go on with it, or --force (force=True) to replace it."
            )
        self._check_folder()

    def _check_folder(self) -> None:
        kind = files.kind(self.folder.path)
        if kind not in ("", "folder"):
            raise _untouchable(self.folder.path, "no folder")
        if not kind:
            return
        for path in self.folder.foreign() if self.force else ():
            raise _untouchable(self.folder.path, f"a folder that holds {path.name}, which is no file of a recording")
        self.folder.check_regular()

    # ---- the start

    def claim(self) -> None:
        """Makes the folder and takes the lock, if a recording may begin here.

        Raises:
            OutputExistsError, RecorderBusyError, RecordingError: as in `check`.
        """
        self.check()
        try:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.folder.lock)
        except OSError as error:
            raise RecordingError(f"{self.folder.path} cannot be made: {error.strerror}. Name another file.") from error
        try:
            self.check()
        except BaseException:
            self.give_up()
            raise

    def make_room(self) -> None:
        """Sets an earlier recording in the folder aside, and leaves the folder empty but for the lock."""
        if _holds_nothing(self.folder):
            self.folder.clear()
            self._is_new = True
            return
        old = next(path for path in _aside(self.folder) if not files.kind(path))
        self.folder.path.rename(old)
        self._old, self._old_lock, self._lock = Folder(old), self._lock, None
        self.folder.path.mkdir()
        self._lock = Lock(self.folder.lock)

    def begun(self) -> None:
        """Deletes what the new recording replaces, if it is still what may be replaced."""
        if files.kind(self.output):
            why = _no_run(self.output, is_replaced=True)
            if why:
                raise _untouchable(self.output, why)
            self.output.unlink()
        if self._old is not None:
            self._old.remove()
        if self._old_lock is not None:
            self._old_lock.release()
        self._old, self._old_lock, self._is_new = None, None, False

    def give_up(self) -> None:
        """Leaves the place as it was, without the lock."""
        if self._lock is not None and (self._old is not None or self._is_new or _holds_nothing(self.folder)):
            self.folder.remove()
        old, old_lock = self._old, self._old_lock
        self._old = self._old_lock = None
        self.release()
        if old is not None:
            with contextlib.suppress(OSError):
                old.path.rename(self.folder.path)
        if old_lock is not None:
            old_lock.release()

    def release(self) -> None:
        """Gives the lock back, and changes nothing; in a process that was forked it closes that one's copy."""
        for lock in (self._lock, self._old_lock):
            if lock is not None:
                lock.release()
        self._lock = self._old_lock = None

    def second_part(self) -> Place:
        """A free place beside this one: run-part2.h5, run-part3.h5, ..."""
        names = (self.output.with_name(f"{self.output.stem}-part{k}{self.output.suffix}") for k in count(2))
        return next(p for p in (Place(name, False, False) for name in names) if not p._has_anything())

    def _has_anything(self) -> bool:
        return bool(files.kind(self.output) or files.kind(self.folder.path))


def _aside(folder: Folder) -> Iterator[Path]:
    """run.h5.old.rec, run.h5.old2.rec, ...: folders of recordings, too, should a power cut leave one."""
    output = folder.output
    return (output.with_name(f"{output.name}.old{'' if k == 1 else k}{SUFFIX}") for k in count(1))


def _holds_nothing(folder: Folder) -> bool:
    """Whether a folder is missing, or holds no step: only what a start has left that failed or was killed."""
    if not files.kind(folder.path) or folder.is_bare():
        return True
    if folder.foreign() or folder.segments() or not folder.ring.exists():
        return False
    try:
        ring = Ring(folder.ring)
    except (OSError, ValueError, DamagedRunError):
        return False
    return ring.first == 0 and not ring.published(0)


def _is_empty(path: Path) -> bool:
    """Whether nothing has a name, or an empty file, as made to reserve it."""
    return not files.kind(path) or (files.kind(path) == "file" and path.stat().st_size == 0)


def _no_run(path: Path, is_replaced: bool) -> str:
    """What a file is instead of a run that may be replaced, or gone on with; "" if it is one, or empty."""
    kind = files.kind(path)
    if kind not in ("", "file"):
        return {"link": "a link", "folder": "a folder"}.get(kind, "no file")
    if _is_empty(path):
        return ""
    with path.open("rb") as file:
        if file.read(len(_SIGNATURE)) != _SIGNATURE:
            return "no run of trajrec"
    if is_replaced and not trailer.is_there(path):
        return "an HDF5 file that does not end as a run of trajrec does: another program made it, or wrote to it"
    return ""


def _untouchable(path: Path, why: str) -> OutputExistsError:
    return OutputExistsError(
        f"{path} is {why}. trajrec replaces and continues only what it has made, and leaves this as it is: record to "
        "another file, or move it away."
    )

"""The training process's side of the processes that call HDF5: starting, waking and watching them.

The writer gets a session of its own, so that Ctrl-C and a closed terminal reach only training; training ends the
recording in order, and the writer follows. It inherits the lock (lock.py), so that nobody else takes the folder
while it drains the ring of a recorder that was killed. `rework` runs what is done between two writers (rework.py).

A process that was forked from training has copies of the pipe and the lock; it closes them (`WriterProcess.abandon`,
`Lock.release`) and has no part in the recording.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from trajrec.errors import DamagedRunError, DiskFullError, RecordingError
from trajrec.runfile import files
from trajrec.runfile.folder import Folder
from trajrec.runfile.format.geometry import Geometry
from trajrec.runfile.lock import Lock
from trajrec.runfile.manifest import Manifest
from trajrec.runfile.place import Place
from trajrec.runfile.ring import EXIT_DISK_FULL, Control, Finish, Ring, Status, create, ring_bytes
from trajrec.runfile.trainer.fulldisk import Room, no_start

_RESTARTS = 5
_FINAL = (Status.DONE, Status.DISK_FULL, Status.FILE_TOO_LARGE, Status.DAMAGED, Status.BLOCKED)
_START = 30.0
_NAP = 0.01
_SHORT_NAP = 0.001
_GLANCE = 0.1
_GLANCE_STEPS = 128


class WriterProcess:
    """The writer of a folder, as its parent sees it."""

    def __init__(self, folder: Folder, ring: Ring, lock: Lock) -> None:
        self.folder = folder
        self.ring = ring
        self._lock = lock
        self._failures = 0
        self._tail = -1
        self.start()

    def start(self) -> None:
        """Starts a writer."""
        self.ring.set(Control.STATUS, Status.STARTING)
        with open(files.in_place(self.folder.log, os.O_CREAT | os.O_APPEND), "ab") as log:
            self._process = subprocess.Popen(
                _command("loop", self.folder),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                bufsize=0,
                pass_fds=(self._lock.fd,),
                start_new_session=True,
                env=_environment(),
            )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        os.set_blocking(self._pipe.fileno(), False)

    def wake(self) -> None:
        """Tells the writer that there is something to do."""
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            self._pipe.write(b"w")

    def check_started(self) -> None:
        """Waits until the writer works; one that takes very long is trusted to.

        Raises:
            DiskFullError: no room for it.
            RecordingError: it ended at once.
        """
        until = time.monotonic() + _START
        while self.ring.get(Control.STATUS) == Status.STARTING and time.monotonic() < until:
            if self.wait(_NAP):
                break
        if self.ring.get(Control.STATUS) == Status.DISK_FULL:
            raise DiskFullError(f"The disk is full: recording cannot begin in {self.folder.path}. Make room.")
        if self._process.poll() is not None:
            raise RecordingError(f"The writer process cannot be started. Its last words: {self.last_words()}")

    def status(self) -> Status:
        """RUNNING, or why the writer has ended; one that died of something unforeseen is started again.

        Raises:
            RecordingError: it died several times without sealing anything.
        """
        if self._process.poll() is None:
            return Status.RUNNING
        said = Status(self.ring.get(Control.STATUS))
        if said in _FINAL:
            return said
        self._revive()
        return Status.RUNNING

    def _revive(self) -> None:
        tail = self.ring.get(Control.TAIL)
        self._failures = self._failures + 1 if tail == self._tail else 1
        self._tail = tail
        if self._failures > _RESTARTS:
            raise RecordingError(
                f"The writer process stopped {_RESTARTS} times without sealing a step. What was recorded is safe in "
                f"{self.folder.path}; `trajrec pack` finishes it. Its last words: {self.last_words()}"
            )
        self.restart()

    def restart(self) -> None:
        """Starts a new writer in the place of one that has ended."""
        self.close()
        self.start()

    def last_words(self) -> str:
        """The last line of the writer's log."""
        with contextlib.suppress(OSError, DamagedRunError):
            lines = files.read(self.folder.log).decode(errors="replace").strip().splitlines()
            return lines[-1] if lines else "none"
        return "none"

    def reason(self) -> str:
        """The message of the error that the writer ended with."""
        return self.last_words().partition("Error: ")[2] or self.last_words()

    def wait(self, seconds: float) -> bool:
        """Waits for the writer to end, at most so long; returns whether it has."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """Closes the pipe and waits for the writer, which ends of itself then."""
        self._pipe.close()
        self._process.wait()

    def kill(self) -> None:
        """Ends a writer at once, and waits until it has; what it had not sealed is still in the ring."""
        self._process.kill()
        self._process.wait()

    def abandon(self) -> None:
        """Closes the pipe's copy in a process that was forked; the writer belongs to the process it was forked from."""
        self._pipe.close()
        self._process.returncode = 0  # nobody here is to wait for it, or to be warned that nobody has


@dataclass(frozen=True, slots=True)
class Line:
    """What a recording has as long as it goes on: a ring, and the writer that empties it.

    Attributes:
        folder: of the recording.
        geometry: of the ring.
        ring: the ring.
        writer: the writer.
    """

    folder: Folder
    geometry: Geometry
    ring: Ring
    writer: WriterProcess

    @property
    def tail(self) -> int:
        """The first step that is not sealed."""
        return self.ring.get(Control.TAIL)

    def pause(self, is_close: bool) -> int:
        """Steps between two glances at the writer; `is_close` where a budget is looked after."""
        return self.geometry.chunk_rows if is_close else min(self.geometry.segment_rows, _GLANCE_STEPS)

    def flush_before(self, step: int) -> None:
        """Has the steps before this one sealed; in whole chunks of rows, where there are any."""
        aligned = step - step % self.geometry.chunk_rows
        self.ring.set(Control.FLUSH, aligned if aligned > self.tail else step)

    def wait_for_tail(self) -> bool:
        """Waits a moment for the writer to seal something; whether it did, also if it has no room for more."""
        self.writer.wake()
        tail, until = self.tail, time.monotonic() + _GLANCE
        while self.tail == tail and time.monotonic() < until:
            time.sleep(_SHORT_NAP)
        return self.tail != tail

    def finish(self, finish: Finish, room: Room) -> Status:
        """Has the writer finish and waits for it: DONE, or why it is not; waits for room where that was asked for."""
        self.ring.set(Control.FINISH, finish)
        self.writer.wake()
        while (status := self.writer.status()) is not Status.DONE:
            if status is Status.RUNNING:
                self.writer.wait(_GLANCE)
            elif status is Status.DISK_FULL and room.on_full == "wait":
                room.wait(f"The disk is full: {self.folder.output} cannot be finished.", self.folder.packing_size())
                self.writer.restart()
            else:
                break
        return status


def start(place: Place, geometry: Geometry, first: int, manifest: Manifest, is_new: bool) -> Line:
    """Makes a ring for the steps from `first` on, writes the manifest of a new recording, and starts a writer.

    Raises:
        DiskFullError: no room for the ring. RecordingError: the writer cannot be started.
    """
    folder = place.folder
    try:
        ring = create(folder.ring, geometry, first, manifest.spec.dtype)
        if is_new:
            folder.write_manifest(manifest)
        return Line(folder, geometry, ring, WriterProcess(folder, ring, place.lock))
    except OSError as error:
        raise no_start(error, folder.path, ring_bytes(geometry)) from error


def rework(folder: Folder, lock: Lock, *arguments: str) -> tuple[int, ...] | None:
    """Runs a command of rework.py on a folder, and returns the numbers it prints, or None for "none".

    It inherits the lock, like a writer.

    Raises:
        DiskFullError: no room for it; the recording can still be read.
        RecordingError: it failed otherwise.
    """
    command = [*_command("rework", folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, pass_fds=(lock.fd,), env=_environment())
    if done.returncode == EXIT_DISK_FULL:
        raise DiskFullError(f"The disk is full: {folder.output} cannot be changed. Make room.")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise RecordingError(f"{folder.output} cannot be continued. {reason} Record to another file.")
    printed = done.stdout.strip()
    return None if printed == "none" else tuple(map(int, printed.split()))


def _command(module: str, folder: Folder) -> list[str]:
    return [sys.executable, "-P", "-m", f"trajrec.runfile.writer.{module}", os.path.abspath(folder.path)]


def _environment() -> dict[str, str]:
    """One thread for numpy, and the way to this package where it is imported from a checkout.

    The C library is told to keep the few MB that compressing a chunk takes. Else it gives them back to the kernel after
    every chunk, which clears them for the next one: a third of the time that sealing takes. (glibc's names; others have
    no such habit, and do not look at them.)
    """
    memory = {"MALLOC_MMAP_THRESHOLD_": str(2**21), "MALLOC_TRIM_THRESHOLD_": str(2**24)}
    environment = {**memory, **os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[3]
    if root.name not in ("site-packages", "dist-packages"):
        paths = [p for p in (environment.get("PYTHONPATH"), str(root)) if p]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment

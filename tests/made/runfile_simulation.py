"""Processes and a disk that tests have in their hands: the writer runs in this process, a turn at a time.

`Simulation` takes the place of subprocess.Popen and subprocess.run under `trajrec.runfile.trainer.process`; everything
above and below them is the product's. The writer takes a turn when it is woken or waited for. It can be killed before
any of the operations that change names or sync files: from then on none of its operations has an effect any more, not
even those of its own clearing up, as after kill -9. A full disk refuses new files and rows.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trajrec.errors import TrajrecError, is_disk_full
from trajrec.runfile import files
from trajrec.runfile.folder import Folder
from trajrec.runfile.format import layout, rowfile
from trajrec.runfile.ring import Control, Finish, Ring
from trajrec.runfile.trainer import fulldisk, process
from trajrec.runfile.writer import rework
from trajrec.runfile.writer.loop import Writer, _status


class KilledError(BaseException):
    """The process that runs is killed here."""


class Simulation:
    """The disk, and the process that runs at the moment."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.full = False
        self.within = False  # another process than training
        self.left: int | None = None  # operations until it is killed
        self.watch: Callable[[], object] = lambda: None  # is called before every operation
        for module, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (files, "in_place")):
            patch.setattr(module, name, self._mortal(getattr(module, name)))
        for module, name in ((files, "fresh"), (layout, "begin"), (rowfile, "_write_at")):
            patch.setattr(module, name, self._mortal(self._needing_room(getattr(module, name))))
        patch.setattr(process.subprocess, "Popen", lambda command, **_: Process(self, Folder(Path(command[-1]))))
        patch.setattr(process.subprocess, "run", self._run)
        patch.setattr(fulldisk.time, "sleep", self._sleep)
        patch.setattr(fulldisk.Room, "free", property(lambda _: 0 if self.full else 10**12))

    def _mortal(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def tried(*args: Any, **options: Any) -> Any:
            self.watch()
            if self.within and self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise KilledError
            return call(*args, **options)

        return tried

    def _needing_room(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def tried(*args: Any, **options: Any) -> Any:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*args, **options)

        return tried

    def _sleep(self, seconds: float) -> None:
        if seconds >= fulldisk._RETRY:
            self.full = False  # somebody makes fulldisk while training waits

    def another_process(self, call: Callable[[], Any]) -> Any:
        """Calls as another process that may be killed over it."""
        self.within = True
        try:
            return call()
        finally:
            self.within = False
            if self.left is not None and self.left < 0:
                self.left = None

    def _run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        """rework.py, as its `main` does it."""
        folder, name, rest = Folder(Path(command[command.index("-m") + 2])), command[command.index("-m") + 3], []
        rest = command[command.index("-m") + 4 :]
        calls = {
            "find": lambda: rework.find(folder, int(rest[0]), *rest[1:]),
            "cut": lambda: (rework.cut(folder, int(rest[0])),),
            "drop-rows": lambda: (rework.drop_rows(folder),),
        }
        try:
            found = self.another_process(calls[name])
        except KilledError:
            return subprocess.CompletedProcess(command, -9, "", "")
        except (OSError, TrajrecError) as error:
            code = process.EXIT_DISK_FULL if is_disk_full(error) else 1
            return subprocess.CompletedProcess(command, code, "", str(error))
        return subprocess.CompletedProcess(command, 0, "none" if found is None else " ".join(map(str, found)), "")


class Process:
    """What subprocess.Popen gives, for a writer; its own standard input, too."""

    def __init__(self, simulation: Simulation, folder: Folder) -> None:
        self._simulation, self._folder = simulation, folder
        self._owner = os.getpid()
        self.returncode: int | None = None
        self.stdin = self
        self._fd = os.open(os.devnull, os.O_WRONLY)
        self._writer: Writer | None = None
        self._turn(self._start)

    def _start(self) -> None:
        self._writer = Writer(self._folder)

    def _turn(self, call: Callable[[], None]) -> None:
        if self.returncode is not None or os.getpid() != self._owner:
            return
        try:
            self._simulation.another_process(call)
        except KilledError:
            self.returncode = -9
        except Exception as error:
            self.returncode = 1
            with self._folder.log.open("a") as log:
                log.write(f"{type(error).__name__}: {error}\n")
            if self._folder.ring.exists():
                Ring(self._folder.ring, writable=True).set(Control.STATUS, _status(error))

    def _work(self) -> None:
        """What the writer does when it is woken (writer.Writer.run)."""
        finish = Finish(self._writer.ring.get(Control.FINISH))
        if finish is Finish.NO:
            self._writer._seal_ready()
            return
        self._writer.seal_everything()
        self._writer._finish(finish)
        self.returncode = 0

    # ---- as the product sees it

    def fileno(self) -> int:
        return self._fd

    def write(self, data: bytes) -> int:
        self._turn(self._work)
        return len(data)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._turn(self._work)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("writer", timeout or 0)
        return self.returncode

    def kill(self) -> None:
        self.returncode = -9 if self.returncode is None else self.returncode

    def close(self) -> None:
        """The pipe ends: the writer seals what is there, and ends."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._turn(lambda: self._writer.seal_everything())
        if self.returncode is None:
            self.returncode = 0

"""The writer process: turns ring entries into sealed segments, and at the end the folder into one file.

    python -m trajrec.runfile.writer.loop FOLDER

The training process starts it with a pipe as its standard input. A byte wakes it; the end of the pipe, or
another parent process, means that training was killed: then it seals what is in the ring and ends, and the folder
stays for `trajrec pack`. What it is to do otherwise stands in the ring's control words, so a writer that
takes over from one that died needs to be told nothing.

HDF5 is written only here, because after an I/O error (a full disk) it cannot be closed safely: on any
exception the process says so in the ring and ends at once (`os._exit`) without closing anything. What it had begun
carries the name of a temporary file; what it had not sealed is still in the ring.

What was packed is read back before the folder goes (sealing.py). If it is not what was recorded, the folder stays.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
import time
import traceback
from pathlib import Path

from trajrec.errors import OutputExistsError, RunFileError, is_disk_full, is_file_too_large
from trajrec.runfile.durable import sync
from trajrec.runfile.folder import Folder
from trajrec.runfile.reader.stored import holds
from trajrec.runfile.ring import Control, Finish, Ring, Status
from trajrec.runfile.writer.packing import pack
from trajrec.runfile.writer.sealing import row_file, seal

POLL_SECONDS = 1.0  # what matters wakes it; this only finds a parent that is gone while others hold its pipe
_PATIENCE = 20


class Writer:
    """The writer of one folder."""

    def __init__(self, folder: Folder) -> None:
        folder.check_regular()
        self.folder = folder
        self.parent = os.getppid()
        self.ring = Ring(folder.ring, writable=True)
        self.manifest = folder.read_manifest()
        self.orphan = False
        self._synced: set[Path] = set()
        folder.sweep()
        segments = folder.segments()
        self.next = segments[-1].stop if segments else self.ring.first
        self._tidy_rows()
        folder.drop_sealed(self.next)  # an earlier writer may have been killed before it did
        self._head = self.next  # what was seen in the ring stays there until it is sealed
        self.ring.set(Control.TAIL, self.next)
        self.ring.set(Control.STATUS, Status.RUNNING)

    def _tidy_rows(self) -> None:
        """Cuts off rows that an earlier writer was killed over, before a segment spoke of them."""
        if self.manifest.plain_rows:
            row_file(self.folder, self.manifest).cut(self.next)
        else:
            self.folder.rows.unlink(missing_ok=True)  # rows that are dropped to stay in a budget

    def run(self) -> None:
        """Seals until training ends."""
        while not self.orphan:
            finish = Finish(self.ring.get(Control.FINISH))
            if finish is not Finish.NO:
                self.seal_everything()
                self._finish(finish)
                return
            self._seal_ready()
            self._wait()
        self.seal_everything()

    def _seal_ready(self) -> None:
        """Seals whole segments, and whole chunk rows below an entry that the trainer asked for."""
        size, rows = self.ring.geometry.segment_rows, self.ring.geometry.chunk_rows
        while True:
            head = self._head = self.ring.head(max(self._head, self.next))
            stop = self.next - self.next % size + size
            if stop > head:
                if self.ring.get(Control.FLUSH) <= self.next or head == self.next:
                    return
                aligned = head - head % rows
                stop = aligned if aligned > self.next else head
            if not self._seal(stop):
                return  # the entry's stores have not all arrived; look again later

    def seal_everything(self) -> None:
        """Seals whatever is intact in the ring."""
        size, patience = self.ring.geometry.segment_rows, _PATIENCE
        while (head := self.ring.head(self.next)) > self.next and patience:
            if not self._seal(min(head, self.next - self.next % size + size)):
                patience -= 1
                time.sleep(0.01)

    def _seal(self, stop: int) -> bool:
        done = seal(self.folder, self.manifest, self.ring, self.next, stop)
        advanced = done > self.next
        if advanced:
            self._sync_keyframes()
            self.next = done
            self.ring.set(Control.TAIL, done)
        return advanced

    def _sync_keyframes(self) -> None:
        for path in self.folder.keyframes().values():
            if path not in self._synced and path.exists():
                sync(path)
                self._synced.add(path)

    def _finish(self, finish: Finish) -> None:
        if finish is not Finish.HAND_OVER:
            state = "complete" if finish is Finish.COMPLETE else "recovered"
            if not self._is_packed():
                pack(self.folder, self.manifest, state, self.ring.gaps())
        self.ring.set(Control.STATUS, Status.DONE)
        if finish is not Finish.HAND_OVER:
            self.folder.remove()  # said first: no other writer could tell, once the ring is gone

    def _is_packed(self) -> bool:
        """Whether an earlier writer has packed it, and was killed before it could say so."""
        output = self.folder.output
        return output.is_file() and holds(output, self.manifest.spec.run_id, self.next)

    def _wait(self) -> None:
        ready, _, _ = select.select([0], [], [], POLL_SECONDS)
        ended = bool(ready) and not os.read(0, 65536)
        self.orphan = ended or os.getppid() != self.parent


def main(argument: str) -> None:
    """Runs a writer; never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # modules stay anyway: collections need not look through them
    folder = Folder(Path(argument))
    try:
        Writer(folder).run()
    except BaseException as error:
        try:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), traceback.format_exc(), file=sys.stderr, flush=True)
            Ring(folder.ring, writable=True).set(Control.STATUS, _status(error))
        finally:
            os._exit(1)
    os._exit(0)


def _status(error: BaseException) -> Status:
    """What an error that ends the writer means to whoever started it."""
    if is_file_too_large(error):
        return Status.FILE_TOO_LARGE
    if is_disk_full(error):
        return Status.DISK_FULL
    if isinstance(error, OutputExistsError):
        return Status.BLOCKED
    return Status.DAMAGED if isinstance(error, RunFileError) else Status.FAILED


if __name__ == "__main__":
    main(sys.argv[1])

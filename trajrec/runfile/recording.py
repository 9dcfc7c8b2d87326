"""The sink that writes a run file, as the training process sees it: copy into the ring, now and then a glance.

    reserve()   waits for a free slot (there nearly always is one) and hands out its row
    commit()    encodes the record into the ring and publishes the slot; every R steps wakes the writer
    keyframe()  writes a raw file
    close()     waits until the writer has packed everything

No HDF5 here: on a full disk it takes its process down with it. When the writer has no room it ends, and nothing
happens to training until the ring is full. Then `on_full` decides: "wait" until there is room, "stop-recording" (the
training goes on, the steps that are not recorded are noted as a gap), or "raise" `DiskFullError`.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Literal

import numpy as np

from trajrec.errors import DiskFullError, OutputExistsError, RecorderBusyError, RecordingError
from trajrec.records import Keyframe, Row, RunSpec, StepRecord
from trajrec.runfile.folder import Folder, Manifest, is_disk_full
from trajrec.runfile.geometry import geometry_for
from trajrec.runfile.keyfile import write_keyframe
from trajrec.runfile.lock import Lock, holder
from trajrec.runfile.process import WriterProcess
from trajrec.runfile.ring import Control, Finish, Status, create, ring_bytes
from trajrec.sink import Summary

logger = logging.getLogger("trajrec")

KEYFRAME_INTERVAL = 64
_NAP = 0.001
_GLANCE = 0.1
_RETRY = 1.0

OnFull = Literal["wait", "stop-recording", "raise"]


class RunFileSink:
    """Writes one run to `path`.

    Args:
        path: the run file; it is a folder `path.rec` until the run ends.
        keep: "steps" for the weights of every step, or K for keyframes every K steps and checksums between.
        compression: "zstd" or "none".
        on_full: what to do when the disk is full: "wait", "stop-recording" or "raise".
        force: replace an existing recording.
        keyframe_every: keyframe interval with keep="steps" (optimizer state is rebuilt between).

    Raises:
        OutputExistsError: there is a recording already and `force` is False.
        RecorderBusyError: another recorder writes it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        keep: Literal["steps"] | int = "steps",
        compression: Literal["zstd", "none"] = "zstd",
        on_full: OnFull = "wait",
        force: bool = False,
        keyframe_every: int = KEYFRAME_INTERVAL,
    ) -> None:
        self.output = Path(path)
        self.folder = Folder.of(self.output)
        self.resumed_at = 0
        self._keep_rows = keep == "steps"
        self._interval = keyframe_every if isinstance(keep, str) else keep
        self._compression = compression
        self._on_full = on_full
        self._force = force
        self._next = 0
        self._stopped = False
        self._retried_at = -1
        _check_options(keep, compression, on_full, self._interval)
        self._check_output()

    def _check_output(self) -> None:
        pid = holder(self.folder.lock)
        if pid is not None:
            raise RecorderBusyError(f"{self.output} is being recorded by process {pid}. Record to another file.")
        found = [p for p in (self.output, self.folder.path) if p.exists()]
        if found and not self._force:
            raise OutputExistsError(
                f"{found[0]} exists already and would be overwritten. Record to another file, or pass --force "
                "(force=True)."
            )

    def open(self, spec: RunSpec) -> None:
        """Starts the run: makes the ring and starts the writer.

        Raises:
            DiskFullError: there is no room for the ring.
        """
        self._spec = spec
        itemsize = np.dtype(spec.dtype).itemsize
        self._geometry = geometry_for(spec.row_length, itemsize, self._keep_rows)
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.folder.lock)
        try:
            self._begin(0, Manifest(spec, self.output.name, self._keep_name, self._compression))
        except BaseException:
            self._lock.release()
            raise

    @property
    def _keep_name(self) -> str:
        return "steps" if self._keep_rows else "keyframes"

    def _begin(self, first: int, manifest: Manifest) -> None:
        if first == 0:
            self.folder.clear()
            self.output.unlink(missing_ok=True)
        self._next = first
        try:
            self._ring = create(self.folder.ring, self._geometry, first, self._spec.dtype)
            self.folder.write_manifest(manifest)
        except OSError as error:
            raise _no_room(error, self.folder.path, ring_bytes(self._geometry)) from error
        self._writer = WriterProcess(self.folder, self._ring, self._lock)

    # ---- steps

    def reserve(self) -> Row | None:
        """The row [P] to fill before the next commit, or None if rows of single steps are not kept."""
        while not self._stopped and not self._ring.has_slot(self._next):
            self._wait_for_writer()
        if self._stopped:
            return np.empty(self._spec.row_length, self._spec.dtype) if self._keep_rows else None
        return self._ring.open_slot(self._next)

    def commit(self, record: StepRecord) -> None:
        """Publishes the reserved row together with its record."""
        if record.step != self._next and not self._stopped:
            raise RecordingError(f"Step {self._next} was to be recorded, and step {record.step} was given.")
        while not self._stopped and not self._ring.publish(record):
            self._ring.set(Control.FLUSH, record.step)
            self._wait_for_writer()
        if self._stopped:
            self._ring.set(Control.GAP_LAST, record.step)
            return
        self._next = record.step + 1
        if self._next % self._geometry.chunk_rows == 0:
            self._writer.wake()
            self._writer.status()

    def wants_keyframe(self, step: int) -> bool:
        """Whether the state after this step is to be kept."""
        return step % self._interval == 0 and not self._stopped

    def keyframe(self, keyframe: Keyframe) -> None:
        """Takes the state after a committed step."""
        while not self._stopped and keyframe.step < self._next:
            try:
                write_keyframe(self.folder.keyframe(keyframe.step), keyframe)
                return
            except OSError as error:
                if not is_disk_full(error):
                    raise
                self._act_on_full_disk(sum(array.nbytes for array in keyframe.arrays.values()))

    # ---- waiting, and full disks

    def _wait_for_writer(self) -> None:
        """Waits a moment for the writer to free slots; acts if it has no room to."""
        self._writer.wake()
        tail, until = self._ring.get(Control.TAIL), time.monotonic() + _GLANCE
        while self._ring.get(Control.TAIL) == tail and time.monotonic() < until:
            time.sleep(_NAP)
        if self._writer.status() is Status.DISK_FULL:
            self._act_on_full_disk(self._geometry.segment_bytes // 2)
            if not self._stopped:
                self._writer.restart()

    def _act_on_full_disk(self, needed: int) -> None:
        if self._retried_at != self._next and self._free() >= 2 * needed:
            self._retried_at = self._next
            return  # there is room again, it seems; a quota may see it otherwise, so only once a step
        where = f"The disk is full: step {self._next} of {self.output} cannot be recorded."
        if self._on_full == "raise":
            raise DiskFullError(f"{where} Make room; `trajrec pack {self.folder.path}` keeps the steps before it.")
        if self._on_full == "stop-recording":
            logger.warning("%s Training goes on WITHOUT RECORDING; the steps before it are kept.", where)
            self._stopped = True
            self._ring.set(Control.GAP_FIRST, self._next)
            self._ring.set(Control.GAP_LAST, self._next)
        else:
            self._wait_for_room(where, needed)

    def _wait_for_room(self, where: str, needed: int) -> None:
        logger.warning("%s Training WAITS until there is room (about %d MB).", where, needed // 10**6 + 1)
        self.folder.sweep()
        time.sleep(_RETRY)
        while self._free() < max(needed, 2**20):
            time.sleep(_RETRY)
        logger.warning("There is room again: recording of %s goes on.", self.output)

    def _free(self) -> int:
        return shutil.disk_usage(self.folder.path).free

    # ---- the end

    def close(self, complete: bool) -> Summary:
        """Ends the run: waits until the writer has sealed and packed everything.

        Raises:
            RecordingError: the writer cannot finish.
        """
        self._ring.set(Control.FINISH, Finish.COMPLETE if complete else Finish.RECOVERED)
        self._writer.wake()
        try:
            while (status := self._writer.status()) is Status.RUNNING:
                self._writer.wait(_GLANCE)
            while status is Status.DISK_FULL and self._on_full == "wait":
                self._wait_for_room(f"The disk is full: {self.output} cannot be finished.", self.folder.size())
                self._writer.restart()
                while (status := self._writer.status()) is Status.RUNNING:
                    self._writer.wait(_GLANCE)
        finally:
            self._writer.close()
            self._lock.release()
        return self._summary(packed=status is Status.DONE)

    def _summary(self, packed: bool) -> Summary:
        gap = (self._ring.get(Control.GAP_FIRST), self._ring.get(Control.GAP_LAST))
        gaps = (gap,) if gap[0] else ()
        if packed:
            return Summary(self.output, self._next - 1, self.output.stat().st_size, gaps)
        self.folder.sweep()
        logger.warning(
            "The disk is full: %s was not packed. Its steps are safe in %s; make room and run `trajrec pack %s`.",
            self.output,
            self.folder.path,
            self.folder.path,
        )
        return Summary(self.folder.path, self._next - 1, self.folder.size(), gaps)


def _check_options(keep: object, compression: str, on_full: str, interval: int) -> None:
    if (isinstance(keep, str) and keep != "steps") or interval < 1:
        raise ValueError(f'keep is "steps" or a number of steps from 1; found {keep!r}.')
    if compression not in ("zstd", "none"):
        raise ValueError(f'compression is "zstd" or "none"; found {compression!r}.')
    if on_full not in ("wait", "stop-recording", "raise"):
        raise ValueError(f'on_full is "wait", "stop-recording" or "raise"; found {on_full!r}.')


def _no_room(error: OSError, path: Path, size: int) -> Exception:
    if not is_disk_full(error):
        return error
    return DiskFullError(f"The disk is full: recording needs {size / 1e6:.0f} MB in {path} to begin with. Make room.")

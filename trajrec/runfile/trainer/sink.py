"""The sink that writes a run file, as the training process sees it: copy into the ring, now and then a glance.

    reserve()   waits for a free slot (there nearly always is one) and hands out its row
    commit()    encodes the record into the ring and publishes the slot; now and then wakes the writer
    inputs()    writes a raw file, which the writer takes into the step's segment
    keyframe()  leaves it to the writer (staging.py), or writes a raw file
    close()     waits until the writer has packed everything

No HDF5 here: on a full disk it takes its process down with it. When the writer has no room it ends, and nothing
happens to training until the ring is full. Then `on_full` decides: "wait" until there is room, "stop-recording" (the
training goes on, the steps that are not recorded are noted as a gap), or "raise" `DiskFullError`. A limit on the size
of files is a full disk that nobody makes room on: "wait" stops recording then.

Once recording has stopped, whoever asked for it, every call is answered and nothing is kept. In a process that was
forked (`abandon`) there is no ring and no writer any more, only that.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np

from trajrec.errors import DiskFullError, RecordingError
from trajrec.records import Inputs, LiveKeyframe, Row, RunSpec, StepRecord
from trajrec.runfile import register
from trajrec.runfile.format.arrays import Piece, pieces_of, write_pieces
from trajrec.runfile.format.geometry import PAGE, Geometry, geometry_for
from trajrec.runfile.manifest import Manifest
from trajrec.runfile.place import Place
from trajrec.runfile.ring import Control, Finish, Status, create, ring_bytes
from trajrec.runfile.trainer.budget import Budget, parse_size
from trajrec.runfile.trainer.fulldisk import LIMIT, OnFull, Room, no_start
from trajrec.runfile.trainer.process import WriterProcess, rework
from trajrec.runfile.trainer.staging import LARGEST, PLACES, Staging
from trajrec.sink import Summary

logger = logging.getLogger("trajrec")

KEYFRAME_INTERVAL = 64
INPUT_BYTES = 256 * 1024**2  # of raw inputs at a time; then training waits for the writer
_NAP = 0.001
_GLANCE = 0.1
_GLANCE_STEPS = 128


class RunFileSink:
    """Writes one run to `path`.

    Args:
        path: the run file; it is a folder `path.rec` until the run ends. Made absolute here and now.
        keep: "steps" for the weights of every step, or K for keyframes every K steps and checksums between.
        compression: "zstd" or "none".
        on_full: what to do when the disk is full: "wait", "stop-recording" or "raise".
        force: replace an existing recording, once the new one has begun; nothing but a recording is replaced.
        resume: go on with an existing recording at the step whose weights training starts with; if there is none, or
            if that would throw away a training that is complete, or all of one, record a second part beside it.
        budget: limit on disk space ("20GB", or bytes); rows and keyframes are dropped to stay below it.
        keyframe_every: keyframe interval with keep="steps" (optimizer state is rebuilt between).

    Raises:
        OutputExistsError: there is a recording already, and neither `force` nor `resume` was given; or there is
            something that trajrec has not made.
        RecorderBusyError: another recorder writes it.
        RecordingError: it cannot be written there.
        ValueError: an option has none of these values.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        keep: Literal["steps"] | int = "steps",
        compression: Literal["zstd", "none"] = "zstd",
        on_full: OnFull = "wait",
        force: bool = False,
        resume: bool = False,
        budget: str | int | None = None,
        keyframe_every: int = KEYFRAME_INTERVAL,
    ) -> None:
        self._place = Place(Path(os.path.abspath(path)), force, resume)
        self.output, self.folder = self._place.output, self._place.folder
        self.resumed_at = self.resumed_epochs = 0
        self._keep_rows = keep == "steps"
        self._interval = keyframe_every if isinstance(keep, str) else keep
        self._compression = compression
        self._room = Room(self.output, on_full)
        self._budget = None if budget is None else Budget(parse_size(budget), self.folder)
        self._next = 0
        self._resuming = False
        self._is_open = False
        self._live = False  # whether there are a ring and a writer to talk to
        self._stopped: str | None = None  # why
        self._gap: tuple[int, int] | None = None
        self._unkept: Row | None = None
        self._pending: deque[tuple[int, int]] = deque()
        self._largest_inputs = 0
        self._wanted = -1
        self._needed: set[int] = set()  # keyframes that came unasked
        self._staging: Staging | None = None
        _check_options(keep, compression, on_full, self._interval)
        self._place.check()

    def open(self, spec: RunSpec) -> None:
        """Starts the run: makes the ring and starts the writer. Where that fails nothing is left of it.

        Raises:
            OutputExistsError, RecorderBusyError: as when the sink was made.
            DiskFullError: there is no room for the ring.
            RecordingError: the budget is too small, or the writer cannot be started.
        """
        self._spec, self._is_open = spec, True
        if self._stopped is not None:
            return
        self._geometry = self._measure()
        if self._budget is not None:
            self._budget.check_minimum(self._geometry)
        self._place.claim()
        self._lock = self._place.lock
        self._resuming = self._place.resume and not self._place.force and self._place.is_taken()
        if not self._resuming:
            self._begin()

    @property
    def _pause(self) -> int:
        """Steps between two glances at the writer."""
        geometry = self._geometry
        return geometry.chunk_rows if self._budget is not None else min(geometry.segment_rows, _GLANCE_STEPS)

    def _measure(self) -> Geometry:
        spec = self._spec
        return geometry_for(spec.row_length, np.dtype(spec.dtype).itemsize, self._keep_rows)

    def _begin(self) -> None:
        """Begins a new recording in the place that has been claimed; only then an earlier one goes."""
        try:
            self._place.make_room()
            self._lock = self._place.lock
            keep = "steps" if self._keep_rows else "keyframes"
            self._start_writer(0, Manifest(self._spec, self.output.name, keep, self._compression))
            self._writer.check_started()
            self._place.begun()
            register.enter(self._spec)
        except OSError as error:
            self._undo_start()
            raise no_start(error, self.folder.path, ring_bytes(self._geometry)) from error
        except BaseException:
            self._undo_start()
            raise

    def _undo_start(self) -> None:
        if self._live:
            self._writer.kill()
        self._live = False
        self._place.give_up()

    def _start_writer(self, first: int, manifest: Manifest | None = None) -> None:
        """Makes a ring for the steps from `first` on and starts a writer."""
        self._next = first
        try:
            self._ring = create(self.folder.ring, self._geometry, first, self._spec.dtype)
            if manifest is not None:
                self.folder.write_manifest(manifest)
            self._writer = WriterProcess(self.folder, self._ring, self._lock)
        except OSError as error:
            raise no_start(error, self.folder.path, ring_bytes(self._geometry)) from error
        self._live = True

    # ---- going on with an earlier recording

    def _take_up(self, record: StepRecord) -> None:
        """Finds where training starts again, by the weights; elsewhere begins a second part."""
        self._resuming = False
        keep = "any" if self._budget is not None else "steps" if self._keep_rows else "keyframes"
        try:
            why = self._go_on(record.crc32, keep)
        except BaseException:
            self._undo_start()
            raise
        if why:
            self._begin_second_part(record, why)

    def _go_on(self, checksum: int, keep: str) -> str:
        """Goes on with the recording that is there; returns why not, where it is to be kept as it is."""
        found = rework(self.folder, self._lock, "find", str(checksum), keep, self._spec.inputs)
        if found is None:
            return f"No step of {self.output} has the weights that training starts with"
        step, epochs, last, is_complete = found
        if step < last:
            if step == 0 or is_complete:
                return _would_lose(self.output, step, last, bool(is_complete))
            logger.warning(
                "Training starts again with the weights of step %d of %s: the %d step(s) recorded after it go now.",
                *(step, self.output, last - step),
            )
        rework(self.folder, self._lock, "cut", str(step))
        self._keep_rows = self.folder.read_manifest().keep == "steps"
        self._geometry = self._measure()
        self.resumed_at, self.resumed_epochs = step, epochs
        self._needed = {t for t in self.folder.keyframes() if t % self._interval}
        self._start_writer(step + 1)
        logger.warning("Recording of %s goes on after step %d.", self.output, step)
        return ""

    def _begin_second_part(self, record: StepRecord, why: str) -> None:
        row = self._scratch
        self._place.give_up()
        self._place = self._place.second_part()
        self.output, self.folder = self._place.output, self._place.folder
        self._room = Room(self.output, self._room.on_full)
        if self._budget is not None:
            self._budget = Budget(self._budget.limit, self.folder)
        logger.warning("%s: this is recorded as a second part, %s.", why, self.output)
        self._place.claim()
        self._begin()
        if (target := self.reserve()) is not None:
            target[:] = row
        self.commit(record)

    # ---- steps

    def reserve(self) -> Row | None:
        """The row [P] to fill before the next commit, or None if rows of single steps are not kept."""
        if self._stopped is not None:
            return self._unkept_row()
        if self._resuming:
            self._scratch = np.empty(self._spec.row_length, self._spec.dtype)
            return self._scratch if self._keep_rows else None
        if self._next % self._geometry.chunk_rows == 0:
            self._stay_in_budget()
        while self._stopped is None and not self._ring.has_slot(self._next):
            self._wait_for_writer()
        return self._unkept_row() if self._stopped is not None else self._ring.open_slot(self._next)

    def _unkept_row(self) -> Row | None:
        """A row that may be filled, and goes nowhere."""
        if self._unkept is None and self._keep_rows and self._is_open:
            self._unkept = np.empty(self._spec.row_length, self._spec.dtype)
        return self._unkept

    def commit(self, record: StepRecord) -> None:
        """Publishes the reserved row together with its record."""
        if self._stopped is not None:
            self.note_gap(record.step)
            return
        if self._resuming:
            self._take_up(record)
            return
        if record.step != self._next:
            raise RecordingError(f"Step {self._next} was to be recorded, and step {record.step} was given.")
        while self._stopped is None and not self._publish(record):
            pass
        if self._stopped is not None:
            self.note_gap(record.step)
            return
        self._next = record.step + 1
        self._glance()

    def _publish(self, record: StepRecord) -> bool:
        """Publishes a record; False where there was no room, and may be now."""
        try:
            if self._ring.publish(record):
                return True
        except OSError as error:
            self._stop(self._room.act(error, self._next, self._geometry.arena_bytes))
        else:
            self._ring.set(Control.FLUSH, record.step)
            self._wait_for_writer()
        return False

    def _glance(self) -> None:
        """Looks after the writer now and then."""
        if self._next % self._pause == 0:
            self._writer.wake()
            if self._writer.status() is Status.DISK_FULL and self._room.free > 2 * self._geometry.segment_bytes:
                self._writer.restart()

    def stop(self, reason: str) -> None:
        """Ends recording, and not the run: what comes now is noted as a gap, and nothing is kept. Says nothing."""
        if self._stopped is None:
            self._stopped = reason

    def note_gap(self, step: int) -> None:
        """Notes that the steps from the last recorded one up to this one go unrecorded."""
        self.stop(f"Step {step} was not recorded.")
        if step < max(1, self._next):
            return
        self._gap = max(1, self._next), step if self._gap is None else max(step, self._gap[1])
        if self._live:
            self._ring.set(Control.GAP_FIRST, self._gap[0])
            self._ring.set(Control.GAP_LAST, self._gap[1])

    def abandon(self) -> None:
        """Closes a forked process's copies of lock and pipe; whatever is called here from now on does nothing."""
        if self._live:
            self._writer.abandon()
        self._live, self._next = False, 0
        self._place.release()
        self.stop("This process was forked from the one that is recorded.")

    def wants_keyframe(self, step: int) -> bool:
        """Whether the state after this step is to be kept."""
        wanted = step % self._interval == 0 and self._stopped is None
        self._wanted = step if wanted else -1
        return wanted

    def keyframe(self, keyframe: LiveKeyframe) -> None:
        """Takes the state after a committed step; none once recording has stopped, because training has gone on."""
        if self._stopped is not None:
            return
        is_needed, self._wanted = keyframe.step != self._wanted, -1
        if is_needed:
            self._needed.add(keyframe.step)
        if keyframe.step >= self._next:
            return
        if not is_needed and self._staging is not None:
            if self._staging.put(keyframe):
                return
            self._writer.wake()
        size = self._write(self.folder.keyframe(keyframe.step), pieces_of(keyframe.copied()))
        if not is_needed and self._staging is None:
            self._prepare_staging(size)

    def _prepare_staging(self, size: int) -> None:
        """Makes room for keyframes of this size; none under a budget, or where the disk is filling up."""
        needed = 2 * (self._geometry.segment_bytes + PLACES * size)
        if self._budget is None and 0 < size <= LARGEST and self._room.free > needed:
            with suppress(OSError):
                self._staging = Staging(self.folder.staged, size + PAGE)

    def inputs(self, inputs: Inputs) -> None:
        """Takes the inputs of the step that is committed next, before its row is reserved."""
        if self._stopped is not None:
            return
        expected = sum(array.nbytes for array in inputs.arrays.values())
        if expected > self._largest_inputs:
            self._largest_inputs = expected
            self._stay_in_budget()
        size = self._write(self.folder.inputs(inputs.step), pieces_of(inputs))
        self._pending.append((inputs.step, size))
        if self._pending_inputs() > INPUT_BYTES // 2:
            self._flush_before(inputs.step)
            self._writer.wake()
        while self._stopped is None and self._pending_inputs() > max(INPUT_BYTES, 4 * size):
            self._flush_before(inputs.step)
            self._wait_for_writer()

    def _flush_before(self, step: int) -> None:
        """Has the steps before this one sealed; in whole chunks of rows, where there are any."""
        aligned = step - step % self._geometry.chunk_rows
        self._ring.set(Control.FLUSH, aligned if aligned > self._ring.get(Control.TAIL) else step)

    def _pending_inputs(self) -> int:
        """Bytes of raw inputs that no segment has taken in yet."""
        tail = self._ring.get(Control.TAIL)
        while self._pending and self._pending[0][0] < tail:
            self._pending.popleft()
        return sum(size for _, size in self._pending)

    def _write(self, path: Path, pieces: list[Piece]) -> int:
        """Writes a raw file, and returns its size; 0 where recording has stopped."""
        while self._stopped is None:
            try:
                return write_pieces(path, pieces)
            except OSError as error:
                self._stop(self._room.act(error, self._next, sum(map(len, pieces))))
        return 0

    # ---- the budget

    def _stay_in_budget(self) -> None:
        budget = self._budget
        if budget is None:
            return
        inputs = self._pending_inputs() + self._geometry.chunk_rows * self._largest_inputs
        while self._stopped is None and budget.exceeded(self._geometry, self._ring.pending_bytes(self._next) + inputs):
            if self._keep_rows:
                self._drop_rows(budget)
            elif (interval := budget.thin(self._interval, self._needed)) is not None:
                self._interval = interval
            else:
                self._stop(f"The budget of {self.output} is used up at step {self._next - 1}.")

    def _drop_rows(self, budget: Budget) -> None:
        """From now on keeps keyframes only: one writer ends, the folder is reworked, another begins."""
        status = self._end_writer(Finish.HAND_OVER)
        if status is not Status.DONE:
            self._act_on(status)
            return
        self._writer.close()
        self._live = False
        while self._stopped is None and not self._live:
            try:
                self._go_on_without_rows(budget)
            except DiskFullError:
                self._stop(self._room.act_on_full_disk(self._next, self._geometry.segment_bytes))

    def _go_on_without_rows(self, budget: Budget) -> None:
        rework(self.folder, self._lock, "drop-rows")
        budget.forget()
        self._keep_rows = False
        self._geometry = self._measure()
        self._start_writer(self._next)

    # ---- waiting, and full disks

    def _wait_for_writer(self) -> None:
        """Waits a moment for the writer to free slots; acts if it has no room to."""
        self._writer.wake()
        tail, until = self._ring.get(Control.TAIL), time.monotonic() + _GLANCE
        while self._ring.get(Control.TAIL) == tail and time.monotonic() < until:
            time.sleep(_NAP)
        if self._ring.get(Control.TAIL) != tail:
            return  # what it has sealed made room here, also if there was none for more
        self._act_on(self._writer.status())

    def _act_on(self, status: Status) -> None:
        """Does what there is to do about a writer that has ended before its time."""
        if status is Status.DISK_FULL:
            self._stop(self._room.act_on_full_disk(self._next, self._geometry.segment_bytes // 2))
            if self._stopped is None:
                self._writer.restart()
        elif status is Status.FILE_TOO_LARGE:
            self._stop(self._room.act_on_limit(self._next))
        elif status is not Status.RUNNING:
            self._stop(f"The writer of {self.output} cannot go on: {self._writer.reason()}")

    def _stop(self, why: str | None) -> None:
        """Stops recording if there is a reason to, and says so."""
        if why is not None:
            logger.warning("%s Training goes on WITHOUT RECORDING; the steps before it are kept.", why)
            self.stop(why)

    # ---- the end

    def close(self, complete: bool) -> Summary:
        """Ends the run: waits until the writer has sealed and packed everything, and read it back.

        Raises:
            RecordingError: the writer cannot finish.
        """
        if not self._live:
            self._place.give_up()
            return self._unpacked("It has no writer") if self._next else self._nothing()
        if not self._next:
            self._undo_start()
            return self._nothing()
        self._live, status = False, Status.FAILED
        try:
            status = self._end_writer(Finish.COMPLETE if complete else Finish.RECOVERED)
        finally:
            self._writer.close()
            if status is Status.DONE:
                self.folder.remove()  # a writer may have been killed over it
            self._place.release()
        if status is Status.DONE:
            return Summary(self.output, self._next - 1, self.output.stat().st_size, self._gaps, self._stopped)
        self.folder.sweep()
        return self._unpacked(_WHY_UNPACKED.get(status) or self._writer.reason())

    def _end_writer(self, finish: Finish) -> Status:
        """Has the writer finish and waits for it: DONE, or why it is not; waits for room where `on_full` says so."""
        self._ring.set(Control.FINISH, finish)
        self._writer.wake()
        while (status := self._writer.status()) is not Status.DONE:
            if status is Status.RUNNING:
                self._writer.wait(_GLANCE)
            elif status is Status.DISK_FULL and self._room.on_full == "wait":
                self._room.wait(f"The disk is full: {self.output} cannot be finished.", self.folder.packing_size())
                self._writer.restart()
            else:
                break
        return status

    @property
    def _gaps(self) -> tuple[tuple[int, int], ...]:
        return () if self._gap is None else (self._gap,)

    def _nothing(self) -> Summary:
        return Summary(None, 0, 0, self._gaps, self._stopped)

    def _unpacked(self, why: str) -> Summary:
        folder = self.folder.path
        logger.error(
            "%s was NOT PACKED: %s. What was recorded is safe in %s, and is read like a packed run; "
            "`trajrec pack %s` packs it once the cause is gone.",
            *(self.output, why.rstrip("."), folder, folder),
        )
        return Summary(folder, self._next - 1, self.folder.size(), self._gaps, self._stopped)


_WHY_UNPACKED = {
    Status.DISK_FULL: "The disk is full; make room",
    Status.FILE_TOO_LARGE: f"{LIMIT}; raise it",
}


def _would_lose(output: Path, step: int, last: int, is_complete: bool) -> str:
    """Why a recording is kept as it is."""
    what = f"the {last} steps of a training that is complete" if is_complete else f"{last} steps"
    return (
        f"{output} holds {what}, and training starts with the weights of step {step}; going on there would throw away "
        f"{last - step} of them, so they are kept"
    )


def _check_options(keep: object, compression: str, on_full: str, interval: int) -> None:
    if (isinstance(keep, str) and keep != "steps") or interval < 1:
        raise ValueError(f'keep is "steps" or a number of steps from 1; found {keep!r}.')
    if compression not in ("zstd", "none"):
        raise ValueError(f'compression is "zstd" or "none"; found {compression!r}.')
    if on_full not in ("wait", "stop-recording", "raise"):
        raise ValueError(f'on_full is "wait", "stop-recording" or "raise"; found {on_full!r}.')

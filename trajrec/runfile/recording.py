"""The sink that writes a run file, as the training process sees it: copy into the ring, now and then a glance.

    reserve()   waits for a free slot (there nearly always is one) and hands out its row
    commit()    encodes the record into the ring and publishes the slot; now and then wakes the writer
    inputs()    writes a raw file, which the writer takes into the step's segment
    keyframe()  leaves it to the writer (staging.py), or writes a raw file
    close()     waits until the writer has packed everything

No HDF5 here: on a full disk it takes its process down with it. When the writer has no room it ends, and nothing
happens to training until the ring is full. Then `on_full` decides: "wait" until there is room, "stop-recording" (the
training goes on, the steps that are not recorded are noted as a gap), or "raise" `DiskFullError`.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trajrec import register
from trajrec.errors import DiskFullError, OutputExistsError, RecorderBusyError, RecordingError
from trajrec.records import Inputs, LiveKeyframe, Row, RunSpec, StepRecord
from trajrec.runfile.budget import Budget, parse_size
from trajrec.runfile.folder import Folder, Manifest, is_disk_full
from trajrec.runfile.geometry import PAGE, Geometry, geometry_for
from trajrec.runfile.keyfile import Piece, pieces_of, write_pieces
from trajrec.runfile.lock import Lock, holder
from trajrec.runfile.process import WriterProcess, rework
from trajrec.runfile.ring import Control, Finish, Status, create, ring_bytes
from trajrec.runfile.staging import LARGEST, PLACES, Staging
from trajrec.sink import Summary

logger = logging.getLogger("trajrec")

KEYFRAME_INTERVAL = 64
INPUT_BYTES = 256 * 1024**2  # of raw inputs at a time; then training waits for the writer
_NAP = 0.001
_GLANCE = 0.1
_GLANCE_STEPS = 128
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
        resume: go on with an existing recording at the step whose weights training starts with; if there is none,
            record a second part beside it.
        budget: limit on disk space ("20GB", or bytes); rows and keyframes are dropped to stay below it.
        keyframe_every: keyframe interval with keep="steps" (optimizer state is rebuilt between).

    Raises:
        OutputExistsError: there is a recording already, and neither `force` nor `resume` was given.
        RecorderBusyError: another recorder writes it.
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
        self.output = Path(path)
        self.folder = Folder.of(self.output)
        self.resumed_at = self.resumed_epochs = 0
        self._keep_rows = keep == "steps"
        self._interval = keyframe_every if isinstance(keep, str) else keep
        self._compression = compression
        self._on_full = on_full
        self._force = force
        self._resume = resume
        self._budget = None if budget is None else Budget(parse_size(budget), self.folder)
        self._next = 0
        self._resuming = False
        self._stopped = False
        self._retried_at = -1
        self._pending: deque[tuple[int, int]] = deque()
        self._largest_inputs = 0
        self._wanted = -1
        self._needed: set[int] = set()  # keyframes that came unasked
        self._staging: Staging | None = None
        _check_options(keep, compression, on_full, self._interval)
        self._check_output()

    def _check_output(self) -> None:
        pid = holder(self.folder.lock)
        if pid is not None:
            raise RecorderBusyError(f"{self.output} is being recorded by process {pid}. Record to another file.")
        found = [p for p in (self.output, self.folder.path) if p.exists()]
        if found and not self._force and not self._resume:
            raise OutputExistsError(
                f"{found[0]} exists already and would be overwritten. Record to another file, pass --resume "
                "(resume=True) to go on with it, or --force (force=True) to replace it."
            )

    def open(self, spec: RunSpec) -> None:
        """Starts the run: makes the ring and starts the writer.

        Raises:
            RecorderBusyError: another recorder writes it.
            DiskFullError: there is no room for the ring.
            RecordingError: the budget is too small.
        """
        self._spec = spec
        self._geometry = self._measure()
        if self._budget is not None:
            self._budget.check_minimum(self._geometry)
        self._lock_folder()
        self._resuming = self._resume and not self._force and self._is_there()
        if not self._resuming:
            self._begin()

    @property
    def _pause(self) -> int:
        """Steps between two glances at the writer."""
        geometry = self._geometry
        return geometry.chunk_rows if self._budget is not None else min(geometry.segment_rows, _GLANCE_STEPS)

    def _lock_folder(self) -> None:
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.folder.lock)

    def _is_there(self) -> bool:
        return self.output.exists() or self.folder.manifest.exists()

    def _measure(self) -> Geometry:
        spec = self._spec
        return geometry_for(spec.row_length, np.dtype(spec.dtype).itemsize, self._keep_rows)

    def _begin(self) -> None:
        """Begins a new recording in the locked folder."""
        self.folder.clear()
        self.output.unlink(missing_ok=True)
        keep = "steps" if self._keep_rows else "keyframes"
        self._start_writer(0, Manifest(self._spec, self.output.name, keep, self._compression))
        register.enter(self._spec)

    def _start_writer(self, first: int, manifest: Manifest | None = None) -> None:
        """Makes a ring for the steps from `first` on and starts a writer."""
        self._next = first
        try:
            self._ring = create(self.folder.ring, self._geometry, first, self._spec.dtype)
            if manifest is not None:
                self.folder.write_manifest(manifest)
        except OSError as error:
            self._lock.release()
            raise _no_room(error, self.folder.path, ring_bytes(self._geometry)) from error
        self._writer = WriterProcess(self.folder, self._ring, self._lock)

    # ---- going on with an earlier recording

    def _take_up(self, record: StepRecord) -> None:
        """Finds where training starts again, by the weights; elsewhere begins a second part."""
        self._resuming = False
        keep = "any" if self._budget is not None else "steps" if self._keep_rows else "keyframes"
        try:
            found = rework(self.folder, "resume", str(record.crc32), keep, self._spec.inputs)
        except BaseException:
            self._lock.release()
            raise
        if found is None:
            self._begin_second_part(record)
            return
        step, self.resumed_epochs = found
        self._keep_rows = self.folder.read_manifest().keep == "steps"
        self._geometry = self._measure()
        self.resumed_at = step
        self._needed = {t for t in self.folder.keyframes() if t % self._interval}
        self._start_writer(step + 1)
        logger.warning("Recording of %s goes on after step %d.", self.output, step)

    def _begin_second_part(self, record: StepRecord) -> None:
        first, row = self.output, self._scratch
        self._lock.release()
        if not self.folder.manifest.exists():
            self.folder.remove()
        self.output = next(path for path in _parts(first) if not path.exists() and not Folder.of(path).path.exists())
        self.folder = Folder.of(self.output)
        if self._budget is not None:
            self._budget = Budget(self._budget.limit, self.folder)
        logger.warning(
            "No step of %s has the weights that training starts with: this is recorded as a second part, %s.",
            first,
            self.output,
        )
        self._lock_folder()
        self._begin()
        if (target := self.reserve()) is not None:
            target[:] = row
        self.commit(record)

    # ---- steps

    def reserve(self) -> Row | None:
        """The row [P] to fill before the next commit, or None if rows of single steps are not kept."""
        if self._resuming:
            self._scratch = np.empty(self._spec.row_length, self._spec.dtype)
            return self._scratch if self._keep_rows else None
        if self._next % self._geometry.chunk_rows == 0:
            self._stay_in_budget()
        while not self._stopped and not self._ring.has_slot(self._next):
            self._wait_for_writer()
        if self._stopped:
            return np.empty(self._spec.row_length, self._spec.dtype) if self._keep_rows else None
        return self._ring.open_slot(self._next)

    def commit(self, record: StepRecord) -> None:
        """Publishes the reserved row together with its record."""
        if self._resuming:
            self._take_up(record)
            return
        if record.step != self._next and not self._stopped:
            raise RecordingError(f"Step {self._next} was to be recorded, and step {record.step} was given.")
        while not self._stopped and not self._ring.publish(record):
            self._ring.set(Control.FLUSH, record.step)
            self._wait_for_writer()
        if self._stopped:
            self._note_gap(record.step)
            return
        self._next = record.step + 1
        self._glance()

    def _glance(self) -> None:
        """Looks after the writer now and then."""
        if self._next % self._pause == 0:
            self._writer.wake()
            if self._writer.status() is Status.DISK_FULL and self._free() > 2 * self._geometry.segment_bytes:
                self._writer.restart()

    def _note_gap(self, step: int) -> None:
        if not self._ring.gaps():
            self._ring.set(Control.GAP_FIRST, step)
        self._ring.set(Control.GAP_LAST, step)

    def straight(self, step: int) -> dict[str, Any] | None:
        """Where the lane may publish this and the next steps by itself: fields of it; None if it must not.

        Up to a step after which the writer is looked after or a keyframe is due, or before which the budget is.
        """
        is_ready = step == self._next and not self._stopped and not self._resuming and self._spec.inputs != "store"
        if not is_ready or (self._budget is not None and step % self._geometry.chunk_rows == 0):
            return None
        end = 1 + min(step + -(step + 1) % self._pause, step + -step % self._interval)
        return self._ring.straight(end)

    def went_straight(self, step: int, arena_head: int) -> None:
        """The lane has published the steps up to this one, and records in the arena up to there."""
        self._ring.went_straight(arena_head)
        if step >= self._next:
            self._next = step + 1
            self._glance()

    def wants_keyframe(self, step: int) -> bool:
        """Whether the state after this step is to be kept."""
        wanted = step % self._interval == 0 and not self._stopped
        self._wanted = step if wanted else -1
        return wanted

    def keyframe(self, keyframe: LiveKeyframe) -> None:
        """Takes the state after a committed step."""
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
        if self._budget is None and 0 < size <= LARGEST and self._free() > needed:
            with suppress(OSError):
                self._staging = Staging(self.folder.staged, size + PAGE)

    def inputs(self, inputs: Inputs) -> None:
        """Takes the inputs of the step that is committed next, before its row is reserved."""
        expected = sum(array.nbytes for array in inputs.arrays.values())
        if expected > self._largest_inputs:
            self._largest_inputs = expected
            self._stay_in_budget()
        size = self._write(self.folder.inputs(inputs.step), pieces_of(inputs))
        self._pending.append((inputs.step, size))
        if self._pending_inputs() > INPUT_BYTES // 2:
            self._flush_before(inputs.step)
            self._writer.wake()
        while not self._stopped and self._pending_inputs() > max(INPUT_BYTES, 4 * size):
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
        while not self._stopped:
            try:
                return write_pieces(path, pieces)
            except OSError as error:
                if not is_disk_full(error):
                    raise
                self._act_on_full_disk(sum(map(len, pieces)))
        return 0

    # ---- the budget

    def _stay_in_budget(self) -> None:
        budget = self._budget
        if budget is None:
            return
        inputs = self._pending_inputs() + self._geometry.chunk_rows * self._largest_inputs
        while not self._stopped and budget.exceeded(self._geometry, self._ring.pending_bytes(self._next) + inputs):
            if self._keep_rows:
                self._drop_rows(budget)
            elif (interval := budget.thin(self._interval, self._needed)) is not None:
                self._interval = interval
            else:
                self._stop(f"The budget of {self.output} is used up at step {self._next - 1}.")

    def _drop_rows(self, budget: Budget) -> None:
        """From now on keeps keyframes only: one writer ends, the folder is reworked, another begins."""
        if self._end_writer(Finish.HAND_OVER) is not Status.DONE:
            self._act_on_full_disk(self._geometry.segment_bytes)
            return
        self._writer.close()
        rework(self.folder, "drop-rows")
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
            self._stop(where)
        else:
            self._wait_for_room(where, needed)

    def _stop(self, why: str) -> None:
        logger.warning("%s Training goes on WITHOUT RECORDING; the steps before it are kept.", why)
        self._stopped = True

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
        try:
            status = self._end_writer(Finish.COMPLETE if complete else Finish.RECOVERED)
        finally:
            self._writer.close()
            self._lock.release()
        return self._summary(packed=status is Status.DONE)

    def _end_writer(self, finish: Finish) -> Status:
        """Has the writer finish and waits for it: DONE, or DISK_FULL where `on_full` is not to wait for room."""
        self._ring.set(Control.FINISH, finish)
        self._writer.wake()
        while (status := self._writer.status()) is not Status.DONE:
            if status is Status.RUNNING:
                self._writer.wait(_GLANCE)
            elif self._on_full == "wait":
                self._wait_for_room(f"The disk is full: {self.output} cannot be finished.", self.folder.packing_size())
                self._writer.restart()
            else:
                break
        return status

    def _summary(self, packed: bool) -> Summary:
        gaps = self._ring.gaps()
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


def _parts(output: Path) -> Iterator[Path]:
    """run-part2.h5, run-part3.h5, ..."""
    return (output.with_name(f"{output.stem}-part{k}{output.suffix}") for k in count(2))


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

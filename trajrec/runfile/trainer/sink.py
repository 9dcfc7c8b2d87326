"""The sink that writes a run file, as the training process sees it: copy into the ring, now and then a glance.

    open()      claims the place (place.py), makes the ring and starts the writer (process.py); or, where a recording
                may go on, waits for the weights that training starts with (resume.py)
    reserve()   waits for a free slot (there nearly always is one) and hands out its row
    commit()    encodes the record into the ring and publishes the slot; now and then wakes the writer
    inputs()    writes a raw file, which the writer takes into the step's segment
    keyframe()  writes a raw file
    widen()     begins a stretch of longer rows: a frozen parameter is trained from now on
    close()     waits until the writer has packed everything

No HDF5 here: on a full disk it takes its process down with it. When the writer has no room it ends, and nothing
happens to training until the ring is full. Then `on_full` decides (fulldisk.py). A budget is looked after between
chunks of rows (budget.py).

Once recording has stopped, whoever asked for it, every call is answered and nothing is kept. In a process that was
forked (`abandon`) there is no ring and no writer any more, only that.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from trajrec.errors import DiskFullError, RecordingError
from trajrec.records import Inputs, LiveKeyframe, ParamSpec, Row, RunSpec, StepRecord
from trajrec.runfile import register
from trajrec.runfile.folder import Folder
from trajrec.runfile.format.arrays import Piece, pieces_of, write_pieces
from trajrec.runfile.format.geometry import LIMITS, Geometry, Limits
from trajrec.runfile.manifest import Manifest
from trajrec.runfile.place import Place
from trajrec.runfile.ring import Control, Finish, Status, ring_bytes
from trajrec.runfile.trainer import outlook, resume
from trajrec.runfile.trainer.budget import Budget, parse_size
from trajrec.runfile.trainer.ending import Ending
from trajrec.runfile.trainer.fulldisk import Room, no_start
from trajrec.runfile.trainer.inputs import RawInputs
from trajrec.runfile.trainer.keyframes import Schedule
from trajrec.runfile.trainer.options import OnFull, Options
from trajrec.runfile.trainer.outlook import Outlook
from trajrec.runfile.trainer.process import Line, WriterProcess, rework, start
from trajrec.runfile.trainer.waiting import Waiting
from trajrec.sink import Summary

logger = logging.getLogger("trajrec")

KEYFRAME_INTERVAL = 64


class RunFileSink:
    """Writes one run to `path`.

    Args:
        path: the run file; it is a folder `path.rec` until the run ends. Made absolute here and now.
        keep: "steps" for the weights of every step, or K for keyframes every K steps and checksums between; None is
            "steps" until that would take three quarters of the free disk, and keyframes then (outlook.py).
        compression: "zstd" or "none".
        on_full: what to do when the disk is full: "wait", "stop-recording" or "raise".
        force: replace an existing recording, once the new one has begun; nothing but a recording is replaced.
        resume: go on with an existing recording at the step whose weights training starts with; if there is none, or
            if that would throw away a training that is complete, or all of one, record a second part beside it.
        budget: limit on disk space ("20GB", or bytes); rows and keyframes are dropped to stay below it.
        keyframe_every: keyframe interval with keep="steps" (optimizer state is rebuilt between).
        limits: how large segments, ring and raw inputs get.

    Attributes:
        place: where it goes.
        resumed_at: the step at which an earlier recording goes on, else 0; `resumed_epochs` had begun by then.

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
        keep: Literal["steps"] | int | None = None,
        compression: Literal["zstd", "none"] = "zstd",
        on_full: OnFull = "wait",
        force: bool = False,
        resume: bool = False,
        budget: str | int | None = None,
        keyframe_every: int = KEYFRAME_INTERVAL,
        limits: Limits = LIMITS,
    ) -> None:
        size = None if budget is None else parse_size(budget)
        self._options = Options(keep, compression, on_full, size, keyframe_every, limits)
        self._move_to(Place(Path(os.path.abspath(path)), force, resume))
        self.resumed_at = self.resumed_epochs = 0
        self._ending, self._waiting = Ending(), Waiting()
        self._spec: RunSpec | None = None
        self._line: Line | None = None
        self._next = 0
        self._is_resuming = False
        self._spare: Row | None = None
        self._inputs = RawInputs(limits.input_bytes)
        self._keyframes = Schedule(self._options.interval)
        self._limit = 0
        self.place.check()

    def _move_to(self, place: Place) -> None:
        self.place, limit = place, self._options.budget
        self._room = Room(place.output, self._options.on_full)
        self._budget = None if limit is None else Budget(limit, place.folder)

    @property
    def output(self) -> Path:
        """The run file to be."""
        return self.place.output

    @property
    def folder(self) -> Folder:
        """The recording's folder."""
        return self.place.folder

    @property
    def stopped(self) -> str | None:
        """Why recording has ended before the training; None as long as it has not."""
        return self._ending.reason

    @property
    def writer(self) -> WriterProcess:
        """The writer process of a recording that has begun."""
        return self._at_work.writer

    @property
    def _at_work(self) -> Line:
        assert self._line is not None
        return self._line

    @property
    def _geometry(self) -> Geometry:
        return self._at_work.geometry

    # ---- the beginning

    def open(self, spec: RunSpec) -> None:
        """Starts the run: makes the ring and starts the writer. Where that fails nothing is left of it.

        Raises:
            OutputExistsError, RecorderBusyError: as when the sink was made.
            DiskFullError: there is no room for the ring.
            RecordingError: the budget is too small, or the writer cannot be started.
        """
        self._spec = spec
        if self.stopped is not None:
            return
        if self._budget is not None:
            self._budget.check_minimum(self._options.geometry(spec, self._options.keeps_rows))
        self.place.claim()
        self._is_resuming = self.place.resume and not self.place.force and self.place.is_taken()
        if not self._is_resuming:
            self._begin(spec)

    def _begin(self, spec: RunSpec) -> None:
        """Begins a new recording in the place that has been claimed; only then an earlier one goes."""
        options = self._options
        try:
            self.place.make_room()
            keep = "steps" if options.keeps_rows else "keyframes"
            self._start(0, Manifest(spec, self.output.name, keep, options.compression), is_new=True)
            self.writer.check_started()
            self.place.begun()
            register.enter(spec)
        except OSError as error:
            self._undo_start()
            size = ring_bytes(options.geometry(spec, options.keeps_rows))
            raise no_start(error, self.folder.path, size) from error
        except BaseException:
            self._undo_start()
            raise

    def _start(self, first: int, manifest: Manifest, is_new: bool = False) -> None:
        """Makes a ring for the steps from `first` on, and starts a writer."""
        self._next = first
        geometry = self._options.geometry(manifest.spec, manifest.keep == "steps")
        self._limit_to_free(geometry)
        self._line = start(self.place, geometry, first, manifest, is_new)

    def _limit_to_free(self, geometry: Geometry) -> None:
        """Makes a part of what is free a budget of a recording that chooses what to keep, if it can begin in that."""
        self._limit = self._limit or outlook.limit_of(self._room.free)
        if self._options.chooses and self._budget is None:
            budget = Budget(self._limit, self.folder)
            self._budget = budget if budget.suffices(geometry) else None

    def _undo_start(self) -> None:
        if self._line is not None:
            self._line.writer.kill()
            self._line.writer.close()
        self._line = None
        self.place.give_up()

    def _take_up(self, record: StepRecord) -> None:
        """Goes on where training starts again, told by the weights; elsewhere begins a second part."""
        assert self._spec is not None
        row, self._spare, self._is_resuming = self._spare, None, False
        keep = (
            "any"
            if self._budget is not None or self._options.chooses
            else "steps"
            if self._options.keeps_rows
            else "keyframes"
        )
        try:
            found = resume.find(self.place, record.crc32, keep, self._spec)
            why = resume.why_kept(self.output, found)
            if found is not None and not why:
                self._go_on(found)
                return
        except BaseException:
            self._undo_start()
            raise
        self._begin_second_part(self._spec, record, row, why)

    def _go_on(self, found: resume.Resumption) -> None:
        resume.cut(self.place, found)
        self.resumed_at, self.resumed_epochs = found.step, found.epochs
        self._keyframes.know(self.folder.keyframes())
        manifest = self.folder.read_manifest()
        self._spec = manifest.spec
        self._start(found.step + 1, manifest)
        logger.warning("Recording of %s goes on after step %d.", self.output, found.step)

    def _begin_second_part(self, spec: RunSpec, record: StepRecord, row: Row | None, why: str) -> None:
        self.place.give_up()
        self._move_to(self.place.second_part())
        logger.warning("%s: this is recorded as a second part, %s.", why, self.output)
        self.place.claim()
        self._begin(spec)
        if (target := self.reserve()) is not None:
            target[:] = row
        self.commit(record)

    # ---- steps

    def reserve(self) -> Row | None:
        """The row [P] to fill before the next commit, or None if rows of single steps are not kept."""
        if self._is_idle:
            return self._spare_row()
        if self._next % self._geometry.chunk_rows == 0:
            self._stay_in_budget()
        while not self._is_idle and not self._at_work.ring.has_slot(self._next):
            self._wait_for_writer()
        return self._spare_row() if self._is_idle else self._at_work.ring.open_slot(self._next)

    @property
    def _is_idle(self) -> bool:
        """Whether nothing goes into a ring: recording has stopped, or has yet to find where it goes on."""
        return self.stopped is not None or self._is_resuming

    def _spare_row(self) -> Row | None:
        """A row that may be filled, and is in no ring."""
        if self._spare is None and self._keeps_rows and self._spec is not None:
            self._spare = np.empty(self._spec.row_length, self._spec.dtype)
        return self._spare

    @property
    def _keeps_rows(self) -> bool:
        return self._options.keeps_rows if self._line is None else self._line.geometry.row_length > 0

    def commit(self, record: StepRecord) -> None:
        """Publishes the reserved row together with its record."""
        if self._is_resuming and self.stopped is None:
            self._take_up(record)
            return
        if self.stopped is None and record.step != self._next:
            raise RecordingError(f"Step {self._next} was to be recorded, and step {record.step} was given.")
        while self.stopped is None and not self._publish(record):
            pass
        if self.stopped is not None:
            self.note_gap(record.step)
            return
        self._next = record.step + 1
        self._glance()
        if record.step == outlook.AFTER:
            self._say_what_is_coming()

    def _publish(self, record: StepRecord) -> bool:
        """Publishes a record; False where there was no room, and may be now."""
        try:
            if self._at_work.ring.publish(record):
                return True
        except OSError as error:
            self._stop(self._room.act(error, self._next, self._geometry.arena_bytes))
        else:
            self._at_work.ring.set(Control.FLUSH, record.step)
            self._wait_for_writer()
        return False

    def _glance(self) -> None:
        """Looks after the writer now and then."""
        line = self._at_work
        if self._next % line.pause(self._options.budget is not None) == 0:
            line.writer.wake()
            if line.writer.status() is Status.DISK_FULL and self._room.free > 2 * line.geometry.segment_bytes:
                line.writer.restart()

    def inputs(self, inputs: Inputs) -> None:
        """Takes the inputs of the step that is committed next, before its row is reserved."""
        if self.stopped is not None:
            return
        if self._inputs.announce(inputs):
            self._stay_in_budget()
        size = self._write(self.folder.inputs(inputs.step), pieces_of(inputs))
        if self.stopped is not None:
            return
        self._inputs.written(inputs.step, size)
        line = self._at_work
        if self._inputs.are_many(line.tail):
            line.flush_before(inputs.step)
            line.writer.wake()
        while self.stopped is None and self._inputs.are_too_many(line.tail):
            line.flush_before(inputs.step)
            self._wait_for_writer()

    def widen(self, params: Sequence[ParamSpec]) -> None:
        """Begins a stretch of rows with further parameters: one writer seals what there is, another begins."""
        while (
            self.stopped is None and (status := self._at_work.finish(Finish.HAND_OVER, self._room)) is not Status.DONE
        ):
            self._act_on(status)
        if self.stopped is not None:
            return
        self.writer.close()
        self._line = self._spare = None
        if self.folder.read_manifest().plain_rows:
            # A file of rows has rows of one length; segments have their own.
            rework(self.folder, self.place.lock, "compress")
        manifest = self.folder.read_manifest()
        self._spec = manifest.spec.widened(self._next, params)
        self._start(self._next, replace(manifest, spec=self._spec), is_new=True)
        if self._budget is not None:
            self._budget.forget()

    def wants_keyframe(self, step: int) -> bool:
        """Whether the state after this step is to be kept."""
        return self.stopped is None and self._keyframes.wants(step)

    def keyframe(self, keyframe: LiveKeyframe) -> None:
        """Takes the state after a committed step; none once recording has stopped, because training has gone on."""
        if self.stopped is not None:
            return
        self._keyframes.given(keyframe.step)
        if keyframe.step < self._next:
            self._write(self.folder.keyframe(keyframe.step), pieces_of(keyframe.copied()))

    def _write(self, path: Path, pieces: list[Piece]) -> int:
        """Writes a raw file, and returns its size; 0 where recording has stopped."""
        while self.stopped is None:
            try:
                return write_pieces(path, pieces)
            except OSError as error:
                self._stop(self._room.act(error, self._next, sum(map(len, pieces))))
        return 0

    # ---- what recording ends with before the training does

    def stop(self, reason: str) -> None:
        """Ends recording, and not the run: what comes now is noted as a gap, and nothing is kept. Says nothing."""
        self._ending.stop(reason)

    def _stop(self, why: str | None) -> None:
        """Stops recording if there is a reason to, and says so."""
        if why is not None:
            logger.warning("%s Training goes on WITHOUT RECORDING; the steps before it are kept.", why)
            self._ending.stop(why)

    def note_gap(self, step: int) -> None:
        """Notes that the steps from the last recorded one up to this one go unrecorded."""
        self._ending.note_gap(step, max(1, self._next), None if self._line is None else self._line.ring)

    def abandon(self) -> None:
        """Closes a forked process's copies of lock and pipe; whatever is called here from now on does nothing."""
        if self._line is not None:
            self._line.writer.abandon()
        self._line, self._next = None, 0
        self.place.release()
        self.stop("This process was forked from the one that is recorded.")

    def _wait_for_writer(self) -> None:
        """Waits a moment for the writer to free slots; acts if it has no room to."""
        with self._waiting.for_writer(self.output):
            is_going_on = self._at_work.wait_for_tail()
        if not is_going_on:
            self._act_on(self.writer.status())

    def _act_on(self, status: Status) -> None:
        """Does what there is to do about a writer that has ended before its time."""
        if status is Status.DISK_FULL:
            self._stop(self._room.act_on_full_disk(self._next, self._geometry.segment_bytes // 2))
            if self.stopped is None:
                self.writer.restart()
        elif status is Status.FILE_TOO_LARGE:
            self._stop(self._room.act_on_limit(self._next))
        elif status is not Status.RUNNING:
            self._stop(f"The writer of {self.output} cannot go on: {self.writer.reason()}")

    # ---- the budget

    def _stay_in_budget(self) -> None:
        budget, line = self._budget, self._at_work
        if budget is None or (self._options.chooses and outlook.is_far(self._next, line.geometry, budget.limit)):
            return
        inputs = self._inputs.pending(line.tail) + line.geometry.chunk_rows * self._inputs.largest
        while self.stopped is None and budget.exceeded(line.geometry, line.ring.pending_bytes(self._next) + inputs):
            if line.geometry.row_length:
                self._say_that_rows_go()
                line = self._drop_rows(line)
            elif not self._keyframes.thin(self.folder):
                if self._options.chooses:
                    self._budget = None  # nobody asked for it: a disk that is full is waited for
                    return
                self._stop(f"The budget of {self.output} is used up at step {self._next - 1}.")

    def _say_what_is_coming(self) -> None:
        line = self._at_work
        if outlook.is_far(outlook.LIKELY, line.geometry, self._limit):
            return
        found = Outlook.of(self.folder, line.geometry, line.tail, self._options.interval, self._room.free, self._limit)
        if line.geometry.row_length and found.is_too_much and self._options.budget is None:
            logger.warning("%s", found.sentence(chooses=self._options.chooses))

    def _say_that_rows_go(self) -> None:
        if self._options.chooses:
            logger.warning(
                "The weights of every step would fill the disk (%s for %s at most): keyframes are kept from step %d, "
                "and of the steps before it, too; replay computes the steps between again.",
                *(outlook.size_text(self._limit), self.output, self._next),
            )

    def _drop_rows(self, line: Line) -> Line:
        """From now on keeps keyframes only: one writer ends, the folder is reworked, another begins."""
        if (status := line.finish(Finish.HAND_OVER, self._room)) is not Status.DONE:
            self._act_on(status)
            return line
        line.writer.close()
        self._line = None
        while self.stopped is None and self._line is None:
            try:
                self._go_on_without_rows()
            except DiskFullError:
                self._stop(self._room.act_on_full_disk(self._next, line.geometry.segment_bytes))
        return self._line or line

    def _go_on_without_rows(self) -> None:
        rework(self.folder, self.place.lock, "drop-rows")
        if self._budget is not None:
            self._budget.forget()
        self._start(self._next, self.folder.read_manifest())

    # ---- the end

    def close(self, complete: bool) -> Summary:
        """Ends the run: waits until the writer has sealed and packed everything, and read it back.

        Raises:
            RecordingError: the writer cannot finish.
        """
        line, steps = self._line, self._next - 1
        if line is None:
            self.place.give_up()
            return self._ended_without_writer()
        if not self._next:
            self._undo_start()
            return self._ending.summary()
        self._waiting.finish(self.output)
        self._line, status = None, Status.FAILED
        try:
            status = line.finish(Finish.COMPLETE if complete else Finish.RECOVERED, self._room)
        finally:
            line.writer.close()
            if status is Status.DONE:
                self.folder.remove()  # a writer may have been killed over it
            self.place.release()
        if status is Status.DONE:
            return self._ending.summary(self.output, steps, self.output.stat().st_size)
        self.folder.sweep()
        return self._ending.unpacked(self.folder, steps, status, line.writer.reason())

    def _ended_without_writer(self) -> Summary:
        if not self._next:
            return self._ending.summary()
        return self._ending.unpacked(self.folder, self._next - 1, Status.FAILED, "It has no writer")

"""Whatever happens to a recording, in any order: what is read is what was fed, to the last step that was committed.

Steps are fed, writers and trainers are killed, disks fill up, recordings go on, are packed, replaced, stopped and
forked. The model is a list for every file: whose weights it has at step t. The default run simulates the writer's
process (runfile_simulation.py), so that it can be killed between any two operations; the long one has real processes,
too.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

import trajrec
from tests.made.runfile_cases import (
    MadeUpRun,
    assert_same_inputs,
    assert_same_keyframe,
    assert_same_step,
    end_trainer,
    spec,
)
from tests.made.runfile_simulation import Simulation
from trajrec.errors import DiskFullError, OutputExistsError, RecordingError, TrajrecError
from trajrec.runfile.folder import Folder
from trajrec.runfile.format.geometry import Limits
from trajrec.runfile.reader.verify import verify
from trajrec.runfile.recovery import pack
from trajrec.runfile.trainer.sink import RunFileSink
from trajrec.runfile.writer import rework

VALUES = 40
TINY = Limits(segment_bytes=2**12, arena_bytes=2**16)
Origin = tuple[int, int]  # which training, and at which of its steps


class Recordings(RuleBasedStateMachine):
    """A path, what is recorded there and in further parts, and maybe a recorder at work."""

    is_real = False

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.simulation = None if self.is_real else Simulation(self.patch)
        self.home = Path(tempfile.mkdtemp())
        self.path = self.home / "run.h5"
        self.files: dict[Path, list[Origin]] = {}
        self.sink: RunFileSink | None = None
        self.now: MadeUpRun | None = None
        self.trainings = 0
        self.made: dict[int, MadeUpRun] = {}

    def teardown(self) -> None:
        if self.sink is not None:
            self.kill_trainer(drains=False)
        self.patch.undo()
        shutil.rmtree(self.home)

    @initialize(
        compression=st.sampled_from(["zstd", "none"]),
        keep=st.sampled_from(["steps", 8]),
        inputs=st.sampled_from(["digest", "store"]),
        on_full=st.sampled_from(["stop-recording", "wait", "raise"]),
    )
    def choose(self, compression, keep, inputs, on_full) -> None:
        self.options = {"compression": compression, "keep": keep, "on_full": on_full, "keyframe_every": 16}
        self.options["limits"] = TINY
        self.spec = spec(VALUES, rng=8, inputs=inputs)

    # ---- the model

    def training(self, number: int) -> MadeUpRun:
        if number not in self.made:
            self.made[number] = self._training(number)
        return self.made[number]

    def _training(self, number: int) -> MadeUpRun:
        named = dataclasses.replace(self.spec, run_id=f"{number:032x}")
        return MadeUpRun(named, seed=number, batch=3, pixels=2)

    def next_training(self) -> MadeUpRun:
        self.trainings += 1
        return self.training(self.trainings)

    def row(self, origin: Origin) -> np.ndarray:
        return self.training(origin[0]).row(origin[1])

    @property
    def is_full(self) -> bool:
        return self.simulation is not None and self.simulation.full

    @property
    def steps(self) -> list[Origin]:
        """What the recorder at work has recorded."""
        return self.files[self.sink.output]

    def is_complete(self) -> bool:
        """Whether the training that is recorded at the path came to its end."""
        if self.path.exists():
            with trajrec.open(self.path) as run:
                return run.state == "complete"
        return rework._is_complete(Folder.of(self.path))

    # ---- beginning

    @precondition(lambda self: self.sink is None)
    @rule(force=st.booleans())
    def begin(self, force) -> None:
        is_there, made = self.path in self.files, self.next_training()
        try:
            sink = RunFileSink(self.path, force=force, **self.options)
        except OutputExistsError:
            assert is_there
            assert not force
            return
        assert force or not is_there
        try:
            sink.open(made.spec)
        except RecordingError:
            assert not self.is_real  # no room, or the writer was killed at once
            assert sink.close(complete=False).path is None
            return
        self.sink, self.now, self.files[self.path] = sink, made, []
        self.feed(0)

    @precondition(lambda self: self.sink is None)
    @rule(place=st.floats(0, 1), is_known=st.booleans())
    def resume(self, place, is_known) -> None:
        """Training starts again, from a checkpoint or from weights that nobody knows."""
        before, made = self.files.get(self.path), self.next_training()
        at = round(place * (len(before) - 1)) if before and is_known else None
        origin = (made.seed, 0) if at is None else before[at]
        is_complete = before is not None and self.is_complete()
        sink = RunFileSink(self.path, resume=True, **self.options)
        try:
            self._start_with(sink, made, self.row(origin))
        except RecordingError:
            assert not self.is_real
            sink.close(complete=False)
            if before is not None:
                self._may_be_cut(before, at)
            return
        self.sink, self.now = sink, made
        goes_on = before is not None and sink.output == self.path
        if goes_on:
            assert sink.resumed_at == at
            assert at == len(before) - 1 or (at and not is_complete)
        elif at is not None:
            assert at < len(before) - 1
            assert at == 0 or is_complete
        self.files[sink.output] = before[: at + 1] if goes_on else [origin] if sink.stopped is None else []

    def _start_with(self, sink: RunFileSink, made: MadeUpRun, row: np.ndarray) -> None:
        """What a recorder does at the first step."""
        sink.open(made.spec)
        target = sink.reserve()
        if target is not None:
            target[:] = row
        record = dataclasses.replace(made.record(0), crc32=trajrec.checksum.crc32(row.data))
        sink.commit(record)

    def _may_be_cut(self, before: list[Origin], at: int | None) -> None:
        """Where going on failed, steps that were to go may have gone, and no others."""
        with trajrec.open(self.path) as run:
            assert (len(before) - 1 if at is None else at) <= run.steps <= len(before) - 1
            self.files[self.path] = before[: run.steps + 1]

    # ---- at work

    @precondition(lambda self: self.sink is not None)
    @rule(count=st.integers(1, 40))
    def feed(self, count) -> None:
        """Feeds steps, and the first one of all."""
        first = len(self.steps)
        for t in range(first, first + max(1, count)):
            self._feed_one(t)

    def _feed_one(self, t: int) -> None:
        made, sink = self.now, self.sink
        try:
            if self.spec.inputs == "store" and t:
                sink.inputs(made.inputs(t))
            row = sink.reserve()
            if row is not None:
                row[:] = made.row(t)
            sink.commit(made.record(t))
            if sink.stopped is None:
                self.steps.append((made.seed, t))
            if sink.wants_keyframe(t):
                sink.keyframe(made.keyframe(t, with_weights=self.options["keep"] != "steps"))
        except DiskFullError as error:
            assert self.is_full
            assert self.options["on_full"] == "raise"
            sink.stop(str(error))

    @precondition(lambda self: self.sink is not None)
    @rule()
    def stop(self) -> None:
        self.sink.stop("it was asked to")

    @precondition(lambda self: self.sink is not None)
    @rule()
    def fork(self) -> None:
        """A child that gives the sink up, and calls it all the same."""
        child = os.fork()
        if child == 0:
            code = 1
            try:
                self.sink.abandon()
                for t in range(3):
                    self._feed_one(t)
                self.sink.close(complete=True)
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    @precondition(lambda self: self.sink is not None)
    @rule(is_complete=st.booleans())
    def close(self, is_complete) -> None:
        sink, self.sink = self.sink, None
        recorded = self.files[sink.output]
        stopped, was_full = sink.stopped, self.is_full
        summary = sink.close(is_complete)
        assert summary.stopped == stopped
        if not recorded:
            assert summary.path is None
            del self.files[sink.output]
            return
        assert summary.steps == len(recorded) - 1
        assert summary.path == sink.output or was_full

    # ---- what befalls it

    @precondition(lambda self: self.sink is not None)
    @rule()
    def kill_writer(self) -> None:
        self.sink.writer.kill()

    @precondition(lambda self: self.simulation is not None)
    @rule(operations=st.integers(0, 60))
    def kill_writer_soon(self, operations) -> None:
        """At one of its next operations, or those of whoever else changes the recording."""
        self.simulation.left = operations

    @precondition(lambda self: self.sink is not None)
    @rule(drains=st.booleans())
    def kill_trainer(self, drains) -> None:
        """The writer, which finds its pipe at an end, seals what is there, unless it was killed too."""
        sink, self.sink = self.sink, None
        end_trainer(sink, drains)
        if not self.files[sink.output]:
            del self.files[sink.output]

    @precondition(lambda self: self.simulation is not None)
    @rule(full=st.booleans())
    def fill_disk(self, full) -> None:
        self.simulation.full = full

    # ---- afterwards

    @precondition(lambda self: self.sink is None and self.files)
    @rule(data=st.data())
    def pack_it(self, data) -> None:
        path = data.draw(st.sampled_from(sorted(self.files)))
        try:
            assert pack(path) == path
        except DiskFullError:
            assert self.is_full
            return
        assert path.is_file()
        assert not Folder.of(path).path.exists()

    @precondition(lambda self: self.files)
    @rule(data=st.data())
    def verify_it(self, data) -> None:
        path = data.draw(st.sampled_from(sorted(self.files)))
        if not self.files[path]:
            return
        ring = Folder.of(path).ring
        assert [str(problem) for problem in verify(path) if problem.file != ring or ring.exists()] == []

    @invariant()
    def what_is_read_is_what_was_fed(self) -> None:
        for path, steps in self.files.items():
            if steps:
                with trajrec.open(path) as run:
                    self._compare(run, steps)
            else:
                with pytest.raises(TrajrecError):
                    trajrec.open(path)

    def _compare(self, run: trajrec.runfile.reader.run.Run, steps: list[Origin]) -> None:
        assert run.steps == len(steps) - 1
        for t, origin in enumerate(steps):
            assert run.crc32(t) == trajrec.checksum.crc32(self.row(origin).data)
            if run.stored(t):
                assert run.row(t).tobytes() == self.row(origin).tobytes()
            if t:
                made = self.training(origin[0])
                assert_same_step(run, made.record(t))
                assert_same_inputs(run, made, [t])
        for t in run.keyframe_steps:
            made = self.training(steps[t][0])
            assert_same_keyframe(run.keyframe(t), made.keyframe(t, with_weights=run.keep != "steps"))


class RealRecordings(Recordings):
    """The same with processes that are really killed, and a disk that is never full."""

    is_real = True


MADE, LAST = MadeUpRun(spec(VALUES)), 24


def until_nothing_is_left_to_kill(simulation: Simulation, trial) -> None:
    """Tries it with a kill before the first operation of another process, before the second, and so on."""
    for operations in range(1000):
        simulation.left = None
        trial(operations)
        if simulation.left is not None and simulation.left >= 0:
            assert operations > 5
            return
    raise AssertionError


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_the_writer_may_be_killed_at_any_operation_of_the_end(tmp_path, simulation, compression):
    def trial(operations: int) -> None:
        path = tmp_path / f"run{operations}.h5"
        sink = RunFileSink(path, limits=TINY, compression=compression)
        sink.open(MADE.spec)
        MADE.feed(sink, LAST)
        simulation.left = operations
        assert sink.close(complete=True).path == path
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        assert verify(path) == []
        with trajrec.open(path) as run:
            assert (run.steps, run.state) == (LAST, "complete")
        path.unlink()

    until_nothing_is_left_to_kill(simulation, trial)


@pytest.mark.parametrize(("compression", "packed"), [("zstd", True), ("none", False)])
def test_going_on_may_be_killed_at_any_operation(tmp_path, simulation, compression, packed):
    """What was recorded up to the step that training goes on from is never touched."""

    earlier = RunFileSink(tmp_path / "earlier.h5", limits=TINY, compression=compression)
    earlier.open(MADE.spec)
    MADE.feed(earlier, LAST)
    earlier.close(complete=False) if packed else end_trainer(earlier, drains=True)

    def trial(operations: int) -> None:
        path = tmp_path / f"run{operations}.h5"
        if packed:
            shutil.copy(earlier.output, path)
        else:
            shutil.copytree(earlier.folder.path, Folder.of(path).path)
        sink = RunFileSink(path, limits=TINY, compression=compression, resume=True)
        sink.open(MADE.spec)
        sink.reserve()[:] = MADE.row(10)
        simulation.left = operations
        try:
            sink.commit(dataclasses.replace(MADE.record(0), crc32=MADE.record(10).crc32))
            last = 10
        except RecordingError:
            last = LAST
        sink.close(complete=False)
        with trajrec.open(path) as run:
            assert 10 <= run.steps <= last
            assert all(run.row(t).tobytes() == MADE.row(t).tobytes() for t in range(run.steps + 1))

    until_nothing_is_left_to_kill(simulation, trial)


def run(machine: type[Recordings], examples: int, steps: int) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    run_machine(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=checks
        ),
    )


def test_recordings_in_any_order():
    run(Recordings, examples=12, steps=20)


@pytest.mark.long
def test_recordings_in_any_order_for_long():
    run(Recordings, examples=3000, steps=40)


@pytest.mark.long
def test_recordings_in_any_order_with_real_processes():
    run(RealRecordings, examples=60, steps=20)

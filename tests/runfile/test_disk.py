"""A full disk, on a small tmpfs: nothing sealed is harmed, nothing crashes, and training does what it was told to."""

from __future__ import annotations

import logging
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import pytest

import trajrec
from tests.made.runfile_cases import MadeUpRun, assert_same_run, spec
from trajrec.errors import DiskFullError
from trajrec.runfile.format.geometry import Limits, geometry_for
from trajrec.runfile.reader.verify import verify
from trajrec.runfile.recovery import pack
from trajrec.runfile.ring import ring_bytes
from trajrec.runfile.trainer import sink as trainer

VALUES = 2000
MADE = MadeUpRun(spec(VALUES))
BALLAST = 40 * 2**20
LIMITS = Limits(segment_bytes=2**20, arena_bytes=2**20)
RunFileSink = partial(trainer.RunFileSink, limits=LIMITS)
GEOMETRY = geometry_for(VALUES, 4, keep_rows=True, limits=LIMITS)
ROOM = ring_bytes(GEOMETRY) + int(1.5 * GEOMETRY.segment_bytes)


@pytest.fixture
def disk(tmp_path):
    """A disk with room for the ring and one segment, and for much more once `ballast` is deleted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM + BALLAST}", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs needs root")
    with (tmp_path / "ballast").open("wb") as file:
        file.write(bytes(BALLAST))
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def assert_no_half_file(disk: Path) -> None:
    assert [p for p in disk.rglob("*") if p.suffix in (".tmp", ".part")] == []


def steps_that_fit() -> int:
    return GEOMETRY.segment_rows + GEOMETRY.slots - 1


def test_wait_goes_on_when_there_is_room(disk, caplog):
    sink = RunFileSink(disk / "run.h5", keep="steps", on_full="wait", keyframe_every=10_000, compression="none")
    timer = threading.Thread(target=free_when_warned, args=(disk, caplog))
    timer.start()
    summary = MADE.write(sink, steps_that_fit() + 100)
    timer.join()
    assert summary == type(summary)(disk / "run.h5", steps_that_fit() + 100, summary.size, ())
    messages = [record.message for record in caplog.records if record.name == "trajrec"]
    said = [message for message in messages if "Recording takes" not in message]
    assert "Training WAITS until there is room" in said[0]
    assert "There is room again" in said[1]
    assert len(said) == 2
    with trajrec.open(disk / "run.h5") as run:
        assert_same_run(run, MADE, steps_that_fit() + 100)
    assert_no_half_file(disk)


def free_when_warned(disk: Path, caplog) -> None:
    until = time.monotonic() + 60
    while not any("WAITS" in record.message for record in caplog.records) and time.monotonic() < until:
        time.sleep(0.05)
    (disk / "ballast").unlink()


def test_stop_recording_trains_on_and_notes_the_gap(disk, caplog):
    sink = RunFileSink(disk / "run.h5", on_full="stop-recording", keyframe_every=10_000, compression="none")
    last = steps_that_fit() + 100
    with caplog.at_level(logging.WARNING, "trajrec"):
        summary = MADE.write(sink, last)
    gap = (steps_that_fit() + 1, last)
    assert (summary.path, summary.steps, summary.gaps) == (disk / "run.h5.rec", steps_that_fit(), (gap,))
    assert sum("WITHOUT RECORDING" in record.message for record in caplog.records) == 1
    assert_no_half_file(disk)
    assert verify(disk / "run.h5") == []
    with trajrec.open(disk / "run.h5") as run:
        assert_same_run(run, MADE, steps_that_fit())
        assert run.gaps == (gap,)
    (disk / "ballast").unlink()
    pack(disk / "run.h5")
    with trajrec.open(disk / "run.h5") as run:
        assert_same_run(run, MADE, steps_that_fit())
        assert (run.state, run.gaps) == ("complete", (gap,))


def test_raise_stops_training_with_a_clear_error(disk):
    sink = RunFileSink(disk / "run.h5", on_full="raise", keyframe_every=10_000, compression="none")
    sink.open(MADE.spec)
    with pytest.raises(DiskFullError, match=rf"The disk is full: step {steps_that_fit() + 1} of .* cannot be recorded"):
        MADE.feed(sink, steps_that_fit() + 100)
    summary = sink.close(complete=False)
    assert summary.path == disk / "run.h5.rec"
    assert_no_half_file(disk)
    with pytest.raises(DiskFullError, match="Nothing is lost; make room and pack again"):
        pack(disk / "run.h5")
    (disk / "ballast").unlink()
    pack(disk / "run.h5")
    with trajrec.open(disk / "run.h5") as run:
        assert_same_run(run, MADE, steps_that_fit())
        assert run.state == "recovered"
    assert verify(disk / "run.h5") == []


def test_no_room_for_inputs(disk, caplog):
    made = MadeUpRun(spec(VALUES, inputs="store"), pixels=2000)
    sink = RunFileSink(disk / "run.h5", on_full="stop-recording", keyframe_every=10_000, compression="none")
    with caplog.at_level(logging.WARNING, "trajrec"):
        summary = made.write(sink, steps_that_fit())
    assert summary.path == disk / "run.h5.rec"
    assert 10 < summary.steps < steps_that_fit()
    assert summary.gaps == ((summary.steps + 1, steps_that_fit()),)
    assert_no_half_file(disk)
    assert verify(disk / "run.h5") == []
    (disk / "ballast").unlink()
    pack(disk / "run.h5")
    with trajrec.open(disk / "run.h5") as run:
        assert_same_run(run, made, summary.steps)


def test_no_room_for_a_keyframe(disk):
    sink = RunFileSink(disk / "run.h5", on_full="raise", keep=1)
    sink.open(MADE.spec)
    with pytest.raises(DiskFullError, match="cannot be recorded"):
        MADE.feed(sink, 10_000)
    assert_no_half_file(disk)
    (disk / "ballast").unlink()
    sink.close(complete=False)
    assert verify(disk / "run.h5") == []


def test_no_room_to_begin_with(disk):
    with (disk / "more").open("wb") as file:
        file.write(bytes(ROOM - ring_bytes(GEOMETRY)))
    sink = RunFileSink(disk / "run.h5")
    with pytest.raises(DiskFullError, match=r"recording needs \d+ MB in .*run.h5.rec to begin with"):
        sink.open(MADE.spec)
    assert not (disk / "run.h5.rec" / "ring.bin").exists()

"""A limit on disk space: never exceeded, at whatever length; what is left is evenly spread."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

import trajrec
from tests.made.runfile_cases import SMALL, MadeUpRun, assert_same_inputs, assert_same_keyframe, spec
from tests.made.runfile_simulation import Simulation
from trajrec.errors import RecordingError
from trajrec.runfile.reader.verify import verify
from trajrec.runfile.trainer import sink as trainer
from trajrec.runfile.trainer.budget import parse_size

MADE = MadeUpRun(spec(2000))
RunFileSink = partial(trainer.RunFileSink, limits=SMALL)


def used(folder: Path) -> int:
    """Bytes on disk."""
    sizes = []
    for root, _, names in os.walk(folder):  # which, other than rglob, goes on where a folder vanishes meanwhile
        for name in names:
            try:
                sizes.append(Path(root, name).stat().st_blocks * 512)
            except FileNotFoundError:
                continue
    return sum(sizes)


@pytest.fixture(autouse=True)
def watched(request, monkeypatch, tmp_path) -> Watch:
    """Of simulated writers, between whose operations nothing goes unseen."""
    watch = Watch(tmp_path)
    if "real_processes" not in request.fixturenames:
        Simulation(monkeypatch).watch = watch.look
    return watch


class Watch:
    """Looks at the disk before every operation that changes names or syncs a file."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._most = folder, 0

    def look(self) -> None:
        self._most = max(self._most, used(self._folder))

    @property
    def most(self) -> int:
        self.look()
        return self._most


@pytest.mark.parametrize(
    ("budget", "last", "compression"),
    [
        (7_000_000, 1500, "zstd"),
        (7_000_000, 1500, "none"),
        (9_000_000, 600, "none"),
        (30_000_000, 900, "zstd"),
        (7_000_000, 50, "none"),
    ],
)
def test_the_limit_is_never_exceeded(tmp_path, watched, budget, last, compression):
    sink = RunFileSink(tmp_path / "run.h5", budget=budget, keyframe_every=16, compression=compression)
    summary = MADE.write(sink, last)
    assert 0 < watched.most <= budget
    assert summary.steps == last
    assert verify(summary.path) == []
    with trajrec.open(summary.path) as run:
        assert [run.crc32(t) for t in range(last + 1)] == [MADE.record(t).crc32 for t in range(last + 1)]
        interval = run.keyframe_steps[1]
        assert run.keyframe_steps == tuple(range(0, last + 1, interval))
        assert interval == 16 or run.keep == "keyframes"
        for t in run.keyframe_steps:
            assert run.row(t).tobytes() == MADE.row(t).tobytes()
            assert_same_keyframe(run.keyframe(t), MADE.keyframe(t, with_weights=run.keep == "keyframes"))


@pytest.mark.parametrize(("pixels", "last"), [(100, 150), (2000, 150)])
def test_inputs_count(tmp_path, watched, caplog, pixels, last):
    made = MadeUpRun(spec(2000, inputs="store"), pixels=pixels)
    summary = made.write(RunFileSink(tmp_path / "run.h5", budget=12_000_000, keyframe_every=16), last)
    assert 0 < watched.most <= 12_000_000
    assert verify(summary.path) == []
    assert (summary.steps < last) == ("The budget of" in caplog.text) == (pixels == 2000)
    with trajrec.open(summary.path) as run:
        assert_same_inputs(run, made, range(1, run.steps + 1))


def test_a_short_run_keeps_every_step_and_a_long_one_does_not(tmp_path):
    for last, keep in ((200, "steps"), (1200, "keyframes")):
        MADE.write(RunFileSink(tmp_path / f"{last}.h5", budget="9MB"), last)
        with trajrec.open(tmp_path / f"{last}.h5") as run:
            assert run.keep == keep


def test_keyframes_that_came_unasked_are_kept(tmp_path):
    sink = RunFileSink(tmp_path / "run.h5", budget="7MB", keyframe_every=16)
    sink.open(MADE.spec)
    for t in range(2500):
        MADE.feed(sink, t, first=t)
        if t in (7, 16):
            sink.keyframe(MADE.keyframe(t))
    sink.close(complete=True)
    with trajrec.open(tmp_path / "run.h5") as run:
        assert run.keep == "keyframes"
        assert {7, 16} <= set(run.keyframe_steps)
        assert 48 not in run.keyframe_steps


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_reader_follows_the_change(tmp_path, compression):
    sink = RunFileSink(tmp_path / "run.h5", budget="9MB", compression=compression)
    sink.open(MADE.spec)
    MADE.feed(sink, 1200)
    with trajrec.open(tmp_path / "run.h5") as run:
        assert run.keep == "keyframes"
        assert run.steps == 1200
        assert run.row(64).tobytes() == MADE.row(64).tobytes()
        assert not run.stored(65)
    sink.close(complete=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_workers_forked_by_the_loader_do_not_hold_it_up(tmp_path, real_processes):
    """They inherit the pipe to the writer, so its end tells the writer nothing."""
    sink = RunFileSink(tmp_path / "run.h5", budget="9MB")
    sink.open(MADE.spec)
    worker = os.fork()
    if worker == 0:
        time.sleep(60)
        os._exit(0)
    try:
        MADE.feed(sink, 600)
        assert sink.close(complete=True).path == tmp_path / "run.h5"
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_used_up_by_step_data_alone(tmp_path, caplog):
    made = MadeUpRun(spec(2000, rng=4096))
    summary = made.write(RunFileSink(tmp_path / "run.h5", budget="6MB"), 3000)
    assert "The budget of" in caplog.text
    assert "WITHOUT RECORDING" in caplog.text
    assert summary.gaps == ((summary.steps + 1, 3000),)
    assert summary.size <= 6_000_000
    assert verify(summary.path) == []


def test_too_small_a_budget_is_refused(tmp_path):
    with pytest.raises(RecordingError, match=r"A budget of 1 MB is too small for this model: recording needs \d+ MB"):
        RunFileSink(tmp_path / "run.h5", budget="1MB").open(MADE.spec)


@pytest.mark.parametrize(
    ("text", "size"), [("20GB", 2 * 10**10), ("500 MB", 5 * 10**8), ("1.5e9", 15 * 10**8), (77, 77), ("2k", 2000)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


def test_not_a_size(tmp_path):
    with pytest.raises(ValueError, match='a size is given like "20GB"'):
        RunFileSink(tmp_path / "run.h5", budget="much")
    with pytest.raises(ValueError, match="a size is at least one byte"):
        parse_size("0 GB")

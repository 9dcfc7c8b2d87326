"""What a recording is going to need is told; one that would fill the disk goes over to keyframes by itself."""

from __future__ import annotations

import logging
from functools import partial
from itertools import count

import pytest

import trajrec
from tests.made.runfile_cases import SMALL, MadeUpRun, spec
from tests.made.runfile_simulation import Simulation
from trajrec.runfile.reader.verify import verify
from trajrec.runfile.trainer import fulldisk, sink, waiting
from trajrec.runfile.trainer.outlook import Outlook, size_text

MADE = MadeUpRun(spec(2000))
RunFileSink = partial(sink.RunFileSink, limits=SMALL, keyframe_every=16, compression="none")


@pytest.fixture
def disk(monkeypatch):
    """Sets how much is free."""
    Simulation(monkeypatch)
    return lambda free: monkeypatch.setattr(fulldisk.Room, "free", property(lambda _: free))


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "trajrec"]


def kept(summary) -> str:
    assert verify(summary.path) == []
    with trajrec.open(summary.path) as run:
        assert [run.crc32(t) for t in (0, run.steps)] == [MADE.record(t).crc32 for t in (0, run.steps)]
        return run.keep


def test_a_default_that_would_fill_the_disk_chooses_keyframes_and_says_so(tmp_path, disk, caplog):
    disk(10_000_000)  # 2 x 8000 bytes a step: 7.5 MB are reached before step 469
    summary = MADE.write(RunFileSink(tmp_path / "run.h5"), 600)
    assert summary.steps == 600
    assert kept(summary) == "keyframes"
    coming, chosen = said(caplog)
    # 8000 bytes a step, and two states of the size of the weights every 16 steps.
    assert "Recording takes 9.0 kB a step: 9.0 MB at 1,000 steps, 90 MB at 10,000 steps" in coming
    for words in ("10 MB are free", "`--keep 64` is 3.8 MB at 10,000", "by itself"):
        assert words in coming
    assert "would fill the disk (7.5 MB" in chosen
    assert "keyframes are kept" in chosen


def test_keep_steps_is_obeyed_with_the_same_warning(tmp_path, disk, caplog):
    disk(10_000_000)
    assert kept(MADE.write(RunFileSink(tmp_path / "run.h5", keep="steps"), 600)) == "steps"
    (coming,) = said(caplog)
    assert "90 MB at 10,000 steps" in coming
    assert "as you said" in coming


@pytest.mark.parametrize("options", [{}, {"keep": "steps"}, {"keep": 16}, {"budget": "1GB"}])
def test_where_there_is_room_nothing_is_said(tmp_path, disk, caplog, options):
    disk(10**12)
    MADE.write(RunFileSink(tmp_path / "run.h5", **options), 60)
    assert said(caplog) == []


def test_a_run_that_ends_before_the_limit_keeps_its_steps(tmp_path, disk, caplog):
    disk(10_000_000)
    assert kept(MADE.write(RunFileSink(tmp_path / "run.h5"), 60)) == "steps"
    assert len(said(caplog)) == 1


def test_the_figures_are_those_of_the_plan():
    found = Outlook(37e6, 384_000_000, int(76e9), int(57e9))
    assert found.is_too_much
    assert "37 MB a step: 37 GB at 1,000 steps, 370 GB at 10,000 steps, 3.7 TB at 100,000" in (
        found.sentence(chooses=True)
    )
    assert "About step 770 " in found.sentence(chooses=True)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (9_940, "9.9 kB"), (9_960, "10 kB"), (2e12, "2.0 TB")]
)
def test_sizes(size, text):
    assert size_text(size) == text


def test_waiting_for_the_writer_is_said_once_and_summed_up(tmp_path, monkeypatch, caplog):
    clock = count(step=0.4)
    monkeypatch.setattr(waiting.time, "monotonic", lambda: next(clock))
    caplog.set_level(logging.WARNING, "trajrec")
    waited = waiting.Waiting()
    for moments, messages in ((2, 0), (3, 1)):
        for _ in range(moments):
            with waited.for_writer(tmp_path / "run.h5"):
                pass
        assert len(said(caplog)) == messages
    waited.finish(tmp_path / "run.h5")
    assert "Training WAITS for the writer" in said(caplog)[0]
    assert "waited 2 s in all" in said(caplog)[1]


def test_a_short_wait_is_not_worth_a_word(tmp_path, monkeypatch, caplog):
    clock = count(step=0.4)
    monkeypatch.setattr(waiting.time, "monotonic", lambda: next(clock))
    waited = waiting.Waiting()
    with waited.for_writer(tmp_path / "run.h5"):
        pass
    waited.finish(tmp_path / "run.h5")
    assert said(caplog) == []

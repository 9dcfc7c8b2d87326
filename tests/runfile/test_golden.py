"""Files of every released format version are read, and hold what was recorded then."""

from __future__ import annotations

from pathlib import Path

import pytest

import trajrec
from tests.golden.make import LAST, MADE
from tests.made.runfile_cases import assert_same_keyframe, assert_same_run, assert_same_step
from trajrec.runfile.reader.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["run-1.0-zstd.h5", "run-1.0-none.h5", "run-1.0-one-piece.h5"])
def test_a_run_of_every_step(name):
    assert verify(GOLDEN / name) == []
    with trajrec.open(GOLDEN / name) as run:
        assert_same_run(run, MADE, LAST)
        assert (run.state, run.keep, run.gaps, run.resumed) == ("complete", "steps", (), ())
        assert run.keyframe_steps == (0, 16, 32)
        for t in run.keyframe_steps:
            assert_same_keyframe(run.keyframe(t), MADE.keyframe(t))


def test_a_run_of_keyframes():
    path = GOLDEN / "run-1.0-keyframes.h5"
    assert verify(path) == []
    with trajrec.open(path) as run:
        assert run.keyframe_steps == (0, 10, 20, 30, 40)
        for t in run.keyframe_steps:
            assert_same_keyframe(run.keyframe(t), MADE.keyframe(t, with_weights=True))
        for t in range(1, LAST + 1):
            assert_same_step(run, MADE.record(t))


def test_golden_files_are_small():
    assert sum(path.stat().st_size for path in GOLDEN.glob("*.h5")) < 300_000

"""A limit on the size of files (`ulimit -f`) is a full disk that no waiting makes room on: training runs to its end."""

from __future__ import annotations

import errno
import logging
import resource
from functools import partial

import pytest

import trajrec
from tests.made.runfile_cases import MadeUpRun, assert_same_run, spec
from trajrec.errors import DiskFullError, is_disk_full, is_file_too_large
from trajrec.runfile.folder import Folder
from trajrec.runfile.format.geometry import Limits
from trajrec.runfile.reader.verify import verify
from trajrec.runfile.recovery import pack
from trajrec.runfile.trainer import sink as trainer

MADE = MadeUpRun(spec(2000))
RunFileSink = partial(trainer.RunFileSink, limits=Limits(segment_bytes=2**20, arena_bytes=2**20))
LIMIT = 4 * 2**20
LAST = 1000


@pytest.fixture
def limited():
    """A function that lifts the limit of four megabytes, under which the test runs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    lift = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))  # noqa: E731
    yield lift
    lift()


def finish_and_compare(path, lift, last: int, gaps: tuple = ()) -> None:
    """What was recorded is all there, before and after it is packed without the limit."""
    assert verify(path) == []
    with trajrec.open(path) as run:
        assert_same_run(run, MADE, last)
    with pytest.raises(DiskFullError, match=r"takes a file larger than is allowed here .*`ulimit -f`"):
        pack(path)
    lift()
    with trajrec.open(pack(path)) as run:
        assert_same_run(run, MADE, last)
        assert (run.state, run.gaps) == ("complete", gaps)


@pytest.mark.parametrize("on_full", ["wait", "stop-recording"])
def test_rows_that_reach_the_limit_end_recording_and_not_training(tmp_path, limited, caplog, on_full):
    path = tmp_path / "run.h5"
    with caplog.at_level(logging.WARNING, "trajrec"):
        summary = MADE.write(RunFileSink(path, compression="none", on_full=on_full), LAST)
    assert (summary.path, summary.gaps) == (Folder.of(path).path, ((summary.steps + 1, LAST),))
    assert LIMIT // 8000 <= summary.steps < LAST
    assert summary.stopped.startswith("The limit on the size of files (`ulimit -f`) is reached: step")
    assert "WITHOUT RECORDING" in caplog.text
    assert "was NOT PACKED: The limit on the size of files (`ulimit -f`) is reached; raise it." in caplog.text
    finish_and_compare(path, limited, summary.steps, summary.gaps)


def test_by_request_it_is_an_error(tmp_path, limited):
    sink = RunFileSink(tmp_path / "run.h5", compression="none", on_full="raise")
    sink.open(MADE.spec)
    with pytest.raises(DiskFullError, match=r"`ulimit -f`\) is reached: step \d+ of .* was not recorded"):
        MADE.feed(sink, LAST)
    assert sink.close(complete=False).steps >= LIMIT // 8000


def test_a_packed_file_beyond_the_limit_leaves_the_folder(tmp_path, limited, caplog):
    path = tmp_path / "run.h5"
    with caplog.at_level(logging.WARNING, "trajrec"):
        summary = MADE.write(RunFileSink(path), LAST)
    assert (summary.path, summary.steps, summary.gaps) == (Folder.of(path).path, LAST, ())
    assert summary.stopped is None
    assert "was NOT PACKED: The limit on the size of files (`ulimit -f`) is reached; raise it." in caplog.text
    finish_and_compare(path, limited, LAST)


@pytest.mark.parametrize("what", ["keyframe", "inputs", "record"])
def test_a_file_that_training_writes_itself(tmp_path, limited, what):
    """A large keyframe, inputs, or a record that is too large for the ring."""
    made = {
        "keyframe": MadeUpRun(spec(700_000)),
        "inputs": MadeUpRun(spec(100, inputs="store"), pixels=200_000),
        "record": MadeUpRun(spec(100), batch=400_000),
    }[what]
    summary = made.write(RunFileSink(tmp_path / "run.h5", keep=10), 5)
    assert "ulimit -f" in summary.stopped
    assert summary.gaps == ((max(1, summary.steps + 1), 5),)
    assert summary.steps == (2 if what == "record" else 0)
    with trajrec.open(tmp_path / "run.h5") as run:
        assert run.steps == summary.steps


def test_a_ring_beyond_the_limit_is_a_clear_error(tmp_path, limited):
    with pytest.raises(DiskFullError, match=r"Recording needs a file of \d+ MB .*`ulimit -f`\) is below that"):
        RunFileSink(tmp_path / "run.h5").open(spec(400_000))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "full", "too_large"),
    [
        (OSError(errno.ENOSPC, "x"), True, False),
        (OSError(errno.EDQUOT, "x"), True, False),
        (OSError(errno.EFBIG, "x"), True, True),
        (RuntimeError("Can't write data (file write failed: error message = 'File too large')"), True, True),
        (RuntimeError("Can't write data (error message = 'No space left on device')"), True, False),
        (OSError(errno.EACCES, "x"), False, False),
        (None, False, False),
    ],
)
def test_which_errors_mean_that_there_is_no_room(error, full, too_large):
    assert (is_disk_full(error), is_file_too_large(error)) == (full, too_large)
    if error is not None:
        outer = ValueError("while something was done")
        outer.__cause__ = error
        assert (is_disk_full(outer), is_file_too_large(outer)) == (full, too_large)

"""Reading a run: what the public names return, and what they say when they cannot."""

from __future__ import annotations

import json

import h5py
import hdf5plugin  # noqa: F401
import numpy as np
import pytest
import torch

import trajrec
from tests.made.runfile_cases import MadeUpRun, assert_same_run, spec
from trajrec.errors import DamagedRunError, NewerFormatError, NotARunError, OutputExistsError, RecorderBusyError
from trajrec.runfile.format.geometry import Limits
from trajrec.runfile.reader import source
from trajrec.runfile.reader.verify import verify
from trajrec.runfile.trainer.sink import RunFileSink

LAST = 100
MADE = MadeUpRun(spec(999))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("reader") / "run.h5"
    MADE.write(RunFileSink(path), LAST)
    return path


@pytest.fixture
def run(path):
    with trajrec.open(path) as run:
        yield run


def test_weights_come_by_name_and_shape(run):
    weights = run.weights(7)
    assert {name: tuple(w.shape) for name, w in weights.items()} == {"layer.weight": (499,), "layer.bias": (500,)}
    assert torch.equal(torch.cat(list(weights.values())), torch.from_numpy(MADE.row(7)))


def test_a_row_is_read_only(run):
    with pytest.raises(ValueError, match="read-only"):
        run.row(3)[0] = 1.0


@pytest.mark.parametrize(("first", "last"), [(0, LAST), (LAST, 0), (40, 33), (31, 32), (5, 5)])
def test_walk_gives_every_step_once_in_order(run, first, last):
    steps = list(range(first, last + 1)) if first <= last else list(range(first, last - 1, -1))
    assert [t for t, _ in run.walk(first, last)] == steps
    assert all(np.array_equal(row, MADE.row(t)) for t, row in run.walk(first, last))


def test_a_walk_may_be_left_halfway(run):
    for t, _ in run.walk(0, LAST):
        if t == 40:
            break


def test_steps_may_be_asked_for_during_a_walk(path, monkeypatch):
    """The walk's thread and the caller read other tables at the same time."""
    monkeypatch.setattr(source, "TABLE_STEPS", 4)
    with trajrec.open(path) as run:
        for t, row in run.walk(LAST, 1):
            assert np.array_equal(row, MADE.row(t))
            for other in (t, LAST + 1 - t):
                assert np.array_equal(run.sample_ids(other), MADE.record(other).ids)
        assert np.array_equal(run.losses, [1 / t for t in range(1, LAST + 1)])


def test_columns_leave_out_step_zero(run):
    assert run.epochs.tolist() == [t // 10 for t in range(1, LAST + 1)]
    assert run.losses.tolist() == [1 / t for t in range(1, LAST + 1)]


def test_hyperparameters_are_named_by_group(run):
    first, second = run.hyperparameters(4)
    assert first == {"lr": 0.02, "momentum": 0.9}
    assert second["lr"] == 0.01
    assert np.isnan(second["momentum"])


@pytest.mark.parametrize("t", [-1, LAST + 1])
def test_steps_out_of_range_are_named(run, t):
    with pytest.raises(IndexError, match=rf"Step {t} is out of range: .*run.h5 has steps 0 to {LAST}"):
        run.row(t)
    with pytest.raises(IndexError, match=rf"has steps 1 to {LAST}"):
        run.sample_ids(t)


def test_step_zero_has_no_batch(run):
    with pytest.raises(IndexError, match="steps 1 to"):
        run.sample_ids(0)


def test_a_missing_keyframe_is_named(run):
    with pytest.raises(IndexError, match="no keyframe of step 63; it has those of 0, 64"):
        run.keyframe(63)


def test_any_hdf5_program_can_read_it(path):
    with h5py.File(path) as file:
        assert np.array_equal(file["weights"][17], MADE.row(17))
        assert file["steps/loss"][4] == 0.25
        assert file["steps/step"][50] == 50
        a, b = file["batches/ids_offsets"][9:11]
        assert np.array_equal(file["batches/ids"][a:b], MADE.record(9).ids)
        assert json.loads(file["spec"].attrs["command"]) == list(MADE.spec.command)


# ---- files that are no runs


def test_a_missing_file(tmp_path):
    with pytest.raises(NotARunError, match=r"There is no recording at .*none\.h5"):
        trajrec.open(tmp_path / "none.h5")


def test_an_empty_file(tmp_path):
    (tmp_path / "empty.h5").touch()
    with pytest.raises(NotARunError, match=r"empty\.h5 is empty"):
        trajrec.open(tmp_path / "empty.h5")


def test_a_text_file(tmp_path):
    (tmp_path / "text.h5").write_text("step,loss\n1,0.5\n")
    with pytest.raises(NotARunError, match="is not an HDF5 file"):
        trajrec.open(tmp_path / "text.h5")


def test_a_foreign_hdf5_file(tmp_path):
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(NotARunError, match="an HDF5 file, but not a recording"):
        trajrec.open(tmp_path / "foreign.h5")


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(NotARunError, match="no readable manifest"):
        trajrec.open(tmp_path / "runs")


def test_a_truncated_file(path, tmp_path):
    data = path.read_bytes()
    (tmp_path / "cut.h5").write_bytes(data[: len(data) // 2])
    with pytest.raises(DamagedRunError, match=r"cut\.h5: it cannot be read: the file is truncated or damaged"):
        trajrec.open(tmp_path / "cut.h5")


def test_a_newer_file(path, tmp_path):
    newer = tmp_path / "newer.h5"
    newer.write_bytes(path.read_bytes())
    with h5py.File(newer, "r+") as file:
        file.attrs["version"] = np.bytes_("2.0")
    with pytest.raises(NewerFormatError, match=r"has format version 2\.0; this trajrec reads versions up to 1\.x"):
        trajrec.open(newer)


def test_a_damaged_row_is_named(path, tmp_path):
    damaged = tmp_path / "damaged.h5"
    damaged.write_bytes(path.read_bytes())
    with h5py.File(damaged, "r+") as file:
        row = file["weights"][40]
        row[3] += 1e-6
        file["weights"][40] = row
    with trajrec.open(damaged) as run:
        with pytest.raises(DamagedRunError, match="/weights, step 40: the row does not match its checksum"):
            run.row(40)
        assert np.array_equal(run.row(41), MADE.row(41))


# ---- outputs that are there already


def test_an_output_is_not_overwritten_without_force(tmp_path):
    path = tmp_path / "run.h5"
    MADE.write(RunFileSink(path), 2)
    with pytest.raises(OutputExistsError, match=r"run\.h5 exists already.*--force"):
        RunFileSink(path)
    MADE.write(RunFileSink(path, force=True), 3)
    with trajrec.open(path) as run:
        assert run.steps == 3


def test_a_second_recorder_is_refused(tmp_path):
    first = RunFileSink(tmp_path / "run.h5")
    late = RunFileSink(tmp_path / "run.h5")
    first.open(MADE.spec)
    with pytest.raises(RecorderBusyError, match="is being recorded by process"):
        RunFileSink(tmp_path / "run.h5", force=True)
    with pytest.raises(RecorderBusyError, match="is being recorded by process"):
        late.open(MADE.spec)
    MADE.feed(first, 5)
    first.close(complete=True)
    with trajrec.open(tmp_path / "run.h5") as run:
        assert run.steps == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [({"keep": "all"}, "keep is"), ({"keep": 0}, "keep is"), ({"on_full": "panic"}, "on_full is")],
)
def test_options_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        RunFileSink(tmp_path / "run.h5", **options)


# ---- while it is being recorded


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_run_can_be_read_while_it_is_recorded_and_after(tmp_path, compression):
    made = MadeUpRun(spec(3000))
    sink = RunFileSink(tmp_path / "run.h5", limits=Limits(segment_bytes=2**20), compression=compression)
    sink.open(made.spec)
    made.feed(sink, 200)
    early = trajrec.open(tmp_path / "run.h5")
    assert early.state == "recording"
    assert_same_run(early, made, 200)
    made.feed(sink, 700, first=201)
    assert_same_run(early, made, 200)  # its ring rows have been sealed and overwritten meanwhile
    middle = trajrec.open(tmp_path / "run.h5.rec")
    sink.close(complete=True)
    assert_same_run(early, made, 200)  # its folder is gone
    assert_same_run(middle, made, 700)
    early.close()
    middle.close()


def test_the_training_process_does_not_import_hdf5():
    import subprocess
    import sys

    code = "import sys, trajrec.runfile.trainer.sink; sys.exit('h5py' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_what_few_steps_have_comes_back_from_segments_ring_and_packed_file(tmp_path, compression):
    """Micro-batches, digests, conditions and groups added on the way, over the seams of several segments."""
    made, last = MadeUpRun(spec(), with_parts=True), 75
    sink = RunFileSink(tmp_path / "run.h5", limits=Limits(segment_bytes=1), compression=compression)
    sink.open(made.spec)
    made.feed(sink, last)
    with trajrec.open(tmp_path / "run.h5") as run:
        assert_same_run(run, made, last)
    sink.close(complete=True)
    assert verify(tmp_path / "run.h5") == []
    with trajrec.open(tmp_path / "run.h5") as run:
        assert_same_run(run, made, last)
        assert run.changes[33].joined == (("late", 2),)
        assert [len(run.hyperparameters(t)) for t in (19, 20)] == [2, 3]

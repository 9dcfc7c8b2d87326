"""Taking a recording up again: at the step whose weights training restarts with, or as a second part."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import trajrec
from tests.made import runfile_cases as cases
from tests.made.runfile_cases import (
    SMALL,
    MadeUpRun,
    assert_same_inputs,
    assert_same_keyframe,
    assert_same_run,
    end_trainer,
    spec,
)
from trajrec.errors import RecordingError
from trajrec.replay import contributions
from trajrec.runfile.reader.verify import verify
from trajrec.runfile.trainer import resume
from trajrec.runfile.trainer import sink as trainer

MADE = MadeUpRun(spec(2000, rng=32))
RunFileSink = partial(trainer.RunFileSink, limits=SMALL)
begin, cut_off = partial(cases.begin, made=MADE), partial(cases.cut_off, made=MADE)
restart, go_on = partial(cases.restart, made=MADE), partial(cases.go_on, made=MADE)


@pytest.fixture(autouse=True)
def _simulated(simulation):
    pass


@pytest.mark.parametrize("at", [1, 63, 64, 100, 300])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_recording_goes_on_from_any_step(tmp_path, packed, at, compression):
    path, options = tmp_path / "run.h5", {"compression": compression}
    begin(path, 300, packed, **options)
    restart(path, at, 333)
    assert verify(path) == []
    with trajrec.open(path) as run:
        assert_same_run(run, MADE, 333)
        assert (run.state, run.resumed) == ("complete", (at,))
        assert run.keyframe_steps == (0, 64, 128, 192, 256, 320)
        assert_same_keyframe(run.keyframe(192), MADE.keyframe(192))


@pytest.mark.parametrize("at", [1, 31, 70])
@pytest.mark.parametrize("packed", [True, False])
def test_inputs_go_on_too(tmp_path, packed, at):
    path, made = tmp_path / "run.h5", MadeUpRun(spec(2000, inputs="store"))
    begin(path, 70, packed, made=made)
    other = dataclasses.replace(made, pixels=30)  # batches of another shape, so that old ones would be seen
    restart(path, at, 80, made=other)
    assert verify(path) == []
    with trajrec.open(path) as run:
        assert_same_inputs(run, made, range(1, at + 1))
        assert_same_inputs(run, other, range(at + 1, 81))


def test_other_inputs_are_refused(tmp_path):
    path = tmp_path / "run.h5"
    MADE.write(RunFileSink(path), 50)
    with pytest.raises(RecordingError, match='It has inputs="digest", and would now have inputs="store"'):
        restart(path, 50, 60, made=MadeUpRun(dataclasses.replace(MADE.spec, inputs="store")))


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_twice_and_shorter(tmp_path, compression):
    path = tmp_path / "run.h5"
    cut_off(path, 300, compression=compression)
    restart(path, 200, 210, complete=False)
    restart(path, 150, 170)
    with trajrec.open(path) as run:
        assert_same_run(run, MADE, 170)
        assert run.resumed == (150,)
    assert [p.name for p in tmp_path.iterdir()] == ["run.h5"]


def test_keyframes_only(tmp_path):
    path = tmp_path / "run.h5"
    begin(path, 100, packed=True, keep=10)
    restart(path, 57, 120, keep=10)
    with trajrec.open(path) as run:
        assert run.steps == 120
        assert run.keyframe_steps == tuple(range(0, 121, 10))
        assert [run.crc32(t) for t in range(121)] == [MADE.record(t).crc32 for t in range(121)]


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_resumed_recording_may_be_killed_and_resumed(tmp_path, compression):
    path = tmp_path / "run.h5"
    cut_off(path, 100, compression=compression)
    sink = go_on(path, 90)
    MADE.feed(sink, 95, first=91)
    end_trainer(sink)
    with trajrec.open(path) as run:
        assert_same_run(run, MADE, 95)
    restart(path, 93, 140)
    with trajrec.open(path) as run:
        assert_same_run(run, MADE, 140)
        assert run.resumed == (90, 93)


@pytest.mark.parametrize("packed", [True, False])
def test_unknown_weights_make_a_second_part(tmp_path, caplog, packed):
    path, other = tmp_path / "run.h5", MadeUpRun(spec(2000), seed=5)
    begin(path, 50, packed)
    summary = other.write(RunFileSink(path, resume=True), 20)
    assert summary.path == tmp_path / "run-part2.h5"
    assert "No step of" in caplog.text
    assert "recorded as a second part" in caplog.text
    with trajrec.open(path) as first, trajrec.open(summary.path) as second:
        assert_same_run(first, MADE, 50)
        assert_same_run(second, other, 20)


@pytest.mark.parametrize("at", [0, 49])
def test_a_training_that_is_complete_is_kept(tmp_path, caplog, at):
    path = tmp_path / "run.h5"
    MADE.write(RunFileSink(path), 50)
    summary = restart_beside(path, at)
    assert f"holds the 50 steps of a training that is complete, and training starts with the weights of step {at}" in (
        caplog.text
    )
    assert f"going on there would throw away {50 - at} of them, so they are kept" in caplog.text
    with trajrec.open(path) as first, trajrec.open(summary.path) as second:
        assert_same_run(first, MADE, 50)
        assert first.state == "complete"
        assert second.steps == 3


@pytest.mark.parametrize("packed", [True, False])
def test_a_training_that_begins_anew_does_not_throw_the_first_one_away(tmp_path, caplog, packed):
    path = tmp_path / "run.h5"
    begin(path, 50, packed)
    summary = restart_beside(path, 0)
    assert "holds 50 steps, and training starts with the weights of step 0" in caplog.text
    with trajrec.open(path) as first, trajrec.open(summary.path) as second:
        assert_same_run(first, MADE, 50)
        assert second.steps == 3


def restart_beside(path, at: int):
    """Training begins with the weights of step `at`, and is recorded as a second part."""
    sink = go_on(path, at)
    assert (sink.resumed_at, sink.output) == (0, path.with_name("run-part2.h5"))
    MADE.feed(sink, 3, first=1)
    return sink.close(complete=True)


def test_a_complete_training_goes_on_from_its_end(tmp_path):
    path = tmp_path / "run.h5"
    MADE.write(RunFileSink(path), 50)
    restart(path, 50, 60)
    with trajrec.open(path) as run:
        assert_same_run(run, MADE, 60)


def test_steps_that_go_are_said_before_they_go(tmp_path, caplog, monkeypatch):
    path = tmp_path / "run.h5"
    begin(path, 50, packed=False)
    rework, said = resume.rework, {}
    monkeypatch.setattr(
        resume,
        "rework",
        lambda folder, lock, command, *rest: (
            (said.setdefault(command, caplog.text) and None) or rework(folder, lock, command, *rest)
        ),
    )
    restart(path, 30, 60)
    assert said["find"] == ""
    assert "weights of step 30 of" in said["cut"]
    assert "the 20 step(s) recorded after it go now" in said["cut"]


def test_of_several_steps_with_the_same_weights_the_last_counts(tmp_path):
    """A learning rate of zero, or a step that a gradient scaler has skipped."""
    path, still = tmp_path / "run.h5", Still(spec(2000))
    begin(path, 50, packed=False, made=still)
    restart(path, 40, 60, made=still)
    with trajrec.open(path) as run:
        assert_same_run(run, still, 60)
        assert run.resumed == (40,)


class Still(MadeUpRun):
    """Weights that stay the same from step 30 to step 40."""

    def row(self, t):
        return super().row(30 if 30 <= t <= 40 else t)


def test_resume_without_a_recording_begins_one(tmp_path):
    MADE.write(RunFileSink(tmp_path / "run.h5", resume=True), 10)
    with trajrec.open(tmp_path / "run.h5") as run:
        assert_same_run(run, MADE, 10)


def test_another_mode_is_refused_and_nothing_changes(tmp_path):
    path = tmp_path / "run.h5"
    MADE.write(RunFileSink(path), 50)
    sink = RunFileSink(path, resume=True, keep=10)
    sink.open(MADE.spec)
    sink.reserve()
    with pytest.raises(RecordingError, match=r"cannot be continued. It keeps steps, and would now keep keyframes"):
        sink.commit(MADE.record(0))
    with trajrec.open(path) as run:
        assert_same_run(run, MADE, 50)


class Noisy(Dataset):
    """Items that are random each time."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.full((3,), float(index)) / 12 + torch.rand(3), index % 2


def a_session(path, weights, epochs: int, looks_first: bool = False, **options) -> dict[str, torch.Tensor]:
    """A training of its own, of seeded data; returns the weights it ends with."""
    loader = DataLoader(trajrec.seeded(Noisy()), batch_size=4)
    if looks_first:
        next(iter(loader))
    model = nn.Linear(3, 2)
    model.load_state_dict(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with trajrec.record(path, model=model, optimizer=optimizer, loader=loader, **options):
        if looks_first:
            next(iter(loader))
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("looks_first", [False, True])
def test_epochs_and_seeded_augmentation_go_on(tmp_path, looks_first):
    path = tmp_path / "run.h5"
    weights = a_session(path, nn.Linear(3, 2).state_dict(), 2)
    a_session(path, weights, 2, looks_first, resume=True)
    with trajrec.open(path) as run:
        assert run.epochs.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    data = Noisy()
    task = trajrec.Task(
        model=lambda: nn.Linear(3, 2),
        loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1], reduction="none"),
        train=trajrec.seeded(data),
        test=trajrec.seeded(data),
    )
    found = contributions(trajrec.open(path), task, exact=True)
    assert found.certificate.first_bad_step is None

"""Recordings that hold the inputs of their steps: augmentation that nothing can seed replays as it was."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import trajrec
from tests.made import loops
from tests.made.loops import CLASSES, Loop, N, cut
from tests.made.memory_run import MemoryRun
from tests.made.told import Listed
from trajrec.capture.recorder import Recorder
from trajrec.errors import DriftError, RecordingError
from trajrec.replay import contributions
from trajrec.sink import MemorySink
from trajrec.task.task import Task


class Unseedable(Dataset):
    """Draws from the operating system's generator: no two passes are alike, and no seed helps."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, *rest = self.data[i]
        return x + 0.3 * torch.from_numpy(np.frombuffer(os.urandom(4), np.uint8) / 255.0), *rest


class Fixed(Listed):
    """The items of a list, by a name that a refusal shows."""


def recorded(make_loop=Loop, **options):
    return loops.train(make_loop(set=Unseedable), inputs="store", **options)


@pytest.mark.parametrize("mode", ["adjoint", "tangent"])
def test_augmentation_that_nothing_can_seed_replays(mode):
    made = recorded()
    c = contributions(made.run, made.task, targets="each", exact=True, mode=mode)
    assert c.certificate.verdict in ("bit-exact", "within rounding")
    assert c.certificate.steps_checked == made.run.steps


def test_it_is_refused_without_the_stored_inputs():
    made = loops.train(Loop(set=Unseedable))
    with pytest.raises(trajrec.TrajrecError):
        contributions(made.run, made.task)


def retrained(made, eps=None):
    """The same training by hand on the stored batches, the loss of sample i weighted with 1 + N eps_i. Test losses."""
    eps = torch.zeros(N, dtype=torch.float64) if eps is None else eps
    torch.manual_seed(0)
    torch.randn(N, 4), torch.randint(0, CLASSES, (N,)), torch.randn(5, 4), torch.randint(0, CLASSES, (5,))
    model = loops.mlp().double()
    weights = torch.from_numpy(made.run.row(0).copy())
    nn.utils.vector_to_parameters(weights, model.parameters())
    optimizer = loops.sgd(model)
    for t in range(1, made.run.steps + 1):
        (batch,) = made.run.inputs(t)
        optimizer.zero_grad()
        loops.Objective()(model, batch, eps).backward()
        optimizer.step()
    with torch.no_grad():
        return loops.per_sample(model, next(iter(DataLoader(made.task.test, 5))))


def test_contributions_are_those_of_the_training_on_the_stored_batches():
    made, h = recorded(), 1e-5
    assert torch.equal(retrained(made), made.values)
    c = contributions(made.run, made.task, targets="each", samples=[0, 7], exact=True)
    for row, sample in zip(c.values, (0, 7), strict=True):
        e = torch.zeros(N, dtype=torch.float64)
        e[sample] = h
        slope = (retrained(made, e) - retrained(made, -e)) / (2 * h)
        assert np.abs(row + slope.numpy() / N).max() < 1e-6 * np.abs(row).max()


@pytest.mark.parametrize(
    "features",
    [
        {"pieces": cut(2), "objective": lambda *a: loops.Objective()(*a) / 2},
        {"batch_size": 3, "every": 2, "objective": lambda *a: loops.Objective()(*a) / 2},
    ],
)
def test_micro_batches_have_their_own(features):
    made = recorded(lambda **k: Loop(**features, **k))
    assert len(made.run.inputs(1)) == len(made.run.parts(1)) == 2
    assert contributions(made.run, made.task, exact=True).certificate.verdict in ("bit-exact", "within rounding")


def training(loader, change=lambda *batch: batch, steps=9, **options):
    torch.manual_seed(0)
    model, sink = nn.Linear(4, 3), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(sink, model=model, optimizer=optimizer, inputs="store", **options):
        for _, batch in zip(range(steps), loader, strict=False):
            x, y = change(*batch)
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    return MemoryRun(sink)


def pairs():
    torch.manual_seed(1)
    return TensorDataset(torch.randn(20, 4), torch.randint(0, 3, (20,)))


def test_batches_are_kept_as_the_loader_made_them():
    """Also where the loop then changes them in place."""
    data = pairs()
    before = data.tensors[0].clone()
    run = training(DataLoader(data, 5, shuffle=True), lambda x, y: (x.mul_(2), y.add_(1) % 3))
    for t in range(1, run.steps + 1):
        x, y = run.inputs(t)[0]
        assert torch.equal(x, before[run.sample_ids(t)])
        assert torch.equal(y, data.tensors[1][run.sample_ids(t)])


def test_a_stream_whose_samples_are_named():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(pairs())

    named = iter(range(0, 20, 5))

    def name(x, y):
        first = next(named)
        trajrec.set_batch(range(first, first + 5))
        return x, y

    run = training(DataLoader(Stream(), 5), name)
    assert torch.equal(run.inputs(2)[0][0], pairs().tensors[0][5:10])
    task = Task.supervised(lambda: nn.Linear(4, 3), Fixed([None] * 20), pairs())
    assert contributions(run, task, exact=True).certificate.verdict in ("bit-exact", "within rounding")


def test_evaluation_passes_are_not_kept():
    data, other = pairs(), pairs()

    def evaluated_after_every_step(loader):
        for batch in loader:
            yield batch
            for _ in DataLoader(other, 5):
                pass

    run = training(evaluated_after_every_step(DataLoader(data, 5)))
    assert torch.equal(run.inputs(3)[0][0], data.tensors[0][10:15])


def test_batches_that_came_from_no_loader_are_an_error():
    def named():
        for ids in ([0, 1], [2, 3]):
            trajrec.set_batch(ids)
            yield pairs()[ids]

    with pytest.raises(RecordingError, match="those of step 1 came from none"):
        training(named(), strict=True)


def test_batches_that_cannot_be_kept_are_an_error():
    data = pairs()
    data.tensors[0].add_(0.3)  # else it equals what tests before have left in memory
    loader = DataLoader(data, 5, collate_fn=lambda items: Fixed(items))
    with pytest.raises(RecordingError, match=r"this batch holds a .*Fixed.*collate_fn"):
        training(
            loader,
            lambda *items: [torch.stack([i[0] for i in items]), torch.stack([i[1] for i in items])],
            strict=True,
        )


def test_other_words_are_refused():
    with pytest.raises(ValueError, match=r"inputs is .digest. or .store.; found 'all'"):
        Recorder(MemorySink(), inputs="all")


@pytest.mark.parametrize("keep", ["steps", 4])
def test_from_file_to_contributions(tmp_path, keep):
    data = Unseedable(pairs())
    loader = DataLoader(data, 5, shuffle=True)
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with trajrec.record(tmp_path / "run.h5", model=model, optimizer=optimizer, inputs="store", keep=keep):
        for _ in range(3):
            for x, y in loader:
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
    task = Task.supervised(lambda: nn.Linear(4, 3), data, pairs())
    with trajrec.open(tmp_path / "run.h5") as run:
        assert run.spec.inputs == "store"
        one, two = (contributions(run, task, exact=True, mode=mode) for mode in ("adjoint", "tangent"))
    assert np.abs(one.values - two.values).max() < 1e-9 * np.abs(one.values).max()
    assert one.certificate.steps_checked == 12


def test_a_planted_fault_is_found():
    """The stored inputs are used, and nothing else: changing one changes the step made from it."""
    made = recorded()
    stored = made.run.sink.stored[5].arrays
    stored["0/0"] = stored["0/0"] + 1e-3
    with pytest.raises(DriftError, match="drifted at step 5"):
        contributions(made.run, made.task, exact=True)

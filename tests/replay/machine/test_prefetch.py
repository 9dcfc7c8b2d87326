"""Rows are begun before the one in front of them is used, in order, and arrive as they were."""

import numpy as np
import pytest
import torch

from tests.made import scenario
from trajrec.replay import contributions
from trajrec.replay.machine.prefetch import OwnStream, ahead


class Noted:
    """A transfer that keeps a diary; a row is its own handle."""

    def __init__(self):
        self.diary = []

    def start(self, vector):
        self.diary.append(f"start {int(vector)}")
        return vector

    def finish(self, started):
        self.diary.append(f"finish {int(started)}")
        return started


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_a_row_is_under_way_while_the_one_before_it_is_used(count):
    transfer, used = Noted(), []
    for number, vector in ahead(((t, torch.tensor(t)) for t in range(count)), transfer):
        transfer.diary.append(f"use {number}")
        used.append(int(vector))
    assert used == list(range(count))
    for t in range(count):
        finished, use = transfer.diary.index(f"finish {t}"), transfer.diary.index(f"use {t}")
        assert finished < use
        if t + 1 < count:
            assert finished < transfer.diary.index(f"start {t + 1}") < use


def test_a_walk_that_is_left_early_reads_no_further():
    asked = []
    rows = ((t, asked.append(t) or torch.tensor(t)) for t in range(9))
    assert next(ahead(rows, Noted()))[0] == 0
    assert asked == [0, 1]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("mode", ["adjoint", "tangent"])
def test_a_replay_through_transfers_gives_the_same_bits(monkeypatch, mode, exact):
    s = scenario.train()
    expected = contributions(s.run, s.task, targets="each", exact=exact, mode=mode)
    monkeypatch.setattr(
        "trajrec.replay.trajectory.stored.StoredTrajectory._walk",
        lambda self, first, last: ahead(((t, self._vector(row, t)) for t, row in self.run.walk(first, last)), Own()),
    )
    found = contributions(s.run, s.task, targets="each", exact=exact, mode=mode)
    assert (found.values == expected.values).all()
    assert found.certificate == expected.certificate


class Own:
    """A transfer that copies at once."""

    def start(self, vector):
        return vector.clone()

    def finish(self, started):
        return started


@pytest.mark.cuda
def test_rows_arrive_on_cuda_as_they_were():
    device = torch.device("cuda", torch.cuda.current_device())
    rows = [torch.randn(100_000) for _ in range(20)]
    sums = [float(v.double().sum()) for _, v in ahead(enumerate(rows), OwnStream(device, torch.float32))]
    np.testing.assert_allclose(sums, [float(row.double().sum()) for row in rows], rtol=1e-12)

"""What the recorder says that it costs, although it looks at the clock in one step of thirteen only."""

import time

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from trajrec.capture import stopwatch
from trajrec.capture.recorder import Recorder
from trajrec.capture.stopwatch import EVERY, Stopwatch
from trajrec.sink import MemorySink


class Clock:
    """A thread's clock that goes only when it is told to; counts how often it is read."""

    def __init__(self):
        self.now, self.readings = 0.0, 0

    def thread_time(self):
        self.readings += 1
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(stopwatch, "time", found)
    return found


def test_one_step_stands_for_several(clock):
    watch = Stopwatch()
    for _ in range(10 * EVERY):
        for _ in range(3):
            began = watch.start()
            clock.now += 0.5
            watch.stop(began)
        watch.next_step()
    assert watch.seconds == 10 * EVERY * 3 * 0.5
    assert clock.readings == 10 * 3 * 2


@pytest.mark.parametrize("every", [1, 3, EVERY, 50])
def test_rare_things_count_once_and_in_full(clock, every):
    watch = Stopwatch()
    for step in range(400):
        began = watch.start()
        clock.now += 0.25
        if step % every == 0:
            start = clock.now
            clock.now += 10.0
            watch.rare(start)
        watch.stop(began)
        watch.next_step()
    assert watch.seconds == 400 * 0.25 + len(range(0, 400, every)) * 10.0


def test_a_reset_forgets(clock):
    watch = Stopwatch()
    began = watch.start()
    clock.now += 1
    watch.stop(began)
    watch.next_step()
    watch.reset()
    assert watch.seconds == 0


def test_a_real_loop_is_timed():
    watch = Stopwatch()
    start = time.thread_time()
    for _ in range(160):
        began = watch.start()
        sum(range(2000))
        watch.stop(began)
        watch.next_step()
    assert 0 < watch.seconds < 3 * (time.thread_time() - start)


@pytest.mark.parametrize("steps", [2, 3, EVERY, EVERY + 1, EVERY + 2, 2 * EVERY + 1])
def test_the_last_keyframe_is_not_subtracted(steps, monkeypatch):
    """Whether or not the clock is looked at when the recording ends, what it took is no less than the keyframe."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.randn(steps, 3), torch.zeros(steps).long()))
    sink = MemorySink(10**6)
    monkeypatch.setattr(sink, "keyframe", lambda _: sum(range(300_000)))
    with Recorder(sink, model=model, optimizer=optimizer) as recorder:
        for x, y in loader:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        before = recorder.seconds
    assert recorder.seconds > before > 0

"""What the recorder says that it costs, although it looks at the clock in one step of seven only."""

import time

import pytest

from trajrec import stopwatch
from trajrec.stopwatch import EVERY, Stopwatch


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

"""The lane records what Python records, to the byte, whatever the loop does; and it is used where it can be."""

import copy
import inspect
import pickle
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import trajrec
from tests.lane_sink import LaneSink
from trajrec import straight
from trajrec.recorder import Recorder
from trajrec.sink import MemorySink

pytestmark = pytest.mark.skipif(not straight.HAS_LANE, reason="lane.c was not compiled here")

N, BATCH, EPOCHS = 44, 4, 6
STEPS = EPOCHS * N // BATCH


class Loop:
    """A training whose parts a case changes: `each(t)` is called before every step, `after(t)` behind it."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.0), nn.ReLU(), nn.Linear(8, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        data = TensorDataset(torch.randn(N, 3), torch.randint(2, (N,)))
        self.loader = DataLoader(data, BATCH, shuffle=True)
        self.validation = DataLoader(TensorDataset(*data.tensors), BATCH)
        self.each = self.after = lambda t: None
        self.forward = lambda x: self.model(x)
        self.loss = nn.functional.cross_entropy
        self.backwards = 1
        self.epochs = EPOCHS

    def run(self):
        t = 0
        for _ in range(self.epochs):
            for x, y in self.loader:
                t += 1
                self.each(t)
                self.optimizer.zero_grad()
                for k in range(self.backwards):
                    loss = self.loss(self.forward(x), y)
                    loss.backward(retain_graph=k + 1 < self.backwards)
                self.optimizer.step()
                self.after(t)


CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


@case
def plain(loop):
    pass


@case
def adam(loop):
    loop.optimizer = torch.optim.AdamW(loop.model.parameters(), lr=0.01)


@case
def float64(loop):
    loop.model.double()
    loop.forward = lambda x: loop.model(x.double())
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.1)


@case
def groups(loop):
    first, *_, last = loop.model
    loop.optimizer = torch.optim.SGD([{"params": first.parameters(), "lr": 0.2}, {"params": last.parameters()}], lr=0.1)


@case
def dropout(loop):
    loop.model[2].p = 0.5


@case
def dropout_from_a_step_on(loop):
    def each(t):
        loop.model[2].p = 0.5 * (t > 30)

    loop.each = each


@case
def other_random_numbers(loop):
    loop.each = lambda t: torch.rand(t % 3)


@case
def a_schedule(loop):
    schedule = torch.optim.lr_scheduler.ExponentialLR(loop.optimizer, 0.97)
    loop.after = lambda t: schedule.step()


@case
def a_rate_that_rises_from_zero(loop):
    def each(t):
        loop.optimizer.param_groups[0]["lr"] = 0.0 if 20 <= t < 24 else 0.1

    loop.each = each


@case
def evaluations(loop):
    def after(t):
        if t % 9 == 0:
            with torch.no_grad():
                for x, _ in loop.validation:
                    loop.model(x)

    loop.after = after


@case
def evaluations_in_eval_mode(loop):
    def after(t):
        if t % 9 == 0:
            loop.model.eval()
            with torch.no_grad():
                for x, _ in loop.validation:
                    loop.model(x)
            loop.model.train()

    loop.after = after


@case
def a_module_changes_its_mode(loop):
    def each(t):
        loop.model[1].training = t < 30

    loop.each = each


@case
def frozen_on_the_way(loop):
    def each(t):
        loop.model[0].weight.requires_grad_(t < 30)

    loop.each = each


@case
def weights_move_in_memory(loop):
    def each(t):
        if t % 7 == 0:
            weight = loop.model[0].weight
            weight.data = weight.data.clone()

    loop.each = each


@case
def weights_are_clipped(loop):
    def after(t):
        with torch.no_grad():
            loop.model[0].weight.clamp_(-0.3, 0.3)

    loop.after = after


class OtherTensor(torch.Tensor):
    """A loss of a class of its own."""


def negative_in_memory(loss):
    """A loss that torch keeps with its sign turned over."""
    view = torch.imag(torch.complex(torch.zeros_like(loss), -loss).conj())
    assert view.is_neg()
    return view


KINDS_OF_LOSSES = {
    "double": lambda loss: loss.double(),
    "half": lambda loss: loss.bfloat16(),
    "one_dimension": lambda loss: loss.reshape(1),
    "negative_in_memory": negative_in_memory,
    "other_class": lambda loss: loss.as_subclass(OtherTensor),
    "part_of_another": lambda loss: torch.stack([-loss, loss])[1],
}


def a_loss_of_another_kind(kind):
    def change(loop):
        loop.loss = lambda outputs, y: kind(nn.functional.cross_entropy(outputs, y))

    return change


CASES |= {f"a_loss_of_another_kind_{name}": a_loss_of_another_kind(kind) for name, kind in KINDS_OF_LOSSES.items()}


@case
def two_backward_passes(loop):
    loop.backwards = 2


@case
def two_forward_passes(loop):
    loop.forward = lambda x: loop.model(x) + loop.model(-x)


@case
def two_forward_passes_now_and_then(loop):
    calls = iter(range(10**6))
    loop.forward = lambda x: loop.model(x) + (loop.model(-x) if next(calls) % 13 == 0 else 0)


@case
def named_samples_now_and_then(loop):
    def each(t):
        if t % 10 == 0:
            trajrec.set_batch([1, 2, 3, 4])

    loop.each = each


@case
def a_copy_of_the_model(loop):
    def after(t):
        copy.deepcopy(loop.model)(torch.ones(2, 3))
        pickle.loads(pickle.dumps(loop.model))

    loop.after = after


@case
def a_named_argument(loop):
    loop.forward = lambda x: loop.model(input=x)


@case
def another_model_is_trained_too(loop):
    other = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)

    def after(t):
        other(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    loop.after = after


@case
def a_batch_is_looked_at_and_left(loop):
    def after(t):
        if t % 8 == 0:
            next(iter(loop.loader))

    loop.after = after


@case
def a_schedule_within_the_step(loop):
    schedule = torch.optim.lr_scheduler.ExponentialLR(loop.optimizer, 0.97)
    loop.optimizer.register_step_post_hook(lambda *_: schedule.step())


@case
def a_rate_that_rises_from_zero_within_the_step(loop):
    group = loop.optimizer.param_groups[0]
    group["lr"] = 0.0
    loop.optimizer.register_step_post_hook(lambda *_: group.update(lr=0.1))


@case
def a_list_of_ids_that_is_used_again(loop):
    class Again(BatchSampler):
        def __iter__(self):
            batch = []
            for i in self.sampler:
                batch.append(i)
                if len(batch) == self.batch_size:
                    yield batch
                    batch.clear()

    data = loop.loader.dataset
    loop.loader = DataLoader(data, batch_sampler=Again(RandomSampler(data), BATCH, False))
    loop.after = lambda t: next(iter(loop.loader)) if t % 8 == 0 else None


@case
def more_draws_than_samples(loop):
    data = loop.loader.dataset
    loop.loader = DataLoader(data, BATCH, sampler=RandomSampler(data, replacement=True, num_samples=3 * N))
    loop.epochs = 2


@case
def a_mode_changes_between_forward_and_step(loop):
    def hook(*_):
        loop.model[1].train(len(steps) < 30)
        steps.append(0)

    steps = []
    loop.model[4].register_full_backward_hook(hook)


@case
def integers_that_are_not_of_python(loop):
    data = loop.loader.dataset
    loop.loader = DataLoader(data, BATCH, sampler=[*np.arange(N)])


@case
def gradients_are_thrown_away_now_and_then(loop):
    def forward(x):
        if next(calls) % 7 == 0:
            loop.model(x).sum().backward()
            loop.optimizer.zero_grad()
        return loop.model(x)

    calls, loop.forward = iter(range(10**6)), forward


@case
def gradients_are_cleared_by_the_model(loop):
    zero_grad = loop.optimizer.zero_grad

    def after(t):
        loop.model.zero_grad()
        loop.optimizer.zero_grad = zero_grad if t % 5 else lambda: None

    loop.after = after


@case
def large_and_odd_layers(loop):
    layers = [nn.Linear(3, 1031), nn.Linear(1031, 37), nn.Linear(37, 5), nn.Linear(5, 2, bias=False)]
    loop.model = nn.Sequential(*layers)
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.01, momentum=0.9)


@case
def workers(loop):
    loop.loader = DataLoader(loop.loader.dataset, BATCH, shuffle=True, num_workers=1, persistent_workers=True)


def recorded(case, sink):
    loop = Loop()
    CASES[case](loop)
    with Recorder(sink, model=loop.model, optimizer=loop.optimizer):
        loop.run()
    return sink, [p.detach().clone() for p in loop.model.parameters()]


@pytest.mark.parametrize("name", CASES)
def test_the_lane_records_what_python_records(name, monkeypatch):
    lane, weights = recorded(name, LaneSink(16))
    monkeypatch.setattr(straight, "HAS_LANE", False)
    python, expected = recorded(name, MemorySink(16))
    assert all(map(torch.equal, weights, expected))
    assert len(lane.records) == STEPS + 1
    for a, b in zip(lane.records, python.records, strict=True):
        assert repr(replace(a, time=0.0)) == repr(replace(b, time=0.0))
        assert a.hyper.tobytes() == b.hyper.tobytes()
    assert all(a.tobytes() == b.tobytes() for a, b in zip(lane.rows, python.rows, strict=True))
    assert [k.step for k in lane.keyframes] == [k.step for k in python.keyframes]
    for a, b in zip(lane.keyframes, python.keyframes, strict=True):
        assert {k: v.tobytes() for k, v in a.arrays.items()} == {k: v.tobytes() for k, v in b.arrays.items()}


@pytest.mark.parametrize("name", ["plain", "adam", "float64", "groups", "dropout", "a_schedule", "weights_are_clipped"])
def test_most_steps_go_through_the_lane(name):
    sink, _ = recorded(name, LaneSink(16))
    # The others: the first, and the first of every epoch.
    assert sink.straight_steps >= STEPS - 1 - EPOCHS


@pytest.mark.parametrize("keep", ["steps", 10])
@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_file_recorded_through_the_lane_is_the_same(tmp_path, monkeypatch, keep, compression):
    def record(name):
        loop = Loop()
        options = {"keep": keep, "compression": compression}
        with trajrec.record(tmp_path / name, model=loop.model, optimizer=loop.optimizer, **options):
            loop.run()
        return trajrec.open(tmp_path / name)

    with record("lane.h5") as lane:
        monkeypatch.setattr(straight, "HAS_LANE", False)
        with record("python.h5") as python:
            assert (lane.steps, lane.keyframe_steps) == (python.steps, python.keyframe_steps)
            for t in range(1, STEPS + 1):
                assert lane.sample_ids(t).tolist() == python.sample_ids(t).tolist()
                assert lane.hyperparameters(t) == python.hyperparameters(t)
            assert np.array_equal(lane.losses, python.losses)
            if keep == "steps":
                rows = zip(lane.walk(0, STEPS), python.walk(0, STEPS), strict=True)
                assert all(a.tobytes() == b.tobytes() for (_, a), (_, b) in rows)


def test_another_thread_may_call_the_model_meanwhile(monkeypatch):
    monkeypatch.setattr(straight, "_PAUSE", 0)
    loop, sink, over = Loop(), LaneSink(10**6), threading.Event()
    # Large enough to let go of the interpreter's lock.
    loop.model = nn.Sequential(nn.Linear(3, 60_000), nn.Tanh(), nn.Linear(60_000, 2))
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=1e-4)
    loop.epochs = 2
    faults = []

    def act():
        while not over.is_set():
            try:
                with torch.no_grad():
                    loop.model(torch.ones(1, 3))
            except Exception as error:
                faults.append(error)
            time.sleep(0.001)

    actor = threading.Thread(target=act)
    with Recorder(sink, model=loop.model, optimizer=loop.optimizer):
        actor.start()
        loop.run()
        over.set()
        actor.join()
    assert faults == []
    assert [record.step for record in sink.records] == list(range(2 * N // BATCH + 1))


WITHOUT = """
import sys
sys.modules["trajrec.lane"] = None
import torch, trajrec
from trajrec import straight
assert not straight.HAS_LANE
model = torch.nn.Linear(2, 1)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 2)), 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with trajrec.record(sys.argv[1], model=model, optimizer=optimizer):
    for (x,) in loader:
        optimizer.zero_grad()
        model(x).mean().backward()
        optimizer.step()
assert trajrec.open(sys.argv[1]).sample_ids(4).tolist() == [6, 7]
"""


def test_without_a_compiler_python_records(tmp_path):
    subprocess.run([sys.executable, "-c", WITHOUT, tmp_path / "run.h5"], check=True)


def test_what_recording_costs_is_counted_in_the_lane_too(monkeypatch):
    def record():
        loop, seconds = Loop(), []
        with Recorder(LaneSink(16), model=loop.model, optimizer=loop.optimizer) as recorder:
            loop.after = lambda t: seconds.append(recorder.seconds)
            loop.run()
        watch = recorder._watch
        return watch.steps, watch._looked, seconds, recorder.seconds

    steps, looked, seconds, in_all = record()
    assert seconds[0] == 0
    assert seconds[-1] > seconds[30] > 0
    assert in_all >= seconds[-1]
    monkeypatch.setattr(straight, "HAS_LANE", False)
    assert (steps, looked) == record()[:2]


def test_zero_grad_stays_what_it_is_for_others():
    loop, original = Loop(), torch.optim.Optimizer.zero_grad
    loop.epochs = 1
    with Recorder(LaneSink(16), model=loop.model, optimizer=loop.optimizer):
        loop.run()
        hooked = torch.optim.Optimizer.zero_grad
        assert hooked is not original
        assert (hooked.__name__, hooked.__doc__, hooked.__wrapped__) == ("zero_grad", original.__doc__, original)
        assert inspect.signature(hooked) == inspect.signature(original)
        loop.optimizer.param_groups[0]["params"][0].grad = torch.ones(8, 3)
        torch.optim.Optimizer.zero_grad(loop.optimizer, set_to_none=False)
        assert loop.optimizer.param_groups[0]["params"][0].grad.abs().sum() == 0
        loop.model.zero_grad()
        assert loop.model[0].weight.grad is None
    assert torch.optim.Optimizer.zero_grad is original


def step_of(loop, cleared):
    def step(x, y):
        cleared.zero_grad()
        nn.functional.cross_entropy(loop.model(x), y).backward()
        loop.optimizer.step()

    return step


def whole_step(loop):
    compiled = torch.compile(step_of(loop, loop.optimizer), backend="eager")
    return lambda: [compiled(x, y) for x, y in loop.loader]


def step_cleared_by_the_model(loop):
    compiled = torch.compile(step_of(loop, loop.model), backend="eager")
    return lambda: [compiled(x, y) for x, y in loop.loader]


def whole_epoch(loop):
    step = step_of(loop, loop.optimizer)

    def epoch():
        for x, y in loop.loader:
            step(x, y)

    return torch.compile(epoch, backend="eager")


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("compiled", [whole_step, step_cleared_by_the_model, whole_epoch])
def test_a_compiler_may_look_into_the_hooks(compiled):
    torch.compiler.reset()
    loop, sink = Loop(), LaneSink(16)
    epoch = compiled(loop)
    with Recorder(sink, model=loop.model, optimizer=loop.optimizer):
        epoch()
        epoch()
    assert [record.step for record in sink.records] == list(range(2 * N // BATCH + 1))


def test_counts_are_right_also_where_they_were_interrupted():
    def settle(lane):
        if recorder._step < 10 < lane.entry:
            raise KeyboardInterrupt
        original(lane)

    loop, sink = Loop(), LaneSink(10**6)
    recorder = Recorder(sink, model=loop.model, optimizer=loop.optimizer)
    original, recorder._straight._settled = recorder._straight._settled, settle
    with pytest.raises(KeyboardInterrupt), recorder:
        try:
            loop.run()
        finally:
            recorder._straight._settled = original
    assert len(sink.records) == 12  # the first epoch
    assert [keyframe.step for keyframe in sink.keyframes] == [0, 11]


def test_an_iterator_of_the_lane_is_one_of_the_loader():
    loop = Loop()
    loop.epochs = 1
    with Recorder(LaneSink(16), model=loop.model, optimizer=loop.optimizer):
        loop.run()
        iterator = iter(loop.loader)
        assert iter(iterator) is iterator
        assert len(iterator) == len(loop.loader)
        assert vars(iterator)["_loader"] is loop.loader
        assert len([*iterator]) == len(loop.loader)
        with pytest.raises(StopIteration):
            next(iterator)
        with pytest.raises(TypeError, match="a copy"):
            next(type(iterator).__new__(type(iterator)))


def test_an_iterator_that_is_left_ends_its_workers():
    loop = Loop()
    loop.epochs, loop.loader = 1, DataLoader(loop.loader.dataset, BATCH, num_workers=1)
    with Recorder(LaneSink(16), model=loop.model, optimizer=loop.optimizer):
        iterator = iter(loop.loader)
        next(iterator)
        (worker,) = iterator._workers
        del iterator
        worker.join(10)
        assert not worker.is_alive()
        loop.run()


def test_an_error_in_a_hook_of_the_lane_comes_out(monkeypatch):
    loop, sink = Loop(), LaneSink(10**6)

    def each(t):
        if t == 20:
            monkeypatch.setattr(Recorder, "_renew", lambda self: 1 / 0)
            loop.optimizer.param_groups[0]["lr"] = 0.05

    recorder = Recorder(sink, model=loop.model, optimizer=loop.optimizer)
    loop.each = each
    recorder._straight._renew = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError), recorder:
        loop.run()
    assert len(sink.records) == 20  # steps 0 to 19


def test_a_recorder_lets_go_of_everything_when_it_ends():
    loop, sink = Loop(), LaneSink(16)
    recorder = Recorder(sink, model=loop.model, optimizer=loop.optimizer)
    with recorder:
        loop.run()
    assert recorder._straight.lane.stage == straight.Stage.OFF
    assert recorder._straight.lane.loader is None
    before = len(sink.records)
    loop.run()
    assert len(sink.records) == before

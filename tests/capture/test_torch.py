"""What is put in the place of torch's own functions behaves like them, for compilers, other threads and users."""

import inspect
import threading

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trajrec.capture.recorder import Recorder
from trajrec.sink import MemorySink

N, BATCH = 22, 4


class Loop:
    def __init__(self, workers=0):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        data = TensorDataset(torch.randn(N, 3), torch.arange(N) % 2)
        self.loader = DataLoader(data, BATCH, shuffle=True, num_workers=workers)

    def run(self):
        for x, y in self.loader:
            self.step(x, y)

    def step(self, x, y):
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()

    def recorder(self):
        return Recorder(MemorySink(16), model=self.model, optimizer=self.optimizer, strict=True)


def whole_step(loop):
    compiled = torch.compile(loop.step, backend="eager")
    return lambda: [compiled(x, y) for x, y in loop.loader]


def step_cleared_by_the_model(loop):
    def step(x, y):
        loop.model.zero_grad()
        nn.functional.cross_entropy(loop.model(x), y).backward()
        loop.optimizer.step()

    compiled = torch.compile(step, backend="eager")
    return lambda: [compiled(x, y) for x, y in loop.loader]


def whole_epoch(loop):
    return torch.compile(loop.run, backend="eager")


def compiled_model(loop):
    called = torch.compile(loop.model, backend="eager")

    def step(x, y):
        loop.optimizer.zero_grad()
        nn.functional.cross_entropy(called(x), y).backward()
        loop.optimizer.step()

    return lambda: [step(x, y) for x, y in loop.loader]


def compiled_in_place(loop):
    loop.model.compile(backend="eager")
    return loop.run


COMPILED = [whole_step, step_cleared_by_the_model, whole_epoch, compiled_model, compiled_in_place]


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(("compiled", "found"), [*[(how, False) for how in COMPILED], (whole_step, True)])
def test_a_compiler_may_look_into_the_hooks(compiled, found):
    torch.compiler.reset()
    loop = Loop()
    epoch = compiled(loop)
    recorder = Recorder(MemorySink(16), strict=True) if found else loop.recorder()
    with recorder:
        epoch()
        epoch()
    assert [record.step for record in recorder.sink.records] == list(range(2 * -(-N // BATCH) + 1))


def test_zero_grad_stays_what_it_is_for_others():
    loop, original = Loop(), torch.optim.Optimizer.zero_grad
    with loop.recorder():
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


def test_an_iterator_is_one_of_the_loader():
    loop = Loop()
    with loop.recorder():
        iterator = iter(loop.loader)
        assert iter(iterator) is iterator
        assert len(iterator) == len(loop.loader) == len([*iterator])
        assert isinstance(loop.loader.batch_sampler, torch.utils.data.BatchSampler)
        with pytest.raises(StopIteration):
            next(iterator)
        loop.run()


def test_an_iterator_that_is_left_ends_its_workers():
    loop = Loop(workers=1)
    with loop.recorder():
        iterator = iter(loop.loader)
        next(iterator)
        (worker,) = iterator._workers
        del iterator
        worker.join(10)
        assert not worker.is_alive()
        Loop.run(loop)


def test_another_thread_may_call_the_model_meanwhile():
    loop, over, faults = Loop(), threading.Event(), []

    def act():
        while not over.is_set():
            try:
                with torch.no_grad():
                    loop.model(torch.ones(1, 3))
            except Exception as error:
                faults.append(error)
            over.wait(0.001)

    actor = threading.Thread(target=act)
    with loop.recorder() as recorder:
        actor.start()
        for _ in range(20):
            loop.run()
        over.set()
        actor.join()
    assert faults == []
    assert [record.step for record in recorder.sink.records] == list(range(20 * -(-N // BATCH) + 1))


def test_a_recorder_lets_go_of_everything_when_it_ends():
    loop = Loop()
    with loop.recorder() as recorder:
        loop.run()
    before = len(recorder.sink.records)
    loop.run()
    assert len(recorder.sink.records) == before
    assert not loop.model._forward_hooks
    assert not loop.model._forward_pre_hooks
    assert not loop.optimizer._optimizer_step_post_hooks

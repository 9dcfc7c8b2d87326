"""Untidy loops, as they are written: every step is booked with the samples that made it, and replays clean."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

import trajrec
from tests.made.memory_run import MemoryRun
from trajrec.capture.recorder import Recorder
from trajrec.errors import UnknownBatchError
from trajrec.replay import contributions
from trajrec.sink import MemorySink
from trajrec.task.task import Task

N = 24


class Loop:
    """A model with everything that a loop needs; `step` books what really made each step."""

    def __init__(self):
        torch.manual_seed(0)
        self.data = TensorDataset(torch.randn(N, 4), torch.randint(0, 3, (N,)), torch.arange(N))
        self.other = TensorDataset(torch.randn(20, 4), torch.randint(0, 3, (20,)), torch.arange(20))
        self.build = lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.model = self.build()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.5)
        self.loader = DataLoader(self.data, 6, shuffle=True)
        self.validation = DataLoader(self.other, 4)
        self.made, self.kept = [], []
        self.number = 0

    def loss(self, batch, model=None):
        return cross_entropy((model or self.model)(batch[0]), batch[1])

    def step(self):
        self.optimizer.step()
        self.made.append(self.kept)
        self.kept = []

    def uses(self, batch):
        self.kept = [*self.kept, *batch[2].tolist()]

    def every_third(self):
        self.number += 1
        return self.number % 3 == 0

    def ordinary(self, batch):
        self.optimizer.zero_grad()
        self.uses(batch)
        self.loss(batch).backward()
        self.step()


def validates_in_the_middle(loop, batch):
    if loop.every_third():
        loop.model.eval()
        with torch.no_grad():
            for b in loop.validation:
                loop.model(b[0])
        loop.model.train()
    loop.ordinary(batch)


def validates_with_gradients(loop, batch):
    if loop.every_third():
        loop.model.eval()
        for b in loop.validation:
            loop.model(b[0])
        loop.model.train()
    loop.ordinary(batch)


def validates_on_the_training_set(loop, batch):
    if loop.every_third():
        with torch.no_grad():
            for b in DataLoader(loop.data, 5):
                loop.model(b[0])
    loop.ordinary(batch)


def validates_on_much(loop, batch):
    if loop.every_third():
        with torch.no_grad():
            for b in DataLoader(TensorDataset(torch.randn(200, 4)), 1):
                loop.model(b[0])
    loop.ordinary(batch)


def validates_between_micro_batches(loop, batch):
    loop.uses(batch)
    (loop.loss(batch) / 2).backward()
    validates = loop.every_third()
    if validates:
        with torch.no_grad():
            for b in loop.validation:
                loop.model(b[0])
    if loop.number % 2 == 0:
        loop.step()
        loop.optimizer.zero_grad()


def other_model_first(loop, batch):
    other = nn.Linear(4, 3)
    loop.loss(batch, other).backward()
    loop.ordinary(batch)


def outputs_used_before(loop, batch):
    """The order of a GAN: the outputs go into another model's step first."""
    other = nn.Linear(3, 1)
    z = loop.model(batch[0])
    other(z.detach()).mean().backward()
    loop.optimizer.zero_grad()
    loop.uses(batch)
    cross_entropy(z, batch[1]).backward()
    loop.step()


def skipped_after_forward(loop, batch):
    loss = loop.loss(batch)
    if loop.every_third():
        return
    loop.optimizer.zero_grad()
    loop.uses(batch)
    loss.backward()
    loop.step()


def skipped_after_backward(loop, batch):
    loop.optimizer.zero_grad(set_to_none=False)
    loop.loss(batch).backward()
    if loop.every_third():
        return
    loop.uses(batch)
    loop.step()


def skipped_and_cleared_by_the_model(loop, batch):
    loop.model.zero_grad(set_to_none=False)
    loop.loss(batch).backward()
    if loop.every_third():
        return
    loop.uses(batch)
    loop.step()


def skipped_with_named_ids(loop, batch):
    trajrec.set_batch(batch[2])
    loop.optimizer.zero_grad()
    loop.loss(batch).backward()
    if loop.every_third():
        return
    loop.uses(batch)
    loop.step()


LOOPS = [
    validates_in_the_middle,
    validates_with_gradients,
    validates_on_the_training_set,
    validates_on_much,
    validates_between_micro_batches,
    other_model_first,
    outputs_used_before,
    skipped_after_forward,
    skipped_after_backward,
    skipped_and_cleared_by_the_model,
    skipped_with_named_ids,
]


@pytest.mark.parametrize("body", LOOPS)
def test_every_step_is_booked_with_its_samples(body):
    loop, sink = Loop(), MemorySink(4)
    with Recorder(sink, model=loop.model, optimizer=loop.optimizer):
        for _ in range(3):
            for batch in loop.loader:
                body(loop, batch)
    assert [r.ids.tolist() for r in sink.records[1:]] == loop.made
    assert {r.epoch for r in sink.records[1:]} == {0, 1, 2}
    task = Task(loop.build, loop.data, loop.other, loss=lambda m, b: cross_entropy(m(b[0]), b[1], reduction="none"))
    c = contributions(MemoryRun(sink), task, exact=True)
    assert c.certificate.verdict in ("bit-exact", "within rounding")


def test_adversarial_steps_are_booked_once():
    """The gradient of the inputs is taken first, by a backward pass of its own."""
    loop, sink = Loop(), MemorySink(4)
    with Recorder(sink, model=loop.model, optimizer=loop.optimizer):
        for batch in loop.loader:
            x = batch[0].clone().requires_grad_()
            cross_entropy(loop.model(x), batch[1]).backward()
            loop.optimizer.zero_grad()
            loop.uses(batch)
            cross_entropy(loop.model(batch[0] + 0.1 * x.grad.sign()), batch[1]).backward()
            loop.step()
    assert [r.ids.tolist() for r in sink.records[1:]] == loop.made
    assert all(r.parts.size == 0 for r in sink.records)


class Random(torch.utils.data.Dataset):
    def __len__(self):
        return N

    def __getitem__(self, i):
        return torch.randn(4), i % 3, i


@pytest.mark.parametrize(
    "wrap", [lambda d: trajrec.seeded(Subset(d, range(16))), lambda d: Subset(trajrec.seeded(d), range(16))]
)
@pytest.mark.parametrize("workers", [0, 1])
def test_subsets_are_seeded(wrap, workers):
    loop, sink = Loop(), MemorySink(4)
    loop.loader = DataLoader(wrap(Random()), 4, shuffle=True, num_workers=workers)
    with Recorder(sink, model=loop.model, optimizer=loop.optimizer):
        for _ in range(2):
            for batch in loop.loader:
                loop.ordinary(batch)
    data = loop.loader.dataset
    task = Task(loop.build, data, loop.other, loss=lambda m, b: cross_entropy(m(b[0]), b[1], reduction="none"))
    assert contributions(MemoryRun(sink), task, exact=True).certificate.first_bad_step is None


def test_validation_on_another_part_of_seeded_data_does_not_tell_the_epoch():
    loop, sink = Loop(), MemorySink(4)
    train, rest = random_split(trajrec.seeded(Random()), [16, 8])
    loop.loader, loop.validation = DataLoader(train, 4, shuffle=True), DataLoader(rest, 4)
    with Recorder(sink, model=loop.model, optimizer=loop.optimizer):
        for _ in range(2):
            for batch in loop.loader:
                validates_in_the_middle(loop, batch)
    task = Task(loop.build, train, loop.other, loss=lambda m, b: cross_entropy(m(b[0]), b[1], reduction="none"))
    assert contributions(MemoryRun(sink), task, exact=True).certificate.first_bad_step is None


@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("same", [False, True])
def test_evaluation_on_the_seeded_training_data_is_replayed(at, same):
    """Before an epoch, within it, after it: the items of later batches are those of another pass."""
    loop, sink, data = Loop(), MemorySink(4), trajrec.seeded(Random())
    loop.loader = DataLoader(data, 6, shuffle=True)
    with Recorder(sink, model=loop.model, optimizer=loop.optimizer):
        for _ in range(3):
            for k, batch in enumerate(loop.loader):
                if k == at % 4:
                    evaluate(loop, loop.loader if same else DataLoader(data, 5))
                loop.ordinary(batch)
            if at == 4:
                evaluate(loop, loop.loader)
    assert [r.ids.tolist() for r in sink.records[1:]] == loop.made
    assert [r.epoch for r in sink.records[1:]] == 4 * [0] + 4 * [1] + 4 * [2]
    task = Task(loop.build, data, loop.other, loss=lambda m, b: cross_entropy(m(b[0]), b[1], reduction="none"))
    assert contributions(MemoryRun(sink), task, exact=True).certificate.first_bad_step is None


def evaluate(loop, loader):
    with torch.no_grad():
        for batch in loader:
            loop.model(batch[0])


@pytest.mark.parametrize("steps", [{4: False}, {4: True}])
def test_clipping_by_norm_sees_the_parameters_that_have_a_gradient(steps):
    loop, sink = Loop(), MemorySink(4)
    if True in steps.values():
        loop.model[0].requires_grad_(False)
    with Recorder(sink, model=loop.model, optimizer=loop.optimizer):
        for _ in range(2):
            for batch in loop.loader:
                loop.optimizer.zero_grad()
                if len(loop.made) in steps:
                    loop.model[0].requires_grad_(steps[len(loop.made)])
                loop.loss(batch).backward()
                nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1)
                loop.step()
    loss = lambda m, b: cross_entropy(m(b[0]), b[1], reduction="none")  # noqa: E731
    task = Task(loop.build, loop.data, loop.other, loss=loss, gradient=trajrec.clip_norm(0.1))
    values = [contributions(MemoryRun(sink), task, exact=True, mode=mode).values for mode in ("adjoint", "tangent")]
    np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_that_were_at_work_before_the_recording():
    data = TensorDataset(torch.randn(12, 3), torch.arange(12) % 2)
    loader = DataLoader(data, batch_size=4, num_workers=1, persistent_workers=True)
    list(loader)
    model, sink = nn.Linear(3, 2), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(sink, model=model, optimizer=optimizer, loader=loader):
        for _ in range(2):
            for x, y in loader:
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
    assert [record.ids.tolist() for record in sink.records[1:4]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert loader._iterator._index_sampler is loader.batch_sampler


@pytest.mark.parametrize("how", ["as it is", "copied", "made anew"])
def test_two_loaders_side_by_side_over_the_same_data(how):
    """Batches are told apart by what the model is called on; where that is neither they nor copies, nobody can."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, 3), torch.arange(12) % 2)
    loaders = [DataLoader(data, batch_size=4, shuffle=True) for _ in range(2)]
    model, sink = nn.Linear(3, 2), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train():
        with Recorder(sink, model=model, optimizer=optimizer, strict=True):
            for (x, y), (u, v) in zip(*loaders, strict=True):
                optimizer.zero_grad()
                first, second = (2 * x, 2 * u) if how == "made anew" else (x, u.flatten(1))
                first, second = (x.clone(), u.double().float()) if how == "copied" else (first, second)
                (cross_entropy(model(first), y) + cross_entropy(model(second), v)).backward()
                optimizer.step()
                seen.append([(x, data.tensors[0]), (u, data.tensors[0])])

    seen = []
    if how == "made anew":
        with pytest.raises(UnknownBatchError, match=r"Two loaders.*set_batch"):
            train()
        return
    train()
    assert len(seen) == 3
    for record, batches in zip(sink.records[1:], seen, strict=True):
        expected = [int((whole == row).all(1).nonzero()) for part, whole in batches for row in part]
        assert record.ids.tolist() == expected
        assert record.parts.tolist() == [4, 4]


@pytest.mark.parametrize("passes", [1, 2])
def test_a_loop_that_draws_a_batch_ahead(passes):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, 3), torch.arange(12) % 2)
    loader = DataLoader(data, batch_size=4)
    model, sink = nn.Linear(3, 2), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(sink, model=model, optimizer=optimizer, loader=loader):
        for _ in range(2):
            batches = iter(loader)
            following = next(batches)
            while following is not None:
                (x, y), following = following, next(batches, None)
                for _ in range(passes):
                    optimizer.zero_grad()
                    cross_entropy(model(x), y).backward()
                optimizer.step()
    epoch = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [record.ids.tolist() for record in sink.records[1:]] == epoch + epoch
    assert [record.epoch for record in sink.records[1:]] == [0, 0, 0, 1, 1, 1]


def ahead(loader):
    """Hands out a batch when the next one has been drawn."""
    batches = iter(loader)
    following = next(batches)
    while following is not None:
        batch, following = following, next(batches, None)
        yield batch


def looks_at_numbers(loop, batch):
    """An evaluation on tensors that come from no loader, while the next batch waits."""
    with torch.no_grad():
        loop.model(loop.other.tensors[0])
    loop.ordinary(batch)


def looks_at_its_batch(loop, batch):
    with torch.no_grad():
        loop.model(batch[0])
    loop.ordinary(batch)


def accumulates_and_looks(loop, batch):
    loop.uses(batch)
    with torch.no_grad():
        loop.model(loop.other.tensors[0])
    (loop.loss(batch) / 2).backward()
    loop.every_third()
    if loop.number % 2 == 0:
        loop.step()
        loop.optimizer.zero_grad()


def passes_noise(loop, batch):
    loop.model(torch.randn(6, 4))
    loop.ordinary(batch)


# Told by nothing: a batch that was skipped at the end of an epoch.
AHEAD = [body for body in LOOPS if body is not skipped_after_forward]
AHEAD += [looks_at_numbers, looks_at_its_batch, accumulates_and_looks, passes_noise]


@pytest.mark.parametrize("body", AHEAD)
def test_loops_that_draw_ahead_are_booked(body):
    loop, sink = Loop(), MemorySink(4)
    with Recorder(sink, model=loop.model, optimizer=loop.optimizer):
        for _ in range(2):
            for batch in ahead(loop.loader):
                body(loop, batch)
    assert [r.ids.tolist() for r in sink.records[1:]] == loop.made


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("losses", [1, 2])
def test_the_next_batch_may_be_drawn_between_backward_and_step(copied, losses):
    loop, sink = Loop(), MemorySink(4)
    with Recorder(sink, model=loop.model, optimizer=loop.optimizer):
        for _ in range(2):
            batches = iter(loop.loader)
            following = next(batches)
            while following is not None:
                batch = following
                loop.optimizer.zero_grad()
                loop.uses(batch)
                loss = loop.loss([v.clone() for v in batch] if copied else batch)
                loss.backward(retain_graph=True)
                following = next(batches, None)
                if losses == 2:
                    (0 * loss).backward()
                loop.step()
    assert [r.ids.tolist() for r in sink.records[1:]] == loop.made


@pytest.mark.parametrize("every", [1, 2])
def test_loops_that_call_parts_of_the_model_are_booked(every):
    loop, sink = Loop(), MemorySink(4)
    with Recorder(sink, model=loop.model, optimizer=loop.optimizer):
        for k, batch in enumerate(loop.loader):
            loop.uses(batch)
            x = loop.model[0](batch[0])
            (cross_entropy(loop.model[2](loop.model[1](x)), batch[1]) / every).backward()
            if k % every == every - 1:
                loop.step()
                loop.optimizer.zero_grad()
    assert [r.ids.tolist() for r in sink.records[1:]] == loop.made


class Named(nn.Module):
    """Called with arguments by name, and with a dictionary in a list."""

    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 3), nn.Dropout(0.4)

    def forward(self, x=None, nested=None):
        return self.drop(self.linear(nested[0]["x"] if x is None else x))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("pieces", [1, 2])
def test_batches_are_told_apart_by_named_and_nested_inputs(nested, pieces):
    loop, sink = Loop(), MemorySink(4)
    loop.model = Named()
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.1)
    with Recorder(sink, model=loop.model, optimizer=loop.optimizer):
        for batch in ahead(loop.loader):
            loop.optimizer.zero_grad()
            loop.uses(batch)
            for x, y in zip(batch[0].chunk(pieces), batch[1].chunk(pieces), strict=True):
                z = loop.model(nested=[{"x": x}]) if nested else loop.model(x=x)
                (cross_entropy(z, y) / pieces).backward()
            loop.step()
    assert [r.ids.tolist() for r in sink.records[1:]] == loop.made
    # Dropout drew for each piece by itself.
    loss = lambda m, b: cross_entropy(m(x=b[0]), b[1], reduction="none")  # noqa: E731
    c = contributions(MemoryRun(sink), Task(Named, loop.data, loop.other, loss=loss), exact=True)
    assert c.certificate.verdict in ("bit-exact", "within rounding")


def test_two_loaders_in_turn_begin_an_epoch_each():
    loop, sink = Loop(), MemorySink(4)
    other = DataLoader(loop.data, 6, shuffle=True)
    with Recorder(sink, model=loop.model, optimizer=loop.optimizer):
        for pair in zip(loop.loader, other, strict=True):
            for batch in pair:
                loop.ordinary(batch)
    assert [r.ids.tolist() for r in sink.records[1:]] == loop.made
    assert [r.epoch for r in sink.records[1:]] == [0] + 7 * [1]


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("skipped", [None, 1])
def test_a_loop_that_draws_between_the_forward_and_the_backward_pass(copied, skipped):
    data = TensorDataset(torch.randn(12, 3), torch.arange(12) % 2)
    loader = DataLoader(data, batch_size=3)
    model, sink = nn.Linear(3, 2), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(sink, model=model, optimizer=optimizer, loader=loader):
        batches = iter(loader)
        following, number = next(batches), 0
        while following is not None:
            x, y = following
            optimizer.zero_grad()
            loss = cross_entropy(model(x.clone() if copied else x), y)
            following, number = next(batches, None), number + 1
            if number - 1 != skipped:
                loss.backward()
                optimizer.step()
    expected = [[3 * k, 3 * k + 1, 3 * k + 2] for k in range(4) if k != skipped]
    assert [record.ids.tolist() for record in sink.records[1:]] == expected

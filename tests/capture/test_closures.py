"""step(closure): one gradient is recorded like a backward() before the step; of several none, and training goes on."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import trajrec
from trajrec.capture.recorder import Recorder
from trajrec.sink import MemorySink

X = torch.randn(22, 4, generator=torch.Generator().manual_seed(1))
STEPS = 12


class Numbered(Dataset):
    def __len__(self):
        return 22

    def __getitem__(self, i):
        return X[i], i % 3, i


class Own(torch.optim.SGD):
    """A class of a user's own, with a rule: its step without a closure is that of SGD."""

    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        super().step()
        return loss


class HandsOn(torch.optim.SGD):
    """Its closure is called by the step that it is a part of."""

    def step(self, closure=None):
        return super().step(closure)


class Wraps(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(None if closure is None else lambda: closure())


class Sharpness(Own):
    """Takes its gradient at the weights where the loss is worse."""

    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
            self.move()
        return super().step(closure)

    @torch.no_grad()
    def move(self):
        for p in self.param_groups[0]["params"]:
            p.add_(p.grad, alpha=0.05)


class Ahead(Own):
    """Goes ahead before it takes its gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"] if closure else ():
            p.mul_(0.99)
        return super().step(closure)


class AheadUnseen(Own):
    """Does so where no version is counted."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"] if closure else ():
            p.data.mul_(0.99)
        return super().step(closure)


class Deaf(Own):
    """Does not call its closure."""

    def step(self, closure=None):
        return super().step()


OWN = [Own, HandsOn, Wraps, Sharpness, Ahead, AheadUnseen, Deaf]


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    from trajrec.rules import registry

    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    for kind in OWN:
        trajrec.register_rule(kind)


class Loop:
    """A training by closures; `made` are the samples of its steps, by its own account."""

    def __init__(
        self, kind=torch.optim.SGD, by_name=False, passes=1, empty=(), failing=(), lr=0.1, backward_before=False
    ):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))
        self.optimizer = kind(self.model.parameters(), lr=lr)
        self.by_name, self.passes, self.empty, self.failing = by_name, passes, empty, failing
        self.backward_before = backward_before
        self.loader = DataLoader(Numbered(), 6, shuffle=True)
        self.made, self.calls, self.losses, self.number = [], 0, [], 0

    def run(self):
        for _ in range(3):
            batches = iter(self.loader)
            for first in batches:
                micro = [first, *[batch for _ in range(self.passes - 1) if (batch := next(batches, None)) is not None]]
                self.step(micro)
        return [p.detach().clone() for p in self.model.parameters()], torch.get_rng_state()

    def step(self, micro):
        self.number += 1

        def closure():
            self.calls += 1
            self.optimizer.zero_grad()
            if self.number in self.empty:
                return None
            losses = []
            for x, y, _ in micro:
                losses.append(cross_entropy(self.model(x), y) / len(micro))
                losses[-1].backward()
            if self.number in self.failing:
                raise ZeroDivisionError("of the training")
            return sum(losses).item()

        if self.backward_before:
            cross_entropy(self.model(micro[0][0]), micro[0][1]).backward()
        try:
            loss = self.optimizer.step(closure=closure) if self.by_name else self.optimizer.step(closure)
        except ZeroDivisionError:
            return
        self.losses.append(loss)
        if self.number not in self.empty:
            self.made.append([i for *_, ids in micro for i in ids.tolist()])


def recorded(found=False, **options):
    """The recorded training beside the plain one, to the bit: (loop, sink, recorder)."""
    plain, loop, sink = Loop(**options), Loop(**options), MemorySink()
    weights, state = plain.run()
    loop = Loop(**options)
    with Recorder(sink, **({} if found else {"model": loop.model, "optimizer": loop.optimizer})) as recorder:
        again, after = loop.run()
    assert all(map(torch.equal, weights, again))
    assert torch.equal(state, after)
    assert (plain.calls, plain.losses) == (loop.calls, loop.losses)
    return loop, sink, recorder


def ids_of(sink):
    return [record.ids.tolist() for record in sink.records[1:]]


@pytest.mark.parametrize("found", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"by_name": True},
        {"passes": 2},
        {"empty": (1, 4, 12)},
        {"failing": (2, 5)},
        {"kind": torch.optim.AdamW},
        {"kind": Own},
        {"kind": HandsOn},
        {"kind": Wraps, "by_name": True},
    ],
    ids=str,
)
def test_a_closure_of_one_gradient_is_recorded(options, found):
    loop, sink, recorder = recorded(found, **options)
    assert recorder.problem is None
    assert ids_of(sink) == loop.made
    assert torch.equal(
        torch.from_numpy(sink.rows[-1]), torch.cat([p.detach().reshape(-1) for p in loop.model.parameters()])
    )


def test_it_is_recorded_as_a_step_after_a_backward_pass_is():
    """The same training, written the other way: equal records, generator states included."""
    _, sink, _ = recorded()

    class Outside(Loop):
        def step(self, micro):
            self.optimizer.zero_grad()
            cross_entropy(self.model(micro[0][0]), micro[0][1]).backward()
            self.optimizer.step()

    other, loop = MemorySink(), Outside()
    with Recorder(other, model=loop.model, optimizer=loop.optimizer):
        loop.run()
    assert len(sink.records) == STEPS + 1
    for a, b in zip(sink.records, other.records, strict=True):
        assert (a.ids.tolist(), a.crc32, a.rng, a.changes) == (b.ids.tolist(), b.crc32, b.rng, b.changes)
        assert np.array_equal([a.loss, *a.hyper.ravel()], [b.loss, *b.hyper.ravel()], equal_nan=True)


@pytest.mark.parametrize("found", [False, True])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (torch.optim.LBFGS, "LBFGS takes several gradients a step"),
        (Sharpness, "Sharpness.step.closure. calls its closure more than once"),
        (Ahead, "Ahead.step.closure. changes the weights before it calls the closure"),
        (AheadUnseen, "AheadUnseen.step.closure. changes the weights before it calls the closure"),
    ],
)
def test_several_gradients_end_the_recording_and_not_the_training(kind, message, found):
    loop, sink, recorder = recorded(found, kind=kind)
    assert re.search(message, recorder.problem)
    assert ids_of(sink) == []
    assert loop.calls == STEPS if kind in (Ahead, AheadUnseen) else loop.calls > STEPS


def test_a_closure_that_is_not_called_ends_the_recording():
    _, sink, recorder = recorded(kind=Deaf, backward_before=True)
    assert "Deaf.step(closure) did not call the closure it was given" in recorder.problem
    assert ids_of(sink) == []


def test_steps_before_a_second_call_are_kept_and_the_others_are_a_gap(tmp_path):
    class Late(Own):
        steps = 0

        def step(self, closure=None):
            self.steps += closure is not None
            if self.steps == 5:
                with torch.enable_grad():
                    closure()
            return super().step(closure)

    trajrec.register_rule(Late)
    plain = Loop(kind=Late)
    weights, _ = plain.run()
    loop = Loop(kind=Late)
    with trajrec.record(tmp_path / "run.h5", model=loop.model, optimizer=loop.optimizer) as recorder:
        again, _ = loop.run()
    assert all(map(torch.equal, weights, again))
    assert recorder.summary.gaps == ((5, STEPS),)
    with trajrec.open(tmp_path / "run.h5") as run:
        assert [run.sample_ids(t).tolist() for t in range(1, run.steps + 1)] == loop.made[:4]


def test_strict_raises_into_the_training():
    loop = Loop(kind=Sharpness)
    with pytest.raises(trajrec.TrajrecError, match="more than once"), Recorder(MemorySink(), strict=True):
        loop.run()
    assert loop.calls == 1

"""Ids are right or absent, never wrong: loops put together at random, each of which knows what it trains on."""

import logging
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trajrec.capture.recorder import Recorder
from trajrec.sink import MemorySink

N, BATCH = 12, 3
HOW = {
    "as it is": lambda x: x,
    "a view": lambda x: x.view(-1, 4),
    "a copy": lambda x: x.clone(),
    "a copy of another type": lambda x: x.double().float(),
    "made anew": lambda x: (x - 0.5) / 2,
}
BEFORE = ["nothing", "nothing", "evaluates", "evaluates with gradients", "looks at its batch", "looks at numbers"]
BEFORE += ["passes numbers", "trains another model", "looks at the data"]
STEPS = ["step", "step", "step", "skip", "skip after forward", "skip after backward", "two losses", "accumulate"]
STEPS += ["attack", "twice the same loss"]


class Loop:
    """A loop of `made` steps: what it trained on in each."""

    def __init__(self, how, ahead, peeks):
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(N, 4), torch.arange(N))
        self.loader = DataLoader(data, BATCH, shuffle=True)
        self.validation = DataLoader(TensorDataset(torch.randn(5, 4), torch.arange(5)), 2)
        self.model, self.other = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), nn.Linear(4, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.how, self.ahead, self.made, self.used = HOW[how], ahead, [], []
        if peeks:
            next(iter(self.loader))

    def batches(self):
        while True:
            waiting = []
            for batch in self.loader:
                waiting.append(batch)
                if len(waiting) > self.ahead:
                    yield waiting.pop(0)
            yield from waiting

    def loss(self, batch):
        self.used += batch[1].tolist()
        return self.model(self.how(batch[0])).square().mean()

    def before(self, what, batch):
        match what:
            case "evaluates":
                with torch.no_grad():
                    for x, _ in self.validation:
                        self.model(self.how(x))
            case "evaluates with gradients":
                for x, _ in self.validation:
                    self.model(self.how(x))
            case "looks at its batch":
                with torch.no_grad():
                    self.model(self.how(batch[0]))
            case "looks at numbers":
                with torch.no_grad():
                    self.model(torch.randn(3, 4))
            case "passes numbers":
                self.model(torch.randn(3, 4))
            case "trains another model":
                self.other(batch[0]).mean().backward()
            case "looks at the data":
                next(iter(self.loader))

    def step(self, what, batches, batch):
        self.optimizer.zero_grad()
        self.used = []
        if what == "skip":
            return
        loss = self.loss(batch)
        match what:
            case "skip after forward":
                return
            case "skip after backward":
                loss.backward()
                return
            case "two losses":
                (loss + self.loss(next(batches))).backward()
            case "accumulate":
                loss.backward()
                self.loss(next(batches)).backward()
            case "attack":
                x = self.how(batch[0]).detach().clone().requires_grad_()
                self.model(x).mean().backward()
                self.optimizer.zero_grad()
                loss.backward()
            case "twice the same loss":
                loss.backward(retain_graph=True)
                loss.backward()
            case _:
                loss.backward()
        self.optimizer.step()
        self.made.append(sorted(self.used))


def recorded(how, ahead, peeks, events, found):
    """(what was recorded, what was made) of a loop of these events."""
    sink = MemorySink()
    logging.disable(logging.CRITICAL)
    try:
        loop = Loop(how, ahead, False)
        with Recorder(sink, **({} if found else {"model": loop.model, "optimizer": loop.optimizer})):
            if peeks:
                next(iter(loop.loader))
            batches = loop.batches()
            for before, step in events:
                batch = next(batches)
                loop.before(before, batch)
                loop.step(step, batches, batch)
    finally:
        logging.disable(logging.NOTSET)
    return [sorted(record.ids.tolist()) for record in sink.records[1:]], loop.made


loops = {
    "how": st.sampled_from(list(HOW)),
    "ahead": st.integers(0, 2),
    "peeks": st.booleans(),
    "events": st.lists(st.tuples(st.sampled_from(BEFORE), st.sampled_from(STEPS)), min_size=1, max_size=9),
    "found": st.booleans(),
}


def never_wrong(**loop):
    ids, made = recorded(**loop)
    assert ids == made[: len(ids)], loop


@settings(max_examples=60, deadline=None)
@given(**loops)
def test_ids_are_right_or_absent(how, ahead, peeks, events, found):
    never_wrong(how=how, ahead=ahead, peeks=peeks, events=events, found=found)


@pytest.mark.long
@settings(max_examples=10_000, deadline=None)
@given(**loops)
def test_ids_are_right_or_absent_in_many_loops(how, ahead, peeks, events, found):
    never_wrong(how=how, ahead=ahead, peeks=peeks, events=events, found=found)


@pytest.mark.parametrize("how", list(HOW)[:4])
@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("found", [False, True])
def test_loops_whose_inputs_can_be_told_are_recorded_to_their_end(how, ahead, found):
    chance = random.Random(f"{how}{ahead}")
    steps = [step for step in STEPS if step != "attack"]
    events = [(chance.choice(BEFORE), chance.choice(steps)) for _ in range(30)]
    ids, made = recorded(how, ahead, True, [("nothing", "step"), *events], found)
    assert ids == made

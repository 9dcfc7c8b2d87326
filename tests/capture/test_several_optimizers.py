"""Several optimizers on disjoint parameters that step together: recorded as one training, and replayed exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trajrec
from tests.made import loops
from tests.made.loops import Loop, sgd
from tests.made.memory_run import MemoryRun
from tests.replay.losses.test_loops import batch_norm, check, clips_norm, dropout, toggles
from trajrec.capture.recorder import Recorder
from trajrec.errors import RecordingError, TaskError
from trajrec.records import RunSpec
from trajrec.replay import contributions
from trajrec.rules import FlatLayout, rule_for
from trajrec.sink import MemorySink


def heads(model):
    layers = [layer for layer in model if any(True for _ in layer.parameters())]
    return layers[0].parameters(), [p for layer in layers[1:] for p in layer.parameters()]


def two_sgd(model):
    first, rest = heads(model)
    return [torch.optim.SGD(first, lr=0.3), torch.optim.SGD(rest, lr=0.1, momentum=0.8, weight_decay=0.01)]


def sgd_and_adam(model):
    first, rest = heads(model)
    return [torch.optim.SGD(first, lr=0.2, momentum=0.7), torch.optim.AdamW(rest, lr=0.02)]


def adam_and_sgd(model):
    """The other way round in the table of parameters."""
    first, rest = heads(model)
    return [torch.optim.SGD(rest, lr=0.2, momentum=0.7), torch.optim.Adam(first, lr=0.02)]


def with_groups(model):
    first, rest = heads(model)
    weight, bias = first
    one = torch.optim.RMSprop([{"params": [weight]}, {"params": [bias], "lr": 0.002}], lr=0.01, momentum=0.5, eps=0.01)
    return [one, torch.optim.Adagrad(rest, lr=0.05, eps=0.01)]


def three(model):
    (weight, bias), rest = heads(model)
    return [torch.optim.Adam([weight], lr=0.02), torch.optim.SGD([bias], lr=0.1), torch.optim.NAdam(rest, lr=0.02)]


def adafactor_and_sgd(model):
    first, rest = heads(model)
    return [torch.optim.Adafactor(first, lr=0.05), torch.optim.SGD(rest, lr=0.1, momentum=0.5, nesterov=True)]


def scheduled(model, optimizers, t):
    """A rate that changes after its own optimizer has stepped, and an option by hand."""
    optimizers[0].param_groups[0]["lr"] *= 0.9
    if t == 4:
        optimizers[1].param_groups[0]["weight_decay"] = 0.2


LOOPS = {
    "two SGD": Loop(optimizer=two_sgd),
    "SGD and AdamW": Loop(optimizer=sgd_and_adam),
    "the other way round": Loop(optimizer=adam_and_sgd),
    "groups": Loop(optimizer=with_groups),
    "three": Loop(optimizer=three),
    "rules of several kinds": Loop(optimizer=adafactor_and_sgd),
    "schedules": Loop(optimizer=sgd_and_adam, after_step=scheduled),
    "dropout, accumulation": Loop(optimizer=sgd_and_adam, build=dropout, batch_size=3, every=2),
    "batch norm": Loop(optimizer=two_sgd, build=batch_norm),
    "frozen on the way": Loop(optimizer=sgd_and_adam, after_step=toggles({3: False, 6: True})),
    "clipped together": Loop(
        optimizer=sgd_and_adam, before_step=clips_norm(0.3), task={"gradient": trajrec.clip_norm(0.3)}
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_replays_exactly(name):
    made = check(LOOPS[name])
    spec = made.run.spec
    assert len(spec.optimizers) == len(LOOPS[name].optimizer(LOOPS[name].build()))
    assert RunSpec.from_json(spec.to_json()) == spec


def data():
    torch.manual_seed(1)
    return TensorDataset(torch.randn(24, 4), torch.randint(0, 3, (24,)))


def record(make, steps, recorder=None, model=None, strict=False):
    """A loop that calls `steps(optimizers, loss)` on every batch."""
    torch.manual_seed(0)
    model, sink = model or loops.mlp(), MemorySink(4)
    optimizers = make(model)
    given = {"model": model, "optimizer": optimizers} if recorder is None else recorder
    with Recorder(sink, **given, strict=strict):
        for x, y in DataLoader(data(), 6, shuffle=True):
            for optimizer in optimizers:
                optimizer.zero_grad()
            steps(optimizers, lambda x=x, y=y: nn.functional.cross_entropy(model(x), y))
    return MemoryRun(sink)


def together(optimizers, loss):
    loss().backward()
    for optimizer in optimizers:
        optimizer.step()


def test_they_find_themselves():
    run = record(sgd_and_adam, together, recorder={})
    assert [o.name for o in run.spec.optimizers] == ["SGD", "AdamW"]
    assert run.steps == 4
    task = trajrec.Task.supervised(loops.mlp, data(), data())
    assert contributions(run, task, exact=True).certificate.verdict in ("bit-exact", "within rounding")


def test_one_that_steps_alone_is_recorded_as_ever():
    """No gradient, no model of ours, no parameter left: none of these is a companion."""
    frozen, other = loops.mlp(), loops.mlp()
    model = nn.Sequential(loops.mlp(), nn.Linear(3, 3).requires_grad_(False))
    idle = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (frozen, other, model[1])]
    run = record(lambda model: [sgd(model[0])], together, recorder={}, model=model)
    assert (run.spec.optimizer, run.spec.optimizers, len(idle)) == ("SGD", (), 3)


def test_options_are_those_at_each_optimizers_own_step():
    def steps(optimizers, loss):
        loss().backward()
        for rate, optimizer in zip((0.5, 0.25), optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.125

    run = record(two_sgd, steps)
    column = run.spec.hyperparameters.index("lr")
    assert [run.hyper(t)[:, column].tolist() for t in (1, 2)] == [[0.5, 0.25]] * 2


def test_any_order_is_one_step():
    turns = iter([1, -1, 1, -1])

    def steps(optimizers, loss):
        loss().backward()
        for optimizer in optimizers[:: next(turns)]:
            optimizer.step()

    assert record(two_sgd, steps).steps == 4


def every_other(optimizers, loss, turns=[0]):  # noqa: B006
    loss().backward()
    optimizers[0].step()
    turns[0] += 1
    if turns[0] % 2:
        optimizers[1].step()


def two_losses(optimizers, loss):
    for optimizer in optimizers:
        loss().backward()
        optimizer.step()


def only_at_first(optimizers, loss, turns=[0]):  # noqa: B006
    loss().backward()
    turns[0] += 1
    for optimizer in optimizers[: 2 if turns[0] < 4 else 1]:
        optimizer.step()


@pytest.mark.parametrize("recorder", [None, {}])
@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (every_other, "SGD stepped twice while AdamW did not step"),
        (two_losses, "another backward pass between the steps of SGD and AdamW"),
        (only_at_first, "The last step is not whole: AdamW did not step"),
    ],
)
def test_steps_that_do_not_go_together_are_refused(steps, message, recorder):
    steps.__defaults__ = None if steps is two_losses else ([0],)
    with pytest.raises(RecordingError, match=rf"{message}.*each of them steps once after every backward pass"):
        record(sgd_and_adam, steps, recorder, strict=True)


def test_shared_parameters_are_refused():
    model = loops.mlp()
    with pytest.raises(RecordingError, match="hold the same parameter"):
        Recorder(MemorySink(), model=model, optimizer=[sgd(model), sgd(model)])
    with pytest.raises(RecordingError, match=r"takes one or several of torch\.optim\.Optimizer"):
        Recorder(MemorySink(), model=model, optimizer=["SGD"])


def test_a_group_added_later_to_one_of_them_is_refused():
    def steps(optimizers, loss):
        together(optimizers, loss)
        if len(optimizers[0].param_groups) == 1:
            optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(2))]})

    with pytest.raises(RecordingError, match="Before step 2 one of several optimizers was given or lost parameters"):
        record(two_sgd, steps, strict=True)


def test_an_adversary_of_another_model_is_ignored():
    adversary = loops.mlp()
    theirs = torch.optim.Adam(adversary.parameters(), lr=0.1)

    def steps(optimizers, loss):
        together(optimizers, loss)
        theirs.zero_grad()
        adversary(torch.randn(3, 4)).sum().backward()
        theirs.step()

    run = record(two_sgd, steps, recorder={})
    assert [o.name for o in run.spec.optimizers] == ["SGD", "SGD"]
    assert run.steps == 4


@pytest.mark.parametrize("keep", ["steps", 3])
def test_from_files(tmp_path, keep):
    torch.manual_seed(0)
    model = loops.mlp()
    optimizers, loader = sgd_and_adam(model), DataLoader(data(), 6, shuffle=True)
    with trajrec.record(tmp_path / "run.h5", model=model, optimizer=optimizers, keep=keep):
        for _ in range(2):
            for x, y in loader:
                nn.functional.cross_entropy(model(x), y).backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
    task = trajrec.Task.supervised(loops.mlp, data(), data())
    with trajrec.open(tmp_path / "run.h5") as run:
        assert run.spec.optimizer == "SGD + AdamW"
        found = [contributions(run, task, exact=True, mode=mode) for mode in ("adjoint", "tangent")]
        assert np.isnan(run.hyper(1)[0, run.spec.hyperparameters.index("betas.0")])
    assert all(c.certificate.verdict in ("bit-exact", "within rounding") for c in found)
    assert np.abs(found[0].values - found[1].values).max() < 1e-4 * np.abs(found[0].values).max()


def test_another_class_in_the_task_is_refused():
    spec = record(sgd_and_adam, together).spec
    with pytest.raises(TaskError, match=r"trained with SGD \+ AdamW"):
        rule_for(spec, FlatLayout(spec), torch.optim.Adam)
    assert rule_for(spec, FlatLayout(spec), torch.optim.SGD).needs_state

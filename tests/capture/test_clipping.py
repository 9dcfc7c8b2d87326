"""Clipping is noted however it is called, and a replay needs no word of it in the Task."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_ as imported_before
from torch.nn.utils import clip_grad_value_ as values_imported_before

import trajrec
from tests.made import loops
from tests.made.loops import Loop, N, mlp, sgd
from tests.replay.losses.test_loops import check, relative
from trajrec.errors import DriftError
from trajrec.records import Clip, Conditions
from trajrec.replay import contributions

NORM, VALUE = 0.3, 0.05


def norm(model, _):
    imported_before(model.parameters(), NORM)


def clips_of(run):
    return {t: conditions.clips for t, conditions in run.changes.items()}


CALLS = {
    "imported before": (norm, (Clip("norm", NORM),)),
    "by attribute, with a list and by name": (
        lambda m, _: nn.utils.clip_grad_norm_(list(m.parameters()), max_norm=NORM, norm_type=2, foreach=False),
        (Clip("norm", NORM),),
    ),
    "largest value": (
        lambda m, _: imported_before(m.parameters(), 0.05, norm_type=float("inf")),
        (Clip("norm", 0.05, None),),
    ),
    "of order 1": (lambda m, _: imported_before(m.parameters(), 1.0, 1), (Clip("norm", 1.0, 1.0),)),
    "a tensor": (
        lambda m, _: imported_before(m.parameters(), torch.tensor(NORM)),
        (Clip("norm", float(torch.tensor(NORM))),),
    ),
    "values": (lambda m, _: values_imported_before(m.parameters(), VALUE), (Clip("value", VALUE, 2.0),)),
    "one parameter": (lambda m, _: imported_before(m[0].weight, 0.1), (Clip("norm", 0.1, 2.0, ("0.weight",)),)),
    "an iterator": (
        lambda m, _: imported_before(iter(list(m[2].parameters())), 0.1),
        (Clip("norm", 0.1, 2.0, ("2.weight", "2.bias")),),
    ),
    "two parts": (
        lambda m, _: (imported_before(m[0].parameters(), 0.1), imported_before(m[2].parameters(), 0.2)),
        (Clip("norm", 0.1, 2.0, ("0.weight", "0.bias")), Clip("norm", 0.2, 2.0, ("2.weight", "2.bias"))),
    ),
    "values, then norm": (
        lambda m, _: (values_imported_before(m.parameters(), VALUE), imported_before(m.parameters(), 0.1)),
        (Clip("value", VALUE, 2.0), Clip("norm", 0.1)),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_clipping_is_noted_and_replayed_exactly_without_a_word_in_the_task(name):
    call, expected = CALLS[name]
    made = check(Loop(before_step=call))
    assert clips_of(made.run) == {1: expected}


def test_it_is_the_same_as_said_by_hand():
    made = loops.train(Loop(before_step=norm))
    noted = contributions(made.run, made.task, targets="each")
    made.task.gradient = trajrec.clip_norm(NORM)
    said = contributions(made.run, made.task, targets="each")
    assert np.array_equal(noted.values, said.values)


def test_the_task_wins():
    made = loops.train(Loop(before_step=norm, task={"gradient": lambda g: g}))
    with pytest.raises(
        DriftError,
        match=r"Task\.gradient was used; the recording notes that gradients were clipped, the norm to 0.3: leave",
    ):
        contributions(made.run, made.task)


def test_a_schedule_of_the_limit_and_steps_without_clipping():
    at = iter(range(100))

    def some(model, _):
        t = next(at) + 1
        if t not in (3, 7):
            imported_before(model.parameters(), 0.5 / t)

    class Anew:
        def __call__(self, model, optimizer):
            nonlocal at
            some(model, optimizer)

    def optimizer(model):
        nonlocal at
        at = iter(range(100))
        return sgd(model)

    made = check(Loop(optimizer=optimizer, before_step=Anew()))
    found = clips_of(made.run)
    assert found[1] == (Clip("norm", 0.5),)
    assert found[3] == found[7] == ()
    assert found[4] == (Clip("norm", 0.125),)


def test_measuring_a_norm_is_no_clipping():
    made = loops.train(Loop(before_step=lambda m, _: imported_before(m.parameters(), float("inf"))))
    assert clips_of(made.run) == {}


def test_accumulated_gradients_clipped_once():
    made = check(Loop(every=2, before_step=norm))
    assert clips_of(made.run) == {1: (Clip("norm", NORM),)}


def test_clipping_between_micro_batches_cannot_be_told_and_is_said():
    def backward(loss):
        loss.backward()
        imported_before(holder[-1].parameters(), NORM)

    holder = []

    def optimizer(model):
        holder.append(model)
        return sgd(model)

    made = loops.train(Loop(every=2, optimizer=optimizer, backward=backward))
    assert {clip.kind for clip in clips_of(made.run)[1]} == {"other", "norm"}
    with pytest.raises(DriftError):
        contributions(made.run, made.task)


@pytest.mark.parametrize("to_none", [True, False])
def test_a_step_that_was_not_made_leaves_no_clipping_behind(to_none):
    skipped = []

    def step(optimizer):
        if len(skipped) == 1:
            optimizer.step()
        skipped.append(optimizer) if len(skipped) < 1 else None

    def before(model, optimizer):
        if not skipped:
            imported_before(model.parameters(), NORM)

    made = loops.train(Loop(before_step=before, step=step))
    assert clips_of(made.run) == {}
    contributions(made.run, made.task)


def test_other_models_and_parameters_outside_the_optimizer():
    other = nn.Linear(2, 2)

    def before(model, _):
        other(torch.ones(1, 2)).sum().backward()
        imported_before(other.parameters(), 0.01)
        norm(model, _)

    made = loops.train(Loop(before_step=before))
    assert clips_of(made.run)[1] == (Clip("norm", NORM),)

    def both(model, _):
        other(torch.ones(1, 2)).sum().backward()
        imported_before([*model.parameters(), *other.parameters()], NORM)

    made = loops.train(Loop(before_step=both))
    assert [clip.kind for clip in clips_of(made.run)[1]] == ["other"]
    with pytest.raises(DriftError, match="outside of the recorded optimizer"):
        contributions(made.run, made.task)


def test_an_error_is_no_clipping():
    def before(model, _):
        kept = model[0].weight.grad.clone()
        model[0].weight.grad.fill_(float("nan"))
        with pytest.raises(RuntimeError, match="non-finite"):
            imported_before(model.parameters(), NORM, error_if_nonfinite=True)
        model[0].weight.grad.copy_(kept)

    made = loops.train(Loop(before_step=before))
    assert clips_of(made.run) == {}


def test_several_optimizers_and_adamw():
    def two(model):
        return [torch.optim.AdamW(model[0].parameters(), lr=0.02), torch.optim.SGD(model[2].parameters(), lr=0.2)]

    check(Loop(optimizer=two, before_step=norm), tolerance=1e-5)


def test_unfreezing_with_clipping():
    def optimizer(model):
        model[0].requires_grad_(False)
        return torch.optim.AdamW(model[2].parameters(), lr=0.02)

    def after(model, optimizer, t):
        if t == 3:
            model[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})

    made = check(Loop(optimizer=optimizer, after_step=after, before_step=norm), tolerance=1e-5)
    assert {clip for clips in clips_of(made.run).values() for clip in clips} == {Clip("norm", NORM)}


def test_training_is_the_same_and_everything_is_put_back():
    from torch.nn.utils import clip_grad

    before = [f.__closure__[0].cell_contents for f in (clip_grad.clip_grad_norm_, clip_grad.clip_grad_value_)]
    recorded = loops.train(Loop(before_step=norm))
    after = [f.__closure__[0].cell_contents for f in (clip_grad.clip_grad_norm_, clip_grad.clip_grad_value_)]
    assert before == after
    plain = loops.train(Loop(before_step=norm), torch.zeros(N, dtype=torch.float64))
    assert torch.equal(recorded.values, plain.values)


def test_conditions_as_json_and_hostile_values():
    conditions = Conditions(clips=(Clip("norm", 1.0, None, ("a",)), Clip("value", 0.5)))
    assert Conditions.from_json(conditions.to_json()) == conditions
    assert b"clips" not in Conditions().to_json()
    for text in (
        b'{"clips": [{"kind": "os.system", "limit": 1.0}]}',
        b'{"clips": [{"kind": "norm", "limit": NaN}]}',
        b'{"clips": [{"kind": "norm", "limit": -1.0}]}',
        b'{"clips": [{"kind": "norm", "limit": 1.0, "order": Infinity}]}',
        b'{"clips": [{"kind": "norm", "limit": "1"}]}',
        b'{"clips": [{"kind": "norm", "limit": 1, "params": [1]}]}',
        b'{"clips": 5}',
    ):
        with pytest.raises(ValueError, match=r"clip"):
            Conditions.from_json(text)


def test_what_was_taken_is_said():
    made = loops.train(Loop(build=mlp, before_step=norm))
    c = contributions(made.run, made.task, targets="each")
    assert relative(c.values, c.values) == 0
    assert "Gradients were clipped, as the recording notes: the norm to 0.3." in c.notes

"""Users' own optimizer classes: replayed by their own steps, or refused with the reason."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim.optimizer import register_optimizer_step_post_hook

import trajrec
from tests.made import own_optimizers as own
from tests.made.own_optimizers import N, given, per_sample, recorded, train
from tests.made.reference import Plan
from tests.made.reference import contributions as naive
from trajrec.capture.recorder import Recorder
from trajrec.errors import TaskError, UnsupportedOptimizerError
from trajrec.replay import contributions
from trajrec.rules import OwnRule, RoundedRule, check_recordable, registry
from trajrec.rules.sgd import SGDRule
from trajrec.sink import MemorySink

GOOD = [own.Own, own.Belief, own.Lars, own.Clipped, own.Slow, own.Subclassed, own.Counting, own.Squaring]
BAD = {
    own.OnData: r"failed its self-test.* it works on \.data \(own_optimizers.py:\d+\)",
    own.OfNumbers: r"failed its self-test.* it takes a number out of a tensor by \.item\(\) \(own_optimizers.py:\d+\)",
    own.AsAlpha: "AsAlpha.step.*alpha= or value= is a number taken out of it: multiply by it instead",
    own.ByName: r"ByName keeps 'calls' in optimizer\.state, where a parameter was expected",
    own.Detaching: r"failed its self-test.* it cuts the graph by \.detach\(\) \(own_optimizers.py:\d+\)",
    own.Rounding: r"failed its self-test.* it rounds to bfloat16 \(own_optimizers.py:\d+\)",
    own.Inferring: "Inferring.* inference",
    own.WithClosure: "WithClosure.step.* cannot be repeated .* without a closure .*several gradients a step",
    own.Evaluating: "Evaluating.step.* cannot be repeated .* without a closure .*several gradients a step",
    own.Hiding: r"Hiding takes another step .* outside optimizer.state",
    own.Drawing: "Drawing takes another step .* or draws random numbers",
    own.Remembering: "failed its self-test.* it takes a number out of a tensor",
    own.Listing: "Listing keeps 'history' in its state, a list",
    own.InGroup: "InGroup keeps 'momentum' in its parameter groups, and it depends on the gradient",
    own.MadeInGroup: "MadeInGroup keeps 'group:history' in its state, a list",
}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The table of registered classes, empty."""
    table = {}
    monkeypatch.setattr(registry, "_registered", table)
    return table


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("cls", GOOD)
def test_both_directions_equal_each_other_and_finite_differences_of_the_training(cls, dead):
    trajrec.register_rule(cls)
    run, task = recorded(cls, dead=dead)
    a, t = (contributions(run, task, targets="each", exact=True, mode=mode) for mode in ("adjoint", "tangent"))
    assert a.certificate.verdict == t.certificate.verdict == "bit-exact"
    scale = np.abs(a.values).max()
    assert np.abs(a.values - t.values).max() < 1e-9 * scale
    for sample in (0, 7):
        e = torch.zeros(N, dtype=torch.float64)
        e[sample] = h = 1e-5
        slope = (train(cls, e, dead=dead)[0] - train(cls, -e, dead=dead)[0]) / (2 * h)
        assert np.abs(-slope / N - a.values[sample]).max() < 1e-6 * scale


@pytest.mark.parametrize("cls", GOOD)
def test_a_training_in_float32_is_made_again_bit_for_bit_and_replayed_in_float64(cls):
    trajrec.register_rule(cls)
    run, task = recorded(cls, dtype=torch.float32)
    single, double = (contributions(run, task, targets="each", exact=True, dtype=d) for d in ("float32", "float64"))
    assert single.certificate.verdict == "bit-exact"
    assert double.certificate.verdict == "within rounding"
    assert np.abs(single.values - double.values).max() < 1e-3 * np.abs(double.values).max()


def test_amsgrad_of_a_subclass_writes_with_out_and_is_followed():
    trajrec.register_rule(own.Subclassed)
    run, task = recorded(own.Subclassed, amsgrad=True)
    values = {m: contributions(run, task, targets="each", exact=True, mode=m).values for m in ("adjoint", "tangent")}
    np.testing.assert_allclose(values["adjoint"], values["tangent"], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("cls", BAD)
def test_a_bad_class_is_refused_when_its_recording_begins_with_the_reason(cls):
    trajrec.register_rule(cls)
    with pytest.raises(UnsupportedOptimizerError, match=BAD[cls]) as refusal:
        recorded(cls)
    assert f"trajrec.register_rule({cls.__name__}, MyRule)" in str(refusal.value)


@pytest.mark.parametrize("cls", [own.OnData, own.OfNumbers, own.Detaching, own.Remembering])
def test_a_bad_class_is_refused_at_replay_too(cls, monkeypatch):
    """On the recorded state, where a check at the beginning was not made."""
    monkeypatch.setattr("trajrec.capture.recorder.rehearse", lambda *_: None)
    trajrec.register_rule(cls)
    run, task = recorded(cls)
    with pytest.raises(UnsupportedOptimizerError, match="failed its self-test"):
        contributions(run, task)


@pytest.mark.parametrize("mode", ["adjoint", "tangent"])
def test_what_leaves_the_graph_later_is_refused_at_that_step(mode):
    trajrec.register_rule(own.Late)
    run, task = recorded(own.Late)
    with pytest.raises(UnsupportedOptimizerError, match=r"Late works on .data .*did not during its self-test"):
        contributions(run, task, mode=mode)


def test_an_unknown_class_is_refused_at_record_time_with_both_ways_out():
    with pytest.raises(
        UnsupportedOptimizerError, match=r"no rule for the optimizer Own of tests.made.own_optimizers"
    ) as e:
        recorded(own.Own)
    assert "trajrec.register_rule(Own) before recording" in str(e.value)
    assert "trajrec.register_rule(Own, MyRule)" in str(e.value)


def test_the_class_comes_from_the_task_or_from_registration(registered):
    trajrec.register_rule(own.Belief)
    run, task = recorded(own.Belief)
    expected = contributions(run, task, exact=False).values
    registered.clear()
    assert (contributions(run, given(task, own.Belief), exact=False).values == expected).all()
    with pytest.raises(UnsupportedOptimizerError, match=r"trained with Belief .*Task\(..., optimizer=Belief\)"):
        contributions(run, task)
    with pytest.raises(TaskError, match=r"trained with Belief .*but the Task says optimizer=Lars"):
        contributions(run, given(task, own.Lars))


def test_only_classes_of_optimizers_are_taken():
    with pytest.raises(TaskError, match=r"Task\.optimizer is a class"):
        trajrec.Task(nn.Linear(1, 1), [], loss=None, optimizer="Lion")
    with pytest.raises(UnsupportedOptimizerError, match=r"takes a subclass of torch\.optim\.Optimizer"):
        trajrec.register_rule(nn.Linear)
    with pytest.raises(UnsupportedOptimizerError, match="A rule is a subclass of"):
        trajrec.register_rule(own.Own, nn.Linear)
    with pytest.raises(UnsupportedOptimizerError, match="LBFGS takes several gradients"):
        trajrec.register_rule(torch.optim.LBFGS)


def test_registration_stands_above_a_class_as_a_decorator():
    assert trajrec.register_rule(own.Own) is own.Own


class OnDataRule(SGDRule):
    """What `OnData` does, written as a rule."""

    def step(self, weights, state, gradient, hyper):
        parts = [weights[s] - self.options(hyper, i)["lr"] * gradient[s] for i, s in enumerate(self.layout.groups)]
        return torch.cat(parts), state

    def initial_state(self, keyframe, hyper, dtype, device):
        return {}

    def placeholder_state(self, weights):
        return {}

    def implied_state(self, before, after, gradient, hyper):
        return {}


def test_a_class_that_cannot_be_followed_is_replayed_by_a_rule_of_its_own():
    trajrec.register_rule(own.OnData, OnDataRule)
    run, task = recorded(own.OnData)
    a = contributions(run, task, targets="each", exact=True)
    assert a.certificate.verdict in ("bit-exact", "within rounding")
    e = torch.zeros(N, dtype=torch.float64)
    e[2] = h = 1e-5
    slope = (train(own.OnData, e)[0] - train(own.OnData, -e)[0]) / (2 * h)
    assert np.abs(-slope / N - a.values[2]).max() < 1e-6 * np.abs(a.values).max()


class WrongRule(OnDataRule):
    """Steps twice as far: nothing is wrong with its derivative."""

    def step(self, weights, state, gradient, hyper):
        return super().step(weights, state, 2 * gradient, hyper)


def test_a_rule_that_does_not_step_like_the_class_is_found_by_the_certificate():
    trajrec.register_rule(own.OnData, WrongRule)
    run, task = recorded(own.OnData)
    with pytest.raises(trajrec.TrajrecError, match="drifted at step 1"):
        contributions(run, task)


class DemandingRule(OwnRule):
    """Knows how to build its class."""

    def build(self, groups):
        return own.Demanding(groups, 0.5)


def test_a_constructor_that_wants_more_is_helped_by_a_rule():
    trajrec.register_rule(own.Demanding)
    with pytest.raises(UnsupportedOptimizerError, match=r"Demanding could not be built again .*scale.*build\(self"):
        recorded(own.Demanding, scale=0.5)
    trajrec.register_rule(own.Demanding, DemandingRule)
    run, task = recorded(own.Demanding, scale=0.5)
    assert contributions(run, task).certificate.verdict == "bit-exact"


def test_recording_draws_no_random_numbers():
    """The order of the second epoch's samples is that of a training that is not recorded."""
    trajrec.register_rule(own.Noisy)
    assert (train(own.Noisy)[0] == train(own.Noisy, sink=MemorySink(interval=4))[0]).all()


def test_hooks_on_all_optimizers_hear_the_steps_of_the_training_alone():
    """As the recorder's own under `trajrec record`, which would record the steps on copies."""
    trajrec.register_rule(own.Belief)
    heard = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: heard.append(optimizer))
    try:
        run, task = recorded(own.Belief, named=False)
        contributions(run, task, mode="tangent")
    finally:
        handle.remove()
    assert len(heard) == run.steps == 6
    assert (run.row(6) == recorded(own.Belief)[0].row(6)).all()


def lars(p, state, g, o):
    """The step of `Lars`, once more."""
    t, velocity = (1, 0.0) if state is None else (state[0] + 1, state[1])
    g = g + o["weight_decay"] * p
    velocity = o["momentum"] * velocity + g * p.square().sum().sqrt() / g.square().sum().sqrt()
    return p - o["lr"] / t**0.5 * velocity, (t, velocity)


def test_contributions_are_those_of_naive_autograd_through_the_whole_training():
    trajrec.register_rule(own.Lars)
    run, task = recorded(own.Lars)
    model, layout = task.build_model(), run.spec.params
    start = {p.name: torch.tensor(run.row(0)[p.span]).reshape(p.shape).requires_grad_() for p in layout}
    groups = [[p.name for p in layout if p.group == g] for g in (0, 1)]
    options = [{"momentum": 0.9, "weight_decay": 0.01, "lr": lr} for lr in (0.05, 0.02)]
    plan = Plan([torch.as_tensor(run.sample_ids(t)) for t in range(1, 7)], [options] * 6, groups, step=lars)
    x, y, _ = task.test.tensors

    def target(params):
        return per_sample(lambda a: functional_call(model, params, (a,)), (x, y))

    expected = naive(model, start, task.train.tensors[:2], per_sample, plan, N, target)
    found = contributions(run, task, targets="each", exact=True).values
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-8, atol=1e-12)


def test_a_step_within_a_step_is_one_step():
    """A class that calls the step of a class that has been built too: hooks hear both."""
    torch.optim.AdamW(own.build().parameters())
    trajrec.register_rule(own.Subclassed)
    run, task = recorded(own.Subclassed)
    assert run.steps == 6
    assert contributions(run, task).certificate.verdict == "bit-exact"


def test_a_step_that_failed_half_way_is_a_gap():
    torch.optim.AdamW(own.build().parameters())
    trajrec.register_rule(own.Subclassed)
    sink, model = MemorySink(interval=4), own.build()
    data = torch.utils.data.TensorDataset(torch.randn(6, 4), torch.zeros(6, dtype=torch.long))
    optimizer, loader = own.Subclassed(model.parameters()), torch.utils.data.DataLoader(data, 2)
    with Recorder(sink, model=model, optimizer=optimizer, loader=loader) as recorder:
        for index, (x, y) in enumerate(loader):
            nn.functional.cross_entropy(model(x), y).backward()
            if index == 1:
                rate = optimizer.param_groups[0].pop("lr")
                with pytest.raises(KeyError):
                    optimizer.step()
                optimizer.param_groups[0]["lr"] = rate
            else:
                optimizer.step()
    # What the step changed before it failed is in the weights.
    assert [record.ids.tolist() for record in sink.records[1:]] == [[0, 1]]
    assert "Step 2 changed the weights" in recorder.problem


@pytest.mark.parametrize("cls", [own.Belief, own.Rounding])
def test_a_function_of_the_gradients_goes_before_an_own_rule(cls):
    """What the rule knows of itself (its constants, its rounding) is known through the other as well."""
    trajrec.register_rule(cls, RoundedRule if cls is own.Rounding else None)
    run, task = recorded(cls)
    plain = contributions(run, task, targets="each", exact=True).values
    task.gradient = lambda gradients: gradients
    for mode in ("adjoint", "tangent"):
        np.testing.assert_allclose(
            contributions(run, task, targets="each", exact=True, mode=mode).values, plain, rtol=1e-7
        )


def test_states_rebuilt_from_keyframes_are_the_same():
    trajrec.register_rule(own.Slow)
    run, task = recorded(own.Slow)
    whole = contributions(run, task, targets="each", exact=True, mode="adjoint")
    little = contributions(run, task, targets="each", exact=True, mode="adjoint", memory=1)
    np.testing.assert_allclose(little.values, whole.values, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("cls", [own.Belief, own.Counting])
@pytest.mark.parametrize("keep", ["all", 3])
def test_a_file_is_recorded_and_replayed(tmp_path, keep, cls):
    """What `Counting` keeps in its groups is in the keyframes too."""
    trajrec.register_rule(cls)
    torch.manual_seed(0)
    model, path = own.build(), tmp_path / "run.h5"
    _, task = train(cls, dtype=torch.float32)
    optimizer = cls(model.parameters(), lr=0.02)
    loader = torch.utils.data.DataLoader(task.train, 4, shuffle=True)
    with trajrec.record(
        path, model=model, optimizer=optimizer, loader=loader, **({} if keep == "all" else {"keep": 3})
    ):
        for _ in range(2):
            for x, y, _ in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
    with trajrec.open(path) as run:
        for mode in ("adjoint", "tangent"):
            c = contributions(run, given(task, cls), targets="each", exact=True, mode=mode)
            assert (c.certificate.verdict, c.certificate.steps_checked) == ("bit-exact", 6)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedOptimizerError, match="sparse gradient, which cannot be recorded"):
        check_recordable(torch.optim.SGD(table.parameters(), lr=0.1))


def test_words_that_differ_between_groups_are_refused():
    optimizer = torch.optim.Muon([{"params": [nn.Parameter(torch.zeros(2, 2))], "adjust_lr_fn": "match_rms_adamw"}])
    with pytest.raises(UnsupportedOptimizerError, match="group 0 has adjust_lr_fn='match_rms_adamw'"):
        check_recordable(optimizer)

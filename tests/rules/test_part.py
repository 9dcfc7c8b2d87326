"""The self-test on a part of the weights: no larger for a large model, and no blinder."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import trajrec
from tests.made import own_optimizers as own
from tests.made.rule_point import rule_of
from trajrec.errors import UnsupportedOptimizerError
from trajrec.rules import registry, selftest
from trajrec.rules.adaptive import AdaptiveRule
from trajrec.rules.composed.transformed import TransformedRule
from trajrec.rules.part import _block_shapes, part_of
from trajrec.rules.selftest import self_test
from trajrec.rules.sgd import SGDRule

MOST = 400


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """Parts of some hundred weights, and a table of registered classes of its own."""
    monkeypatch.setattr(selftest, "MOST", MOST)
    monkeypatch.setattr(selftest, "LEAST", MOST)
    monkeypatch.setattr(registry, "_registered", {})


class Net(nn.Module):
    """Parameters of all shapes; of the embedding a batch sees two rows."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(300, 8)
        self.conv = nn.Conv2d(6, 9, 3)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.randn(2))
        self.out = nn.Linear(8, 40)


def point(make, steps=0, model=Net):
    """A rule with a large model and the point that `self_test` takes; after so many steps of the optimizer."""
    torch.manual_seed(0)
    model = model()
    optimizer = make(model)
    for step in range(steps + 1):
        gradients = [torch.randn(p.shape) for p in model.parameters()]
        gradients = [
            g * (torch.arange(300) % 150 == 71)[:, None] if len(g.shape) == 2 and len(g) == 300 else g
            for g in gradients
        ]
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g
        if step < steps:
            optimizer.step()
    return rule_of(optimizer, model, gradients)


def in_groups(cls, **options):
    def make(model):
        parameters = list(model.parameters())
        return cls([{"params": parameters[::2], "lr": 0.1}, {"params": parameters[1::2]}], **options)

    return make


RIGHT = {
    "SGD": in_groups(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True),
    "AdamW": in_groups(torch.optim.AdamW, amsgrad=True),
    "RMSprop": in_groups(torch.optim.RMSprop, centered=True, momentum=0.5),
    "Adafactor": in_groups(torch.optim.Adafactor),
    "Muon": lambda model: torch.optim.Muon(model.parameters()),
    **{cls.__name__: in_groups(cls) for cls in (own.Own, own.Belief, own.Lars, own.Clipped, own.Slow, own.Subclassed)},
}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", RIGHT)
def test_right_classes_prove_themselves_on_a_part(name, steps, monkeypatch):
    if name in vars(own):
        trajrec.register_rule(getattr(own, name))
    rule, *where = point(RIGHT[name], steps, (lambda: nn.Embedding(300, 8)) if name == "Muon" else Net)
    sizes, prove = [], selftest._prove
    monkeypatch.setattr(selftest, "_prove", lambda r, p, h: (sizes.append(p.weights.numel()), prove(r, p, h)))
    self_test(rule, *where)
    assert sizes == [sizes[0]]
    assert sizes[0] <= MOST < rule.layout.size


def test_the_part_holds_every_parameter_and_the_rows_that_have_a_gradient():
    rule, w, _, g, _ = point(RIGHT["SGD"])
    part = part_of(rule.spec, rule.layout, w, g, MOST)
    cut = rule.cut(part)
    assert [p.name for p in cut.layout.params] == [p.name for p in rule.layout.params]
    assert [len(p.shape) for p in cut.layout.params] == [len(p.shape) for p in rule.layout.params]
    whole, some = rule.layout.split(g), cut.layout.split(part.vector(g, slice(0, len(g))) * part.scales[1])
    rows = part.blocks[[p.name for p in rule.spec.params].index("words.weight")][0].tolist()
    assert {71, 221} <= set(rows)
    for name, value in whole.items():
        assert float(some[name].norm()) == pytest.approx(float(value.norm()), rel=1e-5)


@pytest.mark.parametrize("count", [1, 3, 400])
def test_blocks_are_as_large_as_may_be(count):
    shapes = [(1000, 700)] * count + [(3,), (), (64, 3, 3, 3)]
    found = _block_shapes(shapes, 100_000)
    assert all(1 <= b <= a for one, other in zip(shapes, found, strict=True) for a, b in zip(one, other, strict=True))
    assert found[count:] == shapes[count:] or count == 400
    total = sum(map(math.prod, found))
    assert 100_000 / 4 < total <= 100_000


class OneCut(own.Own):
    """Cuts the graph at one of its parameters, in one of its groups."""

    at = (0, 0)

    @torch.no_grad()
    def step(self, closure=None):
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                grad = p.grad.detach() if (i, j) == self.at else p.grad
                p.sub_(group["lr"] * grad * (1 + p.abs()))


@pytest.mark.parametrize("at", [(i, j) for i in (0, 1) for j in range(4)])
def test_one_parameter_that_is_treated_wrongly_is_found(at):
    cls = type("OneCut", (OneCut,), {"at": at})
    trajrec.register_rule(cls)
    rule, *where = point(in_groups(cls))
    with pytest.raises(UnsupportedOptimizerError, match=r"failed its self-test.* cuts the graph by \.detach\(\)"):
        self_test(rule, *where)


class WrongGroup(SGDRule):
    """Its derivative is wrong in the second group."""

    def step(self, weights, state, gradient, hyper):
        cut = gradient.clone()
        cut[self.layout.groups[1]] = gradient[self.layout.groups[1]].detach()
        return super().step(weights, state, cut, hyper)


class WrongMoment(AdaptiveRule):
    """Its second moment is taken out of the graph."""

    def step(self, weights, state, gradient, hyper):
        return super().step(weights, state | {"exp_avg_sq": state["exp_avg_sq"].detach()}, gradient, hyper)


@pytest.mark.parametrize(("name", "wrong"), [("SGD", WrongGroup), ("AdamW", WrongMoment)])
def test_a_rule_that_is_wrong_in_a_group_or_a_moment_is_found(name, wrong):
    rule, *where = point(RIGHT[name], steps=1)
    rule.__class__ = wrong
    with pytest.raises(UnsupportedOptimizerError, match=f"{name} failed its self-test"):
        self_test(rule, *where)


@pytest.mark.parametrize("norm", [0.5, 1e4])
def test_clipping_by_hand_does_in_the_part_what_it_does_in_the_whole(norm):
    """A norm that leaves the graph where it clips, and only there: the part must clip, too."""

    def clip(gradients):
        total = float(torch.stack([g.norm() for g in gradients.values()]).norm())
        return {name: g * min(1.0, norm / total) for name, g in gradients.items()}

    rule, *where = point(RIGHT["SGD"])
    rule = TransformedRule(rule, clip)
    if norm > 1e3:
        self_test(rule, *where)
        return
    with pytest.raises(UnsupportedOptimizerError, match="SGD failed its self-test"):
        self_test(rule, *where)


def test_a_function_that_wants_its_tensors_whole_is_tested_on_the_whole():
    rule, *where = point(RIGHT["SGD"])
    mask = torch.rand(300, 8, dtype=torch.float64)
    right = TransformedRule(rule, lambda gradients: gradients | {"words.weight": gradients["words.weight"] * mask})
    self_test(right, *where, memory=1 << 30)
    wrong = TransformedRule(rule, lambda g: g | {"words.weight": g["words.weight"].detach() * mask})
    with pytest.raises(UnsupportedOptimizerError, match="SGD failed its self-test"):
        self_test(wrong, *where, memory=1 << 30)
    with pytest.raises(
        UnsupportedOptimizerError, match=r"all 3,\d+ takes about .* GB of memory, and .* may be taken \(--memory\)"
    ):
        self_test(right, *where, memory=1 << 20)


def test_little_memory_makes_the_part_smaller(monkeypatch):
    monkeypatch.setattr(selftest, "LEAST", 100)
    rule, *where = point(RIGHT["AdamW"])
    sizes, cut = [], selftest._cut
    monkeypatch.setattr(selftest, "_cut", lambda *a: (sizes.append(a[-1]), cut(*a))[1])
    for memory in (1, 200 * selftest.BYTES, None):
        self_test(rule, *where, memory)
    assert sizes == [100, 200, MOST]


def test_several_optimizers_prove_themselves_on_a_part_of_each():
    from tests.made.rule_point import keyframe_of
    from trajrec.rules import FlatLayout, rule_for
    from trajrec.snapshot.model import Snapshot

    trajrec.register_rule(OneCut)
    torch.manual_seed(0)
    model = Net()
    first = [model.words.weight, model.norm.weight, model.norm.bias]
    others = [p for p in model.parameters() if all(p is not q for q in first)]
    optimizers = [OneCut(first), torch.optim.AdamW(others)]
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    snapshot = Snapshot(model, *optimizers)
    spec = snapshot.spec({"samples": 1})
    layout = FlatLayout(spec)
    w = layout.join({k: p.detach() for k, p in model.named_parameters()})
    g = layout.join({k: p.grad for k, p in model.named_parameters()})
    for at, good in (((5, 5), True), ((0, 2), False)):
        OneCut.at = at
        rule = rule_for(spec, layout)
        state = rule.initial_state(keyframe_of(snapshot), snapshot.hyper(), torch.float32, torch.device("cpu"))
        if good:
            self_test(rule, w, state, g, snapshot.hyper())
        else:
            with pytest.raises(UnsupportedOptimizerError, match="failed its self-test"):
                self_test(rule, w, state, g, snapshot.hyper())


def test_a_large_model_of_an_own_class_is_replayed():
    """What was seen in the part, and found harmless, is let through in the whole."""
    trajrec.register_rule(own.Lars)
    run, task = own.recorded(own.Lars)
    selftest.MOST = selftest.LEAST = 20
    found = trajrec.replay.contributions(run, task, targets="each", exact=True)
    selftest.MOST = 1000
    assert (found.values == trajrec.replay.contributions(run, task, targets="each", exact=True).values).all()
    assert np.isfinite(found.values).all()


@pytest.mark.parametrize("name", ["AdamW", "RMSprop"])
@pytest.mark.parametrize("count", [1, 3])
def test_pulling_back_by_pieces_is_pulling_back(name, count, monkeypatch):
    """Pieces that cut parameters and groups, with weights that never had a gradient, and without a part of sigma."""
    rule, w, state, g, hyper = point(RIGHT[name], steps=1)
    lam = torch.randn(count, len(w))
    vectors = list(rule.vectors_of(state))
    for sigma in ({}, {n: torch.randn(count, len(w)) for n in vectors[1:]}):
        whole = rule.pull(w, state, g, hyper, lam, sigma)
        with monkeypatch.context() as patch:
            patch.setattr("trajrec.rules.adaptive.PIECE", 1009)
            found = rule.pull(w, state, g, hyper, lam, sigma)
        for one, two in ((whole[0], found[0]), (whole[2], found[2]), *((whole[1][n], found[1][n]) for n in vectors)):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=0)

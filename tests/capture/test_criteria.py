"""The criterion that the training calls is noted, and `Task.supervised` needs no word of it."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trajrec
from tests.made.memory_run import MemoryRun
from trajrec.capture.recorder import Recorder
from trajrec.errors import DriftError, TrajrecError
from trajrec.records import Criterion, RunSpec
from trajrec.replay import contributions
from trajrec.sink import MemorySink
from trajrec.task.task import Task

N, CLASSES = 18, 3
WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


class Net(nn.Module):
    def __init__(self, outputs=CLASSES):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs))

    def forward(self, x):
        return self.layers(x)


def labels(kind, n, g):
    if kind == "classes":
        return torch.randint(0, CLASSES, (n,), generator=g)
    if kind == "ignored":
        return torch.randint(0, CLASSES, (n,), generator=g).index_fill(0, torch.tensor([1, 4]), 99)
    if kind == "tokens":
        found = torch.randint(0, CLASSES, (n, 5), generator=g)
        found[:, 3:][torch.rand(n, 2, generator=g) < 0.5] = -100
        return found
    if kind == "bits":
        return torch.randint(0, 2, (n,), generator=g)
    return torch.randn(n, CLASSES, generator=g, dtype=torch.float64)


def inputs(kind, n, g):
    shape = (n, 5, 4) if kind == "tokens" else (n, 4)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


class Case:
    """A training by a criterion, recorded, or with the weights of samples moved."""

    def __init__(self, criterion, kind="classes", call=lambda c, o, y: c(o, y), outputs=CLASSES):
        self.criterion, self.kind, self.call, self.outputs = criterion, kind, call, outputs
        g = torch.Generator().manual_seed(3)
        self.train, self.test = (TensorDataset(inputs(kind, n, g), labels(kind, n, g)) for n in (N, 5))

    def record(self):
        torch.manual_seed(0)
        model = Net(self.outputs).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8)
        loader = DataLoader(self.train, 6, shuffle=True)
        sink = MemorySink(4)
        with Recorder(sink, model=model, optimizer=optimizer, loader=loader):
            for _ in range(2):
                for x, y in loader:
                    optimizer.zero_grad()
                    self.call(self.criterion, model(x), y).backward()
                    optimizer.step()
        return MemoryRun(sink)

    def said(self, **options):
        return Task.supervised(lambda: Net(self.outputs), self.train, self.test, **options)


def flat(c, o, y):
    return c(o.reshape(-1, CLASSES), y.reshape(-1))


def of_bits(c, o, y):
    return c(o, y[:, None].double())


def none(criterion):
    found = copy.deepcopy(criterion)
    found.reduction = "none"
    return found


SMOOTH = nn.CrossEntropyLoss(label_smoothing=0.1)
CASES = {
    "label smoothing": (Case(SMOOTH), {"criterion": none(SMOOTH)}),
    "class weights": (
        Case(nn.CrossEntropyLoss(WEIGHTS)),
        {"criterion": nn.CrossEntropyLoss(reduction="none"), "weight": lambda batch: WEIGHTS[batch[1]]},
    ),
    "sum": (
        Case(nn.CrossEntropyLoss(WEIGHTS, reduction="sum")),
        {"criterion": nn.CrossEntropyLoss(reduction="none"), "weight": lambda batch: WEIGHTS[batch[1]]},
    ),
    "mean squares": (Case(nn.MSELoss(), "numbers"), {"criterion": nn.MSELoss(reduction="none")}),
    "Huber": (Case(nn.HuberLoss(delta=0.5), "numbers"), {"criterion": nn.HuberLoss(delta=0.5, reduction="none")}),
    "bits": (
        Case(nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0])), "bits", of_bits, outputs=1),
        {
            "criterion": lambda o, y: nn.functional.binary_cross_entropy_with_logits(
                o, y[:, None].double(), pos_weight=torch.tensor([2.0], dtype=torch.float64), reduction="none"
            )
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_was_seen_is_the_same_as_said_by_hand(name):
    case, said = CASES[name]
    run = case.record()
    noted = contributions(run, case.said(), targets="mean")
    by_hand = contributions(run, case.said(**said), targets="mean")
    assert noted.certificate.verdict in ("bit-exact", "within rounding")
    assert "was seen to call" in noted.notes[0]
    assert np.abs(noted.values).max() > 1e-4
    assert "was seen to call" not in " ".join(by_hand.notes)
    assert np.allclose(noted.values, by_hand.values, rtol=1e-10, atol=1e-14)


def slopes(case, samples):
    """By central differences of the training written out, for the mean over the test set of what is not weighted."""
    rows = []
    run = case.record()
    for sample in samples:
        values = []
        for h in (1e-5, -1e-5):
            torch.manual_seed(0)
            model = Net(case.outputs).double()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8)
            for t in range(1, run.steps + 1):
                ids = torch.tensor(run.sample_ids(t))
                x, y = case.train[ids]
                eps = 1 + N * h * (ids == sample).double()
                optimizer.zero_grad()
                one = case.criterion.weight if case.criterion.weight is not None else torch.ones(CLASSES).double()
                ignored = case.criterion.ignore_index
                smooth = case.criterion.label_smoothing
                logs = model(x).log_softmax(-1)
                known = y.where(y != ignored, 0)
                w = one[known] * (y != ignored)
                nll = -(logs.gather(-1, known[..., None])[..., 0] * w)
                even = -(logs * one).mean(-1) * (y != ignored)
                loss = (1 - smooth) * nll + smooth * even
                (loss * eps.reshape(-1, *[1] * (y.dim() - 1))).sum().div(w.sum()).backward()
                optimizer.step()
            with torch.no_grad():
                x, y = case.test[:]
                logs, known = model(x).log_softmax(-1), y.where(y != ignored, 0)
                w = one[known] * (y != ignored)
                raw = (1 - smooth) * -(logs.gather(-1, known[..., None])[..., 0] * w)
                raw += smooth * -(logs * one).mean(-1) * (y != ignored)
                raw, w = raw.reshape(len(y), -1).sum(1), w.reshape(len(y), -1).sum(1)
                values.append((raw / w.where(w > 0, 1)).tolist())
        rows.append(-(np.array(values[0]) - np.array(values[1])) / 2e-5 / N)
    return run, np.array(rows)


@pytest.mark.parametrize(
    "case",
    [
        Case(nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.2)),
        Case(nn.CrossEntropyLoss(label_smoothing=0.2), "tokens", flat),
        Case(nn.CrossEntropyLoss(WEIGHTS), "tokens", flat),
        Case(nn.CrossEntropyLoss(ignore_index=99), "ignored"),
    ],
    ids=["weights and smoothing", "tokens, smoothed", "tokens, weighted", "ignored"],
)
def test_against_trainings_again(case):
    run, expected = slopes(case, (0, 7))
    for mode in ("adjoint", "tangent"):
        found = contributions(run, case.said(), samples=np.array([0, 7]), targets="each", mode=mode)
        assert np.abs(found.values - expected).max() < 1e-6 * np.abs(expected).max()


def test_the_default_is_not_said():
    run = Case(nn.CrossEntropyLoss()).record()
    assert run.spec.criteria == (
        Criterion("CrossEntropyLoss", "mean", (("ignore_index", -100.0), ("label_smoothing", 0.0))),
    )
    assert not contributions(run, Case(nn.CrossEntropyLoss()).said()).notes


def test_a_criterion_that_is_no_part_of_the_loss_is_not_noted():
    def call(criterion, outputs, y):
        nn.MSELoss()(outputs, torch.zeros_like(outputs))
        with torch.no_grad():
            nn.L1Loss()(outputs, torch.zeros_like(outputs))
        return criterion(outputs, y)

    run = Case(SMOOTH, call=call).record()
    assert [str(c) for c in run.spec.criteria] == ["CrossEntropyLoss(label_smoothing=0.1)"]


def test_several_and_own_ones_are_not_used_but_said():
    def both(criterion, outputs, y):
        return criterion(outputs, y) + 0.5 * nn.MSELoss()(outputs, torch.zeros_like(outputs))

    case = Case(SMOOTH, call=both)
    with pytest.raises(DriftError, match=r"CrossEntropyLoss\(label_smoothing=0\.1\) and MSELoss\(\)"):
        contributions(case.record(), case.said())

    class Own(nn.CrossEntropyLoss):
        def forward(self, outputs, y):
            return super().forward(outputs, y) * 2

    assert Case(Own()).record().spec.criteria == ()


def test_calls_are_watched_no_longer_and_compile_in_jit():
    def call(criterion, outputs, y):
        return torch.jit.script(nn.CrossEntropyLoss(label_smoothing=0.1))(outputs, y)

    Case(SMOOTH, call=call).record()
    assert "__call__" not in vars(nn.CrossEntropyLoss)


HOSTILE = [
    {"kind": "os.system", "reduction": "mean"},
    {"kind": "CrossEntropyLoss", "reduction": "mean", "options": [["weights_only", 0.0]]},
    {"kind": "CrossEntropyLoss", "reduction": "mean", "weight": [float("nan")]},
    {"kind": "CrossEntropyLoss", "reduction": "mean", "weight": [1.0] * 5000},
    {"kind": "CrossEntropyLoss", "reduction": "mean", "weight": "abc"},
    {"kind": "CrossEntropyLoss", "reduction": 5},
    {"kind": ["CrossEntropyLoss"], "reduction": "mean"},
    7,
]


@pytest.mark.parametrize("values", HOSTILE)
def test_hostile_values_in_a_file_are_refused(values):
    spec = Case(SMOOTH).record().spec
    with pytest.raises(ValueError, match="criteri"):
        RunSpec.from_json(spec.to_json() | {"criteria": [values]})


@pytest.mark.parametrize("weight", [(1.0,), (0.0, 0.0, 0.0), (-1.0, 2.0, 1.0)])
def test_forged_weights_are_a_refusal(weight):
    run = Case(SMOOTH).record()
    forged = Criterion("CrossEntropyLoss", "mean", (("ignore_index", -100.0),), weight)
    run.spec = replace(run.spec, criteria=(forged,))
    with pytest.raises(TrajrecError):
        contributions(run, Case(SMOOTH).said())


def test_a_file_keeps_it(tmp_path):
    case = Case(SMOOTH)
    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with trajrec.record(tmp_path / "run.h5", model=model, optimizer=optimizer):
        for x, y in DataLoader(case.train, 6):
            optimizer.zero_grad()
            SMOOTH(model(x), y).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    with trajrec.open(tmp_path / "run.h5") as run:
        assert str(run.spec.criteria[0]) == "CrossEntropyLoss(label_smoothing=0.1)"
        notes = contributions(run, case.said()).notes
    assert notes == (
        "Gradients were clipped, as the recording notes: the norm to 0.1.",
        "The criterion is the one that the training was seen to call, CrossEntropyLoss(label_smoothing=0.1).",
    )

"""Batches that are no pairs: dictionaries, tuples, tokens, whole batches as items; other batches of the test set.

The truth is central differences of whole retrainings in float64.
"""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate

import trajrec
import trajrec.vision
from tests.made.told import SAMPLES, Listed, Told, assert_equal
from trajrec.errors import TaskError
from trajrec.replay import contributions
from trajrec.replay.session import Session
from trajrec.task.reading import Reading
from trajrec.task.task import Task

N = 12


class Net(nn.Module):
    """Two inputs, named and in order; gives a dictionary."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 5).double(), nn.Linear(2, 5).double(), nn.Linear(5, 3).double()

    def forward(self, left, right):
        return {"loss": None, "logits": self.c(torch.tanh(self.a(left) + self.b(right)))}


def items(n, seed, form):
    g = torch.Generator().manual_seed(seed)
    made = []
    for i in range(n):
        left, right = (torch.randn(size, generator=g, dtype=torch.float64) for size in (3, 2))
        made.append(form(i, left, right, int(torch.randint(0, 3, (), generator=g))))
    return Listed(made)


def named(i, left, right, y):
    return {"left": left, "text": f"sentence {i}", "r": right, "number": i, "labels": y}


def in_order(i, left, right, y):
    return left, i, y, right


FORMS = {
    "keys": (named, {"inputs": {"left": "left", "r": "right"}, "labels": "labels"}, ("left", "r", "labels", "number")),
    "positions": (in_order, {"inputs": [0, 3], "labels": 2}, (0, 3, 2, 1)),
}


def training(form, places):
    left, right, y, number = places

    def one(model, batch):
        return F.cross_entropy(model(batch[left], batch[right])["logits"], batch[y], reduction="none")

    def total(model, batch, weights):
        return (one(model, batch) * weights[batch[number]]).mean()

    def measure(model, item):
        return one(model, default_collate([item]))[0]

    return Told(Net, items(N, 1, form), items(5, 2, form), total, measure)


@pytest.mark.parametrize("form", FORMS)
def test_inputs_and_labels_are_keys_or_positions(form):
    made, told, places = FORMS[form]
    loop = training(made, places)
    task = Task.supervised(Net, loop.data, loop.test, **told)
    found = assert_equal(loop, task)
    classes = np.array([item[places[2]] for item in loop.test.items])
    by_class = contributions(loop.fit(), task, targets="class", samples=SAMPLES)
    assert by_class.targets.tolist() == sorted(set(classes.tolist()))
    expected = np.stack([found.values[:, classes == c].mean(1) for c in by_class.targets], 1)
    assert np.allclose(by_class.values, expected, rtol=1e-9, atol=1e-12)


def test_a_criterion_of_ones_own_takes_what_the_model_returns():
    loop = training(*FORMS["keys"][::2])
    told = FORMS["keys"][1]
    own = Task.supervised(
        Net, loop.data, loop.test, lambda o, y: F.cross_entropy(o["logits"], y, reduction="none"), **told
    )
    of_torch = Task.supervised(Net, loop.data, loop.test, nn.CrossEntropyLoss(reduction="none"), **told)
    run = loop.fit()
    values = [
        contributions(run, task).values for task in (own, of_torch, Task.supervised(Net, loop.data, loop.test, **told))
    ]
    assert np.array_equal(values[0], values[1])
    assert np.array_equal(values[0], values[2])


def test_the_labels_of_dictionaries_are_found_and_told():
    batch = {"text": ["a", "b"], "number": torch.tensor([4, 5]), "label": torch.tensor([1, 0])}
    assert Reading().classes_in(batch).tolist() == [1, 0]
    assert Reading(labels="number").classes_in(batch).tolist() == [4, 5]
    assert Reading().classes_in({"labels": torch.ones(2), "y": torch.tensor([2, 3])}).tolist() == [2, 3]
    assert Reading().classes_in({"labels": torch.ones(2, 4).long()}) is None
    assert Reading().classes_in((1, 2, torch.tensor([1, 0]))) is None
    assert Reading(labels=-1).classes_in((1, 2, torch.tensor([1, 0]))).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({}, ["pairs (inputs, labels)", "'left': a tensor [1, 3] of float64", "inputs="]),
        ({"inputs": "missing", "labels": "labels"}, ["inputs='missing'", "'r': a tensor [1, 2]"]),
        ({"inputs": "left", "labels": 1}, ["labels=1 is no part", "'labels': a tensor [1] of int64"]),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_was_found(told, words):
    batch = default_collate([items(1, 1, named)[0]])
    task = Task.supervised(lambda: None, [], criterion=lambda o, y: y, **told)
    with pytest.raises(TaskError) as refused:
        task.loss(lambda left: left, batch)
    assert all(word in str(refused.value) for word in words), refused.value


def test_keys_that_are_none_are_refused():
    for told in ({"inputs": ["a", 1]}, {"inputs": 1.5}, {"inputs": []}, {"labels": True}):
        with pytest.raises(TaskError, match=r"inputs=|labels="):
            Task.supervised(Net, [], **told)


def test_classes_that_cannot_be_found_say_what_a_batch_is():
    loop = training(*FORMS["positions"][::2])
    task = Task(
        Net, loop.data, loop.test, loss=lambda m, b: F.cross_entropy(m(b[0], b[3])["logits"], b[2], reduction="none")
    )
    with pytest.raises(TaskError, match=r"Task\(labels=KEY\)") as refused:
        contributions(loop.fit(), task, targets="class")
    assert "a list of 4 (0: a tensor [1, 3] of float64" in str(refused.value)
    told = Task(Net, loop.data, loop.test, loss=task.loss, labels=2)
    assert contributions(loop.fit(), told, targets="class").target_kind == "class"


# -- other batches of the test set -------------------------------------------------------------------------------------


def test_the_test_set_has_a_collate_of_its_own():
    def swapped(batch):
        x, y = default_collate(batch)
        return y, x

    def sample(x, y):
        return F.cross_entropy(x, y, reduction="none")

    g = torch.Generator().manual_seed(1)
    pairs = [(torch.randn(4, generator=g).double(), torch.tensor(i % 3), i) for i in range(N)]
    test = Listed([(y, x) for x, y, _ in pairs[:4]])
    loop = Told(
        lambda: nn.Linear(4, 3).double(),
        Listed(pairs),
        test,
        lambda m, b, w: (sample(m(b[0]), b[1]) * w[b[2]]).mean(),
        lambda m, item: sample(m(item[1]), item[0]),
    )
    options = {"inputs": 0, "labels": 1, "test_collate": swapped}
    assert_equal(loop, Task.supervised(loop.build, loop.data, test, **options))


# -- tokens ------------------------------------------------------------------------------------------------------------

V, T = 7, 5


def sentences(n, seed):
    g = torch.Generator().manual_seed(seed)
    made = []
    for i in range(n):
        ids = torch.randint(0, V, (T,), generator=g)
        labels = torch.where(torch.arange(T) < 2 + i % 4, ids, -100)
        made.append({"input_ids": ids, "labels": labels, "number": i})
    return Listed(made)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(V, 4).double(), nn.Linear(4, V).double()

    def forward(self, input_ids):
        return self.out(torch.tanh(self.words(input_ids)).cumsum(1))


def of_next(model, batch):
    """[B, T - 1]"""
    scores = model(input_ids=batch["input_ids"])
    scores = getattr(scores, "logits", scores)
    return F.cross_entropy(scores[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")


def counts(batch):
    return (batch["labels"][:, 1:] != -100).sum(1)


def language(build=Words, loader=None):
    def total(model, batch, weights):
        return (of_next(model, batch).sum(1) * weights[batch["number"]]).sum() / counts(batch).sum()

    def measure(model, item):
        batch = default_collate([item])
        return of_next(model, batch)[0].sum() / counts(batch)[0]

    return Told(build, sentences(N, 1), sentences(4, 2), total, measure, loader or {"batch_size": 5, "shuffle": True})


TOLD = {"inputs": ["input_ids"], "labels": "labels"}


def test_next_tokens_are_those_of_a_language_model():
    loop = language()
    assert_equal(loop, Task.supervised(Words, loop.data, loop.test, trajrec.next_tokens, **TOLD))


def shifted(outputs, labels):
    return F.cross_entropy(outputs[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")


def test_ones_own_losses_of_tokens_are_averaged_over_those_that_count():
    loop = language()
    task = Task.supervised(Words, loop.data, loop.test, shifted, **TOLD)
    assert_equal(loop, task)
    function = Session(loop.fit(), task).function
    assert (function.within, function.left_out) == ("mean of those that count", 1)


def test_or_over_all_of_them_where_the_loop_did():
    loop = language()
    loop.total = lambda m, b, w: (of_next(m, b).mean(1) * w[b["number"]]).mean()
    loop.measure = lambda m, item: of_next(m, default_collate([item]))[0].mean()
    assert_equal(loop, Task.supervised(Words, loop.data, loop.test, shifted, **TOLD))


def tiny_gpt(dtype=torch.float64):
    trajrec.vision.import_torchvision()  # beside a CPU build of torch, before another package does
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=V, n_positions=T, n_embd=4, n_layer=1, n_head=2, resid_pdrop=0.0)
    config.embd_pdrop = config.attn_pdrop = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.GPT2LMHeadModel(config).to(dtype)


def test_a_causal_model_of_transformers_is_exact():
    loop = language(tiny_gpt)
    assert_equal(loop, Task.supervised(tiny_gpt, loop.data, loop.test, trajrec.next_tokens, **TOLD))


def test_and_its_own_loss_is_certified():
    def build():
        return tiny_gpt(torch.float32)

    loop = language(build)
    loop.total = lambda m, b, w: m(input_ids=b["input_ids"], labels=b["labels"]).loss
    task = Task.supervised(build, loop.data, loop.test, trajrec.next_tokens, **TOLD)
    assert contributions(loop.fit(), task).certificate.verdict in ("bit-exact", "within rounding")


# -- batch_size=None ---------------------------------------------------------------------------------------------------


class Single(nn.Linear):
    """Takes a vector, or a batch of three of them, not a batch of one."""

    def forward(self, x):
        assert x.dim() == 1 or (x.dim() == 2 and len(x) > 1)
        return super().forward(x)


def unbatched(data):
    def total(model, item, weights):
        return F.cross_entropy(model(item[0]), item[1]) * weights[item[2]]

    def measure(model, item):
        return F.cross_entropy(model(item[0]), item[1])

    test = Listed(data.items[:4])
    return Told(lambda: Single(4, 3).double(), data, test, total, measure, {"batch_size": None, "shuffle": True})


def singles():
    g = torch.Generator().manual_seed(1)
    return Listed([(torch.randn(4, generator=g).double(), torch.tensor(i % 3), i) for i in range(N)])


def batches():
    g = torch.Generator().manual_seed(1)
    sizes = [2 + i % 3 for i in range(N)]
    made = [(torch.randn(n, 4, generator=g).double(), torch.randint(0, 3, (n,), generator=g)) for n in sizes]
    return Listed([(*item, i) for i, item in enumerate(made)])


@pytest.mark.parametrize("data", [singles, batches])
def test_loaders_without_batches_hand_out_single_samples_or_whole_batches(data):
    """Of whole batches, of several sizes, each is a sample: to remove one means to leave out a batch."""
    loop = unbatched(data())
    task = Task.supervised(loop.build, loop.data, loop.test, inputs=0, labels=1, collate=trajrec.unbatched)
    run = loop.fit()
    assert sorted(int(i) for t in range(1, N + 1) for i in run.sample_ids(t)) == list(range(N))
    assert_equal(loop, task, run=run)


def test_a_criterion_may_give_one_number_for_a_single_sample():
    loop = unbatched(singles())
    options = {"inputs": 0, "labels": 1, "collate": trajrec.unbatched}
    assert_equal(loop, Task.supervised(loop.build, loop.data, loop.test, F.cross_entropy, **options))


def test_noise_in_the_loss_of_items_that_make_no_batch_is_seeded():
    loop = unbatched(batches())

    def noisy(model, item):
        return F.cross_entropy(model(item[0]), item[1]) * (1 + torch.rand(()).double())

    options = {"inputs": 0, "labels": 1, "collate": trajrec.unbatched, "measure": noisy}
    run, task = loop.fit(), Task.supervised(loop.build, loop.data, loop.test, **options)
    first, second = (contributions(run, task, targets="each").values for _ in range(2))
    assert np.array_equal(first, second)

"""Tokens and contrasts as targets: by retraining, both ways; through shards, folders, progress and reports."""

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import trajrec
from tests.made.told import SAMPLES, Listed, Told, assert_equal
from trajrec.errors import DerivativeError, ReplayError, SampleRangeError, TaskError
from trajrec.replay import Contrasts, Tokens, contributions, validate
from trajrec.replay.folder.identity import identity_of
from trajrec.replay.folder.numbers import contributions_in
from trajrec.replay.folder.read import load
from trajrec.replay.folder.shards import join, read_shards
from trajrec.replay.folder.write import write_replay
from trajrec.replay.methods.contributions import solve
from trajrec.replay.question import Question
from trajrec.replay.report import report
from trajrec.replay.report.section import Ask
from trajrec.replay.session import Session
from trajrec.replay.validation.predictions import targets_of
from trajrec.task.task import Task

V, T, N = 7, 5, 12


def build():
    return nn.Sequential(nn.Embedding(V, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, V)).double()


def sentences(n, seed):
    g = torch.Generator().manual_seed(seed)
    return Listed(
        [(torch.randint(0, V, (T,), generator=g), torch.randint(0, V, (T,), generator=g), i) for i in range(n)]
    )


def of_tokens(model, batch):
    """[B, T]"""
    return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none")


def total(model, batch, weights):
    return (of_tokens(model, batch).mean(1) * weights[batch[2]]).mean()


def measure(model, item):
    """[T]"""
    return F.cross_entropy(model(item[0]), item[1], reduction="none")


@pytest.fixture(scope="module")
def loop():
    return Told(build, sentences(N, 1), sentences(6, 2), total, measure)


@pytest.fixture(scope="module")
def run(loop):
    return loop.fit()


@pytest.fixture(scope="module")
def truth(loop):
    """[S, 6, T]"""
    return loop.truth()


def task_of(loop, **options):
    return Task.supervised(build, loop.data, loop.test, inputs=0, labels=1, **options)


SPANS = Tokens([(3, 1, 4), (0, 0, 5), (3, 2, 3), (5, 4, 5)])
PAIRS = Contrasts([(0, 4), (4, 0), (2, 5)])


def expected(asked, truth):
    if isinstance(asked, Tokens):
        return np.stack([truth[:, i, a:b].mean(-1) for i, a, b in asked.rows], 1)
    return np.stack([truth[:, a].mean(-1) - truth[:, b].mean(-1) for a, b in asked.rows], 1)


@pytest.mark.parametrize("asked", [SPANS, PAIRS], ids=["tokens", "contrasts"])
def test_they_are_what_retraining_says(loop, run, truth, asked):
    found = assert_equal(loop, task_of(loop), expected(asked, truth), asked, run=run)
    assert (found.target_kind, found.asked, found.targets.tolist()) == (asked.kind, asked, list(range(len(asked))))


def test_losses_of_tokens_come_from_the_task_or_its_measure(loop, run):
    given = [
        Task(build, loop.data, loop.test, loss=of_tokens),
        Task(build, loop.data, loop.test, loss=lambda m, b: of_tokens(m, b).mean(1), tokens=of_tokens),
        task_of(loop, criterion=lambda o, y: F.cross_entropy(o.transpose(1, 2), y, reduction="none")),
    ]
    values = [contributions(run, task, targets=SPANS).values for task in given]
    for found in values:
        assert np.allclose(found, contributions(run, task_of(loop), targets=SPANS).values, rtol=1e-9)
    averaged = Task(build, loop.data, loop.test, loss=lambda m, b: of_tokens(m, b).mean(1))
    with pytest.raises(TaskError, match=r"shape \(4, tokens\); the Task gives shape \(4,\). Let Task\(tokens=...\)"):
        contributions(run, averaged, targets=SPANS)


def test_tokens_of_language_models_are_in_their_own_places():
    logits, labels = torch.randn(2, T, V), torch.randint(0, V, (2, T))
    labels[1, 3:] = -100
    found = trajrec.next_tokens.values(logits, labels)
    assert found[:, 0].tolist() == [0, 0]
    assert found[1, 3:].tolist() == [0, 0]
    assert torch.allclose(found[0, 4], F.cross_entropy(logits[0, 3], labels[0, 4]))
    assert trajrec.next_tokens.counts(labels).tolist() == [4, 2]


def test_a_detached_part_of_a_token_s_loss_is_found_by_the_second_proof(loop, run):
    def broken(model, batch):
        values = of_tokens(model, batch)
        return values * torch.from_numpy(values.detach().numpy())

    with pytest.raises(DerivativeError, match="target loss"):
        contributions(run, task_of(loop, tokens=broken), targets=SPANS)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Tokens([(0, 3, 3)]), "Tokens 3:3 of test sample 0 are no span"),
        (lambda: Tokens([(0, -1, 3)]), "0 <= start < stop"),
        (lambda: Tokens([(0.5, 1, 3)]), r"float64 of shape \(1, 3\)"),
        (lambda: Tokens([]), "at least one row"),
        (lambda: Contrasts([(1, 2, 3)]), "another test sample"),
        (lambda: Contrasts([(1, 2), (3, 3)]), "test sample 3 with itself"),
    ],
)
def test_rows_that_mean_nothing_are_refused(make, words):
    with pytest.raises(SampleRangeError, match=words):
        make()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Tokens([(0, 2), (3, 5)]), "Test sample 3 has losses of 5 tokens, 0 to 4: there are no tokens 5:6"),
        (Tokens([(6, 2)]), "no test sample 6"),
        (Contrasts([(0, 6)]), "no test sample 6"),
    ],
)
def test_samples_and_tokens_that_are_not_there_are_named(loop, run, asked, words):
    with pytest.raises(SampleRangeError, match=words):
        contributions(run, task_of(loop), targets=asked)


def test_they_are_values():
    assert Tokens([(3, 1)]) == Tokens([(3, 1, 2)])
    assert Tokens([(3, 1)]) != Contrasts([(3, 1)])
    assert len({SPANS, Tokens(SPANS.rows), PAIRS}) == 2
    with pytest.raises(ValueError, match="read-only"):
        SPANS.rows[0, 0] = 1


def test_questions_about_others_are_others(loop, run):
    session = Session(run, task_of(loop))
    asked = [
        SPANS,
        PAIRS,
        Tokens(SPANS.rows[:3]),
        Tokens(SPANS.rows[::-1]),
        SPANS.rows[:, 0],
        Contrasts([[0, 4]]),
        Tokens([[0, 4]]),
    ]
    assert len({identity_of(Question(targets=targets), session, "x:task") for targets in asked}) == len(asked)
    again = identity_of(Question(targets=Tokens(SPANS.rows)), session, "x:task")
    assert again == identity_of(Question(targets=SPANS), session, "x:task")


@pytest.mark.parametrize("asked", [SPANS, PAIRS], ids=["tokens", "contrasts"])
@pytest.mark.parametrize("mode", ["adjoint", "tangent"])
def test_shards_folders_and_reports_keep_what_a_target_is(loop, run, asked, mode, tmp_path):
    session = Session(run, task_of(loop))
    whole = contributions(run, task_of(loop), targets=asked, mode=mode)
    for i in (1, 2):
        question = Question(targets=asked, mode=mode, shard=(i, 2))
        (tmp_path / str(i)).mkdir()
        facts = {"question": "q", "shard": [i, 2], "seconds": 1.0}
        write_replay(tmp_path / str(i), solve(session, question), session, facts)
    (tmp_path / "whole").mkdir()
    join(read_shards([tmp_path / "2", tmp_path / "1"]), tmp_path / "whole")
    inputs = load(tmp_path / "whole")
    found = contributions_in(inputs)
    assert np.allclose(found.values, whole.values, rtol=1e-9)
    assert found.asked == asked
    assert json.loads((tmp_path / "whole" / "replay.json").read_text())["target_rows"] == asked.rows.tolist()
    assert targets_of(found, session).asked == asked
    names = inputs.targets.sort("target").collect()["name"].to_list()
    assert names[0] == {"tokens": "sample 3, tokens 1 to 3", "contrasts": "sample 0 less sample 4"}[asked.kind]
    text = json.dumps(report.build(tmp_path / "whole", 3, Ask(by="target", why=(1,))).values(), default=str)
    assert f"test {names[0]}" in text
    if mode == "adjoint":
        with pytest.raises(ReplayError, match="merge the shards"):
            targets_of(contributions_in(load(tmp_path / "1")), session)


@pytest.mark.parametrize("asked", [SPANS, Tokens([(3, 1, 4)]), Contrasts([(0, 4)])], ids=["tokens", "one", "contrast"])
def test_they_can_be_validated(loop, run, asked):
    task = task_of(loop)
    found = contributions(run, task, targets=asked)
    done = validate(run, task, contributions=found, subsets=2, fraction=0.2)
    assert done.removals.correlation > 0.99
    wrong = replace(found, values=-found.values)
    if len(asked) == 1:
        with pytest.raises(ReplayError, match="not those of this run"):
            validate(run, task, contributions=wrong, subsets=2, fraction=0.2)
    else:
        assert validate(run, task, contributions=wrong, subsets=2, fraction=0.2).removals.correlation < -0.99


# -- class -1 ----------------------------------------------------------------------------------------------------------


def signs(n, seed):
    g = torch.Generator().manual_seed(seed)
    return Listed([(torch.randn(4, generator=g).double(), 2 * (i % 2) - 1, i) for i in range(n)])


def test_class_minus_one_is_not_the_mean(tmp_path):
    def logistic(model, batch):
        return F.softplus(-batch[1] * model(batch[0]).squeeze(-1))

    loop = Told(
        lambda: nn.Linear(4, 1).double(),
        signs(N, 1),
        signs(5, 2),
        lambda m, b, w: (logistic(m, b) * w[b[2]]).mean(),
        lambda m, item: logistic(m, item)[()],
    )
    task = Task(loop.build, loop.data, loop.test, loss=logistic, labels=1, predict=lambda m, b: m(b[0]))
    truth = loop.truth()
    by_class = np.stack([truth[:, 0::2].mean(1), truth[:, 1::2].mean(1)], 1)
    run = loop.fit()
    assert contributions(run, task, targets="class").targets.tolist() == [-1, 1]
    assert_equal(loop, task, by_class, "class", run=run)
    session = Session(run, task)
    write_replay(tmp_path, solve(session, Question(targets="class")), session, {"question": "q"})
    shown = report.build(tmp_path, 3, Ask(by="target", why=(-1,), matrix=True))
    text = json.dumps(shown.values(), default=str)
    assert "class -1" in text
    assert "the mean test loss" not in text
    numbers = pl.read_parquet(tmp_path / "contributions.parquet")
    assert sorted(numbers["target"].unique()) == [-1, 1]
    assert contributions_in(load(tmp_path)).target_kind == "class"
    assert SAMPLES == (0, 5, 11)


def test_labels_that_do_not_count_are_no_class():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).double()
    data = Listed([(x[i], i % 3 if i < 5 else -100, i) for i in range(6)])

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    loop = Told(lambda: nn.Linear(4, 3).double(), data, data, lambda m, b, w: loss(m, b).mean(), loss)
    loop.data = Listed(data.items[:4])
    task = Task(loop.build, loop.data, data, loss=loss, labels=1)
    assert contributions(loop.fit(), task, targets="class").targets.tolist() == [0, 1, 2]

"""`validate` says of numbers whether they come true: of right ones that they hold, of planted wrong ones that not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from tests.made import loops
from tests.made.loops import Loop, N
from trajrec.errors import DriftError, ReplayError
from trajrec.replay import contributions, validate
from trajrec.replay.validation.correlations import bootstrap, pearson, spearman
from trajrec.replay.validation.removals import Pooled, Removals, random_sets

RNG = np.random.default_rng(0)


def gentle(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)


@pytest.fixture(scope="module")
def made():
    return loops.train(Loop(optimizer=gentle))


@pytest.fixture(scope="module")
def exact(made):
    return contributions(made.run, made.task, targets="each", exact=True)


def shuffled(found):
    """The same numbers, of other samples."""
    return replace(found, values=np.roll(found.values, 7, axis=0))


# -- the verdict -------------------------------------------------------------------------------------------------------


def test_a_smooth_gentle_training_holds(made):
    done = validate(made.run, made.task)
    assert done.verdict == "holds"
    assert done.correlation > 0.99
    assert done.interval[0] <= done.correlation <= done.interval[1]
    assert done.sentence.startswith("The numbers hold: trained again without each of 5 random samples")
    assert "of 5 target losses" in done.sentence


def test_planted_wrong_numbers_do_not_hold(made, exact):
    assert validate(made.run, made.task, contributions=exact).verdict == "holds"
    done = validate(made.run, made.task, contributions=shuffled(exact))
    assert done.verdict == "does not hold"
    assert "The numbers do not hold" in done.sentence


def test_planted_wrong_numbers_to_one_target_are_refused(made):
    """One target is not enough for a verdict; so others are predicted, and the one must come out the same."""
    mean = contributions(made.run, made.task, targets="mean", exact=True)
    assert validate(made.run, made.task, contributions=mean).verdict == "holds"
    with pytest.raises(ReplayError, match="are not those of this run and Task"):
        validate(made.run, made.task, contributions=shuffled(mean))


def test_a_wild_training_with_kinks_does_not_hold():
    def kinked():
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    def fast(model):
        return torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9)

    wild = loops.train(Loop(build=kinked, optimizer=fast, epochs=12))
    assert validate(wild.run, wild.task, fraction=0.1).verdict == "does not hold"


@pytest.mark.parametrize(
    ("correlation", "verdict"), [(0.9, "holds"), (0.89, "weak"), (0.7, "weak"), (0.69, "does not hold")]
)
def test_borders_of_the_verdict(correlation, verdict):
    removals = Removals((np.arange(3),) * 2, np.ones((2, 4)), np.ones((2, 4)))
    assert Pooled(removals, correlation, (0.0, 1.0)).verdict == verdict


def test_where_nothing_changes_nothing_holds():
    removals = Removals((np.arange(3),) * 2, np.ones((2, 4)), np.zeros((2, 4)))
    found = Pooled.of(removals, 0)
    assert found.verdict == "does not hold"
    assert found.to_json()["correlation"] is None
    assert "nan" not in found.sentence


# -- what is predicted, and what happens -------------------------------------------------------------------------------


def test_going_forwards_with_sets_predicts_the_sums_of_contributions(made, exact):
    options = {"subsets": 4, "fraction": 0.2}
    stored = validate(made.run, made.task, contributions=exact, **options).removals.removals
    forwards = validate(made.run, made.task, **options).removals.removals
    sums = [exact.values[ids].sum(axis=0) for ids in stored.sets]
    np.testing.assert_allclose(stored.predicted, sums, rtol=1e-12)
    np.testing.assert_allclose(forwards.predicted, sums, rtol=1e-9)
    np.testing.assert_array_equal(forwards.happened, stored.happened)
    assert {len(ids) for ids in stored.sets} == {round(0.2 * N)}


@pytest.mark.parametrize("form", ["ggn", "none"])
def test_other_forms_are_predicted_too(made, form):
    values = contributions(made.run, made.task, targets="each", curvature=form).values
    done = validate(made.run, made.task, curvature=form, subsets=3, fraction=0.2)
    np.testing.assert_allclose(
        done.removals.removals.predicted, [values[ids].sum(axis=0) for ids in done.removals.removals.sets], rtol=1e-9
    )
    assert done.curvature == form


def test_what_happens_is_what_training_without_them_does(made):
    removals = validate(made.run, made.task, subsets=2, fraction=0.2).removals.removals
    base = loops.train(Loop(optimizer=gentle), torch.zeros(N)).values
    for ids, happened in zip(removals.sets, removals.happened, strict=True):
        eps = torch.zeros(N, dtype=torch.float64)
        eps[ids] = -1 / N
        np.testing.assert_allclose(
            happened, loops.train(Loop(optimizer=gentle), eps).values - base, rtol=1e-9, atol=1e-12
        )


def test_contributions_of_some_samples_do_not_answer_for_sets_of_all(made):
    some = contributions(made.run, made.task, targets="each", samples=np.arange(3), exact=True)
    assert validate(made.run, made.task, contributions=some).verdict == "holds"


# -- the other trials --------------------------------------------------------------------------------------------------


def test_scores_are_those_of_scipy(made, exact):
    done = validate(made.run, made.task, contributions=exact, subsets=0, loo=5, lds=6, lds_fraction=0.3, taylor=2)
    singles = done.leave_one_out.removals
    predicted, happened = singles.predicted, singles.happened
    expected = np.mean([stats.spearmanr(p, h).statistic for p, h in zip(predicted.T, happened.T, strict=True)])
    assert done.leave_one_out.spearman == pytest.approx(expected)
    expected = np.mean([stats.pearsonr(p, h).statistic for p, h in zip(predicted.T, happened.T, strict=True)])
    assert done.leave_one_out.pearson == pytest.approx(expected)
    assert done.leave_one_out.slope == pytest.approx((predicted * happened).sum() / (predicted**2).sum())
    assert done.leave_one_out.slope == pytest.approx(1, abs=0.1)
    sets = done.lds.removals
    expected = np.mean(
        [stats.spearmanr(p, h).statistic for p, h in zip(sets.predicted.T, sets.happened.T, strict=True)]
    )
    assert done.lds.score == pytest.approx(expected)
    assert done.verdict is None
    assert set(done.to_json()) == {"leave_one_out", "lds", "taylor", "curvature", "seed"}
    assert "Leaving out each of 5 random samples" in done.sentence
    assert "random sets of 30 % of the samples" in done.sentence
    np.testing.assert_array_equal(
        done.taylor.samples, exact.samples[np.argsort(-np.abs(exact.values).sum(axis=1))[[0, (N - 1) // 2]]]
    )


def test_one_target_suffices_for_single_samples(made):
    mean = contributions(made.run, made.task, targets="mean", exact=True)
    done = validate(made.run, made.task, contributions=mean, subsets=0, loo=4)
    assert done.leave_one_out.removals.predicted.shape == (4, 1)
    assert done.leave_one_out.spearman == pytest.approx(1)


def test_correlations_with_ties_are_those_of_scipy():
    for _ in range(20):
        a, b = RNG.integers(0, 4, (2, 12)).astype(float)
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
        assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)


def test_the_interval_holds_the_true_correlation_as_often_as_it_says():
    """Rows and columns of normal numbers that share .8 of what they are, 20 rows: about 95 %, never below 80 %."""
    inside = 0
    for seed in range(60):
        a, noise = np.random.default_rng(seed).standard_normal((2, 20, 10))
        low, high = bootstrap(a, 0.8 * a + 0.6 * noise, seed)
        inside += low <= 0.8 <= high
    assert inside >= 48


# -- seeds, and what makes no sense ------------------------------------------------------------------------------------


def test_sets_are_drawn_by_the_seed_and_hold_one_sample_at_least():
    assert [len(ids) for ids in random_sets(30, 3, 0.01, 0)] == [1, 1, 1]
    assert [len(set(ids.tolist())) for ids in random_sets(1000, 2, 0.01, 0)] == [10, 10]
    first, again, other = (np.concatenate(random_sets(1000, 3, 0.01, seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"subsets": 0}, "Nothing is to be trained again"),
        ({"subsets": -1, "loo": 4}, "Nothing is to be trained again"),
        ({"fraction": 0.0}, "between 0 and 1, not 0"),
        ({"lds": 4, "lds_fraction": 1.5}, "between 0 and 1, not 1.5"),
        ({"loo": 1}, "needs two trainings at least"),
    ],
)
def test_what_makes_no_sense_is_refused(made, options, says):
    with pytest.raises(ReplayError, match=says):
        validate(made.run, made.task, **options)


def test_another_task_is_refused_though_contributions_are_there(made, exact):
    made = loops.train(Loop(optimizer=gentle))
    made.task.loss = lambda model, batch: 1.5 * loops.per_sample(model, batch)
    with pytest.raises(DriftError, match="Replay drifted at step 1"):
        validate(made.run, made.task, contributions=exact)


def test_progress_is_told_of_every_step(made):
    class Told:
        def __init__(self):
            self.totals, self.done = [], 0

        def start(self, what, total, done=0):
            self.totals.append((what, total))

        def advance(self, count):
            self.done += count

    told = Told()
    validate(made.run, made.task, subsets=3, loo=2, progress=told)
    assert told.done == sum(total for _, total in told.totals)
    whats = ["tangent", "training again without 3 random sets", "tangent", "training again without 2 samples"]
    assert [what for what, _ in told.totals] == whats

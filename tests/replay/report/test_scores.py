"""Scores against cases counted by hand and against scipy."""

from __future__ import annotations

import math
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from trajrec.replay import report as replay_report
from trajrec.replay.report import agreement, scores

# Rows: samples 0..4; columns: targets 10 and 11.
HAND = np.array([[1.0, -1.0], [1.0, -1.0], [-2.0, -1.0], [0.0, 4.0], [3.0, 5.0]])


def lazy(values: np.ndarray, targets: list[int], epochs: int | None = None) -> pl.LazyFrame:
    S, M = values.shape
    frame = pl.DataFrame(
        {
            "sample": np.repeat(np.arange(S), M),
            "target": np.tile(targets, S),
            "contribution": values.ravel(),
        }
    )
    if epochs is None:
        return frame.lazy()
    parts = [frame.with_columns(pl.col("contribution") * (e + 1), epoch=pl.lit(e)) for e in range(epochs)]
    return pl.concat(parts).lazy()


def rows(frame: pl.LazyFrame) -> list[tuple]:
    return scores.collect(frame).rows()


def test_totals_are_the_mean_over_targets() -> None:
    got = scores.collect(scores.totals(lazy(HAND, [10, 11]))).sort("sample")
    assert got.rows() == [(0, 0.0), (1, 0.0), (2, -1.5), (3, 2.0), (4, 4.0)]


def test_epochs_are_summed_before_anything_else() -> None:
    plain, by_epoch = lazy(HAND * 6, [10, 11]), lazy(HAND, [10, 11], epochs=3)
    assert rows(scores.totals(plain).sort("sample")) == rows(scores.totals(by_epoch).sort("sample"))
    assert rows(scores.pairs(plain).sort("sample", "target")) == rows(scores.pairs(by_epoch).sort("sample", "target"))


def test_top_ranks_and_shares_counted_by_hand() -> None:
    got = rows(scores.top(scores.totals(lazy(HAND, [10, 11])), 2))
    assert got == [
        ("helpful", 1, 4, 4.0, pytest.approx(4 / 7.5)),
        ("helpful", 2, 3, 2.0, pytest.approx(2 / 7.5)),
        ("harmful", 1, 2, -1.5, pytest.approx(1.5 / 7.5)),
    ]


def test_top_by_target_counted_by_hand() -> None:
    got = rows(scores.top(lazy(HAND, [10, 11]), 2, by="target"))
    assert [row[:4] for row in got] == [
        (10, "helpful", 1, 4),
        (10, "helpful", 2, 0),  # ties with sample 1: the lower id comes first
        (10, "harmful", 1, 2),
        (11, "helpful", 1, 4),
        (11, "helpful", 2, 3),
        (11, "harmful", 1, 0),  # three samples at -1
        (11, "harmful", 2, 1),
    ]
    assert [row[-1] for row in got] == pytest.approx([3 / 7, 1 / 7, 2 / 7, 5 / 12, 4 / 12, 1 / 12, 1 / 12])


def test_totals_by_class_counted_by_hand() -> None:
    values = np.array([[1.0, 3.0, 5.0], [0.0, 2.0, -7.0]])
    targets = pl.LazyFrame({"target": [0, 1, 2, 99], "label": ["cat", "cat", "dog", "dog"]})
    got = scores.collect(scores.totals_by_class(lazy(values, [0, 1, 2]), targets)).sort("sample", "class")
    assert got.rows() == [(0, "cat", 2.0), (0, "dog", 5.0), (1, "cat", 1.0), (1, "dog", -7.0)]


def test_blocks_give_the_same_tops_as_one_query(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal((50, 7))
    frame = lazy(values, list(range(7)))
    monkeypatch.setattr(scores, "ROWS_AT_ONCE", 120)
    blocks = list(scores.blocks(frame, scores.target_ids(frame), 50))
    parts = [scores.collect(scores.top(block, 3, by="target")) for block in blocks]
    assert len(parts) == 4
    got, whole = pl.concat(parts), scores.collect(scores.top(frame, 3, by="target"))
    assert got.drop("share").equals(whole.drop("share"))
    np.testing.assert_allclose(got["share"], whole["share"], rtol=1e-12)


@given(st.integers(2, 60), st.integers(1, 30), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_rank_correlations_are_those_of_their_definition_with_ties(n: int, spread: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.integers(-spread, spread + 1, n) / 7
    b = a + rng.integers(-spread, spread + 1, n)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert math.isnan(agreement.kendall(a, b))
        return
    got = agreement.agree(a, b)
    i, j = np.triu_indices(n, 1)
    pairs_a, pairs_b = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
    untied = math.sqrt(np.abs(pairs_a).sum() * np.abs(pairs_b).sum())
    assert got.kendall == pytest.approx((pairs_a * pairs_b).sum() / untied, abs=1e-12)
    assert got.spearman == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)


def test_agreement_counted_by_hand() -> None:
    got = agreement.agree(np.array([4.0, 3.0, -1.0, -2.0]), np.array([8.0, -6.0, -4.0, 2.0]), k=2)
    assert (got.samples, got.k) == (4, 2)
    assert got.sign_error == 0.5  # samples 1 and 3
    assert got.overlap_helpful == 0.5  # {0, 1} and {0, 3}
    assert got.overlap_harmful == 0.5  # {2, 3} and {1, 2}
    assert got.slope == pytest.approx((32 - 18 + 4 - 4) / (16 + 9 + 1 + 4))


def test_agreement_of_equal_replays_is_perfect() -> None:
    values = np.random.default_rng(1).standard_normal(1000)
    got = agreement.agree(values, 3 * values)
    assert (got.spearman, got.kendall, got.sign_error, got.overlap_helpful) == (1, 1, 0, 1)
    assert got.slope == pytest.approx(3)


def test_agreement_of_a_constant_is_undefined() -> None:
    got = agreement.agree(np.ones(5), np.arange(5.0))
    assert math.isnan(got.spearman)
    assert math.isnan(got.kendall)


def test_joined_keeps_samples_that_both_have() -> None:
    a = pl.LazyFrame({"sample": [3, 1, 2], "contribution": [0.3, 0.1, 0.2]})
    b = pl.LazyFrame({"sample": [2, 9, 3], "contribution": [2.0, 9.0, 3.0]})
    assert rows(agreement.joined(a, b)) == [(2, 0.2, 2.0), (3, 0.3, 3.0)]


def test_no_query_holds_a_scanned_file_in_memory(tmp_path: Path) -> None:
    scores.collect(lazy(HAND, [10, 11])).write_parquet(tmp_path / "c.parquet")
    frame = pl.scan_parquet(tmp_path / "c.parquet")
    labels = pl.LazyFrame({"target": [10, 11], "label": ["a", "b"]})
    for query in (scores.totals(frame), scores.totals_by_class(frame, labels)):
        assert "CACHE" in query.explain()  # what Polars would do by itself: keep the shared scan
        assert "CACHE" not in query.explain(optimizations=scores.OPTIMIZATIONS)


def test_reports_do_not_import_torch() -> None:
    found = pkgutil.walk_packages(replay_report.__path__, f"{replay_report.__name__}.")
    names = [module.name for module in found]
    assert "trajrec.replay.report.sections.top" in names
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

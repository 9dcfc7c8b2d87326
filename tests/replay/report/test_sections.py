"""Sections of a report against numpy, scipy, scikit-learn and cases counted by hand."""

from __future__ import annotations

import builtins
import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score, roc_auc_score

from tests.made import replay_folder
from trajrec.errors import ReplayError, SampleRangeError
from trajrec.replay.report import scores, suspects
from trajrec.replay.report.render import tables
from trajrec.replay.report.report import Ask, Report, build

RNG = np.random.default_rng(7)
VALUES = RNG.standard_normal((60, 9)) * 1e-3
TRAIN = RNG.integers(0, 3, 60)
TEST = np.array([0, 1, 2, 0, 1, 2, 0, 1, 1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return replay_folder.write(
        tmp_path / "r", VALUES, labels=TRAIN.tolist(), target_labels=TEST.tolist(), predictions=[1] * 9
    )


def asked(folder: Path, top: int = 10, **ask: object) -> Report:
    return build(folder, top, Ask(**ask))  # type: ignore[arg-type]


def test_matrix_is_the_mean_over_pairs_of_classes(folder: Path) -> None:
    found = asked(folder, matrix=True)["matrix"]
    assert found is not None
    assert found.train == found.test == ("0", "1", "2")
    expected = [[VALUES[np.ix_(a == TRAIN, b == TEST)].mean() for b in range(3)] for a in range(3)]
    np.testing.assert_allclose(np.array(found.mean, dtype=float), expected, rtol=1e-12)


def test_matrix_is_normalised_by_row_and_column_sums(tmp_path: Path) -> None:
    values = np.array([[4.0, 1.0], [2.0, 3.0]])
    path = replay_folder.write(tmp_path / "p", values, labels=["a", "b"], target_labels=["a", "b"])
    found = asked(path, matrix=True)["matrix"]
    assert found is not None
    expected = [[4 / math.sqrt(5 * 6), 1 / math.sqrt(5 * 4)], [2 / math.sqrt(5 * 6), 3 / math.sqrt(5 * 4)]]
    np.testing.assert_allclose(np.array(found.normalised, dtype=float), expected)


def test_matrix_is_not_normalised_where_the_product_is_negative(tmp_path: Path) -> None:
    path = replay_folder.write(tmp_path / "n", [[4.0, -6.0], [2.0, 3.0]], labels=["a", "b"], target_labels=["a", "b"])
    found = asked(path, matrix=True)["matrix"]
    assert found is not None
    assert found.normalised == ((None, pytest.approx(-6 / math.sqrt(6))), (pytest.approx(2 / math.sqrt(30)), None))


def test_matrix_by_epoch_sums_epochs(folder: Path, tmp_path: Path) -> None:
    parts = np.stack([VALUES * 0.5, VALUES * 0.3, VALUES * 0.2])
    path = replay_folder.write(tmp_path / "e", parts, labels=TRAIN.tolist(), target_labels=TEST.tolist())
    one, other = asked(folder, matrix=True)["matrix"], asked(path, matrix=True)["matrix"]
    assert one is not None
    assert other is not None
    np.testing.assert_allclose(np.array(one.mean, dtype=float), np.array(other.mean, dtype=float), rtol=1e-9)


def test_statistics_equal_numpy(folder: Path) -> None:
    found = asked(folder, statistics=True)["statistics"]
    assert found is not None
    assert found.pairs is not None
    for spread, values in ((found.samples, VALUES.mean(1)), (found.pairs, VALUES.ravel())):
        assert spread.count == values.size
        assert spread.mean == pytest.approx(values.mean())
        assert spread.std == pytest.approx(values.std(ddof=1))
        assert (spread.min, spread.max) == pytest.approx((values.min(), values.max()))
        assert (spread.positive, spread.negative) == ((values > 0).sum(), (values < 0).sum())
    sizes = np.sort(np.abs(VALUES.mean(1)))[::-1]
    expected = [(f, n, sizes[:n].sum() / sizes.sum()) for f, n in ((0.01, 1), (0.05, 3), (0.1, 6), (0.5, 30))]
    np.testing.assert_allclose(found.concentration, expected)
    assert sum(found.histogram.counts) == 60


def test_statistics_by_epoch_are_those_of_the_sums(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = np.stack([VALUES * 0.5, VALUES * 0.3, VALUES * 0.2])
    path = replay_folder.write(tmp_path / "e", parts)
    monkeypatch.setattr(scores, "ROWS_AT_ONCE", 60 * 3 * 2)  # two targets at a time, one left over
    one, other = asked(folder, statistics=True)["statistics"], asked(path, statistics=True)["statistics"]
    assert one is not None
    assert other is not None
    assert one.pairs is not None
    assert other.pairs is not None
    for name in ("count", "mean", "std", "min", "max", "positive", "negative", "zero"):
        assert getattr(other.pairs, name) == pytest.approx(getattr(one.pairs, name), rel=1e-9)


def test_outliers_by_hand(tmp_path: Path) -> None:
    values = np.array([[1.0], [-1.0]] * 20 + [[50.0], [-40.0]])
    found = asked(replay_folder.write(tmp_path / "o", values), statistics=True)["statistics"]
    assert found is not None
    z = (values - values.mean()) / values.std(ddof=1)
    assert found.outliers.select("sample", "z").rows() == [(40, pytest.approx(z[40, 0])), (41, pytest.approx(z[41, 0]))]
    assert found.far == 2


def test_histogram_by_hand() -> None:
    frame = pl.LazyFrame({"contribution": [-9.0, 0.0, 0.5, 1.0, 2.9, 3.0, 99.0]})
    got = scores.collect(scores.histogram(frame, 0, 3, 3))
    assert got.rows() == [(0, 3), (1, 1), (2, 3)]


def test_statistics_of_one_sample_are_defined_where_they_can_be(tmp_path: Path) -> None:
    found = asked(replay_folder.write(tmp_path / "1", [[2.0]]), statistics=True)["statistics"]
    assert found is not None
    assert found.samples.mean == 2
    assert math.isnan(found.samples.std)
    assert sum(found.histogram.counts) == 1


def test_groups_by_class_and_target(folder: Path) -> None:
    groups = asked(folder, 1, by="class")["groups"]
    assert [g.title for g in groups] == ["class 0", "class 1", "class 2"]
    for label, group in enumerate(groups):
        means = VALUES[:, label == TEST].mean(1)
        assert group.helpful["sample"][0] == means.argmax()
        assert group.harmful["contribution"][0] == pytest.approx(means.min())
    targets = asked(folder, 1, by="target")["groups"]
    assert [g.helpful["sample"][0] for g in targets] == VALUES.argmax(0).tolist()
    assert targets[2].title == "test sample 2 (label 2, read as 1)"


def test_why_names_label_prediction_and_classes(folder: Path) -> None:
    (why,) = asked(folder, 3, why=(4,))["why"]
    assert (why.label, why.prediction) == ("1", "1")
    assert why.top.helpful["sample"].to_list() == np.argsort(-VALUES[:, 4])[:3].tolist()
    assert set(why.top.helpful["target"]) == {4}
    sums = {label: value for label, _, value in why.by_label}
    assert sums == pytest.approx({str(c): VALUES[c == TRAIN, 4].sum() for c in range(3)})
    with pytest.raises(SampleRangeError, match="has no target 99; it was replayed for targets=each"):
        asked(folder, why=(99,))


def test_timeline_and_tracks(tmp_path: Path) -> None:
    parts = RNG.standard_normal((4, 10, 3))
    path = replay_folder.write(tmp_path / "t", parts, labels=list("abcdefghij"))
    found = asked(path, samples=(3, 1))["timeline"]
    assert found is not None
    means = parts.mean(2)
    assert found.epochs == (0, 1, 2, 3)
    np.testing.assert_allclose(found.helpful, np.where(means > 0, means, 0).sum(1))
    np.testing.assert_allclose(found.harmful, np.where(means < 0, means, 0).sum(1))
    assert [(t.sample, t.label) for t in found.tracks] == [(3, "d"), (1, "b")]
    np.testing.assert_allclose(found.tracks[0].values, means[:, 3])
    with pytest.raises(SampleRangeError, match="no training sample 77"):
        asked(path, samples=(77,))


@given(st.integers(2, 300), st.integers(0, 10**6), st.booleans())
@settings(max_examples=50, deadline=None)
def test_roc_auc_equals_scikit_learn(n: int, seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    wrong = rng.random(n) < 0.3
    score = rng.integers(0, 5, n).astype(float) if ties else rng.standard_normal(n)
    found = suspects.detect(score, wrong)
    if 0 < wrong.sum() < n:
        assert found.auc == pytest.approx(roc_auc_score(wrong, score))
    else:
        assert math.isnan(found.auc)


def test_detection_by_hand() -> None:
    score = np.arange(20, 0, -1.0)
    wrong = np.zeros(20, dtype=bool)
    wrong[[0, 3, 9, 19]] = True
    found = suspects.detect(score, wrong)
    assert (found.samples, found.wrong, found.found_10, found.found_20) == (20, 4, 0.25, 0.5)


def test_harm_ranks_the_most_harmful_first(tmp_path: Path) -> None:
    path = replay_folder.write(
        tmp_path / "h", [[1.0], [-3.0], [-2.0], [5.0]], labels=list("abab"), noisy=[False, True, True, False]
    )
    found = asked(path, suspects=True)["suspicions"]
    assert found is not None
    (ranking,) = found.rankings
    assert ranking.suspects.select("rank", "sample", "score").rows()[:2] == [(1, 1, 3.0), (2, 2, 2.0)]
    assert ranking.detection is not None
    assert ranking.detection.auc == 1
    assert found.clusters is None  # one target has no sign vectors, and few say little


def test_self_influence_needs_training_samples_as_targets(tmp_path: Path) -> None:
    values = np.array([[1.0, 9.0], [9.0, 4.0], [9.0, 9.0]])
    path = replay_folder.write(tmp_path / "s", values, targets=[0, 1], target_set="train")
    found = asked(path, suspects=True)["suspicions"]
    assert found is not None
    assert [r.title for r in found.rankings][1] == "self-influence"
    assert found.rankings[1].suspects.select("sample", "score").rows() == [(1, 4.0), (0, 1.0)]
    plain = replay_folder.write(tmp_path / "p", values, targets=[0, 1])
    only = asked(plain, suspects=True)["suspicions"]
    assert only is not None
    assert len(only.rankings) == 1


def test_self_influence_is_read_from_samples_too(tmp_path: Path) -> None:
    path = replay_folder.write(tmp_path / "s", [[1.0], [2.0]], labels=["a", "b"])
    pl.DataFrame({"sample": [0, 1], "self_influence": [0.1, 0.7]}).write_parquet(path / "samples.parquet")
    found = asked(path, suspects=True)["suspicions"]
    assert found is not None
    assert found.rankings[1].suspects["sample"].to_list() == [1, 0]


def planted(folder: Path, flip: float = 0.02) -> tuple[Path, np.ndarray, np.ndarray]:
    """Wrongly labelled samples harm most targets, right ones help most."""
    rng = np.random.default_rng(3)
    labels, wrong = rng.integers(0, 4, 200), rng.random(200) < 0.3
    values = np.where(wrong[:, None], -1.0, 1.0) * rng.random((200, 110))
    values *= np.where(rng.random(values.shape) < flip, -1, 1)
    replay_folder.write(folder, values, labels=labels.tolist(), noisy=wrong.tolist())
    return folder, labels, wrong


def test_clusters_by_sign_find_planted_wrong_labels(tmp_path: Path) -> None:
    path, labels, wrong = planted(tmp_path / "c")
    found = asked(path, suspects=True)["suspicions"]
    assert found is not None
    assert found.clusters is not None
    assert found.clusters.jaccard is not None
    assert found.clusters.suspected == wrong.sum()
    assert (found.clusters.jaccard.correct, found.clusters.jaccard.wrong) == (1, 1)
    assert found.clusters.classes.select("label", "samples", "apart").rows() == [
        (str(c), (labels == c).sum(), (wrong & (labels == c)).sum()) for c in range(4)
    ]


def test_few_targets_are_not_clustered(tmp_path: Path) -> None:
    path = replay_folder.write(tmp_path / "f", RNG.standard_normal((40, 99)), labels=["a"] * 40)
    found = asked(path, suspects=True)["suspicions"]
    assert found is not None
    assert found.clusters is None


def test_jaccard_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels, apart, noisy = rng.integers(0, 3, 90), rng.random(90) < 0.4, rng.random(90) < 0.4
    clusters = pl.DataFrame({"sample": range(90), "label": labels.astype(str), "apart": apart})
    found = suspects.jaccard(clusters, pl.DataFrame({"sample": range(90), "noisy": noisy}))
    assert found is not None
    per_class = [labels == c for c in range(3)]
    assert found.wrong == pytest.approx(np.mean([jaccard_score(noisy[c], apart[c]) for c in per_class]))
    assert found.correct == pytest.approx(np.mean([jaccard_score(~noisy[c], ~apart[c]) for c in per_class]))


def test_a_class_of_equal_signs_has_no_suspects(tmp_path: Path) -> None:
    path = replay_folder.write(tmp_path / "q", -np.ones((6, 100)), labels=list("aaabbb"))
    found = asked(path, suspects=True)["suspicions"]
    assert found is not None
    assert found.clusters is not None
    assert found.clusters.suspected == 0


def forget(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has imports of a library fail."""
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith(library):
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)


def test_comparing_without_its_library_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget("scipy", monkeypatch)
    with pytest.raises(ReplayError, match=r"needs scipy, .* pip install 'trajrec\[report\]'"):
        asked(folder, compare=folder)
    assert asked(folder, everything=True)["comparison"] is None


def test_clustering_without_its_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, _ = planted(tmp_path / "c")
    forget("sklearn", monkeypatch)
    with pytest.raises(ReplayError, match=r"pip install 'trajrec\[report\]'"):
        asked(path, suspects=True)
    full = asked(path, everything=True)
    assert full["suspicions"] is not None  # the rest is still answered
    assert full["suspicions"].clusters is None
    assert any("scikit-learn" in note for note in full.notes)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        ({"matrix": True}, r"inter-class matrix: it needs a target of every class.*--targets class"),
        ({"by": "class"}, r"--by class: it needs more than the mean target"),
        ({"timeline": True}, r"timeline: it needs contributions by epoch.*--by-epoch"),
    ],
)
def test_what_a_replay_cannot_answer_names_the_one_that_can(tmp_path: Path, ask: dict, words: str) -> None:
    path = replay_folder.write(tmp_path / "m", [[1.0], [2.0]], labels=["a", "b"])
    with pytest.raises(ReplayError, match=words):
        asked(path, **ask)
    assert len(asked(path, everything=True).notes) == 3


def test_targets_by_class_use_class_names(tmp_path: Path) -> None:
    path = replay_folder.write(
        tmp_path / "k",
        VALUES[:, :3],
        labels=TRAIN.tolist(),
        target_labels=[0, 1, 2],
        targets=[0, 1, 2],
        classes=["zebra", "yak", "ant"],
    )
    settings_ = json.loads((path / "replay.json").read_text()) | {"targets": "class"}
    (path / "replay.json").write_text(json.dumps(settings_))
    report = asked(path, matrix=True, by="target")
    assert report["matrix"] is not None
    assert report["matrix"].test == ("zebra", "yak", "ant")
    assert report["groups"][0].title == "class zebra"
    assert report["overall"].title == "the mean over the classes"


def test_agreement_by_target(folder: Path, tmp_path: Path) -> None:
    other = VALUES.copy()
    other[:, 0] *= -1
    path = replay_folder.write(tmp_path / "other", other)
    found = asked(folder, compare=path)["comparison"]
    assert found is not None
    assert found.by_target == (9, pytest.approx(7 / 9), pytest.approx(1 / 9))


def test_json_holds_every_section_and_no_nan(folder: Path, tmp_path: Path) -> None:
    path = tables.write_json(asked(folder, everything=True, why=(1,)), tmp_path / "r.json")
    got = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert got["overall"]["helpful"][0]["sample"] == int(VALUES.mean(1).argmax())
    assert got["why"][0]["target"] == 1
    assert got["matrix"]["train"] == ["0", "1", "2"]
    assert got["settings"]["exact"] is True


def test_parquet_holds_all_tables_and_their_sign(folder: Path, tmp_path: Path) -> None:
    path = tables.write_parquet(asked(folder, 2, by="class"), tmp_path / "r.parquet")
    got = pl.read_parquet(path)
    assert got["table"].unique(maintain_order=True).to_list() == [
        "the mean over all test samples",
        "class 0",
        "class 1",
        "class 2",
    ]
    assert got.height == 4 * 4
    assert pl.read_parquet_metadata(path)["sign"] == "positive = helpful"

"""Cleaning: what is dropped, what is written, and retraining through TRAJREC_KEEP."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from tests.made import replay_folder
from trajrec.cli.clean import clean as command
from trajrec.errors import OutputExistsError, ReplayError, TrajrecError
from trajrec.replay.folder.read import load
from trajrec.replay.report import cleaning

VALUES = np.array([[3.0], [-2.0], [1.0], [-5.0], [0.5], [-2.0], [4.0], [2.0], [6.0], [0.0]])

SCRIPT = """
import os, numpy as np
keep = np.load(os.environ["TRAJREC_KEEP"]) if "TRAJREC_KEEP" in os.environ else np.arange(10)
print("epoch 1 accuracy: 1.00 %")
print(f"test accuracy {50 + len(keep)}%")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    noisy = [False, True, False, True, False, False, False, False, True, False]
    return replay_folder.write(tmp_path / "lenet-replay", VALUES, labels=list("abcdefghij"), noisy=noisy)


def run(*args: object) -> tuple[int, str, BaseException | None]:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, " ".join(result.output.split()), result.exception


@pytest.mark.parametrize(
    ("rule", "drop"),
    [
        ("harmful:10%", (3,)),
        ("harmful:29.9%", (1, 3)),
        ("harmful:30%", (1, 3, 5)),
        ("harmful:2", (1, 3)),  # samples 1 and 5 are equal: the lower id goes first
        ("harmful:5", (1, 3, 4, 5, 9)),
        ("harmful:0", ()),
        ("negative", (1, 3, 5)),
    ],
)
def test_rules_drop_the_lowest(folder: Path, rule: str, drop: tuple[int, ...]) -> None:
    found = cleaning.clean(load(folder), rule)
    assert found.drop == drop
    assert found.keep == tuple(i for i in range(10) if i not in drop)


def test_known_wrong_labels_are_counted(folder: Path) -> None:
    found = cleaning.clean(load(folder), "harmful:5")
    assert (found.harming, found.wrong, found.wrong_dropped) == (3, 3, 2)


def test_untracked_samples_are_kept(tmp_path: Path) -> None:
    path = replay_folder.write(tmp_path / "r", [[1.0], [-1.0]], samples=[4, 7], samples_total=9)
    found = cleaning.clean(load(path), "negative")
    assert found.drop == (7,)
    assert found.keep == (0, 1, 2, 3, 4, 5, 6, 8)


def test_suspected_drops_the_harming_clusters(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    wrong = rng.random(80) < 0.3
    values = np.where(wrong[:, None], -1, 1) * rng.random((80, 120))
    path = replay_folder.write(tmp_path / "r", values, labels=rng.integers(0, 2, 80).tolist())
    assert cleaning.clean(load(path), "suspected").drop == tuple(np.flatnonzero(wrong))


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("worst:3", r"--drop worst:3 is not known. Pass harmful:10%"),
        ("harmful:1.5", "is not known"),
        ("harmful:101%", "more than all samples"),
        ("harmful:11", "more than the 10 samples"),
        ("harmful:100%", "drops all 10 samples"),
        ("suspected", "needs contributions to 100 targets or more.*--targets each"),
    ],
)
def test_rules_that_make_no_sense_are_refused(folder: Path, rule: str, words: str) -> None:
    with pytest.raises(ReplayError, match=words):
        cleaning.clean(load(folder), rule)


def test_files_are_written_once(folder: Path, tmp_path: Path) -> None:
    assert run(folder, "--drop", "harmful:20%")[0] == 0
    out = tmp_path / "lenet-clean"
    assert np.load(out / "keep.npy").tolist() == [0, 2, 4, 5, 6, 7, 8, 9]
    assert np.load(out / "drop.npy").dtype == np.int64
    table = pl.read_csv(out / "samples.csv")
    assert table.columns == ["sample", "label", "name", "contribution", "drop"]
    assert table.filter("drop")["sample"].to_list() == [3, 1]
    assert json.loads((out / "clean.json").read_text())["dropped"] == 2
    assert isinstance(run(folder)[2], OutputExistsError)
    assert run(folder, "--force")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lenet-clean", "lenet-replay"]


def test_force_replaces_nothing_else(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    assert "was not made by `trajrec clean`" in str(run(folder, "--out", tmp_path / "mine", "--force")[2])
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_retraining_compares_the_last_accuracy(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    monkeypatch.setenv("TRAJREC_KEEP", "somewhere else")  # the baseline must not see it
    code, text, _ = run(tmp_path / "lenet.h5", "--drop", "harmful:3", "--retrain", f"{script} --epochs 1")
    assert code == 0
    assert "Accuracy with all samples 60.00%, with the kept ones 57.00% (-3.00%)." in text
    script.write_text("print('accuracy 0.5')")
    assert "does the script read TRAJREC_KEEP?" in run(folder, "--force", "--retrain", script)[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [("raise SystemExit(3)", "failed with exit code 3"), ("print('done')", "printed no accuracy")],
)
def test_retraining_that_fails_is_said(folder: Path, tmp_path: Path, text: str, words: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(text)
    error = run(folder, "--retrain", script)[2]
    assert isinstance(error, TrajrecError)
    assert words in str(error)
    assert "There is no script" in str(run(folder, "--force", "--retrain", "nothing.py")[2])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("accuracy 0.981", 0.981),
        ("Accuracy: 98.1 %", 0.981),
        ("accuracy=1.0", 1.0),
        ("test_accuracy: 97.5", 0.975),
        ("accuracy 0.1\naccuracy 0.2\n", 0.2),
        ("loss 3", None),
    ],
)
def test_accuracy_is_read_from_what_a_script_prints(text: str, value: float | None) -> None:
    assert cleaning.accuracy(text) == (None if value is None else pytest.approx(value))

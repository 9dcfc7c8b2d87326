"""`trajrec validate` as a user meets it: what it says, where it is kept, and who shows it."""

import json
import shutil

import numpy as np
import polars as pl
import pytest

from tests.made import user_project
from tests.made.command import call

MANY = ("--fraction", ".1")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A user's folder with a recording of a smooth training, and its replay to every test loss."""
    folder = tmp_path_factory.mktemp("project")
    user_project.write(folder)
    assert call("record", "--out", "run.h5", "train.py", cwd=folder).returncode == 0
    assert call("replay", "run.h5", "--exact", "--targets", "each", cwd=folder).returncode == 0
    return folder


@pytest.fixture
def here(project, tmp_path):
    shutil.copytree(project, tmp_path / "p")
    return tmp_path / "p"


def in_one_line(text):
    return " ".join(text.split())


def test_it_says_that_the_numbers_hold_and_everybody_shows_it(here):
    assert "Not checked" in call("report", "run.h5", cwd=here).stdout
    done = call("validate", "run.h5", *MANY, cwd=here)
    assert done.returncode == 0, done.stderr
    said = in_one_line(done.stdout)
    assert said.startswith("The numbers hold: trained again without each of 5 random sets of 3 samples")
    assert "of 12 target losses correlate at" in said
    assert "Written to run-replay/validation.json" in done.stderr
    kept = json.loads((here / "run-replay" / "validation.json").read_text())
    facts = json.loads((here / "run-replay" / "replay.json").read_text())
    assert (kept["run_id"], kept["question"]) == (facts["run_id"], facts["question"])
    assert kept["removals"]["verdict"] == "holds"
    assert len(kept["removals"]["pairs"]) == 5 * 12
    again = call("report", "run.h5", "--html", "page.html", cwd=here)
    assert said in in_one_line(again.stdout)
    assert "<strong>Comes true</strong>" in (here / "page.html").read_text()
    replayed = call("replay", "run.h5", "--exact", "--targets", "each", "--force", cwd=here)
    assert said in in_one_line(replayed.stdout)
    other = call("replay", "run.h5", "--exact", "--targets", "mean", "--force", cwd=here)
    assert "Not checked" in other.stdout
    assert not (here / "run-replay" / "validation.json").exists()


def test_planted_wrong_numbers_do_not_hold(here):
    path = here / "run-replay" / "contributions.parquet"
    frame = pl.read_parquet(path)
    samples = frame["sample"].to_numpy()
    moved = frame.with_columns(pl.Series("sample", (samples + 7) % (samples.max() + 1)))
    moved.write_parquet(path, metadata=pl.read_parquet_metadata(path))
    done = call("validate", "run.h5", *MANY, cwd=here)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The numbers do not hold")
    assert "DOES NOT COME TRUE" in call("report", "run.h5", cwd=here).stdout


def test_without_a_replay_it_is_made_first(here):
    shutil.rmtree(here / "run-replay")
    done = call("validate", "run.h5", *MANY, "--out", "answer", "--dtype", "float64", cwd=here)
    assert done.returncode == 0, done.stderr
    assert "There is no replay in answer yet: it is made first." in done.stderr
    assert "of 12 target losses correlate at" in in_one_line(done.stdout)
    facts = json.loads((here / "answer" / "replay.json").read_text())
    assert (facts["exact"], facts["targets"], facts["dtype"]) == (True, "mean", "float64")
    assert (here / "answer" / "validation.json").is_file()


def test_other_trials_are_said_and_join_the_first(here):
    assert call("validate", "run.h5", *MANY, cwd=here).returncode == 0
    done = call(
        "validate", "run.h5", "--subsets", "0", "--loo", "4", "--lds", "5", "--taylor", "2", "--seed", "3", cwd=here
    )
    assert done.returncode == 0, done.stderr
    said = in_one_line(done.stdout)
    for part in (
        "Leaving out each of 4 random samples",
        "over 5 random sets of 10 % of the samples",
        "Removing each of 2 samples",
    ):
        assert part in said
    shown = in_one_line(call("report", "run.h5", cwd=here).stdout)
    assert "The numbers hold" in shown
    assert "Leaving out each of 4 random samples" in shown


def test_the_fraction_is_that_of_the_ranked_sets_where_they_are_asked_for(here):
    done = call("validate", "run.h5", "--subsets", "2", "--lds", "2", "--fraction", ".2", cwd=here)
    assert done.returncode == 0, done.stderr
    said = in_one_line(done.stdout)
    assert "without each of 2 random samples" in said
    assert "2 random sets of 20 % of the samples" in said


def test_a_replay_of_another_run_is_refused(here):
    assert call("record", "--out", "other.h5", "train.py", cwd=here).returncode == 0
    done = call("validate", "other.h5", "--out", "run-replay", cwd=here)
    assert done.returncode == 2
    assert "holds a replay of another run" in done.stderr
    assert not (here / "run-replay" / "validation.json").exists()


def test_a_task_that_differs_is_refused_though_the_replay_is_there(here):
    done = call("validate", "run.h5", "--task", "summed_loss.py", cwd=here)
    assert done.returncode == 3
    assert "Replay drifted at step 1" in done.stderr
    assert not (here / "run-replay" / "validation.json").exists()


def test_a_run_that_was_recorded_elsewhere_needs_trust(here, monkeypatch):
    done = call("validate", "run.h5", cwd=here, env={"XDG_STATE_HOME": str(here / "state")})
    assert done.returncode == 2
    assert "--trust" in done.stderr


def test_a_folder_with_a_validation_can_be_replaced(here):
    assert call("validate", "run.h5", *MANY, cwd=here).returncode == 0
    np.save(here / "some.npy", np.arange(4))
    done = call("replay", "run.h5", "--samples", "some.npy", "--force", cwd=here)
    assert done.returncode == 0, done.stderr

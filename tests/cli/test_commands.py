"""The command line as a user meets it: the same numbers as in Python, exit codes, messages, nothing half written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import polars.testing
import pytest
import torch

import trajrec
import trajrec.errors
from tests.made import user_project
from tests.made.command import TRAJREC, call
from trajrec.replay import Contrasts, contributions
from trajrec.task.loading import load_task


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A user's folder after `trajrec record train.py`."""
    folder = tmp_path_factory.mktemp("project")
    user_project.write(folder)
    done = call("record", "train.py", "--epochs", "3", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "recorded.txt").write_text(done.stderr)
    return folder


@pytest.fixture
def here(project, tmp_path):
    """A copy of that folder."""
    shutil.copytree(project, tmp_path / "p", dirs_exist_ok=True)
    return tmp_path / "p"


def the_run(folder):
    (run,) = (folder / "runs").glob("train-*.h5")
    return run


def test_record_names_the_run_and_says_what_to_do_next(project):
    said = (project / "recorded.txt").read_text()
    assert "Recorded 12 steps of train.py into runs/train-" in said
    assert "Next: trajrec replay\n" in said
    with trajrec.open(the_run(project)) as run:
        assert run.steps == 12
        assert run.state == "complete"
        assert run.spec.command == ("train.py", "--epochs", "3")
        assert run.spec.task == f"{project / 'task.py'}:task"
        final = torch.load(project / "final.pt")
        for name, value in run.weights(run.steps).items():
            assert torch.equal(value, final[name])


def test_the_recorded_training_is_the_unrecorded_one(project, tmp_path):
    user_project.write(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "train.py", "--epochs", "3"], cwd=tmp_path, env=environment, check=True, timeout=60)
    plain, recorded = (torch.load(folder / "final.pt") for folder in (tmp_path, project))
    assert all(torch.equal(plain[k], recorded[k]) for k in plain)


def test_replay_gives_the_numbers_of_the_python_api(here):
    np.save(here / "idx.npy", np.array([7, 3, 29]))
    done = call("replay", "--samples", "idx.npy", cwd=here)
    assert done.returncode == 0, done.stderr
    folder = here / "runs" / f"{the_run(here).stem}-replay"
    names = {path.name for path in folder.iterdir()}
    assert {"contributions.parquet", "top.csv", "replay.json"} <= names
    frame = pl.read_parquet(folder / "contributions.parquet")
    assert frame.schema == {"sample": pl.Int64, "target": pl.Int64, "contribution": pl.Float64}
    torch.set_num_threads(1)
    with trajrec.open(the_run(here)) as run:
        c = contributions(run, load_task(f"{here / 'task.py'}"), samples=[7, 3, 29])
    assert frame["sample"].to_list() == [7, 3, 29]
    assert frame["target"].to_list() == [-1, -1, -1]
    # Which form computes the derivatives is chosen by speed; two replays may differ by rounding.
    pl.testing.assert_frame_equal(frame, c.frame().collect(), rel_tol=1e-4)
    metadata = pl.read_parquet_metadata(folder / "contributions.parquet")
    assert metadata["sign"] == "positive = helpful"
    assert {"method", "exact", "mode", "unit", "run_id", "certificate"} <= set(metadata)
    assert json.loads(metadata["certificate"])["steps_checked"] == 12
    described = json.loads((folder / "replay.json").read_text())
    assert described["exact"] is True
    assert "12 of 12 steps were made again" in described["certificate"]["sentence"]
    assert "Most helpful" in done.stdout
    report = call("report", cwd=here)
    assert report.returncode == 0, report.stderr
    assert "Most harmful" in report.stdout


@pytest.mark.parametrize(
    "options",
    [
        ["--targets", "each", "--mode", "tangent"],
        ["--targets", "class"],
        ["--targets", "t.npy", "--by-epoch"],
        ["--targets", "contrasts:pairs.npy", "--taylor", "1"],
        ["--targets", "tokens:places.npy", "--task", "as_tokens.py"],
    ],
)
def test_replay_answers_every_kind_of_question(here, options):
    np.save(here / "t.npy", np.array([2, 5]))
    np.save(here / "pairs.npy", np.array([[2, 5], [5, 1]]))
    np.save(here / "places.npy", np.array([[2, 0], [5, 0]]))
    done = call("replay", the_run(here), *options, "--out", "answer", "--dtype", "float64", "--top", "3", cwd=here)
    assert done.returncode == 0, done.stderr
    frame = pl.read_parquet(here / "answer" / "contributions.parquet")
    own = {"contrasts:pairs.npy": Contrasts([(2, 5), (5, 1)]), "t.npy": [2, 5], "tokens:places.npy": [2, 5]}
    wanted = own.get(options[1], options[1])
    torch.set_num_threads(1)
    with trajrec.open(the_run(here)) as run:
        c = contributions(
            run, load_task(f"{here / 'task.py'}"), targets=wanted, dtype="float64", by_epoch="t.npy" in options
        )
    joined = frame.join(c.frame().collect(), on=[n for n in frame.columns if n != "contribution"], suffix="_api")
    if options[1] == "tokens:places.npy":  # of one token each: the losses themselves, named by their rows
        assert frame["target"].unique().to_list() == [0, 1]
        values = frame.sort("target", "sample")["contribution"]
        expected = c.frame().collect().sort("target", "sample")["contribution"]
        np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-15)
        return
    assert len(joined) == len(frame)
    np.testing.assert_allclose(joined["contribution"], joined["contribution_api"], rtol=1e-9, atol=1e-15)


def test_info_tells_what_the_run_is(here):
    done = call("info", cwd=here)
    assert done.returncode == 0, done.stderr
    for part in ("12 in 3 epoch(s)", "SGD", "momentum 0.9", "51 float32", "complete", "task.py"):
        assert part in done.stdout


def test_help_is_instant_and_every_command_has_an_example():
    call("--help", cwd=".")
    began = time.perf_counter()
    done = call("--help", cwd=".")
    assert time.perf_counter() - began < 1.0  # 0.3 s on an idle machine; tests share theirs
    for command in ("record", "replay", "report", "validate", "clean", "info", "verify", "pack", "demo"):
        assert command in done.stdout
        said = call(command, "--help", cwd=".").stdout
        assert "Example" in said
        assert " . " not in said  # rich takes text in square brackets for markup and drops it
    code = "import sys, trajrec.cli.main; sys.exit(any(m in sys.modules for m in ('torch', 'h5py', 'polars')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


BAD = [
    (["replay", "RUN", "--task", "nowhere.py:task"], 2, "There is no task file nowhere.py"),
    (
        ["replay", "RUN", "--task", "broken.py:task"],
        2,
        "ModuleNotFoundError: No module named 'no_such_module_anywhere'",
    ),
    (["replay", "RUN", "--task", "task.py:other"], 2, "no attribute 'other'. It has these tasks: task"),
    (["replay", "RUN", "--task", "not_a_task.py"], 2, "must be a trajrec.Task, but is int"),
    (["replay", "RUN", "--task", "other_shapes.py"], 2, "other shape: 0.weight: recorded (6, 4), task (7, 4)"),
    (["replay", "RUN", "--task", "other_names.py"], 2, "missing in the task: 0.weight (6, 4)"),
    (["replay", "RUN", "--task", "short_data.py"], 2, "the task's training set has only 20 samples"),
    (["replay", "RUN", "--task", "changed_labels.py"], 2, "The training data changed since the recording"),
    (["replay", "RUN", "--task", "summed_loss.py"], 3, "Replay drifted at step 1"),
    (["replay", "RUN", "--task", "summed_loss.py"], 3, "gradient is 0.125 times the Task's"),
    (["replay", "RUN", "--task", "mean_loss.py"], 2, "must return one value for each of the 8 samples"),
    (["replay", "RUN", "--task", "no_test.py"], 2, "the Task has no test set"),
    (["replay", "RUN", "--task", "no_data_set.py"], 2, "Task.train must be a map-style data set"),
    (["replay", "RUN", "--task", "no_model.py"], 2, "Task.model must return an nn.Module"),
    (["replay", "RUN", "--samples", "none.npy"], 2, "there is no file none.npy"),
    (["replay", "RUN", "--samples", "task.py"], 2, "task.py is no .npy file of integers"),
    (["replay", "RUN", "--samples", "far.npy"], 2, "There is no training sample 30: the training set has 30 samples"),
    (["replay", "RUN", "--samples", "floats.npy"], 2, "one-dimensional array of integers"),
    (["replay", "RUN", "--targets", "far.npy"], 2, "There is no test sample 30"),
    (["replay", "RUN", "--targets", "tokens:far.npy"], 2, "Tokens takes rows (test sample, start, stop)"),
    (["replay", "RUN", "--targets", "contrasts:nowhere.npy"], 2, "there is no file nowhere.npy"),
    (["replay", "RUN", "--targets", "tokens:places.npy"], 2, "Let Task(tokens=...) return them"),
    (["validate", "RUN", "--task", "nowhere.py:task"], 2, "There is no task file nowhere.py"),
    (["validate", "RUN", "--task", "summed_loss.py"], 3, "Replay drifted at step 1"),
    (["validate", "RUN", "--subsets", "0"], 2, "Nothing is to be trained again"),
    (["validate", "RUN", "--fraction", "2"], 2, "between 0 and 1, not 2"),
    (["validate", "RUN", "--out", "."], 2, "exists already"),
    (["validate", "empty.h5"], 4, "empty.h5"),
    (["validate", "nothing.h5"], 2, "There is no run nothing.h5"),
    (["replay", "RUN", "--targets", "all"], 2, 'targets must be "mean", "each", "class"'),
    (["replay", "RUN", "--mode", "sideways"], 2, 'mode must be "auto", "adjoint" or "tangent"'),
    (["replay", "RUN", "--by-epoch", "--mode", "tangent"], 2, 'Contributions by epoch need mode="adjoint"'),
    (["replay", "RUN", "--dtype", "float16"], 2, "A replay computes in float32 or float64, not float16"),
    (["replay", "RUN", "--out", "."], 2, "exists already"),
    (["replay", "nothing.h5"], 2, "There is no run nothing.h5"),
    (["replay", "task.py"], 4, "task.py"),
    (["info", "empty.h5"], 4, "empty.h5"),
    (["record"], 2, "Name the script"),
    (["record", "nothing.py"], 2, "There is no script nothing.py"),
    (["record", "--task", "nothing.py", "train.py"], 2, "There is no task file nothing.py"),
    (["record", "--out", "RUN", "train.py"], 2, "exists already"),
    (["record", "net.py"], 2, "No optimizer step was seen"),
    (["record", "--keep", "0", "train.py"], 2, "keep is"),
    (["record", "--compression", "lzma", "train.py"], 2, "compression is"),
    (["record", "--budget", "plenty", "train.py"], 2, "plenty"),
    (["replay", "RUN", "--memory", "lots"], 2, "lots"),
    (["verify", "empty.h5"], 4, "empty.h5"),
    (["replay", "RUN", "--device", "foo"], 2, "Device foo cannot be used"),
    (["replay", "RUN", "--samples", "none-given.npy"], 2, "No training ids were given"),
    (["record", "--strict", "--budget", "1", "--out", "k.h5", "train.py"], 2, "budget"),
    (["pack", "task.py"], 4, "task.py"),
    (["replay", "--no-such-option"], 2, "No such option"),
    (["replay", "RUN", "--exact", "--hessian-free"], 2, "--exact and --hessian-free contradict each other"),
    (["replay", "RUN", "--exact", "--curvature", "ggn"], 2, "--exact and --curvature ggn contradict each other"),
    (["replay", "RUN", "--hessian-free", "--curvature", "hessian"], 2, "--hessian-free and --curvature hessian"),
    (["replay", "RUN", "--curvature", "fisher"], 2, "curvature must be one of hessian"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "message"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_mistakes_have_their_message_and_exit_code(project, tmp_path, arguments, code, message, monkeypatch, capsys):
    """In this process, which is faster; the entry point is the same."""
    from trajrec.cli.main import app

    folder = tmp_path / "p"
    shutil.copytree(project, folder)
    np.save(folder / "far.npy", np.array([0, 30]))
    np.save(folder / "places.npy", np.array([[0, 1]]))
    np.save(folder / "floats.npy", np.array([0.5]))
    np.save(folder / "none-given.npy", np.array([], dtype=np.int64))
    (folder / "empty.h5").touch()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        app([str(the_run(folder)) if a == "RUN" else a for a in arguments])
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert stopped.value.code == code
    assert [p for p in sorted(folder.rglob("*")) if "__pycache__" not in p.parts] == [
        p for p in before if "__pycache__" not in p.parts
    ]


def test_drift_can_be_allowed_and_is_then_on_the_record(here):
    done = call("replay", "--task", "summed_loss.py", "--allow-drift", cwd=here)
    assert done.returncode == 0, done.stderr
    folder = next((here / "runs").glob("*-replay"))
    certificate = json.loads((folder / "replay.json").read_text())["certificate"]
    assert certificate["verdict"] == "drifted"
    assert certificate["first_bad_step"] == 1
    assert "NOT the recorded run" in " ".join(done.stdout.split())


def test_a_changed_task_file_is_not_imported_unasked(here):
    text = (here / "task.py").read_text()
    with trajrec.open(the_run(here)) as run:
        noted = Path(run.spec.task.rpartition(":")[0])
    original = noted.read_text()
    noted.write_text(text + "\nraise SystemExit('imported')\n")
    try:
        done = call("replay", cwd=here)
    finally:
        noted.write_text(original)
    assert done.returncode == 2
    assert "has changed since the recording" in " ".join(done.stderr.split())


def test_outputs_are_replaced_only_by_force(here):
    assert call("replay", cwd=here).returncode == 0
    again = call("replay", cwd=here)
    assert again.returncode == 2
    assert "--force" in again.stderr
    assert call("replay", "--force", cwd=here).returncode == 0


def test_the_scripts_own_failure_is_shown_and_what_was_recorded_is_kept(tmp_path):
    user_project.write(tmp_path)
    script = tmp_path / "train.py"
    script.write_text(script.read_text() + "\nraise ValueError('after training')\n")
    done = call("record", "--out", "cut.h5", "train.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "ValueError: after training" in done.stderr
    assert "runpy" not in done.stderr
    with trajrec.open(tmp_path / "cut.h5") as run:
        assert run.steps == 8
        assert run.state != "complete"


def test_a_module_is_run_like_python_does(tmp_path):
    user_project.write(tmp_path)
    done = call("record", "--out", "m.h5", "--task", "task.py", "-m", "train", "--epochs", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "__main__" in done.stdout
    with trajrec.open(tmp_path / "m.h5") as run:
        assert run.steps == 4


def test_verify_finds_a_flipped_byte_and_certifies_a_task(here):
    run = the_run(here)
    whole = call("verify", run, "--task", "task.py", cwd=here)
    assert whole.returncode == 0, whole.stderr
    assert "every checksum matches" in whole.stdout
    assert "12 of 12 steps were made again, every one bit for bit as recorded" in whole.stdout
    assert call("verify", run, "--task", "summed_loss.py", cwd=here).returncode == 3
    data = bytearray(run.read_bytes())
    data[len(data) // 2] ^= 1
    run.write_bytes(data)
    damaged = call("verify", run, cwd=here)
    assert damaged.returncode == 4
    assert f"{run.name}" in damaged.stderr
    assert "problem(s) found" in damaged.stderr


def test_a_run_killed_in_the_middle_is_read_as_it_stands_and_packed(here):
    """kill -9 of the trainer and of the writer; `replay`, `info`, `verify` and `pack` go on from the folder."""
    for path in (here / "runs").iterdir():
        path.unlink()
    train = here / "train.py"
    train.write_text(train.read_text().replace("optimizer.step()", "optimizer.step(); time.sleep(0.02)", 1))
    train.write_text("import time\n" + train.read_text())
    command = [*TRAJREC, "record", "--out", "runs/cut.h5", "train.py", "--epochs", "500"]
    process = subprocess.Popen(command, cwd=here, stdout=subprocess.DEVNULL, start_new_session=True)
    ring = here / "runs" / "cut.h5.rec" / "ring.bin"
    until = time.monotonic() + 60
    while not ring.exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1.5)
    with pytest.raises(trajrec.errors.RecorderBusyError):
        trajrec.record(here / "runs" / "cut.h5", force=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    info = call("info", cwd=here)
    assert info.returncode == 0, info.stderr
    assert "recovered" in info.stdout
    replayed = call("replay", "--exact", cwd=here)
    assert replayed.returncode == 0, replayed.stderr
    packed = call("pack", cwd=here)
    assert packed.returncode == 0, packed.stderr
    assert [p.name for p in (here / "runs").glob("cut.h5*")] == ["cut.h5"]
    assert call("verify", "runs/cut.h5", cwd=here).returncode == 0


def test_recording_goes_on_where_a_restarted_training_began(tmp_path):
    """The user restarts from a checkpoint of their own; the run has every step once."""
    user_project.write(tmp_path)
    train = tmp_path / "train.py"
    resumed = train.read_text().replace("model = Net()", "model = Net(); model.load_state_dict(torch.load('final.pt'))")
    first = call("record", "--out", "r.h5", "train.py", "--epochs", "2", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    train.write_text(resumed)
    again = call("record", "--out", "r.h5", "--resume", "train.py", "--epochs", "1", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    with trajrec.open(tmp_path / "r.h5") as run:
        assert run.steps == 12
        assert len(run.keyframe_steps) >= 3


def test_keyframes_only_and_no_compression(tmp_path):
    user_project.write(tmp_path)
    for name, options in (("k.h5", ["--keep", "3"]), ("n.h5", ["--compression", "none"])):
        assert call("record", "--out", name, *options, "train.py", cwd=tmp_path).returncode == 0
    values = []
    for name in ("k.h5", "n.h5"):
        done = call("replay", name, "--exact", "--memory", "1MB", "--mode", "tangent", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / f"{name.removesuffix('.h5')}-replay"
        values.append(pl.read_parquet(folder / "contributions.parquet")["contribution"].to_list())
    assert values[0] == values[1]


def test_ctrl_c_leaves_nothing_half_written(here):
    slow = here / "slow.py"
    slow.write_text(
        user_project.TASK
        + """
import time
inner = task.loss

def loss(model, batch):
    time.sleep(0.5)
    return inner(model, batch)

task.loss = loss
"""
    )
    process = subprocess.Popen(
        [*TRAJREC, "replay", "--task", "slow.py"], cwd=here, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    time.sleep(6)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Interrupted" in error
    assert not list((here / "runs").glob("*replay*"))
    assert not list((here / "runs").glob(".*"))


@pytest.mark.long  # `trajrec demo`, which is tested, runs the same scripts
def test_the_example_trains_records_and_replays(tmp_path):
    shutil.copytree(Path(trajrec.__file__).parent / "cli" / "mnist", tmp_path / "mnist")
    done = call("record", "--out", "run.h5", "mnist/train.py", "--epochs", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    np.save(tmp_path / "idx.npy", np.arange(50))
    done = call("replay", "run.h5", "--samples", "idx.npy", "--exact", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    samples = pl.read_parquet(tmp_path / "run-replay" / "samples.parquet")
    assert samples.columns == ["sample", "label", "noisy"]
    assert pl.read_parquet(tmp_path / "run-replay" / "thumbnails.parquet").height == 50
    retrain = ("--drop", "harmful:20", "--retrain", "mnist/train.py --epochs 1")
    done = call("clean", "run.h5", *retrain, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "20 samples to drop, 3,980 to keep" in done.stdout
    all_samples, kept = [line for line in done.stdout.splitlines() if line.startswith("  epoch 1:")]
    assert all_samples != kept
    assert "Accuracy with all samples" in done.stdout


def test_the_demo_shows_the_whole_path(tmp_path):
    done = call("demo", "--epochs", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("Hessian-free", "exact", "Spearman", "sign error", "of the 200 wrong labels", "The run:"):
        assert part in done.stdout


def test_gauss_newton_and_taylor_check_are_in_the_folder_and_on_the_terminal(here):
    done = call("replay", "--curvature", "ggn", "--taylor", "2", cwd=here)
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert "Gauss-Newton approximation" in shown
    assert "certificate approximation, not checked against exact. 12 of 12 steps were made again" in shown
    assert "Removing each of 2 samples on the recorded schedule did" in shown
    assert "sensitivity" not in shown
    facts = json.loads((the_run(here).with_name(f"{the_run(here).stem}-replay") / "replay.json").read_text())
    assert (facts["curvature"], facts["exact"], facts["reduction"]) == ("ggn", False, "mean")


OTHER_FORMS = [(["--hessian-free"], "none"), (["--curvature", "none"], "none"), (["--curvature", "ggn"], "ggn")]


@pytest.mark.parametrize(("options", "curvature"), [([], "hessian"), (["--exact"], "hessian"), *OTHER_FORMS])
def test_an_approximation_is_asked_for_by_name_and_labelled(here, options, curvature):
    done = call("replay", *options, cwd=here)
    assert done.returncode == 0, done.stderr
    folder = the_run(here).with_name(f"{the_run(here).stem}-replay")
    label = "exact" if curvature == "hessian" else "approximation, not checked against exact"
    written = json.loads((folder / "replay.json").read_text())
    found = (written["exact"], written["curvature"], written["label"])
    assert found == (curvature == "hessian", curvature, label)
    assert (written["growth"] is not None) == (curvature == "hessian")
    metadata = pl.read_parquet_metadata(folder / "contributions.parquet")
    assert (metadata["exact"], metadata["curvature"], metadata["label"]) == (json.dumps(found[0]), curvature, label)
    assert json.loads((folder / "top.csv.meta.json").read_text())["label"] == label
    said = " ".join(done.stdout.split())
    assert ("approximation, not checked against exact" in said) == (curvature != "hessian")
    assert ("adjoint grew" in said) == (curvature == "hessian")

"""A forked child has no recorder: whatever it does, the recording is that of the parent alone."""

import os
import subprocess
import sys

import numpy as np
import pytest

import trajrec
from trajrec.runfile.lock import holder
from trajrec.runfile.reader.verify import verify

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

SCRIPT = """
import multiprocessing, os, subprocess, sys, time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import trajrec

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    data = TensorDataset(torch.randn(40, 4), torch.arange(40) % 3)

    def train(epochs, workers=0):
        for _ in range(epochs):
            for x, y in DataLoader(data, 4, shuffle=True, num_workers=workers):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()

    def record():
        return trajrec.record("run.h5", model=model, optimizer=optimizer, keep={keep})

    with record() as recorder:
        train(5)
        state = torch.get_rng_state()
        {child}
        torch.set_rng_state(state)
        train(10, {workers})
    assert recorder.problem is None, recorder.problem
"""

CHILDREN = {
    "none": "pass",
    "ends": "if os.fork() == 0: sys.exit(0)",
    "fails": "if os.fork() == 0: raise ValueError('in the child')",
    "trains on to its end": "if os.fork() == 0: optimizer.param_groups[0]['lr'] = 5.; train(3); sys.exit(0)",
    "outlives it": "if os.fork() == 0: [os.close(k) for k in (0, 1, 2)]; time.sleep(60); os._exit(0)",
    "forks again": "if os.fork() == 0: os.fork(); train(1); sys.exit(0)",
    "multiprocessing": (
        "made = multiprocessing.get_context('fork').Process(target=train, args=(2,)); made.start(); made.join()"
    ),
    "subprocess": "subprocess.run([sys.executable, '-c', 'import trajrec'], check=True)",
}


def run(folder, child, keep="'steps'", workers=0):
    script = SCRIPT.format(child=CHILDREN[child], keep=keep, workers=workers)
    (folder / "train.py").write_text(script)
    done = subprocess.run([sys.executable, "train.py"], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert verify(folder / "run.h5") == []
    with trajrec.open(folder / "run.h5") as opened:
        assert (opened.steps, opened.state) == (150, "complete")
        keyframes = [opened.keyframe(t).arrays["optimizer/exp_avg"] for t in opened.keyframe_steps if t]
        return np.stack(keyframes), [opened.sample_ids(t).tolist() for t in range(1, 151)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"), "none")


@pytest.mark.parametrize("child", [name for name in CHILDREN if name != "none"])
def test_the_recording_is_that_of_the_parent(child, tmp_path, alone):
    found = run(tmp_path, child)
    np.testing.assert_array_equal(found[0], alone[0])
    assert found[1] == alone[1]


def test_workers_of_a_loader_are_such_children(tmp_path, alone):
    assert run(tmp_path, "none", workers=2)[1] == alone[1]


def test_the_lock_goes_with_the_parent(tmp_path):
    run(tmp_path, "outlives it")
    assert holder(tmp_path / "run.h5.rec" / "lock") is None
    with trajrec.record(tmp_path / "run.h5", force=True):
        pass


def test_a_child_may_record_itself(tmp_path):
    child = (
        "if os.fork() == 0:\n            with trajrec.record('child.h5', model=model, optimizer=optimizer): train(2)"
    )
    CHILDREN["records"] = f"{child}\n            os._exit(0)\n        os.wait()"
    try:
        run(tmp_path, "records")
    finally:
        del CHILDREN["records"]
    with trajrec.open(tmp_path / "child.h5") as opened:
        assert opened.steps == 20


@pytest.mark.parametrize("child", ["ends", "fails"])
def test_the_command_is_quiet_in_a_child(child, tmp_path):
    script = SCRIPT.format(child=CHILDREN[child], keep="'steps'", workers=0)
    script = script.replace("trajrec.record(\"run.h5\", model=model, optimizer=optimizer, keep='steps')", "None")
    script = script.replace("with record() as recorder:", "if True:").replace("    assert recorder.problem", "    # ")
    (tmp_path / "train.py").write_text(script)
    command = [sys.executable, "-m", "trajrec.cli.main", "record", "--out", "run.h5", "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Recorded 150 steps") == 1
    assert "No optimizer step" not in done.stderr
    assert verify(tmp_path / "run.h5") == []

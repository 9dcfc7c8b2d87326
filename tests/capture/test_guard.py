"""A recorder never ends a training: it ends as an unrecorded one, to the bit, and what is missing is said and noted."""

import contextlib
import logging
import math
import re
import resource
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import trajrec
from trajrec.capture.recorder import Recorder
from trajrec.errors import RecordingError, TrajrecError
from trajrec.runfile.trainer.sink import RunFileSink
from trajrec.sink import MemorySink

STEPS = 9


def data():
    return TensorDataset(torch.randn(36, 4, generator=torch.Generator().manual_seed(1)), torch.arange(36) % 3)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data())


class Unknown(torch.optim.SGD):
    """Rounds its weights where nobody sees it."""

    def step(self, closure=None):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.data.copy_((p.data - 0.1 * p.grad).to(torch.bfloat16).float())


class Training:
    """A training that a recorder cannot follow from some step on, in one way or another."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.loader = DataLoader(data(), 4, shuffle=True)

    def batches(self):
        return iter(self.loader)

    def before(self, step):
        pass

    def step(self):
        self.optimizer.step()

    def run(self):
        for step, (x, y) in enumerate(self.batches()):
            self.before(step)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x.to(self.model[0].weight.dtype)), y).backward()
            self.step()

    def weights(self):
        return [p.detach().clone() for p in self.model.parameters()]


class NoLoader(Training):
    def batches(self):
        x, y = data().tensors
        for _ in range(STEPS):
            ids = torch.randint(0, 36, (4,))
            yield x[ids], y[ids]


class Streamed(Training):
    def batches(self):
        return iter(DataLoader(Stream(), 4))


class Closure(Training):
    """Takes several gradients a step."""

    def __init__(self):
        super().__init__()
        self.optimizer = torch.optim.LBFGS(self.model.parameters(), lr=0.1, max_iter=3)

    def step(self):
        x, y = data()[:4]

        def closure():
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(x), y)
            loss.backward()
            return loss

        self.optimizer.step(closure)


class WithoutRule(Training):
    def __init__(self):
        super().__init__()
        self.optimizer = Unknown(self.model.parameters(), lr=0.1)


class BecomesDouble(Training):
    def before(self, step):
        if step == 3:
            self.model.double()
            self.optimizer.state.clear()


class MovesInMemory(Training):
    """Not a fault: everything is recorded."""

    def before(self, step):
        if step == 3:
            for p in self.model.parameters():
                p.data = p.data.clone()


class HookRaises(Training):
    def __init__(self):
        super().__init__()
        self.count = 0
        self.optimizer.register_step_post_hook(self.hook)

    def hook(self, *_):
        self.count += 1
        if self.count == 4:
            raise ValueError("of the user")

    def step(self):
        with contextlib.suppress(ValueError):
            self.optimizer.step()


class HookRaisesAtTheEnd(HookRaises):
    def hook(self, *_):
        self.count += 1
        if self.count == STEPS:
            raise ValueError("of the user")


class GivesParametersLater(Training):
    def before(self, step):
        if step == 3:
            self.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


class Sharded(Training):
    def __init__(self):
        super().__init__()
        self.model[0].weight = nn.Parameter(Wrapped(self.model[0].weight.detach()))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)


class Wrapped(torch.Tensor):
    """Does not let its memory be seen."""

    def data_ptr(self):
        raise RuntimeError("no memory of its own")


UNFOLLOWED = {
    NoLoader: (0, "No batch of a DataLoader was seen"),
    Streamed: (0, "Stream is an iterable data set"),
    Closure: (0, "LBFGS takes several gradients a step"),
    WithoutRule: (0, "Unknown"),
    BecomesDouble: (3, "0.weight was float32 of shape"),
    HookRaises: (3, "Step 4 changed the weights"),
    HookRaisesAtTheEnd: (STEPS - 1, f"Step {STEPS} changed the weights"),
    GivesParametersLater: (3, "Before step 4 the optimizer was given parameters"),
    Sharded: (0, "The recorder failed: RuntimeError: no memory of its own"),
}


def trained(kind, record, **options):
    """(weights at the end, recorder) of a training."""
    training = kind()
    if not record:
        training.run()
        return training.weights(), None
    found = {} if options.pop("found", False) else {"model": training.model, "optimizer": training.optimizer}
    with record(**found, **options) as recorder:
        training.run()
    return training.weights(), recorder


@pytest.mark.parametrize("found", [False, True])
@pytest.mark.parametrize("kind", UNFOLLOWED)
def test_the_training_ends_with_the_bits_of_an_unrecorded_one(kind, found, tmp_path, caplog):
    recorded, message = UNFOLLOWED[kind]
    weights, recorder = trained(kind, lambda **o: trajrec.record(tmp_path / "run.h5", **o), found=found)
    plain, _ = trained(kind, None)
    assert all(map(torch.equal, weights, plain))
    assert re.search(message, recorder.problem)
    said = [record.message for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(said) == 1
    assert recorder.problem in said[0]
    assert "WITHOUT RECORDING" in said[0]
    if not recorded:
        assert recorder.summary is None
        assert not (tmp_path / "run.h5").exists()
        return
    assert recorder.summary.gaps == ((recorded + 1, STEPS),)
    with trajrec.open(tmp_path / "run.h5") as run:
        assert (run.steps, run.state) == (recorded, "recovered")
        assert run.gaps == ((recorded + 1, STEPS),)


@pytest.mark.parametrize("kind", UNFOLLOWED)
def test_strict_raises(kind):
    with pytest.raises(
        (TrajrecError, RuntimeError), match=UNFOLLOWED[kind][1].removeprefix("The recorder failed: RuntimeError: ")
    ):
        trained(kind, lambda **o: Recorder(MemorySink(), strict=True, **o))


def test_parameters_may_move_in_memory():
    sink = MemorySink()
    _, recorder = trained(MovesInMemory, lambda **o: Recorder(sink, **o))
    assert recorder.problem is None
    assert len(sink.records) == STEPS + 1


class Failing(MemorySink):
    """Fails at one of its calls."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def __getattribute__(self, name):
        if name == object.__getattribute__(self, "__dict__").get("call"):
            raise MemoryError(f"in {name}")
        return super().__getattribute__(name)


@pytest.mark.parametrize("call", ["open", "reserve", "commit", "wants_keyframe", "keyframe", "close"])
def test_whatever_fails_in_a_sink_does_not_end_the_training(call, caplog):
    weights, recorder = trained(Training, lambda **o: Recorder(Failing(call), **o))
    assert all(map(torch.equal, weights, trained(Training, None)[0]))
    assert recorder.problem == f"The recorder failed: MemoryError: in {call}"
    assert len(caplog.records) == 1


def test_a_recording_is_finished_whatever_its_last_keyframe_fails_at(tmp_path, monkeypatch):
    take = RunFileSink.keyframe

    def fails_at_the_end(sink, keyframe):
        if keyframe.step == STEPS:
            raise MemoryError("no room for it")
        take(sink, keyframe)

    monkeypatch.setattr(RunFileSink, "keyframe", fails_at_the_end)
    _, recorder = trained(Training, lambda **o: trajrec.record(tmp_path / "run.h5", **o))
    assert recorder.problem == "The recorder failed: MemoryError: no room for it"
    assert [path.name for path in tmp_path.iterdir()] == ["run.h5"]
    with trajrec.open(tmp_path / "run.h5") as run:
        assert (run.steps, run.gaps) == (STEPS, ())


def test_a_budget_that_is_too_small_is_no_end(tmp_path, caplog):
    weights, recorder = trained(Training, lambda **o: trajrec.record(tmp_path / "run.h5", budget="10kB", **o))
    assert all(map(torch.equal, weights, trained(Training, None)[0]))
    assert "too small" in recorder.problem
    assert list(tmp_path.iterdir()) == []


def test_an_optimizer_that_never_steps_is_said_and_no_error(caplog):
    model = nn.Linear(1, 1)
    with Recorder(MemorySink(), model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)) as recorder:
        pass
    assert "made no step" in recorder.problem


def test_errors_of_the_training_come_out_as_they_are():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ZeroDivisionError), Recorder(Failing("close"), model=model, optimizer=optimizer):
        for x in DataLoader(torch.ones(4, 1), 2):
            model(x).mean().backward()
            optimizer.step()
        1 / 0  # noqa: B018


def test_of_several_processes_none_is_stopped(tmp_path, monkeypatch, caplog):
    """The second one does not even meet the output of the first."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "run.h5").write_text("of the first")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        weights, recorder = trained(Training, lambda **o: trajrec.record(tmp_path / "run.h5", **o))
        assert all(map(torch.equal, weights, trained(Training, None)[0]))
        assert "runs as 2 processes" in recorder.problem
    assert len([r for r in caplog.records if r.levelno >= logging.ERROR]) == 1
    assert (tmp_path / "run.h5").read_text() == "of the first"


SCRIPT = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(0)
model = nn.Linear(500, 40)
optimizer = torch.optim.SGD(model.parameters(), lr=.1)
data = TensorDataset(torch.randn(600, 500), torch.arange(600) % 3)
for epoch in range(2):
    for x, y in DataLoader(data, 4):
        optimizer.zero_grad(); nn.functional.cross_entropy(model(x), y).backward(); optimizer.step()
        {extra}
print("weights", float(model.weight.sum()))
"""


def command(*arguments, cwd, **options):
    call = [sys.executable, "-m", "trajrec.cli.main", *arguments]
    return subprocess.run(call, cwd=cwd, capture_output=True, text=True, timeout=300, **options)


def test_the_command_exits_with_5_and_says_why(tmp_path):
    (tmp_path / "train.py").write_text(
        SCRIPT.format(extra="pass").replace("torch.optim.SGD(", "type('Mine', (torch.optim.SGD,), {})(")
    )
    done = command("record", "--out", "run.h5", "train.py", cwd=tmp_path)
    assert done.returncode == 5, done.stderr
    assert "weights" in done.stdout
    assert "There is no rule for the optimizer Mine" in done.stderr
    assert "Traceback" not in done.stderr
    strict = command("record", "--strict", "--out", "run.h5", "train.py", cwd=tmp_path)
    assert strict.returncode == 2
    assert "weights" not in strict.stdout


@pytest.mark.parametrize("megabytes", [0, pytest.param(1, marks=pytest.mark.long), 4])
def test_a_limit_on_the_size_of_files_is_no_end(tmp_path, megabytes):
    """At the ring, or at a segment, or at packing."""
    (tmp_path / "train.py").write_text(SCRIPT.format(extra="pass"))
    plain = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    limit = max(1, megabytes) << 20 if megabytes else 4096

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = command("record", "--out", "run.h5", "train.py", cwd=tmp_path, preexec_fn=limited)
    assert done.stdout == plain.stdout
    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr


def test_paths_are_those_of_the_beginning(tmp_path):
    (tmp_path / "train.py").write_text(
        SCRIPT.format(extra="import os; os.makedirs('there', exist_ok=True); os.chdir('there') if epoch == 0 else None")
    )
    done = command("record", "train.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Next: trajrec replay --task" in done.stderr
    (run,) = (tmp_path / "runs").glob("*.h5")
    with trajrec.open(run) as opened:
        assert opened.steps == 300
        assert math.isfinite(opened.loss(300))


def test_the_task_is_that_of_the_beginning(tmp_path, monkeypatch):
    (tmp_path / "task.py").write_text("task = None")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    training, sink = Training(), MemorySink()
    with Recorder(sink, model=training.model, optimizer=training.optimizer, task="task.py:task") as recorder:
        monkeypatch.chdir(tmp_path / "there")
        training.run()
    assert recorder.problem is None
    assert sink.spec.task == f"{tmp_path / 'task.py'}:task"
    assert sink.spec.task_sha256 is not None


def test_recorders_may_end_in_any_order():
    """The watching of torch's own parts is one for all of them."""
    before = (DataLoader.__iter__, torch.autograd.backward, nn.Module.zero_grad)
    sinks, trainings, recorders = [], [], []
    for _ in range(2):
        sinks.append(MemorySink())
        trainings.append(Training())
        recorders.append(Recorder(sinks[-1], model=trainings[-1].model, optimizer=trainings[-1].optimizer, strict=True))
        recorders[-1].__enter__()
    for training in trainings:
        training.run()
    recorders[0].__exit__(None, None, None)
    trainings[1].run()
    recorders[1].__exit__(None, None, None)
    assert (DataLoader.__iter__, torch.autograd.backward, nn.Module.zero_grad) == before
    assert [len(sink.records) - 1 for sink in sinks] == [STEPS, 2 * STEPS]


def test_hooks_on_a_model_may_be_copied_and_pickled():
    import copy
    import pickle

    training = Training()
    with Recorder(MemorySink(), model=training.model, optimizer=training.optimizer) as recorder:
        training.run()
        copied, pickled = copy.deepcopy(training.model), pickle.loads(pickle.dumps(training.model))
    for model in (copied, pickled):
        model(torch.ones(1, 4)).mean().backward()
    assert recorder.problem is None


def test_wrong_words_are_said_at_once():
    with pytest.raises(RecordingError, match="takes the DataLoader"):
        Recorder(MemorySink(), loader=[1])


LATE = """
import atexit, os, pickle, sys
{training}
class Kept: pass
@atexit.register
def save():
    with open("kept.pickle", "wb") as file: pickle.dump(Kept(), file)
print(os.path.isabs(__file__), sys.argv[0], __name__, __spec__ is None)
"""


def test_the_script_finds_itself_as_python_lets_it(tmp_path):
    """Its file's name is absolute, and it stays `__main__` to the very end."""
    (tmp_path / "train.py").write_text(LATE.format(training=SCRIPT.format(extra="pass")))
    plain = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    (tmp_path / "kept.pickle").unlink()
    done = command("record", "--out", "run.h5", "train.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, plain.stdout), done.stderr
    assert (tmp_path / "kept.pickle").exists()

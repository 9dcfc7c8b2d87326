"""Autocast, and the loaders of the training and of evaluations, are noted; replay uses or names them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from tests.made.memory_run import MemoryRun
from trajrec.capture.recorder import Recorder
from trajrec.errors import DriftError, TaskError, TrajrecError
from trajrec.records import Autocast, LoaderSpec, RunSpec
from trajrec.replay import contributions
from trajrec.replay.session import Session
from trajrec.sink import MemorySink
from trajrec.task.task import Task

N = 12
CAST = Autocast("cpu", "bfloat16")


def data(n=N, seed=0):
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g))


def build():
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))


def doubled(items):
    x, y = default_collate(items)
    return 2 * x, y


def trained(cast=True, covers_loss=True, evaluates=False, finds=False, collate=None, epochs=2):
    torch.manual_seed(1)
    model, sink = build(), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(data(), 4, shuffle=True, collate_fn=collate)
    held_out = DataLoader(data(6, seed=1), 3)
    with Recorder(sink, **({} if finds else {"model": model, "optimizer": optimizer})):
        for _ in range(epochs):
            model.train()
            for x, y in loader:
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                    outputs = model(x)
                    if covers_loss:
                        loss = F.cross_entropy(outputs, y)
                if not covers_loss:
                    loss = F.cross_entropy(outputs.float(), y)
                loss.backward()
                optimizer.step()
            if evaluates:
                model.eval()
                with torch.no_grad():
                    for x, _ in held_out:
                        model(x)
    return MemoryRun(sink)


@pytest.mark.parametrize("finds", [False, True])
def test_autocast_is_noted_at_the_first_step(finds):
    assert trained(finds=finds).spec.autocast == CAST
    assert trained(cast=False, finds=finds).spec.autocast is None


def of_task(loss):
    return Task(build, data(), data(6, seed=1), loss=loss)


def plain(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def cast(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return plain(model, batch)


@pytest.mark.parametrize("covers_loss", [True, False])
def test_a_task_without_autocast_is_computed_under_the_noted_one(covers_loss):
    """The same numbers as of a Task that enters it itself; both proofs hold."""
    run = trained(covers_loss=covers_loss)
    said, used = (contributions(run, of_task(loss), targets="each", exact=True) for loss in (cast, plain))
    assert used.certificate.verdict in ("bit-exact", "within rounding")
    assert used.certificate.derivative is not None
    assert (used.values == said.values).all()
    assert any("torch.autocast('cpu', torch.bfloat16)" in note for note in used.notes)
    assert not any("autocast" in note for note in said.notes)


def test_autocast_is_not_put_around_a_training_without():
    assert not any("autocast" in note for note in contributions(trained(cast=False), of_task(plain)).notes)


def test_a_drift_names_the_autocast():
    """In float64 torch's autocast does nothing."""
    with pytest.raises(DriftError, match=r"ran under torch.autocast\('cpu', torch.bfloat16\): put `with"):
        Session(trained(), of_task(plain), dtype="float64").certify(_Silent())


class _Silent:
    def start(self, *_):
        pass

    advance = start


def test_the_loaders_are_noted():
    run = trained(evaluates=True, collate=doubled)
    assert run.spec.loader == LoaderSpec("TensorDataset", N, 4, f"{__name__}.doubled")
    (found,) = {spec for changes in run.changes.values() for spec in changes.evaluated}
    assert (found.dataset, found.length, found.batch_size, found.collates_itself) == ("TensorDataset", 6, 3, False)
    assert not any(changes.evaluated for changes in trained().changes.values())


def test_a_task_without_a_test_set_hears_what_the_training_was_evaluated_on():
    task = Task(build, data(), loss=plain)
    with pytest.raises(TaskError, match="evaluate its model on TensorDataset of 6 samples, batches of 3"):
        contributions(trained(cast=False, evaluates=True), task)
    with pytest.raises(TaskError, match=r"Task\(test=...\).$"):
        contributions(trained(cast=False), task)


def test_the_collate_function_is_named_where_inputs_differ():
    run = trained(cast=False, collate=doubled)
    with pytest.raises(TrajrecError, match=r"made its batches by .*doubled: pass Task\(collate=...\)"):
        contributions(run, of_task(plain))
    task = Task(build, data(), data(6, seed=1), loss=plain, collate=doubled)
    assert contributions(run, task).certificate.verdict in ("bit-exact", "within rounding")


@pytest.mark.parametrize("noted", [{"device": "os", "dtype": "bfloat16"}, {"device": "cpu", "dtype": "load"}])
def test_an_autocast_that_there_is_not_is_refused(noted):
    values = trained().spec.to_json()
    with pytest.raises(ValueError, match="there is no autocast"):
        RunSpec.from_json({**values, "autocast": noted})

"""What is stored follows what is trained: frozen parameters once, rows of the others, longer where that changes."""

from __future__ import annotations

import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import trajrec
from trajrec.errors import DriftError, HalfPrecisionError, ModelMismatchError
from trajrec.replay.methods.contributions import contributions
from trajrec.runfile.folder import Folder
from trajrec.runfile.reader.verify import verify
from trajrec.runfile.recovery import pack

STEPS, BATCH = 12, 4


def data(count=24):
    g = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(count, 5, generator=g), torch.arange(count) % 3)


class Net(nn.Module):
    """Three layers, of which the first ones are frozen."""

    def __init__(self, frozen=("one", "two"), dtype=None):
        super().__init__()
        torch.manual_seed(3)
        self.one, self.two, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6)
        for name in frozen:
            getattr(self, name).requires_grad_(False)
            getattr(self, name).to(dtype)

    def forward(self, x):
        x = torch.tanh(self.one(x.to(self.one.weight.dtype))).to(self.two.weight.dtype)
        x = self.norm(torch.tanh(self.two(x)).to(self.head.weight.dtype))
        return self.head(x)


def thaw_in_stages(model, optimizer, step):
    if step == 4:
        model.two.requires_grad_(True)
    if step == 8:
        model.one.requires_grad_(True)


def join_later(model, optimizer, step):
    if step == 5:
        model.two.requires_grad_(True)
        optimizer.add_param_group({"params": list(model.two.parameters()), "lr": 0.05})


def held(model):
    """The optimizer of a script that gives it all parameters, frozen ones too."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def chosen(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def train(
    path=None, build=Net, optimizer=held, between=None, steps=STEPS, double=False, sample=None, eps=0.0, **options
):
    """A trained model; recorded with a path; in float64, and with one sample weighed by 1 + N eps, for the truth."""
    set_, made = data(), build()
    if double:
        made.double()
    stepper = optimizer(made)
    torch.manual_seed(0)
    loader = DataLoader([(*item, k) for k, item in enumerate(set_)] if path is None else set_, BATCH, shuffle=True)

    def loop():
        number = 0
        while number < steps:
            for x, y, *ids in loader:
                if number == steps:
                    return
                number += 1
                if between is not None:
                    between(made, stepper, number)
                stepper.zero_grad()
                losses = functional.cross_entropy(made(x.double() if double else x), y, reduction="none")
                if ids and sample is not None:
                    losses = losses * (1 + len(set_) * eps * (ids[0] == sample))
                losses.mean().backward()
                stepper.step()

    if path is None:
        loop()
    else:
        with trajrec.record(path, model=made, optimizer=stepper, loader=loader, **options):
            loop()
    return made


def target(model):
    x, y = data()[:6]
    return functional.cross_entropy(model.eval()(x.to(model.head.weight.dtype)), y).item()


def task(build=Net):
    test = torch.utils.data.Subset(data(), range(6))
    return trajrec.Task.supervised(build, data(), test)


STAGES = {
    "in a group from the start": (held, thaw_in_stages),
    "Adam": (adam, thaw_in_stages),
    "joins": (chosen, join_later),
}


@pytest.mark.parametrize("options", [{}, {"compression": "none"}, {"keep": 3}], ids=str)
@pytest.mark.parametrize("kind", STAGES)
def test_what_is_trained_later_is_in_longer_rows_and_replayed_exactly(kind, options, tmp_path):
    optimizer, between = STAGES[kind]
    trained = train(tmp_path / "run.h5", optimizer=optimizer, between=between, **options)
    alone = train(tmp_path / "alone.h5", optimizer=optimizer, steps=2)
    assert verify(tmp_path / "run.h5") == []
    with trajrec.open(tmp_path / "run.h5") as run, trajrec.open(tmp_path / "alone.h5") as short:
        assert [t for t, _ in run.spec.stretches] == ([0, 5] if kind == "joins" else [0, 4, 8])
        assert run.spec.width(3) == short.spec.row_length == sum(p.numel() for p in (*trained.head.parameters(),)) + 12
        for t in (0, 2):
            if run.stored(t) and short.stored(t):
                found = run.weights(t)
                assert found.keys() == dict(trained.named_parameters()).keys()
                assert all(torch.equal(found[name], w) for name, w in short.weights(t).items())
        last = run.weights(run.steps)
        assert all(torch.equal(last[name], p.detach()) for name, p in trained.named_parameters())
        answer = contributions(run, task(), targets="mean", dtype="float64", samples=np.array([0, 7]), exact=True)
        assert answer.certificate.derivative is not None
    for sample, value in zip(
        (0, 7), answer.values[:, 0] if answer.values.shape[0] == 2 else answer.values[0], strict=True
    ):
        e = 1e-5
        up, down = (
            target(train(optimizer=optimizer, between=between, double=True, sample=sample, eps=s * e)) for s in (1, -1)
        )
        assert value == pytest.approx(-(up - down) / (2 * e) / len(data()), rel=3e-4, abs=1e-7)
    assert len(alone.state_dict()) == len(trained.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float32])
def test_frozen_parameters_of_any_dtype_are_stored_once_as_they_are(dtype, tmp_path):
    def build():
        return Net(dtype=dtype)

    before = {name: p.detach().clone() for name, p in build().named_parameters()}
    train(tmp_path / "run.h5", build)
    with trajrec.open(tmp_path / "run.h5") as run:
        assert run.spec.row_length == 12 + 18 + 3
        assert {p.name for p in run.spec.stored_once} == {"one.weight", "one.bias", "two.weight", "two.bias"}
        for t in (0, STEPS):
            for name in ("one.weight", "two.bias"):
                assert run.weights(t)[name].dtype == dtype
                assert torch.equal(run.weights(t)[name], before[name])
    other = torch.nn.Module.float if dtype != torch.float64 else torch.nn.Module.double

    def wrong_values():
        return other(Net(frozen=())) if dtype in (torch.float32, torch.float64) else Net(dtype=dtype).apply(_zeroed)

    with trajrec.open(tmp_path / "run.h5") as run:
        answers = [
            contributions(run, task(b), targets="mean", samples=np.arange(3), exact=True).values
            for b in (build, wrong_values)
        ]
    np.testing.assert_array_equal(*answers)


def _zeroed(module):
    for p in module.parameters(recurse=False):
        p.data.zero_()


class Quantized(nn.Module):
    """A frozen layer in int8, and one in float8."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.codes = nn.Parameter(torch.randint(-99, 99, (6, 5), dtype=torch.int8), requires_grad=False)
        self.eighth = nn.Parameter(torch.randn(6, 6).to(torch.float8_e4m3fn), requires_grad=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = functional.linear(x, self.codes.to(x.dtype) / 99)
        return self.head(functional.linear(x, self.eighth.to(x.dtype)))


def test_whole_numbers_and_eight_bits_are_frozen_too(tmp_path):
    made = train(tmp_path / "run.h5", Quantized, adam)
    assert verify(tmp_path / "run.h5") == []
    with trajrec.open(tmp_path / "run.h5") as run:
        assert torch.equal(run.weights(3)["codes"], made.codes.detach())
        assert run.weights(3)["eighth"].dtype == torch.float8_e4m3fn
        assert np.isfinite(
            contributions(run, task(Quantized), targets="mean", dtype="float64", samples=np.arange(2)).values
        ).all()
        with pytest.raises(ModelMismatchError, match=r"codes is int8 .*must build, and quantize"):
            contributions(run, task(_of_parts), targets="mean", samples=np.arange(2))


def _of_parts():
    made = Quantized()
    made.codes = nn.Parameter(Parted(made.codes.detach()), requires_grad=False)
    return made


class Parted(torch.Tensor):
    """A tensor that says that it is made of others."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_subclass(cls, codes)

    def __tensor_flatten__(self):
        return ["inner"], None

    @property
    def inner(self):
        return self.as_subclass(torch.Tensor)


def test_a_tensor_that_is_made_of_others_is_kept_in_its_parts(tmp_path):
    made = train(tmp_path / "run.h5", _of_parts, adam)
    with trajrec.open(tmp_path / "run.h5") as run:
        assert torch.equal(run.weights(0)["codes:inner"], made.codes.inner)
        assert np.isfinite(contributions(run, task(_of_parts), targets="mean", samples=np.arange(2)).values).all()


def test_rows_and_states_are_of_what_is_trained(tmp_path):
    train(tmp_path / "run.h5", optimizer=adam)
    with h5py.File(tmp_path / "run.h5") as file:
        assert file["weights"].shape[1] == file[f"keyframes/{STEPS:010d}/optimizer/exp_avg"].size == 33
        assert file["keyframes/0000000000/frozen/one.weight"].shape == (6, 5)
        assert "frozen" not in file[f"keyframes/{STEPS:010d}"]


@pytest.mark.parametrize("options", [{}, {"keep": 3}], ids=str)
def test_a_frozen_weight_that_is_changed_by_hand_ends_the_recording_and_is_not_replayed(options, tmp_path, caplog):
    def between(model, _, step):
        if step == 7:
            model.one.weight.data[0, 0] += 1e-3

    recorded = train(tmp_path / "run.h5", between=between, keyframe_every=3, **options)
    alone = train(between=between)
    # `alone` shuffles a list of the same length: the same order.
    assert all(torch.equal(a, b) for a, b in zip(recorded.parameters(), alone.parameters(), strict=True))
    assert "one.weight was changed outside the optimizer" in caplog.text
    with trajrec.open(tmp_path / "run.h5") as run:
        assert (run.steps, run.state) == (9, "recovered")
        with pytest.raises(DriftError, match=r"one\.weight is not in the optimizer and was changed by step 9"):
            contributions(run, task(), targets="mean", samples=np.arange(2), exact=True)


def test_one_that_was_changed_before_it_is_trained_ends_it_there(tmp_path, caplog):
    def between(model, optimizer, step):
        if step == 3:
            model.two.weight.data.mul_(2)
        thaw_in_stages(model, optimizer, step)

    train(tmp_path / "run.h5", between=between)
    assert "two.weight was changed outside the optimizer" in caplog.text
    with trajrec.open(tmp_path / "run.h5") as run:
        assert run.steps == 3


def test_a_flipped_byte_in_a_frozen_weight_is_found(tmp_path):
    made = train(tmp_path / "run.h5")
    path, held_bytes = tmp_path / "run.h5", made.one.weight.detach().numpy().tobytes()
    whole = path.read_bytes()
    place = whole.index(held_bytes)
    path.write_bytes(whole[: place + 9] + bytes([whole[place + 9] ^ 1]) + whole[place + 10 :])
    assert [p.dataset for p in verify(path)] == ["/keyframes"]


def test_a_training_beside_another_base_is_not_taken_for_the_same(tmp_path):
    def build():
        made = Net()
        if again:
            made.one.weight.data.add_(0.5)
        return made

    again = False
    train(tmp_path / "run.h5", build, steps=5)
    again = True  # the weights that are trained are those of step 0, the base is another
    train(tmp_path / "run.h5", build, steps=3, resume=True)
    with trajrec.open(tmp_path / "run.h5") as run, trajrec.open(tmp_path / "run-part2.h5") as part:
        assert (run.steps, part.steps) == (5, 3)


def test_resuming_before_a_stretch_cuts_it_off(tmp_path):
    kept = {}

    def between(model, optimizer, step):
        if step == 4:
            kept.update(model={k: v.clone() for k, v in model.state_dict().items()}, at=optimizer.state_dict())
        thaw_in_stages(model, optimizer, step)
        if step == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run.h5", between=between)

    def build():
        made = Net()
        made.load_state_dict(kept["model"])
        return made

    train(tmp_path / "run.h5", build, steps=3, resume=True)
    assert verify(tmp_path / "run.h5") == []
    with trajrec.open(tmp_path / "run.h5") as run:
        assert (run.resumed, run.steps, run.spec.stretches) == ((3,), 6, ())


def test_weights_in_half_precision_are_recorded_and_not_replayed(tmp_path):
    def build():
        made = Net(frozen=())
        made.head.to(torch.bfloat16)
        return made

    made = train(tmp_path / "run.h5", build, adam)
    assert verify(tmp_path / "run.h5") == []
    with trajrec.open(tmp_path / "run.h5") as run:
        assert torch.equal(run.weights(STEPS)["head.weight"].bfloat16(), made.head.weight.detach())
        with pytest.raises(HalfPrecisionError, match=r"head\.weight was trained in bfloat16"):
            contributions(run, task(build), targets="mean", samples=np.arange(2))


KILLED = """
import os, signal, sys
import torch
from tests.runfile.test_frozen import held, thaw_in_stages, train
torch.set_num_threads(1)  # as in the other tests
def between(model, optimizer, step):
    thaw_in_stages(model, optimizer, step)
    if step == 10:
        os.kill(os.getpid(), signal.SIGKILL)
train(sys.argv[1], between=between, **eval(sys.argv[2]))
"""


@pytest.mark.parametrize("options", [{}, {"compression": "none"}, {"keep": 3}], ids=str)
def test_a_recording_killed_in_a_later_stretch_is_read_and_packed(options, tmp_path):
    path = tmp_path / "run.h5"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, path, repr(options)], check=False)
    assert done.returncode == -9
    whole = train(tmp_path / "whole.h5", between=thaw_in_stages, **options)
    for _ in range(2):
        with trajrec.open(path) as run, trajrec.open(tmp_path / "whole.h5") as other:
            assert run.steps == 9
            for t in (0, 3, 6, 9):
                assert run.crc32(t) == other.crc32(t)
                assert not run.stored(t) or np.array_equal(run.row(t), other.row(t))
        assert verify(path) == []
        pack(path)
    assert len(dict(whole.named_parameters())) == 8


def test_a_budget_drops_rows_of_all_stretches(tmp_path):
    """As `trajrec.runfile.writer.rework` does it between two writers."""
    path = tmp_path / "run.h5"
    subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, path, "{'keyframe_every': 2}"], check=False)
    folder = Folder.of(path)
    subprocess.run([sys.executable, "-m", "trajrec.runfile.writer.rework", folder.path, "drop-rows"], check=True)
    pack(path)
    assert verify(path) == []
    train(tmp_path / "whole.h5", between=thaw_in_stages)
    with trajrec.open(path) as run, trajrec.open(tmp_path / "whole.h5") as other:
        assert run.keep == "keyframes"
        for t in (0, 2, 4, 6, 8):
            np.testing.assert_array_equal(run.row(t), other.row(t))

"""Sameness judged rightly: right Tasks pass where other bits are all that differs, and small errors do not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import trajrec
from tests.made import loops
from trajrec.replay import contributions
from trajrec.replay.losses.gradient import gradient_of
from trajrec.replay.proof import place
from trajrec.replay.proof.rounding import FACTOR, Rounding, on_a_copy
from trajrec.replay.session import Session
from trajrec.runfile.trainer.sink import RunFileSink

N, TOKENS, LENGTH, BATCH = 30, 24, 7, 6


class Attention(nn.Module):
    """A transformer block over tokens; its keys' biases have no gradient but for rounding."""

    def __init__(self, width=8):
        super().__init__()
        self.tokens, self.norm = nn.Embedding(TOKENS, width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, TOKENS)

    def forward(self, x):
        h = self.tokens(x)
        q, k, v = self.qkv(self.norm(h)).chunk(3, dim=-1)
        return self.out(h + functional.scaled_dot_product_attention(q, k, v, is_causal=True))


def normalised():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def smooth():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def tokens(seed):
    x = torch.from_numpy(np.random.default_rng(seed).integers(0, TOKENS - 4, (N, LENGTH + 1)))
    return TensorDataset(x[:, :-1].contiguous(), x[:, 1:].contiguous())


def points(seed, dtype):
    random = np.random.default_rng(seed)
    x = torch.from_numpy(random.standard_normal((N, 4))).to(dtype)
    return TensorDataset(x, torch.from_numpy(random.integers(0, 3, N)))


def losses(model, batch):
    found = functional.cross_entropy(model(batch[0]).movedim(-1, 1), batch[1], reduction="none")
    return found.flatten(1).mean(1) if found.dim() > 1 else found


def adam(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


def fused(model):
    return adam(model, fused=True)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8)


def record(path, build=Attention, optimizer=adam, dtype=torch.float32, epochs=3, **options):
    """Trains as a loop does, with one mean over all tokens. Returns the right Task's arguments."""
    data, test = (tokens(0), tokens(1)) if build is Attention else (points(0, dtype), points(1, dtype))
    torch.manual_seed(0)
    model = build().to(dtype)
    made, loader = optimizer(model), DataLoader(data, BATCH, shuffle=True)
    with trajrec.record(path, model=model, optimizer=made, loader=loader, **options):
        for _ in range(epochs):
            for x, y in loader:
                made.zero_grad()
                functional.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
                made.step()
    return {"model": build, "train": data, "test": test, "loss": losses}


def certificate(path, told, **options):
    with trajrec.open(path) as run:
        return contributions(run, trajrec.Task(**told), exact=True, **options).certificate


@pytest.mark.parametrize("keep", ["steps", 5])
@pytest.mark.parametrize("build", [Attention, normalised])
@pytest.mark.parametrize("optimizer", [adam, fused, sgd])
def test_other_bits_are_no_drift(tmp_path, build, optimizer, keep):
    """A mean over tokens, a fused optimizer: the Task is the training, and its bits are others."""
    told = record(tmp_path / "run.h5", build, optimizer, keep=keep)
    for dtype in ("float32", "float64"):
        found = certificate(tmp_path / "run.h5", told, dtype=dtype)
        assert found.verdict in ("bit-exact", "within rounding")
        assert found.steps_checked == found.steps == 15


def test_a_mean_over_tokens_has_other_checksums(tmp_path):
    """Why a checksum that fails is no proof: this Task is right, and the machine and its threads are the training's."""
    told = record(tmp_path / "run.h5", keep=5)
    with trajrec.open(tmp_path / "run.h5") as run:
        assert place.is_here(run.spec, torch.device("cpu"), torch.float32)
        assert contributions(run, trajrec.Task(**told)).certificate.verdict == "within rounding"


def smoothing(s):
    def smoothed(model, batch):
        scores = model(batch[0]).movedim(-1, 1)
        found = functional.cross_entropy(scores, batch[1], reduction="none", label_smoothing=s)
        return found.flatten(1).mean(1) if found.dim() > 1 else found

    return {"loss": smoothed}


def decayed(s):
    return {"penalty": lambda model: s * sum(p.square().sum() for p in model.parameters())}


def one_bias(s):
    return {"penalty": lambda model: s * model[-1].bias[0]}


WRONG = {
    "label smoothing of .0005": (smooth, smoothing(5e-4), ("float32", "float64")),
    "label smoothing of .0005 in attention": (Attention, smoothing(5e-4), ("float32",)),
    "an L2 penalty of 3e-5": (smooth, decayed(3e-5), ("float32", "float64")),
    "one bias": (smooth, one_bias(1e-3), ("float32", "float64")),
    "label smoothing of 1e-8": (smooth, smoothing(1e-8), ("float64",)),
    "one bias in double precision": (smooth, one_bias(1e-9), ("float64",)),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("keep", ["steps", 3])
@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_a_small_error_is_refused(tmp_path, name, keep, optimizer):
    build, more, dtypes = WRONG[name]
    for dtype in dtypes:
        kept = getattr(torch, dtype)
        told = record(tmp_path / f"{dtype}.h5", build, optimizer, kept, epochs=1, keep=keep)
        with trajrec.open(tmp_path / f"{dtype}.h5") as run:
            assert Session(run, trajrec.Task(**told)).find_drift() is None
            # Adam's first step is the gradient's sign, which a small error leaves alone.
            assert Session(run, trajrec.Task(**(told | more))).find_drift().t in (1, 2)


def test_rows_that_nothing_measured_do_not_count_as_checked(tmp_path, monkeypatch):
    """Behind the last keyframe of a recording that was cut off a checksum is all there is."""
    take = RunFileSink.keyframe
    monkeypatch.setattr(RunFileSink, "keyframe", lambda self, k: None if k.step == 15 else take(self, k))
    told = record(tmp_path / "run.h5", keep=7)
    found = certificate(tmp_path / "run.h5", told)
    assert (found.verdict, found.steps_checked) == ("within rounding", 14)
    told = record(tmp_path / "short.h5", keep=20)
    wrong = certificate(tmp_path / "short.h5", told | smoothing(0.1))
    assert (wrong.verdict, wrong.steps_checked) == ("unchecked", 0)


@pytest.fixture
def session(tmp_path):
    told = record(tmp_path / "run.h5")
    with trajrec.open(tmp_path / "run.h5") as run:
        yield Session(run, trajrec.Task(**told))


def test_rounding_is_found_as_it_is(session):
    """Within a factor of four of what float64 tells, in every parameter; nothing of tokens that no sample holds."""
    step = session.step_at_start()
    gradient = gradient_of(session.function, session.train, step)
    rounding = Rounding(session.rule, lambda at: gradient_of(session.function, session.train, at), 2.0**-23)
    found = session.layout.split(rounding.measured(step, gradient) * rounding.taken(gradient))
    double = Session(session.run, session.task, dtype="float64")
    exact = gradient_of(double.function, double.train, double.step_at_start())
    true = session.layout.split(gradient.double() - exact)
    for name, d in found.items():
        held = d != 0
        size = d[held].double().square().mean().sqrt() / FACTOR
        assert 0.25 < size / true[name][held].square().mean().sqrt() < 4
    unused = sorted(set(range(TOKENS)) - set(session.train.dataset.tensors[0][step.ids].flatten().tolist()))
    assert unused
    assert not found["tokens.weight"][unused].any()


def test_random_numbers_are_no_rounding(session):
    """What does not come back is off by more than rounding can be, and is not allowed for."""
    step = session.step_at_start()
    gradient = gradient_of(session.function, session.train, step)
    found = Rounding(session.rule, lambda at: torch.randn_like(gradient), 2.0**-23).measured(step, gradient)
    assert float(found.abs().max()) < 2e-3 * float(gradient.abs().max())


def test_the_place_is_told_by_processor_versions_threads_and_type(session):
    spec, cpu = session.run.spec, torch.device("cpu")
    assert place.is_here(spec, cpu, torch.float32)
    assert not place.is_here(spec, cpu, torch.float64)
    assert not place.is_here(replace(spec, threads=spec.threads + 1), cpu, torch.float32)
    assert not place.is_here(replace(spec, device="cuda:0"), cpu, torch.float32)
    for name in ("torch", "processor"):
        without = {key: value for key, value in spec.versions.items() if key != name}
        assert not place.is_here(replace(spec, versions=without), cpu, torch.float32)


def test_rounding_is_measured_by_the_kernels_of_the_training():
    """A replay differentiates plain attention; what a fused one rounds otherwise is rounding, and no other Task."""
    from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

    seen = []

    def loss(model, batch):
        seen.append(SDPBackend.FLASH_ATTENTION in _cur_sdpa_kernel_backends())
        return loops.per_sample(model, batch)

    made = loops.train(loops.Loop(loss=loss))
    session = Session(made.run, made.task)
    step = session.step_at_start()
    seen.clear()
    on_a_copy(session.function, session.train)(step)
    session.loss(step)
    assert seen == [True, False]

"""What differs on a GPU. Those without the marker hold the same code on any machine."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.made import loops
from tests.made.memory_run import MemoryRun
from trajrec.capture.recorder import Recorder
from trajrec.errors import DriftError
from trajrec.replay import contributions
from trajrec.sink import MemorySink
from trajrec.task.task import Task


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.drop = nn.Linear(4, 3), nn.Dropout(0.5)

    def forward(self, x):
        return self.out(self.drop(x))


def as_if_on_a_gpu(made, state=bytes(16)):
    """The recording with the state of a GPU's generator beside the CPU's, as one of a GPU has it."""
    spec = made.run.spec
    object.__setattr__(spec, "rng", (*spec.rng, ("cuda:0", len(state))))
    for record in made.run.sink.records:
        size = spec.rng[0][1]
        parts = [record.rng[k : k + size] + state for k in range(0, len(record.rng), size)]
        record.rng = b"".join(parts)
    return made


def test_a_run_of_a_gpu_is_replayed_on_the_cpu():
    """Its losses draw from the CPU's generator here, which comes back; nothing asks for a GPU."""
    plain = loops.train(loops.Loop(build=Noisy))
    expected = contributions(plain.run, plain.task)
    made = as_if_on_a_gpu(loops.train(loops.Loop(build=Noisy)))
    assert any(made.run.rng(t) for t in range(1, made.run.steps + 1))
    np.testing.assert_array_equal(contributions(made.run, made.task).values, expected.values)


def test_numbers_that_a_gpu_drew_are_asked_for_there():
    made = as_if_on_a_gpu(loops.train(loops.Loop(build=Noisy)))
    for record in made.run.sink.records:
        if record.rng:  # what the CPU's generator was then says nothing of what a GPU drew
            record.rng = torch.Generator().manual_seed(7).get_state().numpy().tobytes() + record.rng[-16:]
    with pytest.raises(DriftError, match=r"random numbers of cuda:0, which come back on a GPU only.*--device cuda"):
        contributions(made.run, made.task)


# ---- on a GPU


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.steps, self.out = nn.LSTM(4, 5, num_layers=2, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.steps(x)[0][:, -1])


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts, self.out = nn.Linear(4, 24), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.parts(x).view(len(x), 6, 1, 24).transpose(1, 2).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))


class Convolving(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8), nn.GELU(), nn.Flatten(), nn.Linear(16, 3))

    def forward(self, x):
        return self.net(x)


class Scattering(nn.Module):
    """The gradient of its embedding is added up by atomic operations, in no order."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.table((x[..., 0] > 0).long() * 2 + (x[..., 1] > 0).long()).mean(1))


MODELS = {model.__name__: model for model in (Recurrent, Attending, Convolving, Scattering)}


def recorded(build, compile_mode=None):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 6, 4), torch.randint(0, 3, (24,)))
    model = build().cuda()
    used = model if compile_mode is None else torch.compile(model, mode=compile_mode)
    sink = MemorySink(interval=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with Recorder(sink, model=model, optimizer=optimizer) as recorder:
        for _ in range(2):
            for x, y in DataLoader(data, batch_size=8, shuffle=True, pin_memory=True):
                optimizer.zero_grad()
                F.cross_entropy(used(x.cuda(non_blocking=True)), y.cuda(non_blocking=True)).backward()
                optimizer.step()
    return sink, Task.supervised(build, data, data), recorder


@pytest.mark.cuda
@pytest.mark.parametrize("name", MODELS)
def test_what_has_no_second_derivative_in_a_fast_kernel_is_exact(name):
    """Adjoint and tangent agree on the GPU, and with the CPU's replay of the same recording."""
    sink, task, _ = recorded(MODELS[name])
    options = {"targets": "each", "dtype": "float64"}
    found = [contributions(MemoryRun(sink), task, mode=m, device="cuda", **options) for m in ("adjoint", "tangent")]
    found.append(contributions(MemoryRun(sink), task, device="cpu", **options))
    for other in found[1:]:
        np.testing.assert_allclose(other.values, found[0].values, rtol=1e-5, atol=1e-9)


@pytest.mark.cuda
def test_convolutions_in_tensor_float_32_are_given_room():
    sink, task, _ = recorded(Convolving)
    assert sink.spec.data["tf32"]
    assert contributions(MemoryRun(sink), task, device="cuda").certificate.verdict in ("bit-exact", "within rounding")


@pytest.mark.cuda
def test_a_captured_step_is_not_recorded_and_trains():
    """The capture goes on, and the reason is told."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).cuda(), torch.randn(8, 4, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1, device="cuda"), capturable=True)
    with Recorder(MemorySink(), model=model, optimizer=optimizer) as recorder:
        graph = torch.cuda.CUDAGraph()
        before = model.weight.detach().clone()
        with torch.cuda.graph(graph):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        graph.replay()
    assert "CUDA graph" in recorder.problem
    assert not torch.equal(model.weight, before)

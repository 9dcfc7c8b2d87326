"""Optimizers as users write them, good ones and bad ones, and a training to record with them."""

import copy

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from tests.made.memory_run import MemoryRun
from trajrec.capture.recorder import Recorder
from trajrec.sink import MemorySink
from trajrec.task.task import Task

N = 12


class Own(Optimizer):
    """Steps parameter by parameter; what a class does is its `update`."""

    def __init__(self, params, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, self.state[p], group)

    def update(self, p, state, group):
        """Plain momentum."""
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(p)
        state["velocity"].mul_(group["momentum"]).add_(p.grad).add_(p, alpha=group["weight_decay"])
        p.add_(state["velocity"], alpha=-group["lr"])


class Belief(Own):
    """AdaBelief, with a count that is a Python number and square roots of moments that begin with zero."""

    def update(self, p, state, group):
        if not state:
            state.update(step=0, m=torch.zeros_like(p), s=torch.zeros_like(p))
        state["step"] += 1
        m, s, t = state["m"], state["s"], state["step"]
        m.mul_(0.9).add_(p.grad, alpha=0.1)
        s.mul_(0.99).addcmul_(p.grad - m, p.grad - m, value=0.01)
        p.addcdiv_(m, (s / (1 - 0.99**t)).sqrt_().add_(1e-8), value=-group["lr"] / (1 - 0.9**t))


class Lars(Own):
    """Steps as long as the weights of a parameter, with a count that is a tensor and a branch on norms."""

    def update(self, p, state, group):
        if not state:
            state.update(step=torch.tensor(0.0), velocity=torch.zeros_like(p))
        state["step"] += 1
        grad = p.grad.add(p, alpha=group["weight_decay"])
        size, slope = p.norm(), grad.norm()
        trust = size / slope if size > 0 and slope > 0 else 1.0
        state["velocity"].mul_(group["momentum"]).add_(grad * trust)
        p.sub_(state["velocity"] * group["lr"] / state["step"].item() ** 0.5)


class Clipped(Own):
    """Clips by the norm of all gradients of all groups, in place of the gradient, with foreach functions."""

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        torch._foreach_mul_([p.grad for p in params], 0.5 / torch.maximum(norm, torch.full_like(norm, 0.5)))
        super().step()


class Slow(Own):
    """Lookahead: weights that follow slowly, begun with a copy outside the graph, and a scalar that is followed."""

    def update(self, p, state, group):
        if "slow" not in state:
            state.update(slow=p.detach().clone(), calls=0, length=p.new_zeros(()))
        super().update(p, state, group)
        state["calls"] += 1
        state["length"].mul_(0.5).add_(p.square().sum().sqrt())
        p.mul_(1 - 0.001 * state["length"])
        if state["calls"] % 2 == 0:
            state["slow"].lerp_(p, 0.5)
            p.copy_(state["slow"])


class Subclassed(torch.optim.AdamW):
    """One of torch's with something added; amsgrad writes with `out=`."""

    def __init__(self, params, lr=0.05, extra=0.9, **options):
        super().__init__(params, lr=lr, **options)
        self.defaults["extra"] = extra
        for group in self.param_groups:
            group.setdefault("extra", extra)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(group["extra"])
        super().step()


class Squaring(Own):
    """Multiplies a tensor in place by itself, of which torch's own forward mode gives a wrong derivative."""

    def update(self, p, state, group):
        size = state.setdefault("size", torch.ones_like(p))
        size.mul_(size).add_(p.grad.square()).sqrt_()
        p.sub_(p.grad / size * group["lr"])


class OnData(Own):
    def update(self, p, state, group):
        p.data.add_(p.grad.data, alpha=-group["lr"])


class OfNumbers(Own):
    def update(self, p, state, group):
        p.add_(p.grad, alpha=-group["lr"] / (1 + p.grad.norm().item()))


class AsAlpha(Own):
    def update(self, p, state, group):
        p.add_(p.grad, alpha=-group["lr"] / p.grad.norm())


class ByName(Own):
    def update(self, p, state, group):
        self.state["calls"]["all"] = self.state["calls"].get("all", 0) + 1
        p.add_(p.grad, alpha=-group["lr"] / self.state["calls"]["all"])


class Detaching(Own):
    def update(self, p, state, group):
        p.add_(p.grad.detach() * p, alpha=-group["lr"])


class Rounding(Own):
    def update(self, p, state, group):
        p.add_(p.grad.bfloat16(), alpha=-group["lr"])


class Inferring(Own):
    @torch.inference_mode()
    def step(self, closure=None):
        super().step()


class WithClosure(Own):
    def step(self, closure):
        closure()
        super().step()


class Evaluating(Own):
    def step(self, closure=None):
        with torch.enable_grad():
            closure().backward()
        super().step()


class Hiding(Own):
    calls = 0

    def update(self, p, state, group):
        self.calls += 1
        p.add_(p.grad, alpha=-group["lr"] / self.calls)


class Drawing(Own):
    def update(self, p, state, group):
        p.add_(p.grad + torch.randn_like(p), alpha=-group["lr"])


class Remembering(Own):
    """Keeps a number that depends on the gradient: a cut between two steps."""

    def update(self, p, state, group):
        p.add_(p.grad, alpha=-group["lr"] * (1 + state.get("last", 0.0)))
        state["last"] = float(p.grad.abs().sum())


class Listing(Own):
    def update(self, p, state, group):
        state.setdefault("history", []).append(p.grad)
        p.add_(p.grad, alpha=-group["lr"])


class InGroup(Own):
    def update(self, p, state, group):
        p.add_(p.grad, alpha=-group["lr"])
        group["momentum"] = 0.9 * group["momentum"] + float(p.grad.square().sum())


class Counting(Own):
    """Keeps its count in the parameter groups, where its first step puts it, and a state that is None."""

    def update(self, p, state, group):
        if "count" not in group:
            group["count"] = 0
        if p is group["params"][0]:
            group["count"] += 1
        state.setdefault("compensation", None)
        p.sub_(p.grad * group["lr"] / (state.setdefault("scale", 2.0) * group["count"] * p.grad.norm()))


class MadeInGroup(Own):
    def update(self, p, state, group):
        group.setdefault("history", []).append(1)
        p.add_(p.grad, alpha=-group["lr"] / len(group["history"]))


class Late(Own):
    """Good for two steps."""

    def update(self, p, state, group):
        super().update(p, state, group)
        state["calls"] = state.get("calls", 0) + 1
        if state["calls"] > 2:
            p.data.mul_(0.9)


class Noisy(Own):
    """Draws a number that it never uses."""

    def __init__(self, params, **options):
        torch.rand(3)
        super().__init__(params, **options)


class Demanding(Own):
    """Its constructor wants more than its defaults hold."""

    def __init__(self, params, scale, **options):
        super().__init__(params, **options)
        self.scale = scale

    def update(self, p, state, group):
        p.add_(p.grad, alpha=-self.scale * group["lr"])


def build():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def per_sample(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def train(cls, eps=None, sink=None, dtype=torch.float64, dead=False, make=None, named=True, **options):
    """A real training with sample weights 1 + N eps. Returns the test losses and the task."""
    torch.manual_seed(0)
    x, y = torch.randn(N, 4, dtype=dtype), torch.randint(0, 3, (N,))
    tx, ty = torch.randn(5, 4, dtype=dtype), torch.randint(0, 3, (5,))
    if dead:
        x[:, 2] = 0.0
    eps = torch.zeros(N, dtype=dtype) if eps is None else eps
    data, test = TensorDataset(x, y, torch.arange(N)), TensorDataset(tx, ty, torch.arange(5))
    model = build().to(dtype)
    groups = [{"params": [p for p in model.parameters() if p.ndim == d]} for d in (2, 1)]
    groups[1]["lr"] = 0.02
    optimizer = cls(groups, **options) if make is None else make(groups)
    loader = DataLoader(data, 5, shuffle=True)

    def loop():
        for _ in range(2):
            for xs, ys, ids in loader:
                optimizer.zero_grad()
                ((1 + N * eps[ids]) * per_sample(model, (xs, ys)) / len(ids)).sum().backward()
                optimizer.step()

    if sink is None:
        loop()
    else:
        with Recorder(sink, model=model, optimizer=optimizer if named else None, loader=loader, strict=True):
            loop()
    task = Task(lambda: build().to(dtype), data, test, loss=per_sample)
    with torch.no_grad():
        return per_sample(model, (tx, ty)).numpy(), task


def recorded(cls, **options):
    """A recorded training in memory, and its task."""
    sink = MemorySink(interval=4)
    task = train(cls, sink=sink, **options)[1]
    return MemoryRun(sink), task


def given(task, cls):
    """The task with the class of its optimizer."""
    task = copy.copy(task)
    task.optimizer = cls
    return task

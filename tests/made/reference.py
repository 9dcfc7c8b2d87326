r"""The naive reference: the whole training as one differentiable function of eps, in float64.

    c[t,i] becomes c[t,i] (1 + N eps_i);   C(i, j) = -(1/N) d l_j(w_T) / d eps_i

Written from the equations alone, with the SGD step spelled out (a plan may bring another), and never from the project's
own code. `train` is also the function that finite differences are taken of.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.func import functional_call


def sgd_step(p, v, g, o):
    """torch.optim.SGD's documented pseudo code."""
    g = -g if o.get("maximize") else g
    g = g + o.get("weight_decay", 0.0) * p
    if o.get("momentum", 0.0):
        v = g if v is None else o["momentum"] * v + (1 - o.get("dampening", 0.0)) * g
        g = g + o["momentum"] * v if o.get("nesterov") else v
    return p - o["lr"] * g, v


@dataclass
class Plan:
    """A training: batches of ids, and for every step the options of each group (names of parameters)."""

    batches: list
    options: list  # one a step: list of dicts, one a group
    groups: list  # one a group: list of parameter names
    shares: list | None = None
    dropout_states: list = field(default_factory=list)
    step: Callable = sgd_step  # (p, state, g, options) -> (p, state); the state is None at first


def copies(model):
    """Clones of the buffers: training must not change those of the model."""
    return {name: value.clone() for name, value in model.named_buffers()}


class Statistics:
    """The running statistics of a model's BatchNorms as functions of the weights, by the name of their buffers."""

    def __init__(self, model):
        self.norms = {n: m for n, m in model.named_modules() if getattr(m, "running_mean", None) is not None}
        self.values = {}
        for name, module in self.norms.items():
            self.values[f"{name}.running_mean"] = torch.zeros_like(module.running_mean)
            self.values[f"{name}.running_var"] = torch.ones_like(module.running_var)

    @contextmanager
    def moving(self):
        """Inside, batches in training mode move them."""
        hooks = [m.register_forward_pre_hook(partial(self._move, n)) for n, m in self.norms.items()]
        yield
        for hook in hooks:
            hook.remove()

    def _move(self, name, module, args):
        (x,) = args
        dims = [d for d in range(x.dim()) if d != 1]
        for kind, stat in (("running_mean", x.mean(dims)), ("running_var", x.var(dims))):
            key = f"{name}.{kind}"
            self.values[key] = (1 - module.momentum) * self.values[key] + module.momentum * stat

    @contextmanager
    def in_place(self):
        """Inside, normalisations in eval mode can be differentiated by them: torch's cannot."""
        for module in self.norms.values():
            module.forward = partial(self._normalise, module)
        yield
        for module in self.norms.values():
            del module.forward

    @staticmethod
    def _normalise(module, x):
        shape = [-1] + [1] * (x.dim() - 2)
        mean, var, weight, bias = (
            v if v is None else v.view(shape)
            for v in (module.running_mean, module.running_var, module.weight, module.bias)
        )
        found = (x - mean) / (var + module.eps).sqrt()
        return found if weight is None else found * weight + bias


def train(model, params, data, losses, plan, eps, hessian=True):
    """w_T by name, as a function of eps [N], and the running statistics by the names of their buffers.

    Without `hessian`, neither gradients nor statistics depend on the weights.
    """
    n, statistics = len(eps), Statistics(model)
    state = dict.fromkeys(params)
    for t, ids in enumerate(plan.batches):
        batch = [x[ids] for x in data]
        share = torch.full((len(ids),), 1 / len(ids), dtype=eps.dtype) if plan.shares is None else plan.shares[t]
        at = params if hessian else {k: v.detach().requires_grad_() for k, v in params.items()}
        if plan.dropout_states:
            torch.set_rng_state(plan.dropout_states[t])
        with statistics.moving():
            per_sample = losses(lambda *a, at=at: functional_call(model, at | copies(model), a), batch)
        total = (share * (1 + n * eps[ids]) * per_sample).sum()
        grads = torch.autograd.grad(total, list(at.values()), create_graph=eps.requires_grad)
        grads = dict(zip(at, grads, strict=True))
        params = dict(params)
        for names, options in zip(plan.groups, plan.options[t], strict=True):
            for name in names:
                params[name], state[name] = plan.step(params[name], state[name], grads[name], options)
    return params | statistics.values


def contributions(model, params, data, losses, plan, n, target, hessian=True):
    """C(i, .) for all N samples and every target: target(params) -> [M]. Gives [N, M]."""
    eps = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    values = target(train(model, params, data, losses, plan, eps, hessian))
    rows = [torch.autograd.grad(v, eps, retain_graph=True)[0] for v in values]
    return -torch.stack(rows, 1) / n

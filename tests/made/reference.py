r"""The naive reference: the whole training as one differentiable function of eps, in float64.

    c[t,i] becomes c[t,i] (1 + N eps_i);   C(i, j) = -(1/N) d l_j(w_T) / d eps_i

Written from the equations alone, with the SGD step spelled out (a plan may bring another), and never from the project's
own code. `train` is also the function that finite differences are taken of.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

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
    """Clones of the buffers: training must not change the running statistics that the targets use."""
    return {name: value.clone() for name, value in model.named_buffers()}


def train(model, params, data, losses, plan, eps, hessian=True):
    """w_T by name, as a function of eps [N]. Without `hessian`, gradients do not depend on the weights."""
    n = len(eps)
    state = dict.fromkeys(params)
    for t, ids in enumerate(plan.batches):
        batch = [x[ids] for x in data]
        share = torch.full((len(ids),), 1 / len(ids), dtype=eps.dtype) if plan.shares is None else plan.shares[t]
        at = params if hessian else {k: v.detach().requires_grad_() for k, v in params.items()}
        if plan.dropout_states:
            torch.set_rng_state(plan.dropout_states[t])
        per_sample = losses(lambda *a, at=at: functional_call(model, at | copies(model), a), batch)
        total = (share * (1 + n * eps[ids]) * per_sample).sum()
        grads = torch.autograd.grad(total, list(at.values()), create_graph=eps.requires_grad)
        grads = dict(zip(at, grads, strict=True))
        params = dict(params)
        for names, options in zip(plan.groups, plan.options[t], strict=True):
            for name in names:
                params[name], state[name] = plan.step(params[name], state[name], grads[name], options)
    return params


def contributions(model, params, data, losses, plan, n, target, hessian=True):
    """C(i, .) for all N samples and every target: target(params) -> [M]. Gives [N, M]."""
    eps = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    values = target(train(model, params, data, losses, plan, eps, hessian))
    rows = [torch.autograd.grad(v, eps, retain_graph=True)[0] for v in values]
    return -torch.stack(rows, 1) / n

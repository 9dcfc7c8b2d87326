r"""Every rule proves itself before it is used, at a recorded point of the run.

For random directions (d, r, k) of (w, s, g) and random cotangents (c, sigma) of the step's results,

    <c, D> + <sigma, R>  =  <lam', d> + <sigma', r> + <gamma, k>  =  central finite difference

where (D, R) comes from the rule's forward mode and (lam', sigma', gamma) from its reverse mode. A class that cuts the
graph, works on `.data` or rounds inside fails the one or the other. Directions are proportional to the values, so that
no sign flips and no zero is left: the kinks of an optimizer are not what is tested here. All in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trajrec.errors import UnsupportedOptimizerError
from trajrec.records import FloatArray
from trajrec.rules.step import Rule, State

_STEP = 1e-6


def self_test(rule: Rule, weights: Tensor, state: State, gradient: Tensor, hyper: FloatArray) -> None:
    """Checks a rule's derivatives at a point: weights [P'], state, gradient [P'], hyperparameters [G, H].

    Raises:
        UnsupportedOptimizerError: if its two directions, or a finite difference, disagree.
    """
    random = torch.Generator().manual_seed(0)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=random, dtype=torch.float64).to(like.device)

    w, g = weights.double(), gradient.double()
    s = {n: v.double() for n, v in state.items()}
    vectors = [n for n in s if n not in rule.scalars]
    d, k, r = w * draw(w), g * draw(g), {n: s[n] * draw(s[n]) for n in vectors}
    big_d, big_r = rule.push(w, s, g, hyper, d[None], {n: v[None] for n, v in r.items()}, k[None])
    c, sigma = draw(w), {n: draw(v[0]) for n, v in big_r.items()}
    lam, sigma_back, gamma = rule.pull(w, s, g, hyper, c[None], {n: v[None] for n, v in sigma.items()})

    def along(h: float) -> Tensor:
        moved = s | {n: s[n] + h * r[n] for n in vectors}
        stepped, new_state = rule.step(w + h * d, moved, g + h * k, hyper)
        return (c * stepped).sum() + sum((sigma[n] * new_state[n]).sum() for n in sigma)

    terms = [c * big_d[0], *(sigma[n] * big_r[n][0] for n in sigma)]
    forward = float(sum(t.sum() for t in terms))
    backward = float((lam[0] * d).sum() + (gamma[0] * k).sum() + sum((sigma_back[n][0] * r[n]).sum() for n in vectors))
    difference = float(along(_STEP) - along(-_STEP)) / (2 * _STEP)
    scale = float(sum(t.abs().sum() for t in terms)) + 1e-300
    errors = abs(forward - backward) / scale, abs(forward - difference) / scale
    if not (errors[0] < 1e-9 and errors[1] < 1e-4):
        raise UnsupportedOptimizerError(
            f"{rule.optimizer_class.__name__} failed its self-test in torch {torch.__version__}: forward and reverse "
            f"derivative of its step differ by {errors[0]:.1e}, derivative and finite difference by {errors[1]:.1e} "
            "(relative). It works on .data, rounds inside or cuts the graph, so exact replay would be wrong."
        )

r"""SGD with momentum, dampening, Nesterov, weight decay and maximize (paper, equations (5), (6) and (33), (34)).

    v_t = p v_{t-1} + (1 - d) (g_t + lam w_{t-1}),    w_t = w_{t-1} - eta v_t

torch.optim starts the buffer with a detached clone of the first gradient, which would cut the derivative of the first
step without an error. The same first step, to the bit, is a buffer of zeros without dampening: that is what a fresh
state means here.

The derivative of a step does not depend on its state, and the state is implied by the weights:
`implied_state` gives v_t, up to rounding, from two neighbouring rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import SGD

from trajrec.records import FloatArray, Keyframe
from trajrec.rules.step import Rule, State

BUFFER = "momentum_buffer"


class SGDRule(Rule):
    """torch.optim.SGD."""

    optimizer_class = SGD
    needs_state = False

    @property
    def constant(self) -> bool:  # type: ignore[override]
        """True for torch's SGD itself; a rule derived from this one may do more."""
        return type(self) is SGDRule

    def initial_state(self, keyframe: Keyframe, hyper: FloatArray, dtype: torch.dtype, device: torch.device) -> State:
        """The momentum buffer of a keyframe; {} where there is none yet."""
        row = keyframe.arrays.get(f"optimizer/{BUFFER}")
        if row is None:
            return {}
        return {BUFFER: torch.tensor(self.layout.select(row)).to(device, dtype)}

    def step(self, weights: Tensor, state: State, gradient: Tensor, hyper: FloatArray) -> tuple[Tensor, State]:
        """(w_t, s_t) from w_{t-1} [P'], s_{t-1}, g_t [P'] and hyperparameters [G, H]; differentiable."""
        fresh = BUFFER not in state
        buffer = torch.zeros_like(weights) if fresh else state[BUFFER]
        stepped, buffers = [], []
        for index, span in enumerate(self.layout.groups):
            if self.rests(hyper, index):
                stepped.append(weights[span])
                buffers.append(buffer[span])
                continue
            options = self.options(hyper, index)
            if fresh:
                options["dampening"] = 0.0
            w, s = self._step_group(index, weights[span], {BUFFER: buffer[span]}, gradient[span], options)
            stepped.append(w)
            buffers.append(s[BUFFER])
        return _join(stepped), {BUFFER: _join(buffers)}

    def placeholder_state(self, weights: Tensor) -> State:
        """A buffer of zeros: the derivative of a step does not depend on the buffer's values."""
        return {BUFFER: torch.zeros_like(weights)}

    def implied_state(self, before: Tensor, after: Tensor, gradient: Tensor, hyper: FloatArray) -> State | None:
        """s_t from w_{t-1}, w_t and g_t [P'], or None where a learning rate of zero hides it."""
        parts = []
        for index, span in enumerate(self.layout.groups):
            if self.rests(hyper, index):
                return None
            o = self.options(hyper, index)
            if o["lr"] == 0 and o["momentum"] != 0:
                return None
            if o["momentum"] == 0:
                parts.append(torch.zeros_like(before[span]))
                continue
            moved = (before[span] - after[span]) / o["lr"]
            if o["nesterov"]:
                sign = -1.0 if o["maximize"] else 1.0
                moved = (moved - sign * gradient[span] - o["weight_decay"] * before[span]) / o["momentum"]
            parts.append(moved)
        return {BUFFER: _join(parts)}


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)

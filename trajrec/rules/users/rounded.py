r"""A user's own class that rounds inside on purpose, as Muon and its kin do in bfloat16.

The value of a step is the class's own, rounding and all, and so the recorded one. The derivative is that of the same
code with nothing rounded: `.bfloat16()`, `.half()` and `.to(...)` to a coarser dtype are copies then. See
`trajrec.rules.matrix.muon` for why, and for what the certificate can say.

Nobody is given this rule unasked: a class that rounds where it should not is one that the self-test has to refuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from trajrec.records import FloatArray
from trajrec.rules.step import State, is_differentiated, with_derivative
from trajrec.rules.users.following import coarser_dtype
from trajrec.rules.users.own import OwnRule

_CASTS = frozenset({"bfloat16", "half", "to", "type", "float"})


class Unrounded(TorchFunctionMode):
    """Makes casts to a coarser dtype copies in full precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _CASTS and coarser_dtype(args[0], result) is not None:
            return args[0].clone()
        return result


class RoundedRule(OwnRule):
    """Register it for a class that rounds inside: `register_rule(MyMuon, trajrec.rules.RoundedRule)`."""

    tolerance = 0.1

    def step(self, weights: Tensor, state: State, gradient: Tensor, hyper: FloatArray) -> tuple[Tensor, State]:
        """(w_t, s_t) from w_{t-1} [P'], s_{t-1}, g_t [P'] and hyperparameters [G, H]; differentiable."""
        still = {name: value.detach() for name, value in state.items()}
        stepped, after = super().step(weights.detach(), still, gradient.detach(), hyper)
        if not is_differentiated(weights, gradient, *state.values()):
            return stepped, after
        with Unrounded():
            followed, followed_state = super().step(weights, state, gradient, hyper)
        after |= {n: with_derivative(after[n], v) for n, v in self.vectors_of(followed_state).items()}
        return with_derivative(stepped, followed), after

    @contextmanager
    def proving(self) -> Iterator[None]:
        """The class itself, with its rounding left out: that is what the derivative is of."""
        with Unrounded():
            yield

"""At which weights a step is checked, where the gradient by all of them would cost too much.

The exact form for one target needs no gradient but for the certificate: a ninth of its work. Instead every step is
checked at every small tensor (biases, norms: through them go the derivatives of all layers and all samples) and at an
eighth of the large ones, another eighth the next step. What is wrong in the Task, for the whole training or for a
batch, shows at the small tensors of the step, and at all tensors within eight steps. What can be missed is a large
tensor that was changed outside the optimizer once, at a step that is not its turn; so this is done only where it is
asked for.

Only for rules that are constant (`Rule.constant`): these step every weight by itself.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from trajrec.replay.step import Step
from trajrec.rules import Rule
from trajrec.rules.step import State

_TURNS = 8
_SMALL = 0.01


@dataclass(frozen=True, slots=True)
class Portion:
    """The weights that a step is checked at.

    Attributes:
        rule: the optimizer of these weights alone.
        names: of the parameters; None: all.
        spans: where they lie in a vector [P'].
    """

    rule: Rule
    names: frozenset[str] | None = None
    spans: tuple[slice, ...] = (slice(None),)

    def of(self, vector: Tensor) -> Tensor:
        """These weights of a vector [P']."""
        return vector if self.names is None else torch.cat([vector[span] for span in self.spans])

    def step(self, step: Step) -> Step:
        """A step of these weights."""
        return step if self.names is None else replace(step, before=self.of(step.before), after=self.of(step.after))

    def state(self, state: State) -> State:
        """The state of these weights."""
        return state if self.names is None else {name: self.of(vector) for name, vector in state.items()}


def portions_of(rule: Rule) -> tuple[Portion, ...]:
    """The small tensors and a part of the large ones, for one step after the other."""
    params, layout = rule.layout.params, rule.layout
    small = [p.name for p in params if p.size <= _SMALL * layout.size]
    large = [p.name for p in params if p.size > _SMALL * layout.size]
    # Never more turns than large tensors: at every step there must be something to check.
    count = max(1, min(_TURNS, len(large)))
    return tuple(_portion(rule, frozenset(small + large[k::count])) for k in range(count))


def _portion(rule: Rule, names: frozenset[str]) -> Portion:
    layout = rule.layout
    starts = accumulate(layout.sizes, initial=0)
    chosen = [(p, slice(start, start + p.size)) for p, start in zip(layout.params, starts, strict=False)]
    chosen = [(p, span) for p, span in chosen if p.name in names]
    sizes = [sum(p.size for p, _ in chosen if p.group == group) for group in range(len(layout.groups))]
    ends = list(accumulate(sizes))
    groups = tuple(slice(end - size, end) for size, end in zip(sizes, ends, strict=True))
    part: Any = copy(rule)
    part.layout = SimpleNamespace(groups=groups, size=sum(sizes))
    return Portion(part, names, tuple(span for _, span in chosen))

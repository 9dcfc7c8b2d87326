r"""A user's own optimizer class: its own `step()` on clones of the weights, each in its own shape and in its own group.

Nothing is asked of the class but plain torch code: the step runs in the `Following` mode, which keeps the graph through
`torch.no_grad()` and changes in place. All parameters step together, so norms over a parameter, a group or the whole
model are what they were in the training. A state that the class makes on its first step is made there again, as part of
the step that is differentiated.

A class may keep, by parameter, tensors of any shape and numbers. Which of them depend on the weights is found by
trying: the rule takes steps with made-up values when it is built. What it learns there also refuses classes that cannot
be replayed from `optimizer.state` and the recorded options alone: hidden attributes, randomness, closures, lists in the
state, options that follow the gradient.

That the derivative is right is for the self-test to say. It sees the first two steps only; a leak of the graph that
first shows up later (a branch taken every tenth step) is refused there and then.

Letters: K directions at once, P' trainable weights.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer
from torch.optim import optimizer as hooks
from torch.utils._pytree import tree_map

from trajrec.errors import TrajrecError, UnsupportedOptimizerError
from trajrec.records import GROUP_STATE, FloatArray, Keyframe, Row, RunSpec
from trajrec.rules.flat import FlatLayout
from trajrec.rules.matrix.formula import recorded_state
from trajrec.rules.step import Rule, State
from trajrec.rules.users.following import ROUNDS, Following, Leak

_PLAIN_PATH = {"foreach": False, "fused": None, "capturable": False, "differentiable": False}


class OwnRule(Rule):
    """A class outside torch.optim; `register_rule` makes a subclass of it for each.

    Override `build` for a class whose constructor takes more than its `defaults` hold.
    """

    def __init__(self, spec: RunSpec, layout: FlatLayout) -> None:
        self._table = layout.table(spec)
        self._params = dict(self._table)
        super().__init__(spec, layout)
        (self._optimizer,) = self._optimizers
        self._options = [_without_params(group) for group in self._optimizer.param_groups]
        self._numbers: dict[str, type] = {}
        self._dtypes: dict[str, tuple[torch.dtype, torch.Size]] = {}
        self._leaks: dict[Leak, None] = {}
        self._accepted: frozenset[Leak] | None = None
        self._try(getattr(torch, spec.dtype))

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        """An instance for parameter groups, with the defaults of the training."""
        names = _argument_names(self.optimizer_class)
        options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self._defaults.items()}
        options |= {k: v for k, v in _PLAIN_PATH.items() if k in options}
        return self.optimizer_class(groups, **{k: v for k, v in options.items() if k in names})

    def _build_all(self, spec: RunSpec) -> list[Optimizer]:
        shapes: dict[int, list[nn.Parameter]] = {index: [] for index in range(spec.groups)}
        for _, param in self._table:
            shapes[param.group].append(nn.Parameter(torch.zeros(param.shape, dtype=getattr(torch, param.dtype))))
        try:
            return [self.build([{"params": params} for params in shapes.values()])]
        except Exception as error:
            name = self.optimizer_class.__name__
            raise UnsupportedOptimizerError(
                f"{name} could not be built again from the defaults of its recording ({_short(error)}). Give it a rule "
                f"that knows how: class MyRule(trajrec.rules.OwnRule) with build(self, groups) -> {name}, and "
                f"trajrec.register_rule({name}, MyRule)."
            ) from error

    # -- the step ------------------------------------------------------------------------------------------------

    def initial_state(self, keyframe: Keyframe, hyper: FloatArray, dtype: torch.dtype, device: torch.device) -> State:
        """The state s_t of a keyframe; nothing where the class has made none yet."""
        state: State = {}
        for place, param in self._table:
            for name, value in recorded_state(keyframe, place, param).items():
                key = f"{name}/{place}"
                restored = self._restored(key, value)
                if key in self.scalars:  # a count stays on the host, where any device can use it
                    state[key] = restored if restored.ndim == 0 else restored.to(device)
                else:
                    state[key] = restored.to(device, dtype)
        # None is not recorded: it belongs to whatever has a state.
        begun = {key.rpartition("/")[2] for key in state}
        nothing = torch.tensor(torch.nan, dtype=torch.float64)
        empty = [key for key, kind in self._numbers.items() if kind is type(None) and key.rpartition("/")[2] in begun]
        return dict.fromkeys(empty, nothing) | state

    def _restored(self, key: str, value: Row) -> Tensor:
        if key not in self._dtypes:
            return torch.tensor(value)
        dtype, shape = self._dtypes[key]
        return torch.tensor(value).to(dtype).reshape(shape)

    def step(self, weights: Tensor, state: State, gradient: Tensor, hyper: FloatArray) -> tuple[Tensor, State]:
        """(w_t, s_t) from w_{t-1} [P'], s_{t-1}, g_t [P'] and hyperparameters [G, H]; differentiable."""
        groups = range(len(self.layout.groups))
        options = [None if self.rests(hyper, index) else self.options(hyper, index) for index in groups]
        clones = self._load(weights, state, gradient, options)
        self._run()
        return self.layout.join(clones), self._read(clones)

    def _load(
        self, weights: Tensor, state: State, gradient: Tensor, options: Sequence[dict[str, Any] | None]
    ) -> dict[str, Tensor]:
        """Puts clones of weights, state and gradient into the optimizer. Returns the weights by name.

        Options are those of each group; None for one that the step passes by.
        """
        w, g = self.layout.split(weights), self.layout.split(gradient)
        clones = {name: value.clone() for name, value in w.items()}
        self._optimizer.state.clear()
        for group, first, now in zip(self._optimizer.param_groups, self._options, options, strict=True):
            group.clear()
            group |= copy.deepcopy(first) | (now or {}) | {"params": []}
        for key, value in state.items():
            name, _, place = key.rpartition("/")
            param = self._params[int(place)]
            if name.startswith(GROUP_STATE):
                self._optimizer.param_groups[param.group][name.removeprefix(GROUP_STATE)] = self._handed(key, value)
            else:
                self._optimizer.state[clones[param.name]][name] = self._handed(key, value)
        for _, param in self._table:
            if options[param.group] is not None:
                clones[param.name].grad = g[param.name].clone()
            self._optimizer.param_groups[param.group]["params"].append(clones[param.name])
        return clones

    def _handed(self, key: str, value: Tensor) -> Any:
        kind = self._numbers.get(key)
        if kind is type(None):
            return None
        return value.clone() if kind is None else kind(value.item())

    def _run(self) -> None:
        try:
            with Following(self._note), _unheard():
                self._optimizer.step()
        except TrajrecError:
            raise
        except Exception as error:
            name = self.optimizer_class.__name__
            if "must be Number, not Tensor" in str(error):
                why = "A tensor as alpha= or value= is a number taken out of it: multiply by it instead."
            else:
                why = (
                    "A class that evaluates the loss inside its step takes several gradients a step, and cannot be "
                    "replayed."
                )
            raise UnsupportedOptimizerError(
                f"{name}.step() cannot be repeated on copies of the weights, without a closure ({_short(error)}). "
                f"{why} {self.suspects()}"
            ) from error

    def _read(self, clones: dict[str, Tensor]) -> State:
        found: State = {}
        self._check_keys(list(clones.values()))
        for place, param in self._table:
            for name, value in self._kept(clones[param.name], param.group).items():
                key = f"{name}/{place}"
                found[key] = value if isinstance(value, Tensor) else self._number(key, value)
        return found

    def _kept(self, clone: Tensor, index: int) -> dict[str, Any]:
        """What the optimizer keeps of a parameter, with the options that its steps have put into the group."""
        made = self._optimizer.param_groups[index].keys() - self._options[index].keys() - {"params"}
        options = {f"{GROUP_STATE}{key}": self._optimizer.param_groups[index][key] for key in made}
        kept: dict[str, Any] = self._optimizer.state.get(clone, {})
        return kept | options

    def _number(self, key: str, value: Any) -> Tensor:
        if not isinstance(value, bool | int | float | None):
            raise UnsupportedOptimizerError(
                f"{self.optimizer_class.__name__} keeps {key.rpartition('/')[0]!r} in its state, a "
                f"{type(value).__name__}. A recording holds tensors and numbers. {self._way_out()}"
            )
        self._numbers[key] = type(value)
        self.scalars |= {key}
        return torch.tensor(torch.nan if value is None else float(value), dtype=torch.float64)

    # -- trying --------------------------------------------------------------------------------------------------

    def _try(self, dtype: torch.dtype) -> None:
        """Two steps with made-up values, to see what the class keeps, and whether it keeps it in the open."""
        random = torch.Generator().manual_seed(1)
        w, g, other = torch.randn(3, self.layout.size, generator=random, dtype=torch.float64).to(dtype)
        options: list[dict[str, Any]] = [{} for _ in self._options]
        first, state, after = self._attempt(w, {}, g, options)
        self._learn(state)
        self._attempt(first, state, other, options)
        elsewhere = self._attempt(w, {}, other, options)[2]
        again, state_again, _ = self._attempt(w, {}, g, options)
        self._check_open(_equal(first, again) and all(_equal(v, state_again[k]) for k, v in state.items()))
        self._check_options(after, elsewhere)

    def _attempt(
        self, weights: Tensor, state: State, gradient: Tensor, options: Sequence[dict[str, Any]]
    ) -> tuple[Tensor, State, list[dict[str, Any]]]:
        """A step, and the options of the groups after it."""
        clones = self._load(weights.clone().requires_grad_(), state, gradient.clone().requires_grad_(), options)
        with torch.enable_grad():
            self._run()
        after = [_without_params(group) for group in self._optimizer.param_groups]
        return self.layout.join(clones).detach(), self._read(clones), after

    def _learn(self, state: State) -> None:
        """Tells constants from what is differentiated: a number, or a tensor of one value that no gradient reaches."""
        for key, value in state.items():
            if key in self._numbers:
                continue
            self._dtypes[key] = value.dtype, value.shape
            if not value.is_floating_point() or (value.numel() == 1 and not value.requires_grad):
                self.scalars |= {key}

    def _check_open(self, same: bool) -> None:
        if not same:
            raise UnsupportedOptimizerError(
                f"{self.optimizer_class.__name__} takes another step from the same weights, state and gradient the "
                "second time: it keeps something outside optimizer.state and its parameter groups (attributes of its "
                f"own), or draws random numbers. {self._way_out()}"
            )

    def _check_keys(self, clones: list[Tensor]) -> None:
        known = {id(clone) for clone in clones}
        for key in self._optimizer.state:
            if id(key) not in known:
                raise UnsupportedOptimizerError(
                    f"{self.optimizer_class.__name__} keeps {key!r} in optimizer.state, where a parameter was expected"
                    f": a recording holds the state of parameters. {self._way_out()}"
                )

    def _check_options(self, after: list[dict[str, Any]], elsewhere: list[dict[str, Any]]) -> None:
        for one, two in zip(after, elsewhere, strict=True):
            for key in one:
                if not _same(one[key], two.get(key)):
                    raise UnsupportedOptimizerError(
                        f"{self.optimizer_class.__name__} keeps {key!r} in its parameter groups, and it depends on the "
                        f"gradient. Options are not differentiated: keep it in optimizer.state. {self._way_out()}"
                    )

    # -- the proof -----------------------------------------------------------------------------------------------

    def _note(self, leak: Leak) -> None:
        if self._accepted is not None and leak not in self._accepted:
            raise UnsupportedOptimizerError(
                f"{self.optimizer_class.__name__} {leak}, and did not during its self-test: from this step on its "
                f"derivative is not proved. {self._way_out()}"
            )
        self._leaks[leak] = None

    def accept(self, proved: Rule) -> None:
        """From now on only the leaks that the self-test has seen, and found harmless, are let through."""
        self._accepted = frozenset(proved._leaks if isinstance(proved, OwnRule) else self._leaks)

    def suspects(self) -> str:
        """What was seen to leave the graph."""
        if not self._leaks:
            return f"Exact replay would be wrong. {self._way_out()}"
        seen = "; ".join(f"it {leak}" for leak in self._leaks)
        return (
            f"What autograd cannot follow: {seen}. Exact replay would be wrong. {self._on_purpose()}{self._way_out()}"
        )

    def _on_purpose(self) -> str:
        if not any(leak.what.startswith(ROUNDS) for leak in self._leaks):
            return ""
        name = self.optimizer_class.__name__
        return f"If it rounds on purpose, as Muon does: trajrec.register_rule({name}, trajrec.rules.RoundedRule). "

    def _way_out(self) -> str:
        name = self.optimizer_class.__name__
        return f"Or write its step as a rule: trajrec.register_rule({name}, MyRule)."

    def pull(
        self, weights: Tensor, state: State, gradient: Tensor, hyper: FloatArray, lam: Tensor, sigma: State
    ) -> tuple[Tensor, State, Tensor]:
        """The vjp of U; what the backward pass needs is copied, as the step may change it in place."""
        with saved_tensors_hooks(torch.clone, lambda kept: kept):
            return super().pull(weights, state, gradient, hyper, lam, sigma)

    def push(
        self, weights: Tensor, state: State, gradient: Tensor, hyper: FloatArray, d: Tensor, r: State, k: Tensor
    ) -> tuple[Tensor, State]:
        """The jvp of U, after a step in reverse mode: leaks are only seen there."""
        with torch.enable_grad():
            self.step(weights.detach().requires_grad_(), state, gradient.detach().requires_grad_(), hyper)
        return super().push(weights, state, gradient, hyper, d, r, k)


@contextmanager
def _unheard() -> Iterator[None]:
    """Keeps steps on copies from hooks of all optimizers, the recorder's own among them."""
    kept = hooks._global_optimizer_pre_hooks, hooks._global_optimizer_post_hooks
    hooks._global_optimizer_pre_hooks, hooks._global_optimizer_post_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        hooks._global_optimizer_pre_hooks, hooks._global_optimizer_post_hooks = kept


def _argument_names(kind: type) -> set[str]:
    """What a class's constructor takes, those it hands on to by `**options` included."""
    names: set[str] = set()
    for cls in (c for c in kind.__mro__ if "__init__" in vars(c)):
        parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
        names |= {p.name for p in parameters}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    options = {key: value for key, value in group.items() if key != "params"}
    # A tensor of a graph cannot be copied deeply.
    return copy.deepcopy(tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, options))


def _equal(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and bool(((one == two) | (one != one) & (two != two)).all())


def _same(one: Any, two: Any) -> bool:
    """Whether two options are equal; containers (caches) are taken for equal."""
    if isinstance(one, bool | int | float | Tensor) and isinstance(two, bool | int | float | Tensor):
        return bool(one == two)
    return True


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": .")

"""Suspicions about weights that were changed beside the optimizer's step: cut, normalised, moved by hand.

A row is recorded when the step ends. Where the loop changes the weights after that (the clipping of a WGAN), the next
step is made from other weights than the recorded ones. Which ones they were follows from the row after it: w with
U(w, s, g(w)) = w_t, by iterating w += w_t - U(w, s, g(w)). That alone explains everything; that the loss at w is the
recorded one does not come of itself, and how w differs from the row says what was done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trajrec.replay.proof.diagnosis.trial import EXPLAINED, Cause, Trial

_ROUNDS = 200
_SAME = 1e-5
_CLEARLY = 30.0
_TRIED = 24
_FEWEST = 3  # weights that are off: two numbers can be made to fit two
_HELP = (
    "Such a change is in no step, and no replay can make it again. Record a training that keeps its weights in bounds "
    "by its forward pass (torch.nn.utils.parametrize) or by a penalty."
)


def cut_after_the_step(trial: Trial) -> Cause | None:
    """Whether the recorded weights are those of the step, cut to an interval."""
    return _changed(trial, lambda change: change.cut(), "The weights were cut")


def normalised_rows(trial: Trial) -> Cause | None:
    """Whether the recorded weights are those of the step, with rows of a parameter made one length."""
    return _changed(trial, lambda change: change.normalised(), "The weights were normalised")


def _changed(trial: Trial, how: Callable[[Change], str], what: str) -> Cause | None:
    if trial.last != trial.first.t:
        return None
    change = Change(trial, trial.reached(), trial.target)
    words = how(change)
    if not words:
        return None
    return Cause(f"{what} after the optimizer's step: {words}. {_HELP}", 0.0)


def cut_before_the_step(trial: Trial) -> Cause | None:
    """Whether the step was made from other weights than the row before it."""
    if trial.last != trial.first.t:
        return _cut_on_the_way(trial)
    if trial.first.t == 1:
        return None
    used = _used(trial)
    if used is None:
        return _cut_on_the_way(trial)
    if not _is_better_loss(trial, used):
        return None
    change = Change(trial, trial.first.before, used)
    cut, normalised = change.cut(), change.normalised()
    words = f"they were cut, {cut}" if cut else f"they were normalised, {normalised}" if normalised else change.names()
    between = f"between step {trial.first.t - 1} and step {trial.first.t}"
    return Cause(f"Weights were changed {between}, outside of the optimizer: {words}. {_HELP}", 0.0)


def _cut_on_the_way(trial: Trial) -> Cause | None:
    """All weights cut to [-c, c] before every step up to the keyframe."""
    largest = float(trial.first.before.abs().max())

    def cut(limit: float) -> Tensor:
        return trial.reached(weights_to=lambda w: w.clamp(-limit, limit))

    grid = [largest * k / _TRIED for k in range(_TRIED + 1)]
    best = min(range(1, _TRIED), key=lambda k: trial.drift_of(cut(grid[k])))
    limit, reached = trial.least(cut, grid[best - 1], grid[best + 1])
    sentence = f"Weights were changed between the steps: they were cut to [{-limit:.4g}, {limit:.4g}]. {_HELP}"
    return trial.explained(reached, sentence)


def _used(trial: Trial) -> Tensor | None:
    """The weights [P'] that the step gives the recorded ones from; None if they are not found."""
    used, scale = trial.first.before, float((trial.target - trial.first.before).abs().max())
    last = float("inf")
    for _ in range(_ROUNDS):
        missing = trial.target - trial.reached(weights_to=lambda _, w=used: w)  # type: ignore[misc]
        left = float(missing.abs().max())
        if left <= 1e-3 * EXPLAINED * scale:
            return used
        if not left < 2 * last:
            return None
        used, last = used + missing, left
    return None


def _is_better_loss(trial: Trial, weights: Tensor) -> bool:
    """Whether the recorded loss is that of these weights, and not that of the row before the step."""
    recorded = trial.run.loss(trial.first.t)
    off, usual = abs(trial.loss(weights) - recorded), abs(trial.loss() - recorded)
    return off <= _SAME * abs(recorded) and usual > _CLEARLY * off


@dataclass(frozen=True, slots=True)
class Change:
    """What became of weights [P'] beside the optimizer."""

    trial: Trial
    before: Tensor
    after: Tensor

    def _parts(self) -> list[tuple[str, Tensor, Tensor]]:
        """The parameters that changed: names, values before and after."""
        layout = self.trial.function.layout
        before, after = layout.split(self.before), layout.split(self.after)
        return [(n, before[n], after[n]) for n in before if self._is_off(before[n], after[n])]

    def _is_off(self, a: Tensor, b: Tensor) -> bool:
        return float((a - b).abs().max()) > self._tolerance if a.numel() else False

    @property
    def _tolerance(self) -> float:
        return EXPLAINED * float((self.after - self.before).abs().max())

    def names(self) -> str:
        """The parameters that changed."""
        names = [name for name, _, _ in self._parts()]
        return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"

    def cut(self) -> str:
        """To which interval, in words; "" where cutting does not explain it."""
        parts = self._parts()
        if not parts or not self._are_enough(parts):
            return ""
        low, high = min(float(b.min()) for _, _, b in parts), max(float(b.max()) for _, _, b in parts)
        if any(self._is_off(a.clamp(low, high), b) for _, a, b in parts):
            return ""
        off = self._tolerance
        at_least = any(bool((a < low - off).any()) for _, a, _ in parts)
        at_most = any(bool((a > high + off).any()) for _, a, _ in parts)
        low, high = (0.0 if abs(bound) <= off else bound for bound in (low, high))
        bounds = f"[{low:.4g}" if at_least else "(-inf", f"{high:.4g}]" if at_most else "inf)"
        return f"{self.names()} to {bounds[0]}, {bounds[1]}"

    def normalised(self) -> str:
        """Whose rows, in words; "" where that does not explain it."""
        parts = [(name, a.flatten(1), b.flatten(1)) for name, a, b in self._parts() if a.dim() > 1 and a[0].numel() > 1]
        if not parts or len(parts) < len(self._parts()) or not self._are_enough(parts):
            return ""
        for _, a, b in parts:
            lengths = b.norm(dim=1, keepdim=True)
            if self._is_off(a * (lengths / a.norm(dim=1, keepdim=True).clamp(min=1e-30)), b):
                return ""
        lengths = torch.cat([b.norm(dim=1) for _, _, b in parts])
        return f"the rows of {self.names()} to a length of at most {float(lengths.max()):.4g}"

    def _are_enough(self, parts: list[tuple[str, Tensor, Tensor]]) -> bool:
        return sum(int(((a - b).abs() > self._tolerance).sum()) for _, a, b in parts) >= _FEWEST

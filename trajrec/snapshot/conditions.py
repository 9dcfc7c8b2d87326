"""What rarely changes between steps: modes, which parameters have a gradient, the pass over seeded data, clipping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from trajrec.records import Clip, Conditions, LoaderSpec
from trajrec.snapshot.clips import ClipCall, Clips
from trajrec.snapshot.groups import Groups

_MODE = attrgetter("training")


class Watch:
    """Notices that conditions are others than at the step before.

    Attributes:
        enters_other_modes: whether the step that was last asked about is the first in other modes.
        has_changed: whether anything was other than at the step before, when it was last asked about.
        seeded_from: what `Conditions.seeded_from` would be of the coming step; calls: that clipped its gradients;
            evaluated: the loaders of evaluations until then.
    """

    def __init__(self, model: nn.Module, groups: Groups) -> None:
        self._model, self._groups = model, groups
        self._modules = list(model.modules())
        self._seen: Any = None
        self.seeded_from: int | None = None
        self.calls: Sequence[ClipCall] = ()
        self.evaluated: tuple[LoaderSpec, ...] = ()
        self._clips = Clips(groups)
        self._present_clips: tuple[Clip, ...] = ()
        self.enters_other_modes = self.has_changed = False
        self._last: Conditions | None = Conditions(self.eval_modules(), self._where(lambda p: p.grad is None))

    def changes(self, step: int) -> Conditions | None:
        """The conditions of the coming step, where they differ from those of the step before; else None.

        Raises:
            RecordingError: if a parameter left the optimizer, or one came that the model does not have.
        """
        self.enters_other_modes = self.has_changed = False
        sizes = [len(group["params"]) for group in self._groups.all]
        if sizes != self._groups.sizes:
            self._groups.take_in(step)
        self._present_clips = self._clips.of(self.calls)
        seen = (
            sizes,
            [*map(_MODE, self._modules)],
            [None if p.grad is None else p.requires_grad for p in self._groups.members],
            self.seeded_from,
            self._present_clips,
            self.evaluated,
        )
        if seen == self._seen:
            return None
        self.has_changed = True
        self._seen = seen
        before, self._last = self._last, self._present()
        self.enters_other_modes = before is None or before.eval_modules != self._last.eval_modules
        return self._last if self._last != before else None

    def forget(self) -> None:
        """Has the coming step's conditions be a change whatever they are."""
        self._last = None

    def eval_modules(self) -> tuple[str, ...]:
        """Names of the modules in eval mode; "" alone if the model itself is."""
        if not self._model.training:
            return ("",)
        return tuple(name for name, module in self._model.named_modules() if name and not module.training)

    def _present(self) -> Conditions:
        return Conditions(
            self.eval_modules(),
            still=self._where(lambda p: p.grad is None),
            frozen=self._where(lambda p: p.grad is not None and not p.requires_grad),
            joined=tuple(self._groups.joined.items()),
            seeded_from=self.seeded_from,
            clips=self._present_clips,
            evaluated=self.evaluated,
        )

    def _where(self, holds: Callable[[Tensor], bool]) -> tuple[str, ...]:
        """Names of the optimizer's parameters of which something holds."""
        named = self._groups.parameters.items()
        return tuple(name for name, p in named if self._groups.of(p) >= 0 and holds(p))

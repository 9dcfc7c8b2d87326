"""The parameter groups of the optimizers that train a model: which parameter is in which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from trajrec.errors import RecordingError


class Groups:
    """The groups of all optimizers, one optimizer after the other.

    Attributes:
        parameters: of the model, by name.
        optimizers: in their order.
        sizes: how many parameters each group had when it was last read.
        members: the optimizers' parameters, one group after the other.
        joined: names of parameters that came in after the first step, with their group.

    Raises:
        RecordingError: the optimizer has parameters that the model does not have.
    """

    def __init__(self, parameters: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> None:
        self.parameters, self.optimizers = parameters, optimizers
        self.joined: dict[str, int] = {}
        self._read()
        self._check()

    @property
    def all(self) -> list[dict[str, Any]]:
        """The groups as the optimizers have them now."""
        if len(self.optimizers) == 1:
            return self.optimizers[0].param_groups
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def of(self, parameter: Tensor) -> int:
        """The group of a parameter; -1 if no optimizer has it."""
        return self._known.get(id(parameter), -1)

    def rows_of(self, optimizer: Optimizer) -> slice:
        """Which of all groups are an optimizer's."""
        place = next(k for k, other in enumerate(self.optimizers) if other is optimizer)
        start = sum(len(other.param_groups) for other in self.optimizers[:place])
        return slice(start, start + len(optimizer.param_groups))

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """What the optimizer of a parameter keeps of it."""
        return next((o.state[parameter] for o in self.optimizers if parameter in o.state), {})

    def _read(self) -> None:
        groups = self.all
        self._known = _groups_of(groups)
        self.sizes = [len(group["params"]) for group in groups]
        self.members = [p for group in groups for p in group["params"]]

    def _check(self) -> None:
        known = {id(p) for p in self.parameters.values()}
        if any(key not in known for key in self._known):
            raise RecordingError(
                "The optimizer holds parameters that the model does not have. Pass the module that holds them all: "
                "trajrec.record(model=...)."
            )

    def take_in(self, step: int) -> None:
        """Takes in parameters that were added to the optimizer before a step.

        Raises:
            RecordingError: one left it, or one came that the model does not have.
        """
        if len(self.optimizers) > 1:
            raise RecordingError(
                f"Before step {step} one of several optimizers was given or lost parameters. That is recorded of a "
                "single optimizer only: give all of them their parameters before the recording begins."
            )
        found = _groups_of(self.all)
        names = {id(p): name for name, p in self.parameters.items()}
        if any(found.get(key) != group for key, group in self._known.items()):
            raise RecordingError(
                f"Parameters were taken out of the optimizer, or put into another group, before step {step}. Freeze "
                "them with requires_grad_(False) instead, or record the parts of the training as separate runs."
            )
        if any(key not in names for key in found):
            raise RecordingError(
                f"Before step {step} the optimizer was given parameters that the model did not have at the first step. "
                "Make all modules before the recording begins."
            )
        self.joined |= {names[key]: group for key, group in found.items() if key not in self._known}
        self._read()


def _groups_of(groups: Sequence[dict[str, Any]]) -> dict[int, int]:
    """The group of every parameter, by its id."""
    return {id(p): index for index, group in enumerate(groups) for p in group["params"]}

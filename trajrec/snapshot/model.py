"""Reads a model and its optimizers: the spec of a run, its rows, hyperparameters, conditions and keyframes.

Reading changes nothing: values are copied, generators are asked for their state but never drawn from.

Letters: G parameter groups, H hyperparameters, P weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from trajrec.bits import widest
from trajrec.records import FROZEN_CHECK, Conditions, FloatArray, LoaderSpec, ParamSpec, Parts, Row, RunSpec
from trajrec.snapshot.clips import ClipCall
from trajrec.snapshot.conditions import Watch
from trajrec.snapshot.devicecopy import RowCopy
from trajrec.snapshot.frozen import Frozen, trained
from trajrec.snapshot.generators import AllStates, Generators
from trajrec.snapshot.groups import Groups
from trajrec.snapshot.keyframe import Arrays, OptimizerState
from trajrec.snapshot.options import Options
from trajrec.snapshot.spec import buffer_table, optimizer_fields, origin, param_table
from trajrec.snapshot.weights import Weights, dtype_name


class Snapshot:
    """What the recorder reads at a step.

    Of several optimizers the parameter groups are those of all, one optimizer after the other.

    Attributes:
        model: inside of what it is wrapped in.
        generators: of random numbers, that a forward pass may use.

    Raises:
        RecordingError: such weights, or such an optimizer, cannot be recorded.
    """

    def __init__(self, model: nn.Module, *optimizers: Optimizer) -> None:
        self.model = uncompiled(model)
        parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        self._groups = Groups(parameters, optimizers)
        self._watch = Watch(self.model, self._groups)
        self._options = Options(self._groups)
        rows = trained(parameters, self._groups) or parameters
        self._rows = rows
        self._frozen = Frozen({name: p for name, p in parameters.items() if name not in rows}, self._groups)
        self._weights = Weights(rows)
        self._state = OptimizerState(rows, self._groups, self._options)
        self.generators = Generators(self._weights.device)
        self._all_states = AllStates()
        self._spec_seeded_from: int | None = None

    def spec(self, around: dict[str, Any]) -> RunSpec:
        """The run's spec; `around` gives the fields that model and optimizer do not know."""
        return RunSpec(
            params=param_table(self._rows, self._groups),
            buffers=buffer_table(self.model),
            dtype=dtype_name(self._weights.dtype),
            **optimizer_fields(self._groups.optimizers),
            hyperparameters=self._options.names,
            groups=len(self._groups.all),
            rng=self.generators.table(),
            eval_modules=self._watch.eval_modules(),
            device=str(self._weights.device),
            **origin(self._weights.device),
            frozen=self._frozen.table(),
            **around,
        )

    # ---- weights

    def copy(self, row: Row | None) -> int:
        """Copies the weights into a row, if there is one. Returns their CRC-32."""
        return self._weights.copy(row)

    def flat(self) -> list[Tensor]:
        """The parameters as flat tensors, where they are."""
        return self._weights.flat()

    def transfer(self) -> RowCopy | None:
        """How rows travel to the host; None where the weights are in its memory."""
        return self._weights.transfer()

    # ---- what is frozen

    def thawed(self) -> tuple[ParamSpec, ...]:
        """The frozen parameters that the coming step trains: from now on they are in rows, behind the others.

        Raises:
            RecordingError: one is not what it was at the first step.
        """
        if not self._watch.has_changed or not (specs := self._frozen.thawed()):
            return ()
        found = self._frozen.give(specs)
        self._weights.append(found)
        self._state.append(found)
        offset = sum(p.numel() for p in self._rows.values())
        self._rows |= found
        table = param_table(found, self._groups, offset)
        return tuple(replace(p, group=spec.group, trainable=False) for p, spec in zip(table, specs, strict=True))

    @property
    def owes_a_look(self) -> bool:
        """Whether the last keyframe does not say whether the frozen parameters are still the same."""
        return self._frozen.owes_a_look

    def check_frozen(self, arrays: Arrays) -> None:
        """Judges what a keyframe says of the frozen parameters.

        Raises:
            RecordingError: one is not what it was at the first step.
        """
        if FROZEN_CHECK in arrays:
            self._frozen.check(np.asarray(arrays[FROZEN_CHECK]))

    # ---- options

    def hyper(self) -> FloatArray:
        """Hyperparameters in force, [G, H]."""
        return self._options.hyper()

    def rates(self, hyper: FloatArray) -> list[float]:
        """The learning rate of each group, of hyperparameters [G, H]."""
        return self._options.rates(hyper)

    def rows_of(self, optimizer: Optimizer) -> slice:
        """Which of all groups are an optimizer's."""
        return self._groups.rows_of(optimizer)

    # ---- conditions

    def changes(self, step: int) -> Conditions | None:
        """The conditions of the coming step, where they differ from those of the step before; else None.

        Raises:
            RecordingError: if a parameter left the optimizer, or one came that the model does not have.
        """
        return self._watch.changes(step)

    @property
    def enters_other_modes(self) -> bool:
        """Whether the step that `changes` was last asked about is the first in other modes."""
        return self._watch.enters_other_modes

    @property
    def has_buffers(self) -> bool:
        """Whether the model has buffers, which matter in eval mode."""
        return next(self.model.buffers(), None) is not None

    def begin_again(self) -> None:
        """Records the coming step's conditions whatever they are: a resumed recording does not know the last ones."""
        self._watch.forget()

    def begin_seeded(self, seeded_from: int | None) -> None:
        """The run's spec names this pass over seeded data: only another one is a condition of a step."""
        self._spec_seeded_from = seeded_from

    def tell_pass(self, seeded_from: int | None) -> None:
        """What `Conditions.seeded_from` would be of the coming step."""
        self._watch.seeded_from = None if seeded_from == self._spec_seeded_from else seeded_from

    def tell_clips(self, calls: Sequence[ClipCall], further: bool) -> None:
        """The calls that clipped the gradients of the coming step; `further` ones come after those before."""
        self._watch.calls = [*self._watch.calls, *calls] if further else calls

    def tell_evaluated(self, loaders: tuple[LoaderSpec, ...]) -> None:
        """The loaders that the model was evaluated on until the coming step."""
        self._watch.evaluated = loaders

    # ---- keyframes

    def keyframe(self, with_weights: bool, *, is_first: bool = False, is_last: bool = False) -> Arrays:
        """Optimizer state, buffers and generator states, by the paths of `Keyframe.arrays`.

        With the frozen parameters in the first one, and whether they are still the same in others. Weights and states
        are parts that lie where the training has them: it will change them.
        """
        arrays = self._state.read()
        if with_weights:
            arrays["weights"] = Parts(self._weights.memory())
        for name, buffer in self.model.named_buffers():
            arrays[f"buffers/{name}"] = widest(buffer).copy()
        arrays |= self._frozen.arrays() if is_first else self._frozen.look(is_last)
        return arrays | self._all_states.read()


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` or `nn.DataParallel`: its parameters have the names that a Task's model has."""
    while True:
        inner = model.module if isinstance(model, nn.DataParallel) else getattr(model, "_orig_mod", model)
        if inner is model or not isinstance(inner, nn.Module):
            return model
        model = inner

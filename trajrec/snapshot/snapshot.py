"""Reads a model and its optimizer: the spec of a run, its rows, hyperparameters and keyframes.

Reading changes nothing: values are copied, generators are asked for their state but never drawn from.

Letters: G parameter groups, H hyperparameters, P weights.
"""

from __future__ import annotations

import platform
import sys
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import trajrec
from trajrec.checksum import copy_crc32, crc32
from trajrec.errors import HalfPrecisionError, RecordingError
from trajrec.records import (
    GROUP_STATE,
    BufferSpec,
    Conditions,
    FloatArray,
    OptimizerSpec,
    ParamSpec,
    Parts,
    Row,
    RunSpec,
)
from trajrec.snapshot.devicecopy import DeviceCopy, RowCopy
from trajrec.snapshot.generators import AllStates, Generators

_MODE = attrgetter("training")
# How torch computes a step, not what: they have no place in the mathematics of a replay.
_IMPLEMENTATION_OPTIONS = frozenset({"params", "foreach", "fused", "capturable", "differentiable", "initial_lr"})


class Snapshot:
    """Reads a model and its optimizer: the spec, rows, hyperparameters and keyframes of a run.

    Of several optimizers the parameter groups are those of all, one optimizer after the other.
    """

    def __init__(self, model: nn.Module, *optimizers: Optimizer) -> None:
        self.model = model = uncompiled(model)
        self.optimizers = optimizers
        self.parameters = dict(model.named_parameters())
        self._groups: dict[int, int] = {}
        self._group_sizes: list[int] = []
        self._optimized: list[Tensor] = []
        self._read_groups()
        self._modules = list(model.modules())
        self._joined: dict[str, int] = {}
        self._seen: Any = None
        self._seeded_from: int | None = None
        self._spec_seeded_from: int | None = None
        self.enters_other_modes = False  # the step that `changes` was last asked about
        self._conditions: Conditions | None = Conditions(self.eval_modules(), self._where(lambda p: p.grad is None))
        self.names = tuple(dict.fromkeys(name for o in optimizers for name in _hyperparameter_names(o)))
        self._keys = [(name.partition(".")[0], name.partition(".")[2]) for name in self.names]
        self._options_read = dict.fromkeys(key for key, _ in self._keys)
        self.generators = Generators(next(iter(self.parameters.values())).device)
        self._all_states = AllStates()
        self._hyper: FloatArray | None = None
        self._options: list[list[Any]] = []
        self._has_tensors = False
        self._values = list(self.parameters.values())
        self._kinds = [(p.dtype, tuple(p.shape)) for p in self._values]
        self._places: list[int] = []
        self._views: list[npt.NDArray[Any]] = []
        self._flats: dict[tuple[str, int], tuple[Tensor, int, npt.NDArray[Any]]] = {}
        self._check_dtypes()

    def _check_dtypes(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise HalfPrecisionError(
                    f"Parameter {name} is {parameter.dtype}. Replay differentiates the training and needs float32 or "
                    "float64 weights: keep the weights in float32 and use torch.autocast for the forward pass."
                )
        known = {id(p) for p in self.parameters.values()}
        if any(key not in known for key in self._groups):
            raise RecordingError(
                "The optimizer holds parameters that the model does not have. Pass the module that holds them all: "
                "trajrec.record(model=...)."
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimizers."""
        if len(self.optimizers) == 1:
            return self.optimizers[0].param_groups
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _read_groups(self) -> None:
        groups = self.param_groups
        self._groups = _groups_of(groups)
        self._group_sizes = [len(group["params"]) for group in groups]
        self._optimized = [p for group in groups for p in group["params"]]

    def rows_of(self, optimizer: Optimizer) -> slice:
        """Which of all groups are an optimizer's."""
        place = next(k for k, other in enumerate(self.optimizers) if other is optimizer)
        start = sum(len(other.param_groups) for other in self.optimizers[:place])
        return slice(start, start + len(optimizer.param_groups))

    def changes(self, step: int) -> Conditions | None:
        """The conditions of the coming step, where they differ from those of the step before; else None.

        Raises:
            RecordingError: if a parameter left the optimizer, or one came that the model does not have.
        """
        self.enters_other_modes = False
        seen = (
            [len(group["params"]) for group in self.param_groups],
            [*map(_MODE, self._modules)],
            [None if p.grad is None else p.requires_grad for p in self._optimized],
            self._seeded_from,
        )
        if seen == self._seen:
            return None
        if seen[0] != self._group_sizes:
            self._regroup(step)
        self._seen = seen
        conditions = self._present_conditions()
        before, self._conditions = self._conditions, conditions
        changed = conditions != before
        self.enters_other_modes = before is None or before.eval_modules != conditions.eval_modules
        return conditions if changed else None

    @property
    def has_buffers(self) -> bool:
        """Whether the model has buffers, which matter in eval mode."""
        return next(self.model.buffers(), None) is not None

    def begin_again(self) -> None:
        """Records the coming step's conditions whatever they are: a resumed recording does not know the last ones."""
        self._conditions = None

    def begin_seeded(self, seeded_from: int | None) -> None:
        """The run's spec names this pass over seeded data: only another one is a condition of a step."""
        self._spec_seeded_from = seeded_from

    def tell_pass(self, seeded_from: int | None) -> None:
        """What `Conditions.seeded_from` would be of the coming step."""
        self._seeded_from = None if seeded_from == self._spec_seeded_from else seeded_from

    def _regroup(self, step: int) -> None:
        """Takes in parameters that were added to the optimizer."""
        if len(self.optimizers) > 1:
            raise RecordingError(
                f"Before step {step} one of several optimizers was given or lost parameters. That is recorded of a "
                "single optimizer only: give all of them their parameters before the recording begins."
            )
        found = _groups_of(self.param_groups)
        names = {id(p): name for name, p in self.parameters.items()}
        if any(found.get(key) != group for key, group in self._groups.items()):
            raise RecordingError(
                f"Parameters were taken out of the optimizer, or put into another group, before step {step}. Freeze "
                "them with requires_grad_(False) instead, or record the parts of the training as separate runs."
            )
        if any(key not in names for key in found):
            raise RecordingError(
                f"Before step {step} the optimizer was given parameters that the model did not have at the first step. "
                "Make all modules before the recording begins."
            )
        self._joined |= {names[key]: group for key, group in found.items() if key not in self._groups}
        self._read_groups()

    def _present_conditions(self) -> Conditions:
        return Conditions(
            self.eval_modules(),
            still=self._where(lambda p: p.grad is None),
            frozen=self._where(lambda p: p.grad is not None and not p.requires_grad),
            joined=tuple(self._joined.items()),
            seeded_from=self._seeded_from,
        )

    def _where(self, holds: Callable[[Tensor], bool]) -> tuple[str, ...]:
        """Names of the optimizer's parameters of which something holds."""
        return tuple(name for name, p in self.parameters.items() if id(p) in self._groups and holds(p))

    def eval_modules(self) -> tuple[str, ...]:
        """Names of the modules in eval mode; "" alone if the model itself is."""
        if not self.model.training:
            return ("",)
        return tuple(name for name, module in self.model.named_modules() if name and not module.training)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of a row: float64 if any parameter has it."""
        kinds = {p.dtype for p in self.parameters.values()}
        return torch.float64 if torch.float64 in kinds else torch.float32

    def spec(self, around: dict[str, Any]) -> RunSpec:
        """The run's spec; `around` gives the fields that model and optimizer do not know."""
        return RunSpec(
            run_id=uuid.uuid4().hex,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            params=self._param_table(),
            buffers=tuple(
                BufferSpec(name, tuple(b.shape), _dtype_name(b.dtype)) for name, b in self.model.named_buffers()
            ),
            dtype=_dtype_name(self.dtype),
            **self._optimizer_fields(),
            hyperparameters=self.names,
            groups=len(self.param_groups),
            rng=self.generators.table(),
            eval_modules=self.eval_modules(),
            versions={
                "trajrec": trajrec.__version__,
                "torch": str(torch.__version__),
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            device=str(next(iter(self.parameters.values())).device),
            threads=torch.get_num_threads(),
            command=tuple(sys.argv),
            **around,
        )

    def _optimizer_fields(self) -> dict[str, Any]:
        known = tuple(
            OptimizerSpec(
                type(optimizer).__name__,
                type(optimizer).__module__,
                {k: v for k, v in optimizer.defaults.items() if _is_plain(v)},
                len(optimizer.param_groups),
                _hyperparameter_names(optimizer),
            )
            for optimizer in self.optimizers
        )
        if len(known) > 1:
            name = " + ".join(o.name for o in known)
            return {"optimizer": name, "optimizer_module": "", "defaults": {}, "optimizers": known}
        return {"optimizer": known[0].name, "optimizer_module": known[0].module, "defaults": known[0].defaults}

    def _param_table(self) -> tuple[ParamSpec, ...]:
        table, offset = [], 0
        for name, p in self.parameters.items():
            group = self._groups.get(id(p), -1)
            # A parameter without a gradient at the first step is skipped by the optimizer: constant, like a frozen one.
            trainable = group >= 0 and p.requires_grad and p.grad is not None
            table.append(ParamSpec(name, tuple(p.shape), _dtype_name(p.dtype), offset, group, trainable))
            offset += p.numel()
        return tuple(table)

    def copy(self, row: npt.NDArray[Any] | None) -> int:
        """Copies the weights into a row, if there is one. Returns their CRC-32."""
        crc = at = 0
        for view in self._memory():
            crc = crc32(view.data, crc) if row is None else copy_crc32(row[at : at + view.size], view, crc)
            at += view.size
        return crc

    def flat(self) -> list[Tensor]:
        """The parameters as flat tensors, where they are."""
        return [p.detach().reshape(-1) for p in self._values]

    def transfer(self) -> RowCopy | None:
        """How rows travel to the host; None where the weights are in its memory."""
        device = self.generators.device
        return DeviceCopy([p.numel() for p in self._values], self.dtype, device) if device.type == "cuda" else None

    def _memory(self) -> list[npt.NDArray[Any]]:
        """The weights as they lie in memory, one flat array a parameter.

        Made anew only when a parameter has moved; where it cannot be seen (another device or dtype, not contiguous),
        it is copied at every call.
        """
        places = [p.data_ptr() for p in self._values]
        if places != self._places:
            self._check_same()
            self._places = places if all(self._is_seen(p) for p in self._values) else []
            self._views = [p.detach().to("cpu", self.dtype).reshape(-1).numpy() for p in self._values]
        return self._views

    def _check_same(self) -> None:
        """Checks that parameters are what they were at the first step, wherever they lie now.

        Raises:
            RecordingError: one has become another.
        """
        now = [(p.dtype, tuple(p.shape)) for p in self._values]
        for name, before, after in zip(self.parameters, self._kinds, now, strict=True):
            if before != after:
                raise RecordingError(
                    f"Parameter {name} was {_kind_name(*before)} at the first step and has become "
                    f"{_kind_name(*after)}. Rows of one recording have one form: record the two parts of the training "
                    "as separate runs."
                )

    def _is_seen(self, p: Tensor) -> bool:
        return p.device.type == "cpu" and p.dtype == self.dtype and p.is_contiguous()

    def hyper(self) -> FloatArray:
        """Hyperparameters in force, [G, H]."""
        # Mostly nothing has changed since the last step; a tensor may have, in place.
        options = [[*map(group.get, self._options_read)] for group in self.param_groups]
        if self._hyper is None or options != self._options or self._has_tensors:
            self._options = options
            self._has_tensors = any(isinstance(value, Tensor) for row in options for value in row)
            rows = [[_number(group, key, place) for key, place in self._keys] for group in self.param_groups]
            self._hyper = np.array(rows, dtype=np.float64)
        return self._hyper

    def rates(self, hyper: FloatArray) -> list[float]:
        """The learning rate of each group, of hyperparameters [G, H]."""
        return hyper[:, self.names.index("lr")].tolist() if "lr" in self.names else []

    def keyframe(self, with_weights: bool) -> dict[str, npt.NDArray[Any] | Parts]:
        """Optimizer state, buffers and generator states, by the paths of `Keyframe.arrays`.

        Weights and states are parts that lie where the training has them: it will change them.
        """
        arrays = self._optimizer_state()
        if with_weights:
            arrays["weights"] = Parts(self._memory())
        for name, buffer in self.model.named_buffers():
            arrays[f"buffers/{name}"] = buffer.detach().cpu().numpy().copy()
        return arrays | self._all_states.read()

    def _optimizer_state(self) -> dict[str, npt.NDArray[Any] | Parts]:
        arrays: dict[str, npt.NDArray[Any]] = {}
        rows: dict[str, dict[int, npt.NDArray[Any]]] = {}
        count = len(self.parameters)
        for index, p in enumerate(self.parameters.values()):
            for name, value in self._state_of(p).items():
                path = f"optimizer/{name}"
                if isinstance(value, Tensor) and value.shape == p.shape:
                    rows.setdefault(path, {})[index] = self._flat((path, index), value)
                # A step count of a parameter without dimensions has the parameter's shape too: it is kept as both.
                if isinstance(value, bool | int | float) or (isinstance(value, Tensor) and value.numel() == 1):
                    arrays.setdefault(f"{path}.scalar", np.full(count, np.nan))[index] = float(value)
                elif isinstance(value, Tensor) and value.shape != p.shape:
                    arrays[f"{path}/{index}"] = value.detach().cpu().numpy().copy()
        for path, states in rows.items():
            arrays[f"{path}.present"] = np.array([index in states for index in range(count)], dtype=np.uint8)
        return arrays | self._late_options(count) | {path: self._row(states) for path, states in rows.items()}

    def _flat(self, place: tuple[str, int], value: Tensor) -> npt.NDArray[Any]:
        """A state as it lies in memory; looked for anew only where it is another tensor, or has moved."""
        known = self._flats.get(place)
        if known is not None and known[0] is value and known[1] == value.data_ptr():
            return known[2]
        array = value.detach().cpu().reshape(-1).numpy()
        if value.device.type == "cpu" and value.is_contiguous():
            self._flats[place] = (value, value.data_ptr(), array)
        return array

    def _row(self, states: dict[int, npt.NDArray[Any]]) -> Parts:
        """A state of all parameters, with zeros for those that do not have it."""
        dtype = next(iter(states.values())).dtype
        sizes = (p.numel() for p in self.parameters.values())
        parts = [states[k] if k in states else np.zeros(size, dtype) for k, size in enumerate(sizes)]
        return Parts([part.astype(dtype, copy=False) for part in parts])

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        return next((o.state[parameter] for o in self.optimizers if parameter in o.state), {})

    def _late_options(self, count: int) -> dict[str, npt.NDArray[Any]]:
        """Numbers that the optimizer put into its groups on the way, as state of each of the group's parameters."""
        known = _IMPLEMENTATION_OPTIONS | {key for key, _ in self._keys}
        groups = self.param_groups
        arrays: dict[str, npt.NDArray[Any]] = {}
        for index, p in enumerate(self.parameters.values()):
            group = groups[self._groups[id(p)]] if id(p) in self._groups else {}
            for key, value in group.items():
                if key not in known and isinstance(value, bool | int | float):
                    path = f"optimizer/{GROUP_STATE}{key}.scalar"
                    arrays.setdefault(path, np.full(count, np.nan))[index] = value
        return arrays


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` or `nn.DataParallel`: its parameters have the names that a Task's model has."""
    while True:
        inner = model.module if isinstance(model, nn.DataParallel) else getattr(model, "_orig_mod", model)
        if inner is model or not isinstance(inner, nn.Module):
            return model
        model = inner


def _groups_of(groups: Sequence[dict[str, Any]]) -> dict[int, int]:
    """The group of every parameter, by its id."""
    return {id(p): index for index, group in enumerate(groups) for p in group["params"]}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind_name(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{_dtype_name(dtype)} of shape {list(shape)}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _hyperparameter_names(optimizer: Optimizer) -> tuple[str, ...]:
    """Names of the numeric options of the groups; those of tuples by position ("betas.0")."""
    names: dict[str, None] = {}
    for group in optimizer.param_groups:
        for key, value in group.items():
            if key in _IMPLEMENTATION_OPTIONS:
                continue
            if isinstance(value, list | tuple):
                names.update(
                    {f"{key}.{i}": None for i, item in enumerate(value) if isinstance(item, int | float | Tensor)}
                )
            elif value is None or isinstance(value, bool | int | float | Tensor):
                names[key] = None
    return tuple(names)


def _number(group: dict[str, Any], key: str, place: str) -> float:
    value = group.get(key)
    if value is not None and place:
        value = value[int(place)]
    return float("nan") if value is None else float(value)


def copy_row(source: npt.NDArray[Any], row: Row | None) -> int:
    """Copies a row into another, if there is one. Returns its CRC-32."""
    return crc32(source.data) if row is None else copy_crc32(row, source)

"""The frozen values that pass between recorder, run file and replay.

A run is a row of weights w_0, then for every step t = 1..T one `StepRecord` and the row w_t, and now and then a
`Keyframe` with everything else that is needed to restart after step t. `RunSpec` holds what does not change
during a run. All values are plain numbers, strings and numpy arrays: no torch, no HDF5, nothing executable.

A row is flat: the parameters of `RunSpec.params` one after the other in table order, each C-contiguous. Its
dtype is `RunSpec.dtype`, and its length is P = sum of the sizes. Only what is trained is in rows: the parameters that
stay as they are (`RunSpec.frozen`) are in the keyframe of step 0, once. Where one of them is trained after all, a
stretch of longer rows begins: it is appended to the table, and is constant before.

Letters: A micro-batches and B samples in a step, G parameter groups, H numeric hyperparameters a group, N training
samples, P weights, T steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from trajrec.checksum import crc32
from trajrec.typed import typed

# What an optimizer makes inside its steps, in a parameter group instead of its state.
GROUP_STATE = "group:"

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Row = npt.NDArray[Any]
Array = npt.NDArray[Any]  # of any dtype
Json = dict[str, Any]  # what JSON can hold
NO_IDS: IntArray = np.empty(0, dtype=np.int64)
WEIGHT_DTYPES = ("float32", "float64")
HALF_DTYPES = ("float16", "bfloat16")  # of trained parameters, whose bits a row has in float32
FROZEN, FROZEN_CHECK = "frozen/", "check/frozen"  # paths of `Keyframe.arrays`
# Of a run that is read: more were never recorded, and would only be made to fill the memory.
AUTOCAST_DEVICES = ("cpu", "cuda")
MOST_CLASSES = 2048  # whose weights are noted
# Criteria of torch.nn that are noted, with the options that decide their values, and those options' defaults.
CRITERIA: dict[str, dict[str, float | None]] = {
    "CrossEntropyLoss": {"weight": None, "ignore_index": -100.0, "label_smoothing": 0.0},
    "NLLLoss": {"weight": None, "ignore_index": -100.0},
    "BCEWithLogitsLoss": {"weight": None, "pos_weight": None},
    "BCELoss": {"weight": None},
    "MSELoss": {},
    "L1Loss": {},
    "SmoothL1Loss": {"beta": 1.0},
    "HuberLoss": {"delta": 1.0},
    "KLDivLoss": {"log_target": 0.0},
    "SoftMarginLoss": {},
    "MultiLabelSoftMarginLoss": {"weight": None},
}
_MOST_WEIGHTS, MOST_GROUPS, _DIGITS = 2**48, 100_000, 3


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter: where it lies in a row, and how the optimizer treats it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    group: int
    trainable: bool

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def span(self) -> slice:
        """The parameter's values in a row."""
        return slice(self.offset, self.offset + self.size)


@dataclass(frozen=True, slots=True)
class FrozenSpec:
    """One parameter that nobody trained at the first step: its values are stored once.

    Attributes:
        name: of the parameter; `shape` and `dtype` (torch's name) too.
        group: of the optimizer, -1 if it was in none at the first step.
        crc32: CRC-32 of the bytes of its arrays, one after the other.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: int
    crc32: int

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class BufferSpec:
    """One buffer of the model (running statistics and the like); its values are in the keyframes."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """One of several optimizers that step together.

    Attributes:
        name: class name; `module` of that class, to be shown.
        defaults: as `RunSpec.defaults`.
        groups: how many parameter groups it has; those of all optimizers follow one another.
        hyperparameters: the names of the numeric values that its own groups have.
    """

    name: str
    module: str
    defaults: dict[str, Any]
    groups: int
    hyperparameters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Criterion:
    """A criterion of torch.nn that the training's loss was made of.

    Attributes:
        kind: its class, one of `CRITERIA`.
        reduction: "mean", "sum", "none" or "batchmean".
        options: its numbers, and truths as 0 and 1, by name.
        weight: of the classes; pos_weight: of positive labels; empty for none.
    """

    kind: str
    reduction: str
    options: tuple[tuple[str, float], ...] = ()
    weight: tuple[float, ...] = ()
    pos_weight: tuple[float, ...] = ()

    def faults(self) -> Iterator[str]:
        """What there cannot be."""
        names = CRITERIA.get(self.kind, ())
        numbers = [*(value for _, value in self.options), *self.weight, *self.pos_weight]
        if not {name for name, _ in self.options} <= {*names} or self.kind not in CRITERIA:
            yield f"there is no criterion {self.kind!r:.40} with {len(self.options)} such options"
        if not all(map(math.isfinite, numbers)) or max(len(self.weight), len(self.pos_weight)) > MOST_CLASSES:
            yield f"the criterion {self.kind!r:.40} has weights or options that are no numbers"

    def __str__(self) -> str:
        said = [f"{name}={value:g}" for name, value in self.options if value != CRITERIA[self.kind].get(name)]
        said += [f"{name}={_few(getattr(self, name))}" for name in ("weight", "pos_weight") if getattr(self, name)]
        said += [] if self.reduction == "mean" else [f"reduction={self.reduction!r}"]
        return f"{self.kind}({', '.join(said)})"


@dataclass(frozen=True, slots=True)
class Autocast:
    """The `torch.autocast` that the model was called under.

    Attributes:
        device: one of `AUTOCAST_DEVICES`.
        dtype: one of `HALF_DTYPES`.
    """

    device: str
    dtype: str

    def faults(self) -> Iterator[str]:
        """What there cannot be."""
        if self.device not in AUTOCAST_DEVICES or self.dtype not in HALF_DTYPES:
            yield f"there is no autocast to {self.dtype!r:.40} on {self.device!r:.40}"

    def __str__(self) -> str:
        return f"torch.autocast({self.device!r}, torch.{self.dtype})"


@dataclass(frozen=True, slots=True)
class LoaderSpec:
    """A DataLoader that the loop drew from; only ever shown.

    Attributes:
        dataset: class of its data set; length of that, 0 if it has none.
        batch_size: samples in a batch; 0 where a sampler decides.
        collate: module and name of what makes a batch of samples.
    """

    dataset: str
    length: int
    batch_size: int
    collate: str

    @property
    def collates_itself(self) -> bool:
        """Whether batches are made by a function that is not torch's own."""
        return not self.collate.startswith("torch.utils.data.")

    def __str__(self) -> str:
        size = f", batches of {self.batch_size}" if self.batch_size else ""
        own = f", collated by {self.collate}" if self.collates_itself else ""
        return f"{self.dataset} of {self.length:,} samples{size}{own}"


def _few(values: tuple[float, ...]) -> str:
    return f"[{', '.join(f'{value:g}' for value in values[:4])}{', ...' if len(values) > 4 else ''}]"


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What stays the same during a run.

    Attributes:
        run_id: random hexadecimal name of this run.
        created: start of the recording, ISO 8601 in UTC.
        params: parameter table in row order; `group` is -1 for parameters outside the optimizer.
        buffers: buffer table.
        dtype: numpy name of a row's dtype ("float32", "float64"); values of 16 bits are in it without loss.
        optimizer: class name; looked up in torch.optim, never imported from here. Of several "A + B".
        optimizer_module: module of that class, to be shown.
        defaults: the optimizer's `defaults`, numbers, booleans, strings and None only.
        hyperparameters: names of the H numeric values recorded for every group at every step; a tuple-valued one
            is split ("betas.0", "betas.1"). A missing value (None) is NaN.
        groups: G.
        optimizers: where there are several, each of them; `optimizer_module` and `defaults` are empty then.
        samples: N, the length of the training set; 0 where the recorder saw no data set (`set_batch`).
        inputs: "store" where the batches of every step are in the recording, "digest" where their CRC-32 is.
        rng: names and lengths in bytes of the random generator states whose concatenation is `StepRecord.rng`.
        eval_modules: names of modules that were in eval mode during the first training forward pass.
        task: "FILE.py:ATTR" as recorded, or None; `task_sha256` of that file.
        data: fingerprint of the training data (names to values, see `trajrec.task.task`).
        versions: of trajrec, torch, numpy and Python.
        device: where the parameters were ("cpu", "cuda:0").
        threads: torch's thread count within an operation.
        command: the command line.
        frozen: the parameters that were not trained at the first step, stored once; those that were later are in
            `params` too.
        stretches: (first step, P) of every stretch of rows, the first from step 0; empty where all are alike.
        folder: where it ran, if that could be told.
        criteria: of torch.nn that the losses of the first step were made of.
        autocast: that the model was called under in the first step, if it was.
        loader: that the first step's batch came from, if one did.
    """

    run_id: str
    created: str
    params: tuple[ParamSpec, ...]
    buffers: tuple[BufferSpec, ...]
    dtype: str
    optimizer: str
    optimizer_module: str
    defaults: dict[str, Any]
    hyperparameters: tuple[str, ...]
    groups: int
    samples: int
    inputs: str = "digest"
    optimizers: tuple[OptimizerSpec, ...] = ()
    rng: tuple[tuple[str, int], ...] = ()
    eval_modules: tuple[str, ...] = ()
    task: str | None = None
    task_sha256: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    threads: int = 1
    command: tuple[str, ...] = ()
    frozen: tuple[FrozenSpec, ...] = ()
    stretches: tuple[tuple[int, int], ...] = ()
    folder: str | None = None
    criteria: tuple[Criterion, ...] = ()
    autocast: Autocast | None = None
    loader: LoaderSpec | None = None

    @property
    def row_length(self) -> int:
        """P, at the end of the run."""
        return sum(param.size for param in self.params)

    def width(self, step: int) -> int:
        """P at a step: how much of its row was trained by then."""
        return next((p for first, p in reversed(self.stretches) if first <= step), self.row_length)

    @property
    def stored_once(self) -> tuple[FrozenSpec, ...]:
        """The parameters that were never trained."""
        trained = {p.name for p in self.params}
        return tuple(p for p in self.frozen if p.name not in trained)

    def widened(self, step: int, params: Sequence[ParamSpec]) -> RunSpec:
        """The spec of a run whose rows have further parameters from a step on."""
        before = self.stretches or ((0, self.row_length),)
        wide = replace(self, params=(*self.params, *params))
        return replace(wide, stretches=(*before, (step, wide.row_length)))

    def until(self, step: int) -> RunSpec:
        """The spec as it was at a step."""
        if not self.stretches or self.stretches[-1][0] <= step:
            return self
        known = tuple(stretch for stretch in self.stretches if stretch[0] <= step)
        params = tuple(p for p in self.params if p.span.stop <= known[-1][1])
        return replace(self, params=params, stretches=known if len(known) > 1 else ())

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunSpec:
        """The spec from `to_json`'s values; unknown keys (of a newer minor version) are ignored.

        Raises:
            ValueError: a value is missing, of another type, or does not fit the others.
        """
        spec = typed(cls, values)
        for fault in spec._faults():
            raise ValueError(fault)
        return spec

    def is_like(self, other: RunSpec) -> bool:
        """Whether rows and records of the other run are read like those of this one, or of its first stretches."""
        names = ("run_id", "dtype", "hyperparameters", "groups", "inputs", "rng", "frozen")
        same = all(getattr(self, name) == getattr(other, name) for name in names)
        return same and self.params == other.params[: len(self.params)] and self.row_length in other.widths

    @property
    def rows_crc32(self) -> int:
        """A checksum of what rows mean, and of the frozen parameters beside them: whether a training may go on here."""
        table = [(p.name, p.shape, p.dtype) for p in self.params], self.dtype, [asdict(p) for p in self.frozen]
        return crc32(json.dumps(table).encode())

    @property
    def widths(self) -> tuple[int, ...]:
        """P in every stretch."""
        return tuple(width for _, width in self.stretches) or (self.row_length,)

    def _faults(self) -> Iterator[str]:
        """What does not fit together."""
        offsets = accumulate((p.size for p in self.params), initial=0)
        for p, offset in zip(self.params, offsets, strict=False):
            if min(p.shape, default=0) < 0 or p.offset != offset or p.offset + p.size > _MOST_WEIGHTS:
                yield f"parameter {p.name!r} of shape {list(p.shape)} at {p.offset} does not follow the one before it"
            if not (p.group >= 0 if p.trainable else p.group >= -1) or p.group >= self.groups:
                yield f"parameter {p.name!r} is in group {p.group} of {self.groups}"
            if p.trainable and p.dtype not in (*WEIGHT_DTYPES, *HALF_DTYPES):
                yield f"parameter {p.name!r} is trained in {p.dtype!r}; {' and '.join(WEIGHT_DTYPES)} are known"
        yield from self._faulty_names()
        yield from self._faulty_stretches()
        if self.dtype not in WEIGHT_DTYPES:
            yield f"rows are of {self.dtype!r}; {' and '.join(WEIGHT_DTYPES)} are known"
        if not 0 <= self.groups <= MOST_GROUPS or min((o.groups for o in self.optimizers), default=0) < 0:
            yield f"there are {self.groups} parameter groups"
        if self.optimizers and sum(o.groups for o in self.optimizers) != self.groups:
            yield f"the optimizers have other groups than the {self.groups} of the run"
        if self.inputs not in ("digest", "store"):
            yield f'inputs is "digest" or "store", found {self.inputs!r}'
        if self.samples < 0 or min((size for _, size in self.rng), default=1) < 1:
            yield f"there are {self.samples} samples, and generator states of {[size for _, size in self.rng]} bytes"
        for criterion in self.criteria:
            yield from criterion.faults()
        if self.autocast is not None:
            yield from self.autocast.faults()
        if not all(type(self.data.get(name, 0)) is int for name in ("seeded_from", "first_batch_crc32")):
            yield "data should hold whole numbers as seeded_from and first_batch_crc32"

    def _faulty_stretches(self) -> Iterator[str]:
        """Frozen parameters, or stretches, that cannot be."""
        if any(min(p.shape, default=0) < 0 or p.size > _MOST_WEIGHTS or p.group < -1 for p in self.frozen):
            yield "a frozen parameter has a shape, or is in a group, that there is not"
        if not self.stretches:
            return
        ends, known = {p.span.stop for p in self.params}, {p.name: p.shape for p in self.frozen}
        firsts, widths = zip(*self.stretches, strict=True)
        ascending = all(a < b for column in (firsts, widths) for a, b in pairwise(column))
        if firsts[0] != 0 or widths[-1] != self.row_length or not ascending or not ends.issuperset(widths):
            yield f"there are no stretches of rows like {self.stretches}"
        late = [p for p in self.params if p.offset >= widths[0]]
        if any(known.get(p.name) != p.shape for p in late):
            yield "a parameter that was trained later is not among those that were frozen"

    def _faulty_names(self) -> Iterator[str]:
        """Names that are there twice, or that lead nowhere."""
        lists = {"params": [p.name for p in self.params], "hyperparameters": self.hyperparameters}
        lists |= {"frozen": [p.name for p in self.frozen]}
        lists |= {"buffers": [b.name for b in self.buffers], "rng": [name for name, _ in self.rng]}
        for what, names in lists.items():
            if len(set(names)) < len(names):
                yield f"{what} holds a name twice"
        for name in self.hyperparameters:
            _, dot, place = name.partition(".")
            if dot and not (place.isascii() and place.isdecimal() and len(place) <= _DIGITS):
                yield f"hyperparameter {name!r} should be a name, or a name and a place in a tuple"
        for optimizer in self.optimizers:
            if not {*optimizer.hyperparameters} <= {*self.hyperparameters}:
                yield f"{optimizer.name!r} has hyperparameters that the run has not"
        if self.rng and "cpu" not in lists["rng"]:
            yield "there are generator states, and none of the CPU"


@dataclass(slots=True)  # not frozen: the training thread makes one a step, and that takes four times as long
class StepRecord:
    """What one optimizer step used, besides the weights. Step 0 stands for the weights before the first step.

    Attributes:
        step: t, from 1.
        epoch: passes over the training loader begun before this step, minus one: from 0.
        loss: the loss as the loop computed it (sum over backward calls); NaN if there was none.
        time: seconds since the epoch (Unix time) when the step ended.
        crc32: CRC-32 (zlib) of the bytes of the row w_t.
        hyper: [G, H] hyperparameters in force during the step.
        ids: [B] sample ids in batch order, repeats kept.
        weights: [B] the c[t,i] of each id, or None for 1/B.
        rng: generator states at the start of the forward pass of every micro-batch, one after the other, or b"" if
            the step consumed no randomness.
        parts: [A] sizes of the micro-batches whose gradients were added up, in the order of `ids`; empty for one.
        digests: [A] CRC-32 of what the loader yielded for each micro-batch (`trajrec.digest.sampled_digest`), -1
            where it was not made; empty if none was.
        changes: what is different from the step before, JSON of a `Conditions`, or b"".
    """

    step: int
    epoch: int
    loss: float
    time: float
    crc32: int
    hyper: FloatArray
    ids: IntArray
    weights: FloatArray | None = None
    rng: bytes = b""
    parts: IntArray = field(default_factory=lambda: NO_IDS)
    digests: IntArray = field(default_factory=lambda: NO_IDS)
    changes: bytes = b""


@dataclass(frozen=True, slots=True)
class Clip:
    """One call of `torch.nn.utils.clip_grad_norm_` or `clip_grad_value_` between a backward pass and its step.

    Attributes:
        kind: "norm", "value", or "other" for a call whose effect on the step's gradient cannot be told.
        limit: the largest norm, or absolute value, that it leaves.
        order: of the norm; None for the largest absolute value.
        params: names of the parameters whose gradients it was given; empty for all that the step moves.
    """

    kind: str
    limit: float
    order: float | None = 2.0
    params: tuple[str, ...] = ()

    def check(self) -> None:
        """Checks that there is such a call.

        Raises:
            ValueError: there is not.
        """
        numbers = (self.limit, 1.0 if self.order is None else self.order)
        if self.kind not in ("norm", "value", "other") or not all(0 < number < math.inf for number in numbers):
            raise ValueError(f"{self.kind!r:.40} to {self.limit} is no clipping of gradients")

    def __str__(self) -> str:
        of = "" if not self.params else f" of {len(self.params)} parameter{'s' * (len(self.params) > 1)}"
        if self.kind == "other":
            return "a call of torch's clipping whose effect on the step could not be told"
        if self.kind == "value":
            return f"values{of} to {self.limit:g}"
        order = "" if self.order == 2 else " (largest value)" if self.order is None else f" (of order {self.order:g})"
        return f"the norm{of} to {self.limit:g}{order}"


@dataclass(frozen=True, slots=True)
class Conditions:
    """What rarely changes between steps; recorded where it does.

    Attributes:
        eval_modules: names of the modules in eval mode ("" is the model itself).
        still: names of the optimizer's parameters that had no gradient in the step, and were left as they are.
        frozen: names of those that require no gradient but have one, of zeros: decay and momentum still move them.
        joined: parameters that came into the optimizer after the first step, with their group.
        seeded_from: the pass over seeded data that epoch 0 would have been, as `trajrec.seeded` counts, where a
            resumption or an evaluation on these data has changed it; None for `RunSpec.data["seeded_from"]`.
        clips: how torch's own functions clipped the gradients before the step, one call after the other.
        evaluated: loaders whose batches the model was called on without gradients until the step.
    """

    eval_modules: tuple[str, ...] = ()
    still: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    joined: tuple[tuple[str, int], ...] = ()
    seeded_from: int | None = None
    clips: tuple[Clip, ...] = ()
    evaluated: tuple[LoaderSpec, ...] = ()

    def to_json(self) -> bytes:
        """As JSON."""
        values = asdict(self)
        for name in ("clips", "evaluated"):
            if not values[name]:
                del values[name]
        return json.dumps(values).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Conditions:
        """From `to_json`'s value; unknown keys are ignored.

        Raises:
            ValueError: it is no such value.
        """
        found = typed(cls, json.loads(text))
        for clip in found.clips:
            clip.check()
        return found


@dataclass(frozen=True, slots=True)
class Inputs:
    """The batches of a step as the loader made them, one for every micro-batch.

    Attributes:
        step: t, from 1.
        arrays: "structure" (JSON as uint8) and "MICRO-BATCH/LEAF" to array: see `trajrec.inputs`.
    """

    step: int
    arrays: Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Parts:
    """An array that lies in memory in parts, one behind the other: `np.asarray` puts them together.

    Attributes:
        parts: flat arrays of one dtype.
    """

    parts: Sequence[npt.NDArray[Any]]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.concatenate(self.parts, dtype=dtype)


@dataclass(frozen=True, slots=True)
class LiveKeyframe:
    """A keyframe as it is handed over: some of its arrays are `Parts` that lie where the training will change them.

    Attributes:
        step: as in `Keyframe`.
        arrays: as in `Keyframe`.
    """

    step: int
    arrays: Mapping[str, npt.NDArray[Any] | Parts]

    def copied(self) -> Keyframe:
        """The keyframe with arrays of its own."""
        return Keyframe(self.step, {path: np.array(array) for path, array in self.arrays.items()})


@dataclass(frozen=True, slots=True)
class Keyframe(LiveKeyframe):
    """Everything besides the weights that is needed to go on after a step.

    Attributes:
        step: t; the state is that after step t (0: before the first).
        arrays: path to array: "weights" [P] where rows of every step are not kept; "optimizer/NAME" [P] in
            row layout for state shaped like the parameter, "optimizer/NAME.present" [params] uint8 (which parameters
            have it), "optimizer/NAME.scalar" [params] for values of one number (NaN where absent),
            "optimizer/NAME/INDEX" for state of any other shape; "optimizer/group:NAME.scalar" for an option that the
            optimizer put into its groups inside a step; "buffers/NAME"; "rng/python", "rng/numpy",
            "rng/cpu", "rng/cuda:0"; at step 0 "frozen/NAME", the bits of parameters that are stored once
            (`trajrec.bits`), at others "check/frozen" [frozen], their CRC-32 then. All paths but "weights" have one
            or two slashes.
    """

    arrays: Mapping[str, npt.NDArray[Any]]

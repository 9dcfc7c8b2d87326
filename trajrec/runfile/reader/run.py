"""Reading a run: `trajrec.open(path)` gives a `Run`, whatever state the recording is in.

    run.h5 (packed)             the usual case
    run.h5.rec (folder)         being recorded, or left by a recorder that was killed

Both answer alike. A run that is being recorded has the steps that were there when it was opened. Opening executes
nothing from the file: numbers and JSON come out, and no class is looked up.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from trajrec.errors import DamagedRunError, ReplayError
from trajrec.records import Conditions, FloatArray, IntArray, Keyframe, Row, RunSpec
from trajrec.runfile.format.table import StepTable, present
from trajrec.runfile.reader.rows import RowReader
from trajrec.runfile.reader.source import MovedError, Source, find
from trajrec.stretches import NOTHING, completed, completed_keyframe, constants, frozen_arrays

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")
_TABLES = 4


class Run:
    """A recorded run of T steps, open for reading; a context manager.

    Attributes:
        path: the packed file, or the folder.
        spec: what stayed the same during the run.
        state: "complete", "recovered" (cut off) or "recording" (right now).
        steps: T.
        gaps: first and last step of stretches that went unrecorded.
        resumed: steps at which the recording was taken up again.
        keyframe_steps: steps that have a keyframe, ascending.
        keep: "steps", or "keyframes" where weights are stored at keyframes only.
        compression: "zstd" or "none".
    """

    def __init__(self, path: Path) -> None:
        self._given = path
        self._source: Source = find(path)
        source = self._source
        self.path = source.path
        self.spec: RunSpec = source.spec
        self.state: str = source.state
        self.steps: int = source.stop - 1
        self.gaps: tuple[tuple[int, int], ...] = source.gaps
        self.resumed: tuple[int, ...] = source.resumed
        self.keyframe_steps: tuple[int, ...] = source.keyframes
        self.keep: str = "steps" if source.has_rows else "keyframes"
        self.compression: str = source.compression
        self._keyframes = frozenset(source.keyframes)
        self._lock = RLock()  # `walk` reads on a thread
        self._tables: OrderedDict[int, StepTable] = OrderedDict()
        self._block: tuple[int, Row] | None = None
        self._reader = RowReader(
            block=lambda step: self._now(lambda s: s.block(step)),
            rows=self._read_rows,
            crc32=self.crc32,
            width=self.spec.width,
            path=self.path,
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        self._source.close()
        self._block = None

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self._now(lambda source: source.size())

    def _now(self, ask: Callable[[Source], _T]) -> _T:
        """Asks the source; if things have moved since it was looked at, looks again. One thread at a time."""
        with self._lock:
            for _ in range(4):
                try:
                    return ask(self._source)
                except (MovedError, FileNotFoundError):
                    old, self._source = self._source, find(self._given)
                    old.close()
            raise DamagedRunError(f"{self.path}: files that belong to it are missing. Restore it from a copy.")

    def _read_rows(self, first: int, stop: int) -> Row:
        return self._now(lambda source: _in_blocks(source, self.spec, first, stop, self._constants))

    # ---- weights

    def stored(self, t: int) -> bool:
        """Whether the weights of step t (0..T) are on disk, and not to be recomputed."""
        self._check(t, 0)
        return self.keep == "steps" or t in self._keyframes

    def row(self, t: int) -> Row:
        """The weights after step t (0..T) as one row [P], read-only.

        Raises:
            IndexError: t is out of range. ReplayError: the row is not stored. DamagedRunError: its checksum differs.
        """
        if not self.stored(t):
            raise ReplayError(
                f"The weights of step {t} are not stored in {self.path}: it keeps keyframes only, at steps "
                f"{_some(self.keyframe_steps)}. Replay recomputes the steps between."
            )
        return self._stored_row(t) if self.keep == "steps" else self._keyframe_row(t)

    def _stored_row(self, t: int) -> Row:
        if self._block is None or not self._block[0] <= t < self._block[0] + len(self._block[1]):
            first, stop = self._reader.block(t)
            rows = self._read_rows(first, stop)
            rows.flags.writeable = False
            self._block = first, rows
        row: Row = self._block[1][t - self._block[0]]
        self._reader.check(t, row)
        return row

    def _keyframe_row(self, t: int) -> Row:
        found = self._now(lambda source: source.keyframe(t, "weights"))
        row: Row = completed_keyframe(self.spec, found, self._constants).arrays["weights"]
        self._reader.check(t, row)
        row.flags.writeable = False
        return row

    def walk(self, first: int, last: int) -> Iterator[tuple[int, Row]]:
        """Steps and rows (t, [P]) from `first` to `last` inclusive; backwards if first > last.

        Rows are read-only and checked. Each chunk is decoded once, the next ones on a thread meanwhile.
        """
        self._check(first, 0)
        self._check(last, 0)
        if self.keep == "steps":
            return self._reader.walk(first, last)
        direction = 1 if first <= last else -1
        return ((t, self.row(t)) for t in range(first, last + direction, direction))

    def weights(self, t: int) -> dict[str, torch.Tensor]:
        """The weights after step t (0..T) by parameter name, as tensors of their own; frozen ones in their own dtype.

        One that is made of other tensors is there as those, by NAME:PART.
        """
        import torch

        flat = torch.from_numpy(self.row(t).copy())
        return {p.name: flat[p.span].view(p.shape) for p in self.spec.params} | self._frozen()

    def _frozen(self) -> dict[str, torch.Tensor]:
        """The parameters that were never trained."""
        import torch

        from trajrec.bits import values_of

        found: dict[str, torch.Tensor] = {}
        for p in self.spec.stored_once:
            for path, bits in frozen_arrays(self.keyframe(0), p.name).items():
                kind = getattr(torch, p.dtype, None) if path == p.name else None
                found[path] = values_of(bits, kind) if isinstance(kind, torch.dtype) else torch.from_numpy(bits.copy())
        return found

    @cached_property
    def _constants(self) -> Row:
        """The end of a row before it is trained."""
        if not self.spec.stretches:
            return np.empty(0, self.spec.dtype)
        try:
            return constants(self.spec, self._now(lambda source: source.keyframe(0)))
        except (ValueError, IndexError, KeyError) as error:
            raise DamagedRunError(f"{self.path}: {error}. Restore the file from a copy.") from error

    # ---- steps

    def sample_ids(self, t: int) -> IntArray:
        """Sample ids of step t (1..T) in batch order [B]."""
        return self._span("ids", t)

    def recorded_weights(self, t: int) -> FloatArray | None:
        """The weights c[t,i] of the samples of step t (1..T) [B], or None where none were recorded."""
        weights: FloatArray = self._span("weights", t)
        return weights if weights.size else None

    def sample_weights(self, t: int) -> FloatArray:
        """The weights c[t,i] of the samples of step t (1..T) [B]; 1/B where none were recorded."""
        weights, count = self.recorded_weights(t), len(self.sample_ids(t))
        return np.full(count, 1.0 / max(count, 1)) if weights is None else weights

    def hyper(self, t: int) -> FloatArray:
        """Hyperparameters in force at step t (1..T) [G, H], in the order of `spec.hyperparameters`."""
        self._check(t, 1)
        table = self._table(t)
        return present(table["hyper"][t - table.first])

    def hyperparameters(self, t: int) -> list[dict[str, float]]:
        """Hyperparameters in force at step t (1..T), a dictionary for each of the G groups."""
        names = self.spec.hyperparameters
        return [dict(zip(names, map(float, group), strict=True)) for group in self.hyper(t)]

    def epoch(self, t: int) -> int:
        """Epoch of step t (1..T), from 0."""
        return int(self._value("epoch", t, 1))

    def loss(self, t: int) -> float:
        """Loss of step t (1..T) as the loop computed it; NaN if there was none."""
        return float(self._value("loss", t, 1))

    def time(self, t: int) -> float:
        """Unix time in seconds at the end of step t (0..T)."""
        return float(self._value("time", t, 0))

    def crc32(self, t: int) -> int:
        """CRC-32 of the row of step t (0..T)."""
        return int(self._value("crc32", t, 0))

    def rng(self, t: int) -> bytes:
        """Generator states at the start of the forward pass of step t (1..T); b"" if it consumed none."""
        return self._span("rng", t).tobytes()

    def parts(self, t: int) -> IntArray:
        """Sizes of the micro-batches of step t (1..T) [A], in the order of its sample ids."""
        sizes: IntArray = self._span("parts", t)
        return sizes if sizes.size else np.array([len(self.sample_ids(t))], dtype=np.int64)

    def digests(self, t: int) -> IntArray:
        """CRC-32 of the inputs of each micro-batch of step t (1..T), [A]; empty if unknown (`trajrec.digest`)."""
        return self._span("digests", t)

    @cached_property
    def changes(self) -> dict[int, Conditions]:
        """Steps at which the conditions changed, with those in force from there on, ascending."""
        found: dict[int, Conditions] = {}
        t = 0
        while t <= self.steps:
            table = self._table(t)
            for k in np.flatnonzero(np.diff(table["changes_offsets"])).tolist():
                found[table.first + k] = Conditions.from_json(table.span("changes", k).tobytes())
            t = table.first + len(table)
        return {step: conditions for step, conditions in found.items() if step <= self.steps}

    @cached_property
    def epochs(self) -> IntArray:
        """Epochs of steps 1..T [T]."""
        return self._column("epoch")

    @cached_property
    def losses(self) -> FloatArray:
        """Losses of steps 1..T [T]."""
        return self._column("loss")

    # ---- keyframes and inputs

    def keyframe(self, t: int) -> Keyframe:
        """The keyframe of step t.

        Raises:
            IndexError: there is none.
        """
        if t not in self._keyframes:
            raise IndexError(f"{self.path} has no keyframe of step {t}; it has those of {_some(self.keyframe_steps)}.")
        found = self._now(lambda source: source.keyframe(t))
        return completed_keyframe(self.spec, found, self._constants if "weights" in found.arrays else NOTHING)

    def inputs(self, t: int) -> list[Any] | None:
        """The batches of step t (1..T) as the loader made them, one for every micro-batch; None if they were not kept.

        Raises:
            IndexError: t is out of range. DamagedRunError: a checksum differs, or they are missing.
        """
        from trajrec.inputs import batches_of

        self._check(t, 1)
        if self.spec.inputs != "store":
            return None
        arrays = self._now(lambda source: source.inputs(t)).arrays
        try:
            return batches_of(arrays)
        except (ValueError, RecursionError) as error:
            raise DamagedRunError(f"{self.path}: /inputs, step {t}: {error}. Restore the file from a copy.") from error

    # ---- inner

    def _check(self, t: int, lowest: int) -> None:
        if not lowest <= t <= self.steps:
            raise IndexError(f"Step {t} is out of range: {self.path} has steps {lowest} to {self.steps}.")

    def _table(self, t: int) -> StepTable:
        with self._lock:
            for table in reversed(self._tables.values()):
                if table.first <= t < table.first + len(table):
                    return table
            table = self._now(lambda source: source.table(t))
            self._tables[table.first] = table
            if len(self._tables) > _TABLES:
                self._tables.popitem(last=False)
            return table

    def _value(self, name: str, t: int, lowest: int) -> Any:
        self._check(t, lowest)
        table = self._table(t)
        return table[name][t - table.first]

    def _span(self, name: str, t: int) -> npt.NDArray[Any]:
        self._check(t, 1)
        table = self._table(t)
        return table.span(name, t - table.first)

    def _column(self, name: str) -> npt.NDArray[Any]:
        parts, t = [], 0
        while t <= self.steps:
            table = self._table(t)
            parts.append(table[name][t - table.first :])
            t = table.first + len(table)
        column: npt.NDArray[Any] = np.concatenate(parts)[1 : self.steps + 1]
        return column


def open(path: str | Path) -> Run:
    """The run recorded at `path`: run.h5, or run.h5.rec while it is being recorded or after it was cut off.

    Raises:
        NotARunError: nothing there, an empty or a foreign file.
        DamagedRunError: truncated, or a checksum does not match.
        NewerFormatError: written by a newer trajrec.
    """
    return Run(Path(path))


def _in_blocks(source: Source, spec: RunSpec, first: int, stop: int, constant: Row) -> Row:
    """Rows [first, stop), also when a new snapshot has cut them into other blocks; all as long as the last one."""
    parts = []
    while first < stop:
        end = min(source.block(first)[1], stop)
        parts.append(completed(spec, first, source.rows(first, end), constant))
        first = end
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _some(steps: tuple[int, ...]) -> str:
    shown = [str(t) for t in steps[:4]]
    return ", ".join(shown) + (f", ... {steps[-1]}" if len(steps) > 4 else "")

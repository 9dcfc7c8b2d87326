"""`trajrec.record`: a recorder that writes a run file; `start` and `stop` where no `with` fits, as in a notebook.

A process has at most one recording that was begun by `start`. If the interpreter ends before `stop`, what was recorded
is finished as a training that was cut off; if it is killed, a folder is left that `trajrec pack` finishes.
"""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from trajrec.capture.processes import processes
from trajrec.capture.recorder import Recorder
from trajrec.errors import RecordingError
from trajrec.runfile.trainer.sink import RunFileSink
from trajrec.sink import MemorySink, Sink, Summary


def record(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    loader: Any = None,
    task: str | None = None,
    force: bool = False,
    keep: Literal["steps"] | int | None = None,
    compression: Literal["zstd", "none"] = "zstd",
    budget: str | int | None = None,
    on_full: Literal["wait", "stop-recording", "raise"] = "wait",
    resume: bool = False,
    keyframe_every: int = 64,
    inputs: Literal["digest", "store"] = "digest",
    ids: Literal["found", "order"] = "found",
    strict: bool = False,
) -> Recorder:
    """A recorder, to be used as a context manager around a training loop.

        with trajrec.record("run.h5", model=model, optimizer=optimizer, loader=loader):
            ...

    Args:
        path: the run file to be written.
        model: the model being trained; left out, it is found at the first step.
        optimizer: its optimizer, or a list of those that hold different parameters of it and step together; left out,
            they are found when the first one steps.
        loader: the training DataLoader, or a list of them; left out, all are watched and validation is told apart.
        task: "FILE.py:ATTR" of the Task, noted in the recording so that `trajrec replay` finds it.
        force: replace an existing recording.
        keep: "steps" for the weights of every step, or K for keyframes every K steps, recomputed between at replay.
            Left out, every step is kept until the recording would take three quarters of the free disk, and keyframes
            from then on, which is said.
        compression: "zstd" or "none".
        budget: limit on disk space, "20GB" or bytes; rows and keyframes are thinned to stay below it.
        on_full: what to do when the disk is full: "wait" for room, "stop-recording" or "raise".
        resume: go on with an existing recording at the step whose weights training starts with.
        keyframe_every: steps between keyframes with keep="steps".
        inputs: "digest" keeps a checksum of every batch, "store" the batches themselves, as the loader yielded them:
            then a replay needs no data set but for its length, and random augmentation comes back as it was.
        ids: "found" for what samplers draw, or the rows of a tensor that batches are cut out of; "order" to number
            samples that have no ids (of an iterable data set) in the order in which the loop receives them, from 0:
            a second pass over a stream brings new ids.
        strict: raise a RecordingError into the training where it cannot be recorded. Otherwise that is logged once as
            an error, recording stops there, the training goes on to its end with the same bits, and the recorder's
            `problem` says why; the steps that are missing are noted in the run as a gap.

    Raises:
        OutputExistsError: if the output exists and `force` is False.
        RecordingError: if `loader` or `optimizer` is none; with `strict`, if this training cannot be recorded (see
            `trajrec.errors`).
    """
    if resume and ids == "order":
        raise RecordingError("Samples that are numbered as they arrive would get ids again: such a run is not resumed.")
    sink: Sink = MemorySink()
    if processes() == 1:  # of several none records, so that none stands in the way of another
        sink = RunFileSink(
            Path(path),
            keep=keep,
            compression=compression,
            on_full=on_full,
            force=force,
            resume=resume,
            budget=budget,
            keyframe_every=keyframe_every,
        )
    return Recorder(
        sink, model=model, optimizer=optimizer, loader=loader, task=task, inputs=inputs, ids=ids, strict=strict
    )


class _Started:
    """The recording that `start` has begun, if one is on."""

    def __init__(self) -> None:
        self._recorder: Recorder | None = None

    def is_on(self) -> bool:
        """Whether one is on; not in a forked child, which has no recorder."""
        return self._recorder is not None and not self._recorder.is_abandoned

    def begin(self, recorder: Recorder) -> None:
        """This one is on from now on."""
        self._recorder = recorder.__enter__()
        atexit.register(self.cut_off)

    def take(self) -> Recorder | None:
        """The recording that is on, which is none from now on."""
        recorder, self._recorder = (self._recorder if self.is_on() else None), None
        atexit.unregister(self.cut_off)
        return recorder

    def cut_off(self) -> None:
        """The interpreter ends, and nobody has said that the training is whole."""
        recorder = self.take()
        if recorder is not None:
            with suppress(Exception):
                recorder.__exit__(InterruptedError, InterruptedError(), None)


_started = _Started()


def start(path: str | Path, **options: Any) -> Recorder:
    """Begins a recording that goes on until `trajrec.stop()`, as over the cells of a notebook.

        trajrec.start("run.h5", model=model, optimizer=optimizer, loader=loader)
        ...
        trajrec.stop()

    A cell that fails does not end it. If the interpreter ends before `stop`, what was recorded is finished as a
    training that was cut off; where it is killed, `trajrec pack` finishes the folder that is left.

    Args:
        path: the run file to be written.
        options: those of `trajrec.record`.

    Returns:
        The recorder; its `problem` says why recording has stopped, if it has.

    Raises:
        RecordingError: if a recording that was begun by `start` is still on.
        TrajrecError: what `trajrec.record` raises.
    """
    if _started.is_on():
        raise RecordingError("A recording is on already: end it by trajrec.stop() before another one is started.")
    recorder = record(path, **options)
    _started.begin(recorder)
    return recorder


def stop() -> Summary | None:
    """Ends the recording that `trajrec.start` has begun.

    Returns:
        What was written (path, steps, size in bytes, gaps); None if the optimizer made no step.

    Raises:
        RecordingError: if none is on; with `strict`, if the recording is not whole.
    """
    recorder = _started.take()
    if recorder is None:
        raise RecordingError("No recording is on: trajrec.start(path) begins one.")
    recorder.__exit__(None, None, None)
    return recorder.summary

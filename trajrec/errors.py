"""Every error that trajrec raises on purpose.

A message says what was expected, what was found, where, and what to do. `exit_code` is what the command
line returns; nothing else in the project maps errors to codes.

    TrajrecError                          2
    |-- OutputExistsError                 2   an output is there already and --force was not given
    |-- TaskError                         2   the Task cannot be loaded or does not fit the recording
    |   |-- ModelMismatchError            2   names or shapes of the model differ
    |   |-- DataMismatchError             2   the data set is shorter, or changed since recording
    |   `-- SampleRangeError              2   a sample or target id does not exist
    |-- RecordingError                    2   this training cannot be recorded
    |   |-- UnknownBatchError             2   the samples of a step could not be told
    |   |-- UnsupportedOptimizerError     2   the optimizer has no rule
    |   |-- HalfPrecisionError            2   weights in float16 or bfloat16
    |   |-- RecorderBusyError             2   another recorder writes this output
    |   `-- DiskFullError                 2   no room left and on_full="raise"
    |-- ReplayError                       2   the question cannot be answered from this recording
    |   |-- NonFiniteError                2   a loss, weight or adjoint became NaN or infinite
    |   |-- DerivativeError               3   a derivative that cannot be taken
    |   `-- DriftError                    3   recomputed steps differ from the recorded ones
    `-- RunFileError                      4   the recording cannot be read
        |-- NotARunError                  4   foreign or empty file
        |-- DamagedRunError               4   truncated, or a checksum does not match
        `-- NewerFormatError              4   written by a newer trajrec

A message quotes what stands in files, and files come from anywhere: what a terminal would obey is shown as an escape.
"""

from __future__ import annotations

import errno
from pathlib import Path


def printable(text: str, keep: str = "\n") -> str:
    """The text, safe on any terminal: control characters and all else that shows nothing itself become escapes.

    So do orders to change the direction of writing, and halves of characters, which could not be written at all. The
    escapes are those of `repr`; what is in `keep` stays.
    """
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


class TrajrecError(Exception):
    """Base of the family."""

    exit_code = 2

    def __str__(self) -> str:
        return printable(super().__str__())


class OutputExistsError(TrajrecError):
    """An output is there already and overwriting was not asked for."""


class TaskError(TrajrecError):
    """The Task cannot be loaded, or does not fit the recording."""


class ModelMismatchError(TaskError):
    """Parameter names or shapes of the task's model differ from the recording."""


class DataMismatchError(TaskError):
    """The task's data set is shorter than the recorded ids, or changed since the recording."""


class SampleRangeError(TaskError):
    """A sample or target id does not exist in the data set."""


class RecordingError(TrajrecError):
    """This training cannot be recorded."""


class UnknownBatchError(RecordingError):
    """The recorder could not tell which samples made a step."""


class UnsupportedOptimizerError(RecordingError):
    """The optimizer has no rule that could be differentiated."""


class HalfPrecisionError(RecordingError):
    """The weights are float16 or bfloat16."""


class RecorderBusyError(RecordingError):
    """Another recorder is writing this output."""


class DiskFullError(RecordingError):
    """The disk is full, and the user asked to be told by an error."""


class ReplayError(TrajrecError):
    """The question cannot be answered from this recording."""


class NonFiniteError(ReplayError):
    """A loss, weight or adjoint became NaN or infinite; the message names the step.

    Attributes:
        step: at which a derivative did; None where the message alone says it.
    """

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


class DerivativeError(ReplayError):
    """A derivative cannot be taken; the message names the operator or the parameter."""

    exit_code = 3


class DriftError(ReplayError):
    """Recomputed steps differ from the recorded ones by more than the tolerance."""

    exit_code = 3


class RunFileError(TrajrecError):
    """The recording cannot be read."""

    exit_code = 4


class NotARunError(RunFileError):
    """The file is empty, or not a trajrec recording."""


class DamagedRunError(RunFileError):
    """The recording is truncated, or a checksum does not match.

    Attributes:
        file: where the damage is; None where the message alone says it.
        dataset: HDF5 path within the file, or "" for the file as a whole.
        steps: first and last step concerned, or None.
    """

    def __init__(
        self, message: str, file: Path | None = None, dataset: str = "", steps: tuple[int, int] | None = None
    ) -> None:
        super().__init__(message)
        self.file, self.dataset, self.steps = file, dataset, steps


class NewerFormatError(RunFileError):
    """The recording was written by a newer version of trajrec."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, to be put into ours."""
    return str(error).partition("\n")[0]


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that there is no room; a limit on the size of files says so, too."""
    full = (errno.ENOSPC, errno.EDQUOT), ("No space left", "quota exceeded")
    return _says(error, *full) or is_file_too_large(error)


def is_file_too_large(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is a limit on the size of files (`ulimit -f`): waiting does not help."""
    return _says(error, (errno.EFBIG,), ("File too large",))


def _says(error: BaseException | None, numbers: tuple[int, ...], words: tuple[str, ...]) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in numbers or any(word in str(error) for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False

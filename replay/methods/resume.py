"""The progress of a long replay in a file, so that it goes on where it stopped after kill -9, Ctrl-C or a power cut.

Once a minute or so the state of the replay (arrays and a few JSON values, see `replay.methods.blocks`) is written
beside the file, synced and renamed into its place: there is always one whole file or none. It carries the question that
it belongs to: a SHA-256 over everything that decides the numbers. Another question does not go on from it. The file is
plain .npz;
nothing in it is ever unpickled.

Nothing that the disk does to this file ends a replay. Where it cannot be written, that is said and the replay goes on;
where it cannot be read, it is set aside under another name and the replay begins anew. When a replay has come to its
end, but its answer cannot be written, the last state is: the same command then only has to write the answer.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from trajrec.errors import OutputExistsError, TrajrecError, is_disk_full
from trajrec.records import Array, Json

NAME = "progress.npz"
DAMAGED_FILES = "progress-damaged*.npz"
_UNFINISHED = re.compile(r"\.progress-[0-9a-f]+\.tmp|\.progress\.npz\.\d+\.tmp")
PIECES = re.compile(rf"progress(-damaged(-\d+)?)?\.npz|{_UNFINISHED.pattern}")
_SECONDS = 60.0
# Writing may take this share of the time: huge states are written more rarely.
_SHARE = 0.02

Arrays = dict[str, Array]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class ResumeFile:
    """Progress in a folder.

    Args:
        folder: made when there is something to write.
        question: what the replay was asked (`question_of`).
        seconds: between two writings.
        forced: whether the replay may replace an output that lies in the folder; so may the one that goes on from it.
        say: is told what a user should know.

    Attributes:
        path: of the file.
        notes: JSON values beside the state of the replay (`note`).
        say: as the argument.
    """

    def __init__(
        self,
        folder: Path,
        question: str,
        seconds: float = _SECONDS,
        *,
        forced: bool = False,
        say: Callable[[str], None] = _say,
    ) -> None:
        self.path = folder / NAME
        self.question = question
        self.notes: Json = {}
        self.say = say
        self._forced = forced
        self._seconds = seconds
        self._next = self._worth = time.monotonic() + seconds
        self._failed = False
        self._end: tuple[Json, Arrays] | None = None
        self._end_is_written = False

    def load(self) -> tuple[Json, Arrays] | None:
        """The values and arrays of an earlier replay of this question; None if there are none.

        Raises:
            OutputExistsError: if the file belongs to another question.
            TrajrecError: if it is damaged and cannot be set aside.
        """
        self._sweep()
        if not os.path.lexists(self.path):
            return None
        try:
            with _opened(self.path) as file:
                arrays = {name: file[name] for name in file.files}
            values = json.loads(str(arrays.pop("values")))
            question, self.notes = values.pop("question"), values.pop("notes", {})
            values.pop("forced", None)
        except Exception as error:  # NumPy, zipfile and zlib raise all kinds of errors on a damaged file
            self._set_aside(error)
            return None
        if question != self.question:
            raise OutputExistsError(
                f"{self.path.parent} holds the progress of another question. Choose another folder with --out, or "
                "throw it away with --force."
            )
        self.say(f"Going on from {self.path}.")
        return values, arrays

    def _set_aside(self, reason: Exception) -> None:
        number, aside = 1, self.path.with_name("progress-damaged.npz")
        while os.path.lexists(aside):
            number, aside = number + 1, self.path.with_name(f"progress-damaged-{number + 1}.npz")
        try:
            os.rename(self.path, aside)
        except OSError as error:
            raise TrajrecError(
                f"{self.path} cannot be read ({reason}), nor set aside ({error}). Choose another folder with --out."
            ) from None
        self.say(f"{self.path} is damaged ({reason}). It was set aside as {aside.name}; the replay begins anew.")

    def _sweep(self) -> None:
        """Deletes what a replay that was killed while it wrote has left."""
        with suppress(OSError):
            for path in self.path.parent.iterdir():
                if _UNFINISHED.fullmatch(path.name):
                    path.unlink()

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() >= self._next

    def save(self, values: Json, arrays: Arrays) -> bool:
        """Replaces the file. Returns whether it could be written; where it could not, that is said, once in a row."""
        began = time.monotonic()
        try:
            self._write(self.path, values, arrays)
            self._failed = False
        except OSError as error:
            self._complain(error)
        now = time.monotonic()
        self._next = now + max(self._seconds, (now - began) / _SHARE)
        return not self._failed

    def _write(self, path: Path, values: Json, arrays: Arrays) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".progress-{secrets.token_hex(8)}.tmp")
        whose = {"question": self.question, "forced": self._forced, "notes": self.notes}
        text = np.array(json.dumps(values | whose))
        try:
            with unfinished.open("xb") as file:
                np.savez(file, values=text, **arrays)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            with suppress(OSError):
                unfinished.unlink()

    def _complain(self, error: OSError) -> None:
        if not self._failed:
            reason = "The disk is full" if is_disk_full(error) else "The disk refused"
            self.say(
                f"{reason}: the progress could not be written into {self.path} ({error.strerror or error}). The replay "
                "goes on, and tries again from time to time."
            )
        self._failed = True

    def finish(self, values: Json, arrays: Arrays) -> None:
        """Takes the last state; written if it is worth the time, else kept in memory until the answer is written."""
        self._end = values, arrays
        if time.monotonic() >= self._worth:
            self._end_is_written = self.save(values, arrays)

    def note(self, name: str, value: Any) -> None:
        """Adds something that was found after the end."""
        self.notes[name] = value
        if self._end is not None:
            self.finish(*self._end)

    def keep(self) -> str:
        """Writes the last state where it can be, as the answer could not be written. Says where, and how to go on."""
        if self._end is None:
            return ""
        again = "the same command, without --force," if self._forced else "the same command"
        if self._end_is_written or self.save(*self._end):
            return f"What was computed is kept in {self.path}. Make room: {again} then only writes the answer."
        try:
            other = Path(tempfile.gettempdir()) / f"trajrec-{secrets.token_hex(4)}-{NAME}"
            self._write(other, *self._end)
        except OSError:
            kept = f"{self.path} holds what was computed until it was last written" if self.path.exists() else ""
            return f"{kept or 'None of the work could be kept'}. Make room, and give {again} again."
        return (
            f"What was computed is kept in {other}. Make room and move it to {self.path}: {again} goes on from there."
        )

    def remove(self) -> None:
        """Throws the progress away; a damaged file is set aside."""
        try:
            about(self.path)
        except FileNotFoundError:
            return
        except Exception as error:
            self._set_aside(error)
            return
        self.path.unlink(missing_ok=True)

    def remove_own(self) -> None:
        """Throws the progress away if it is of this question."""
        with suppress(Exception):
            if about(self.path)["question"] == self.question:
                self.path.unlink()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    # np.load by name leaves the file open where it is damaged.
    with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
        yield file


def about(path: Path) -> Json:
    """The values in a progress file. Raises whatever a damaged one makes NumPy raise."""
    with _opened(path) as file:
        values: Json = json.loads(str(file["values"]))
    return values


def is_foreign(path: Path) -> bool:
    """Whether a file can be read, and is no progress of ours; a damaged one may be ours."""
    try:
        with _opened(path) as file:
            return "values" not in file or "question" not in json.loads(str(file["values"]))
    except Exception:
        return False


def was_forced(path: Path) -> bool:
    """Whether the replay that left this progress was to replace an output beside it."""
    try:
        return about(path)["forced"] is True
    except Exception:
        return False

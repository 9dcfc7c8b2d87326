"""The progress of a long replay in a file, so that it goes on where it stopped after kill -9, Ctrl-C or a power cut.

Once a minute or so the state of the replay (arrays and a few JSON values, see `replay.contribution`) is written beside
the file, synced and renamed into its place: there is always one whole file or none. It carries the question that it
belongs to: a SHA-256 over everything that decides the numbers. Another question does not go on from it. The file is
plain .npz; nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trajrec.errors import OutputExistsError

NAME = "progress.npz"
_SECONDS = 60.0
# Writing may take this share of the time: huge states are written more rarely.
_SHARE = 0.02

Arrays = dict[str, npt.NDArray[Any]]


def question_of(facts: Mapping[str, Any]) -> str:
    """The SHA-256 of what a replay was asked, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class ProgressFile:
    """Progress in a folder.

    Args:
        folder: made when there is something to write.
        question: what the replay was asked (`question_of`).
        seconds: between two writings.
    """

    def __init__(self, folder: Path, question: str, seconds: float = _SECONDS) -> None:
        self.path = folder / NAME
        self.question = question
        self._seconds = seconds
        self._next = time.monotonic() + seconds

    def load(self) -> tuple[dict[str, Any], Arrays] | None:
        """The values and arrays of an earlier replay of this question; None if there are none.

        Raises:
            OutputExistsError: if the file belongs to another question, or cannot be read.
        """
        if not self.path.exists():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            values = json.loads(str(arrays.pop("values")))
        except (ValueError, OSError, KeyError, EOFError) as error:
            raise OutputExistsError(f"{self.path} cannot be read ({error}). Start anew with --force.") from None
        if values.pop("question") != self.question:
            raise OutputExistsError(
                f"{self.path.parent} holds the progress of another question. Choose another folder with --out, or "
                "throw it away with --force."
            )
        return values, arrays

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() >= self._next

    def save(self, values: dict[str, Any], arrays: Arrays) -> None:
        """Replaces the file."""
        began = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".{NAME}.{os.getpid()}.tmp")
        text = np.array(json.dumps(values | {"question": self.question}))
        try:
            with unfinished.open("wb") as file:
                np.savez(file, values=text, **arrays)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self.path)
        finally:
            unfinished.unlink(missing_ok=True)
        now = time.monotonic()
        self._next = now + max(self._seconds, (now - began) / _SHARE)

    def remove(self) -> None:
        """Throws the progress away."""
        self.path.unlink(missing_ok=True)

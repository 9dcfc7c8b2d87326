"""The Task of a run: the one that is named, or the one that the run notes, if it may be trusted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trajrec.cli.say import say
from trajrec.errors import DataMismatchError, TaskError

if TYPE_CHECKING:
    from trajrec.records import RunSpec
    from trajrec.runfile.reader.run import Run
    from trajrec.task.task import Task


@contextmanager
def task_of(reference: str | None, run: Run, trust: bool) -> Iterator[tuple[str, Task]]:
    """The reference and the Task named on the command line, or by the recording if its file is still the same.

    For the time of the block relative paths are seen from where the training ran: data sets may be read at any time.

    Raises:
        TaskError: if there is none, or it cannot be loaded, or it is named by a recording that is not the user's own.
        DataMismatchError: if the noted file has changed since.
    """
    found = _noted(run, trust) if reference is None else reference
    with ExitStack() as back:
        yield found, _loaded(found, run.spec, back)


def from_anywhere(path: Path) -> Path:
    """The path as seen from every folder: to be made before `task_of`."""
    return Path(os.path.abspath(path))


def _noted(run: Run, trust: bool) -> str:
    """The reference that the recording notes, if it may be used."""
    from trajrec.runfile import register
    from trajrec.task.loading import file_sha256, task_file

    noted = run.spec.task
    if noted is None:
        raise TaskError(
            "The run notes no Task, so replay does not know the model, the data and the loss. Pass --task FILE.py:ATTR "
            "(see `trajrec.Task`), now or with `trajrec record --task`."
        )
    if not trust and not register.has(run.spec):
        raise TaskError(
            f"This run was not recorded here by you, so the Task that it names ({noted!r}) is not run: a Task is code. "
            "Name one yourself with --task FILE.py:ATTR, or pass --trust to run the one that the run names."
        )
    file = task_file(noted)
    if file is not None and not file.is_file():
        raise TaskError(f"The Task noted in the run, {noted}, is not there any more. Pass --task FILE.py:ATTR.")
    if file is not None and file_sha256(file) != run.spec.task_sha256:
        raise DataMismatchError(
            f"The Task noted in the run, {noted}, has changed since the recording. If it still describes the training, "
            f"name it: --task {noted}. The certificate will tell."
        )
    say(f"Task: {noted} (noted in the run, unchanged)", err=True)
    return noted


def _loaded(reference: str, spec: RunSpec, back: ExitStack) -> Task:
    """The Task, seen from where the training ran; what it finds only from here is left here. `back` leads back here.

    Raises:
        TaskError: it cannot be loaded.
    """
    from trajrec.task.loading import absolute, load_task, task_file

    folder, file = _where_it_ran(spec), task_file(reference)
    if folder is None or (file is not None and not file.is_file()):
        return _loaded_here(reference, spec.folder)
    here, named = os.getcwd(), absolute(reference)
    back.callback(os.chdir, here)
    os.chdir(folder)
    try:
        task = load_task(named)
    except TaskError as error:
        os.chdir(here)
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        return _loaded_here(reference, spec.folder)
    say(f"Relative paths of the Task are seen from {folder}, where the training ran.", err=True)
    return task


def _where_it_ran(spec: RunSpec) -> str | None:
    """The folder of a training that this user recorded here; None if that is where we are, or it is gone."""
    from trajrec.runfile import register

    folder = spec.folder
    if folder is None or not os.path.isabs(folder) or not register.ran_in(spec, folder) or _is_here(folder):
        return None
    return folder if os.access(folder, os.R_OK | os.X_OK) and os.path.isdir(folder) else None


def _loaded_here(reference: str, folder: str | None) -> Task:
    """The Task; of a file that it does not find it is said where the script's relative paths were seen from."""
    from trajrec.task.loading import load_task

    try:
        return load_task(reference)
    except TaskError as error:
        if folder is None or not isinstance(error.__cause__, FileNotFoundError) or _is_here(folder):
            raise
        raise TaskError(f"{error}. The run was recorded in {folder}: relative paths were seen from there.") from None


def _is_here(folder: str) -> bool:
    return os.path.realpath(folder) == os.path.realpath(os.getcwd())

"""The Task of a run: the one that is named, or the one that the run notes, if it may be trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trajrec.cli.say import say
from trajrec.errors import DataMismatchError, TaskError

if TYPE_CHECKING:
    from trajrec.runfile.reader.run import Run
    from trajrec.task.task import Task


def task_of(reference: str | None, run: Run, trust: bool) -> tuple[str, Task]:
    """The reference and the Task named on the command line, or by the recording if its file is still the same.

    Raises:
        TaskError: if there is none, or it cannot be loaded, or it is named by a recording that is not the user's own.
        DataMismatchError: if the noted file has changed since.
    """
    from trajrec.runfile import register
    from trajrec.task.loading import file_sha256, task_file

    if reference is not None:
        return reference, _loaded(reference, run)
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
    return noted, _loaded(noted, run)


def _loaded(reference: str, run: Run) -> Task:
    """The Task; of a file that it does not find it is said where the script's relative paths were seen from.

    Raises:
        TaskError: it cannot be loaded.
    """
    from trajrec.task.loading import load_task

    try:
        return load_task(reference)
    except TaskError as error:
        folder = run.spec.folder
        if folder is None or not isinstance(error.__cause__, FileNotFoundError) or _is_here(folder):
            raise
        raise TaskError(f"{error}. The run was recorded in {folder}: relative paths were seen from there.") from None


def _is_here(folder: str) -> bool:
    import os

    return os.path.realpath(folder) == os.path.realpath(os.getcwd())

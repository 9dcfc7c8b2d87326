"""Finishing a recording that was cut off: `trajrec pack`.

A writer process is started on the folder, as the recorder would have done, and told to seal what is left in the
ring and to pack. This process writes no HDF5 either, so a full disk ends in an error here, and no worse.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from trajrec.errors import (
    DamagedRunError,
    DiskFullError,
    NotARunError,
    OutputExistsError,
    TrajrecError,
    is_disk_full,
    is_file_too_large,
)
from trajrec.runfile.folder import SUFFIX, Folder
from trajrec.runfile.format.geometry import Geometry
from trajrec.runfile.lock import Lock
from trajrec.runfile.manifest import Manifest
from trajrec.runfile.ring import Control, Finish, Ring, Status, create
from trajrec.runfile.trainer.process import WriterProcess


def pack(path: str | Path) -> Path:
    """Packs a recording's folder into one file and returns its path; a packed run is left as it is.

    Args:
        path: run.h5 or run.h5.rec.

    Raises:
        NotARunError: there is no recording.
        RecorderBusyError: it is being recorded.
        DamagedRunError: steps are missing or damaged, or a file of the folder is a link; it is left as it was.
        DiskFullError: no room for the packed file, or a limit on the size of files; the folder is left as it was.
        OutputExistsError: another run has that name.
    """
    path = Path(os.path.abspath(path))
    folder = Folder(path) if path.name.endswith(SUFFIX) else Folder.of(path)
    if not folder.path.is_dir():
        if folder.output.is_file():
            return folder.output
        raise NotARunError(f"There is no recording at {path}: neither {folder.output} nor {folder.path} exists.")
    folder.check_regular()
    lock = Lock(folder.lock)
    try:
        if folder.output.exists():
            return _remove_leftover(folder)
        return _finish(folder, _ring(folder, folder.read_manifest()), lock)
    finally:
        lock.release()


def _remove_leftover(folder: Folder) -> Path:
    """Deletes a folder whose packed file is there already: only its removal was cut off."""
    if folder.manifest.exists() or folder.segments():
        _check_same(folder)
    folder.remove()
    return folder.output


def _check_same(folder: Folder) -> None:
    from trajrec.runfile.reader.stored import holds

    if not holds(folder.output, folder.read_manifest().spec.run_id):
        raise OutputExistsError(f"{folder.output} holds another run. Move it away, then pack {folder.path} again.")


def _ring(folder: Folder, manifest: Manifest) -> Ring:
    """The folder's ring; an empty one where it is gone or unreadable, because the sealed segments stand without it."""
    try:
        return Ring(folder.ring, writable=True)
    except (OSError, ValueError, DamagedRunError):
        segments = folder.segments()
        first = segments[-1].stop if segments else 0
        nothing = Geometry(0, np.dtype(manifest.spec.dtype).itemsize, 1, 1, 1, 2, 4096)
        return _create(folder, nothing, first, manifest)


def _create(folder: Folder, nothing: Geometry, first: int, manifest: Manifest) -> Ring:
    try:
        return create(folder.ring, nothing, first, manifest.spec.dtype)
    except OSError as error:
        if is_disk_full(error):
            status = Status.FILE_TOO_LARGE if is_file_too_large(error) else Status.DISK_FULL
            raise _failure(folder, status, str(error)) from error
        raise DamagedRunError(
            f"{folder.ring}: the ring is damaged, and cannot be made anew ({error.strerror}). Move what is there away; "
            "the sealed segments stand without it."
        ) from error


def _finish(folder: Folder, ring: Ring, lock: Lock) -> Path:
    if ring.get(Control.FINISH) != Finish.COMPLETE:
        ring.set(Control.FINISH, Finish.RECOVERED)
    writer = WriterProcess(folder, ring, lock)
    try:
        while (status := writer.status()) is Status.RUNNING:
            writer.wait(0.1)
    finally:
        writer.close()
    if status is not Status.DONE:
        folder.sweep()
        raise _failure(folder, status, writer.reason())
    folder.remove()  # a writer may have been killed over it
    return folder.output


def _failure(folder: Folder, status: Status, reason: str) -> TrajrecError:
    """The error for a writer that could not pack."""
    if status is Status.DAMAGED:
        return DamagedRunError(reason)
    if status is Status.BLOCKED:
        return OutputExistsError(reason)
    size = f"{folder.packing_size() / 1e6:.0f} MB"
    if status is Status.FILE_TOO_LARGE:
        return DiskFullError(
            f"Packing {folder.path} takes a file larger than is allowed here (about {size}; see `ulimit -f`). Nothing "
            "is lost; raise the limit and pack again."
        )
    return DiskFullError(
        f"The disk is full: packing {folder.path} needs about {size}. Nothing is lost; make room and pack again."
    )

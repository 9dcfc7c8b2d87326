"""Forged files end in a result or in a clear refusal: no traceback, no hang, no memory out of proportion."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import trajrec
from tests.made import forging, small_run
from tests.made.forging import Forger
from tests.made.runfile_simulation import Simulation
from trajrec.cli.maintenance import _facts
from trajrec.errors import DamagedRunError, ReplayError, RunFileError, TrajrecError
from trajrec.replay.session import Session
from trajrec.runfile.format import trailer
from trajrec.runfile.reader.verify import verify
from trajrec.runfile.recovery import pack

SECONDS = 120


class Hang(BaseException):
    """Something does not come back."""


@contextmanager
def limited() -> Iterator[None]:
    """Refuses memory out of proportion, and interrupts what hangs."""
    import resource

    def stop(*_: object) -> None:
        raise Hang

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, before[1]))
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def refused(work: Callable[[], Any]) -> Any:
    """What comes out, or the refusal; one that hides a failed allocation is none."""
    try:
        return work()
    except TrajrecError as error:
        if isinstance(error.__cause__, MemoryError):
            raise error.__cause__ from None
        return error


def read_everything(path: Path, replay: bool) -> list[Any]:
    """All that Run, `info`, `verify` and a replay's beginning make of a recording."""
    found = [refused(lambda: verify(path))]
    opened = refused(lambda: trajrec.open(path))
    if isinstance(opened, TrajrecError):
        assert isinstance(opened, RunFileError)
        return [*found, opened]
    with opened as run:
        asks: list[Callable[[], Any]] = [lambda: _facts(run), lambda: run.changes, lambda: [*run.walk(0, run.steps)]]
        asks += [lambda: [*run.walk(run.steps, 0)], lambda: run.losses, lambda: run.size]
        for t in (0, 1, run.steps // 2, run.steps):
            asks += [lambda t=t: run.weights(t), lambda t=t: run.time(t), lambda t=t: run.crc32(t)]
        for name in ("sample_ids", "sample_weights", "hyperparameters", "rng", "parts", "digests", "inputs", "loss"):
            asks += [lambda t=t, name=name: getattr(run, name)(t) for t in {1, run.steps} if t]
        asks += [lambda t=t: run.keyframe(t) for t in run.keyframe_steps[:3]]
        if replay:
            asks.append(lambda: Session(run, small_run.task()))
        # Where no weights of a step are stored, that is said with a ReplayError.
        found += [refused(ask) for ask in asks]
    return found


@pytest.fixture(scope="module")
def forger(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        Simulation(patch)
        return Forger(tmp_path_factory.mktemp("forger"))


def try_out(forger: Forger, seed: int, folder: Path, packs: bool = False) -> None:
    path, said = forger.forge(seed, folder)
    try:
        with limited():
            read_everything(path, replay=seed % 3 == 0)
            if packs and path.is_dir():
                refused(lambda: pack(path))
    except BaseException as error:
        error.add_note(said)
        raise
    finally:
        shutil.rmtree(folder)
        folder.mkdir()


def test_what_was_not_forged_is_read(forger, tmp_path):
    for path in forger.packed + forger.folders:
        found = read_everything(path, replay=True)
        wrong = [one for one in found[1:] if isinstance(one, TrajrecError) and "keeps keyframes only" not in str(one)]
        assert not wrong
        assert found[0] == []


def forged(path: Path, into: Path, change: Callable[[h5py.File], None]) -> Path:
    """A copy with just this changed, and the checksum of the file mended."""
    shutil.copy(path, into)
    os.truncate(into, into.stat().st_size - trailer.SIZE)
    with h5py.File(into, "r+", libver=("v110", "v110"), locking=False) as file:
        change(file)
    trailer.append(into)
    return into


def replaced(name: str, **how: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, **how)

    return change


def noted(name: str, old: bytes, new: bytes) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        text = file["spec"].attrs[name]
        assert old in text
        file["spec"].attrs[name] = np.bytes_(text.replace(old, new))

    return change


@pytest.mark.parametrize("name", ["steps/epoch", "batches", "keyframes", "spec", "weights", "keyframes/0000000000"])
@pytest.mark.parametrize("kind", ["soft", "external"])
def test_no_link_is_followed_out_of_the_file(forger, tmp_path, name, kind):
    """Not even to a file that would do, and not on the way to what is asked for."""
    good = forger.folder / "zstd.h5"

    def change(file: h5py.File) -> None:
        file.move(name, "elsewhere")
        file[name] = h5py.ExternalLink(str(good), name) if kind == "external" else h5py.SoftLink("/elsewhere")

    path = forged(good, tmp_path / "run.h5", change)
    with pytest.raises(DamagedRunError, match="link to somewhere else"), trajrec.open(path) as run:
        run.weights(1)
        run.sample_ids(1)
        run.keyframe(0)
    assert any("link to somewhere else" in problem.message for problem in verify(path))


@pytest.mark.parametrize(
    "change",
    [
        replaced("weights", shape=(7, 2**40), dtype="<f4", chunks=(1, 64)),
        replaced("steps/crc32", shape=(2**44,), dtype="<u4", chunks=(64,)),
        replaced("steps/hyper", shape=(7, 2**34, 5), dtype="<f8"),
        replaced("batches/ids", shape=(2**50,), dtype="<i8", chunks=(64,)),
        replaced("keyframes/0000000000/buffers/1.running_mean", shape=(2**40,), dtype="<f4"),
        noted("groups", b"1", b"100000000000"),
        noted("params", b"[2, 2]", b"[2, 99999999999]"),
    ],
)
def test_what_a_file_does_not_hold_is_not_made_room_for(forger, tmp_path, change):
    path = forged(forger.folder / "zstd.h5", tmp_path / "run.h5", change)
    with limited():
        assert verify(path)
        assert any(isinstance(one, RunFileError) for one in read_everything(path, replay=True))


def test_a_step_without_samples_is_named(forger, tmp_path):
    def change(file: h5py.File) -> None:
        file["batches/ids_offsets"][...] = 1
        forging._mend_records(file)

    path = forged(forger.folder / "zstd.h5", tmp_path / "run.h5", change)
    assert verify(path) == []
    with trajrec.open(path) as run, pytest.raises(ReplayError, match="names no sample of step 1"):
        Session(run, small_run.task())


def test_a_refusal_leaves_the_library_to_other_threads(forger, tmp_path):
    """HDF5 is read by one thread at a time; a refusal in the middle of reading attributes kept its lock."""
    path = forged(
        forger.folder / "zstd.h5",
        tmp_path / "run.h5",
        lambda file: file["spec"].attrs.modify("command", np.bytes_(b"[")),
    )
    with pytest.raises(DamagedRunError) as kept:
        trajrec.open(path)
    read: list[int] = []
    other = threading.Thread(target=lambda: read.append(len(verify(forger.folder / "zstd.h5"))), daemon=True)
    other.start()
    other.join(60)
    assert read == [0], kept


def test_forged_files_are_refused_or_read(forger, tmp_path):
    for seed in range(25):
        try_out(forger, seed, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("block", range(50))
def test_many_forged_files_are_refused_or_read(forger, tmp_path, block):
    for seed in range(100 * block, 100 * (block + 1)):
        try_out(forger, seed, tmp_path, packs=seed % 10 == 0)

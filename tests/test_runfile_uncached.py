"""Writing past the page cache: the same bytes in the file, whatever the system allows."""

from __future__ import annotations

import errno
import os
import random
import zlib
from pathlib import Path

import pytest

from trajrec.runfile import uncached
from trajrec.runfile.uncached import BLOCK, Uncached

DIRECT = getattr(os, "O_DIRECT", 0)
BUFFER = 4 * BLOCK


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    monkeypatch.setattr(uncached, "BUFFER_BYTES", BUFFER)


def refuse(number: int):
    """A function that fails as a system call does."""

    def call(*_):
        raise OSError(number, os.strerror(number))

    return call


def as_it_is(_) -> None:
    """The file system of the tests."""


def without_the_flag(patch) -> None:
    """A system that knows of no such writes."""
    patch.delattr(os, "O_DIRECT", raising=False)


def refused_when_opened(patch) -> None:
    """A file system that says so when the file is opened."""
    real = os.open
    patch.setattr(
        os, "open", lambda path, flags, *a: (refuse(errno.EINVAL) if flags & DIRECT else real)(path, flags, *a)
    )


def refused_when_written(patch) -> None:
    """A file system that says so when it is written to."""
    real, direct = os.pwrite, spied_on(patch)
    patch.setattr(os, "pwrite", lambda fd, *a: (refuse(errno.EINVAL) if fd in direct else real)(fd, *a))


def in_short_pieces(patch) -> None:
    """A system that writes less than it was asked to, and past the page cache whole blocks only."""
    real, direct = os.pwrite, spied_on(patch)

    def pwrite(fd, data, at):
        if fd in direct and (at % BLOCK or len(data) % BLOCK):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        count = random.choice([BLOCK, BLOCK + 1] if fd in direct else [1, 100, BLOCK])
        return real(fd, data[:count], at)

    patch.setattr(os, "pwrite", pwrite)


def spied_on(patch) -> set[int]:
    """The descriptors that were opened for writes past the page cache; opened without where the system cannot."""
    real, direct = os.open, set()

    def spy(path, flags, *more):
        fd = real(path, flags & ~DIRECT, *more)
        (direct.add if flags & DIRECT else direct.discard)(fd)
        return fd

    patch.setattr(os, "open", spy)
    return direct


SYSTEMS = [as_it_is, without_the_flag, refused_when_opened, refused_when_written, in_short_pieces]


@pytest.fixture(params=SYSTEMS, ids=[system.__name__ for system in SYSTEMS])
def system(request, monkeypatch):
    if DIRECT or request.param in (as_it_is, without_the_flag):
        request.param(monkeypatch)
    else:
        pytest.skip("no writes past the page cache on this system")


def write(path: Path, start: int, pieces: list[bytes]) -> list[int]:
    """Writes as the row file does; the checksums that were returned."""
    fd = os.open(path, os.O_RDWR)
    try:
        with Uncached(path, fd, start) as out:
            return [out.write(memoryview(piece)) for piece in pieces]
    finally:
        os.close(fd)


@pytest.mark.parametrize("seed", range(40))
def test_the_file_is_what_was_written(tmp_path, system, seed):
    chance = random.Random(seed)
    sizes = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, BUFFER, 3 * BUFFER + 5, chance.randrange(3 * BUFFER)]
    before = chance.randbytes(chance.choice([0, 5, BLOCK, BUFFER + 1]))
    start = chance.randrange(len(before) + 1)
    pieces = [chance.randbytes(chance.choice(sizes)) for _ in range(chance.randrange(6))]
    path = tmp_path / "rows.bin"
    path.write_bytes(before)
    assert write(path, start, pieces) == [zlib.crc32(piece) for piece in pieces]
    new = b"".join(pieces)
    assert path.read_bytes() == before[:start] + new + before[start + len(new) :]


@pytest.mark.skipif(not DIRECT, reason="no writes past the page cache on this system")
def test_whole_blocks_go_past_the_page_cache(tmp_path, monkeypatch):
    real, direct, written = os.pwrite, spied_on(monkeypatch), {True: 0, False: 0}

    def pwrite(fd, data, at):
        written[fd in direct] += len(data)
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    path = tmp_path / "rows.bin"
    path.touch()
    write(path, 100, [bytes(3 * BUFFER)])
    assert written == {True: 3 * BUFFER - BLOCK, False: BLOCK}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("past_the_cache", [True, False])
def test_other_faults_are_not_hidden(tmp_path, monkeypatch, number, past_the_cache):
    real, direct = os.pwrite, spied_on(monkeypatch)
    faulty = past_the_cache and bool(DIRECT)
    monkeypatch.setattr(os, "pwrite", lambda fd, *a: (refuse(number) if (fd in direct) == faulty else real)(fd, *a))
    path = tmp_path / "rows.bin"
    path.touch()
    with pytest.raises(OSError, match=os.strerror(number)):
        write(path, 1, [bytes(2 * BUFFER)])


def test_nothing_more_is_written_after_a_fault(tmp_path):
    path = tmp_path / "rows.bin"
    path.touch()
    fd, open_before = os.open(path, os.O_RDWR), len(os.listdir("/dev/fd"))
    with pytest.raises(KeyboardInterrupt), Uncached(path, fd, 0) as out:
        out.write(memoryview(bytes(BUFFER + 5)))
        raise KeyboardInterrupt
    assert path.stat().st_size == BUFFER
    assert len(os.listdir("/dev/fd")) == open_before
    os.close(fd)

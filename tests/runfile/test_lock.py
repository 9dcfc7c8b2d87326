"""The lock: one recorder an output, and whoever only looks keeps nobody out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trajrec.errors import RecorderBusyError
from trajrec.runfile import lock as lock_module
from trajrec.runfile.lock import Lock, holder

ROOT = Path(__file__).parents[2]
POLL = """
import sys
from pathlib import Path
from trajrec.runfile.lock import holder

print("looking", flush=True)
while True:
    holder(Path(sys.argv[1]))
"""


@pytest.fixture
def path(tmp_path) -> Path:
    Lock(tmp_path / "lock").release()
    return tmp_path / "lock"


@pytest.fixture
def reader(path):
    """A process that looks at the lock all the time."""
    process = subprocess.Popen([sys.executable, "-c", POLL, path], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_a_free_lock_is_had_beside_a_reader(path, reader):
    for _ in range(300):
        Lock(path).release()
    assert reader.poll() is None


def test_a_reader_never_takes_another_reader_for_a_recorder(path, reader):
    assert [holder(path) for _ in range(2000)] == [None] * 2000
    assert reader.poll() is None


def test_a_held_lock_is_refused_after_a_few_tries(path, monkeypatch):
    naps = []
    monkeypatch.setattr(lock_module.time, "sleep", naps.append)
    held = Lock(path)
    with pytest.raises(RecorderBusyError, match=f"is being recorded by process {os.getpid()}"):
        Lock(path)
    assert 5 <= len(naps) <= 100
    assert sum(naps) <= 1
    assert holder(path) == os.getpid()
    held.release()
    assert holder(path) is None


def test_a_lock_that_comes_free_meanwhile_is_had(path, monkeypatch):
    held = Lock(path)
    monkeypatch.setattr(lock_module.time, "sleep", lambda _: held.release())
    Lock(path).release()


def test_looking_changes_nothing_and_needs_no_right_to_write(path):
    held = Lock(path)
    before = path.read_bytes()
    path.chmod(0o444)
    assert holder(path) == os.getpid()
    assert path.read_bytes() == before
    held.release()

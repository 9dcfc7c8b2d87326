"""Fixtures of the tests of the run file."""

import pytest

from tests.made.runfile_simulation import Simulation


@pytest.fixture
def simulation(monkeypatch) -> Simulation:
    """Writers that run in this process, a turn at a time: no test that can do with one waits for a process."""
    return Simulation(monkeypatch)


@pytest.fixture
def real_processes() -> None:
    """Asked for by tests that need writers of their own, where the others of a file do with simulated ones."""

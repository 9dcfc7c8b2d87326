"""Shared settings: one thread a test process, so that tests run beside each other and repeat to the bit."""

import os

import pytest
import torch

from trajrec.replay.derivatives.choice import right_forms

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _a_register_of_its_own(tmp_path_factory):
    """What the tests record, also in processes of their own, is not entered in the register of whoever runs them."""
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    yield
    if before is None:
        del os.environ["XDG_STATE_HOME"]
    else:
        os.environ["XDG_STATE_HOME"] = before


@pytest.fixture(autouse=True)
def _no_race_for_the_fastest_form(monkeypatch):
    """A replay takes the last form that serves instead of the fastest, so that two replays agree to the bit."""
    last = lambda candidates, trial: [*right_forms(candidates, trial)][-1]  # noqa: E731
    monkeypatch.setattr("trajrec.replay.derivatives.choice.fastest", last)


def pytest_collection_modifyitems(items):
    """The page of recipes takes the longest: where two work, the other is not to wait for it at the end."""
    items.sort(key=lambda item: "docs/recipes.md" not in item.nodeid)

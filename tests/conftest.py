"""Shared settings: one thread a test process, so that tests run beside each other and repeat to the bit."""

import pytest
import torch

from trajrec.replay.choice import right_forms

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_race_for_the_fastest_form(monkeypatch):
    """A replay takes the last form that serves instead of the fastest, so that two replays agree to the bit."""
    last = lambda candidates, trial: [*right_forms(candidates, trial)][-1]  # noqa: E731
    monkeypatch.setattr("trajrec.replay.choice.fastest", last)

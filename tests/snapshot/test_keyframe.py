"""Keyframes as a Snapshot makes them: whatever became of the states since the one before, they are those of now."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from trajrec.snapshot.model import Snapshot


def train(model, optimizer):
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).pow(2).sum().backward()
        optimizer.step()


def keyframe(snapshot):
    return {path: np.array(array) for path, array in snapshot.keyframe(with_weights=True).items()}


def expected(model, optimizer, name):
    """The row of a state, and which parameters have it."""
    parts, present = [], []
    for p in model.parameters():
        value = optimizer.state.get(p, {}).get(name)
        present.append(value is not None)
        parts.append(torch.zeros(p.numel()) if value is None else value.detach().reshape(-1).clone())
    return torch.cat(parts).numpy(), present


def remove(model, optimizer):
    del optimizer.state[model[0].weight]
    model[0].weight.requires_grad_(False)


def move(model, optimizer):
    state = optimizer.state[model[0].weight]
    state["exp_avg"].data = state["exp_avg"].data.clone()


def replace(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def turn_round(model, optimizer):
    state = optimizer.state[model[0].weight]
    state["exp_avg"] = state["exp_avg"].t().contiguous().t()


@pytest.mark.parametrize("change", [remove, move, replace, turn_round])
def test_a_keyframe_holds_the_states_of_now(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    train(model, optimizer)
    snapshot = Snapshot(model, optimizer)
    before = keyframe(snapshot)
    change(model, optimizer)
    for _ in range(2):
        train(model, optimizer)
        arrays = keyframe(snapshot)
        for name in ("exp_avg", "exp_avg_sq"):
            row, present = expected(model, optimizer, name)
            assert np.array_equal(arrays[f"optimizer/{name}"], row)
            assert arrays[f"optimizer/{name}.present"].tolist() == present
            assert not np.array_equal(row, before[f"optimizer/{name}"])
        weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()
        assert np.array_equal(arrays["weights"], weights)

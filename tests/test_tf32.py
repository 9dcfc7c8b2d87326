"""TensorFloat-32 is a setting of torch, which has two ways to say it; both can be read and put back on any machine."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from trajrec.tf32 import full_single_precision, rounds_products

NEW = hasattr(torch.backends.cudnn, "conv")
SETTINGS = {
    "nothing": "",
    "old": "torch.backends.cuda.matmul.allow_tf32 = True",
    "precision": "torch.set_float32_matmul_precision('high')",
    "off": "torch.backends.cudnn.allow_tf32 = False",
}
if NEW:
    SETTINGS |= {
        "new": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "all": "torch.backends.fp32_precision = 'tf32'",
        "mixed": "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    }
SEE = """
import torch
from trajrec.tf32 import full_single_precision
PLACES = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn] if NEW else []
def state():
    found = []
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        try: found.append(backend.allow_tf32)
        except RuntimeError: found.append("mixed")
    return found + [place.fp32_precision.replace("none", "ieee") for place in PLACES]
SETTING
before = state()
with full_single_precision():
    assert "tf32" not in state() and True not in state(), state()
assert state() == before, (before, state())
"""


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_is_put_back_however_it_was_made(setting):
    """In a process of its own: what torch is told of it stays told."""
    program = SEE.replace("SETTING", SETTINGS[setting]).replace("NEW", str(NEW))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("model", "rounds"),
    [(nn.Linear(2, 2), False), (nn.Conv1d(2, 2, 1), True), (nn.GRU(2, 2), True), (nn.BatchNorm1d(2), False)],
)
def test_by_default_what_cudnn_computes_is_rounded(model, rounds):
    assert rounds_products(model) is rounds
    with full_single_precision():
        assert not rounds_products(model)


def test_matrix_products_are_rounded_where_that_is_asked_for():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert rounds_products(nn.Linear(2, 2))
    finally:
        torch.set_float32_matmul_precision(before)

"""Low-rank adapters of peft on a frozen language model of transformers: a step takes the bytes of the adapters."""

from __future__ import annotations

import os
import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset

import trajrec
from trajrec.replay.methods.contributions import contributions
from trajrec.runfile.reader.verify import verify
from trajrec.vision import import_torchvision

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import_torchvision()  # which transformers asks for
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")
N, BATCH, WORDS = 16, 4, 32


def data():
    g = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randint(0, WORDS, (N, 6), generator=g), torch.arange(N))


def build(frozen=torch.float32):
    torch.manual_seed(3)
    rest = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=WORDS, n_positions=8, n_embd=32, n_layer=2, n_head=2, **rest)
    model = transformers.GPT2LMHeadModel(config).to(frozen)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


def losses_of(model, batch):
    logits = model(input_ids=batch[0]).logits[:, :-1]
    return functional.cross_entropy(logits.transpose(1, 2), batch[0][:, 1:], reduction="none").mean(1)


def train(steps, path=None, sample=None, eps=0.0, **options):
    made = build() if path is not None else build().double()
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)  # of all, as scripts do
    torch.manual_seed(0)
    loader = DataLoader(data(), BATCH, shuffle=True)

    def loop():
        for (ids, numbers), _ in zip(loader, range(steps), strict=False):
            optimizer.zero_grad()
            (losses_of(made, [ids]) * (1 + N * eps * (numbers == sample))).mean().backward()
            optimizer.step()

    if path is None:
        loop()
    else:
        with trajrec.record(path, model=made, optimizer=optimizer, loader=loader, **options):
            loop()
    return made


def test_a_step_takes_the_bytes_of_the_adapters_and_is_replayed_exactly(tmp_path):
    sizes = []
    for steps in (2, 4):
        train(steps, tmp_path / f"{steps}.h5", compression="none", keyframe_every=100)
        sizes.append(os.path.getsize(tmp_path / f"{steps}.h5"))
    adapters = sum(p.numel() for p in build().parameters() if p.requires_grad)
    assert sizes[1] - sizes[0] < 2 * (4 * adapters + 2048)
    assert verify(tmp_path / "4.h5") == []
    task = trajrec.Task(
        model=build, train=data(), test=Subset(data(), range(3)), loss=losses_of, collate=_together, measure=losses_of
    )
    with trajrec.open(tmp_path / "4.h5") as run:
        assert run.spec.row_length == adapters
        assert run.weights(4).keys() == dict(build().named_parameters()).keys()
        found = contributions(run, task, targets="mean", samples=np.arange(3), dtype="float64", exact=True)
    for sample, value in enumerate(found.values.reshape(-1)):
        up, down = (_target(train(4, sample=sample, eps=s * 1e-5)) for s in (1, -1))
        assert value == pytest.approx(-(up - down) / 2e-5 / N, rel=1e-3, abs=1e-7)


def _together(items):
    return [torch.stack([item[0] for item in items])]


def _target(model):
    with torch.no_grad():
        return losses_of(model.eval(), [data()[:3][0]]).mean().item()

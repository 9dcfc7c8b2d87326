"""Lightning's Trainer, whose optimizers step with a closure."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from tests.capture.frameworks.common import Numbered, certified, numbers, same_and_right, weights_of
from trajrec import Task, clip_norm
from trajrec.vision import import_torchvision

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import_torchvision()
    lightning = pytest.importorskip("lightning")

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):
    def __init__(self, manual=False, every=1, skipped=()):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.automatic_optimization = not manual
        self.every, self.skipped = every, skipped
        self.made, self.used = [], []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, number):
        if number in self.skipped:
            return None
        x, y = batch
        loss = cross_entropy(self(x), y)
        self.used += numbers(x)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        if (number + 1) % self.every == 0 or number + 1 == 6:
            self.made.append(self.used)
            self.used = []
        return loss

    def validation_step(self, batch, number):
        self.log("loss", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def trained(validates=True, **options):
    def train():
        torch.manual_seed(1)
        names = ("manual", "skipped")
        every = options.get("accumulate_grad_batches", 1)
        module = Module(every=every, **{name: options[name] for name in names if name in options})
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            enable_model_summary=False,
            **quiet,
            **{name: value for name, value in options.items() if name not in names},
        )
        loaders = [DataLoader(Numbered(), 8, shuffle=True), DataLoader(Numbered(), 11)]
        trainer.fit(module, *loaders[: 1 + validates])
        return weights_of(module), module.made

    return train


@pytest.mark.parametrize(
    "options",
    [
        {"validates": False},
        {"val_check_interval": 2},
        {"manual": True},
        {"accumulate_grad_batches": 4},
        {"gradient_clip_val": 0.1},
        {"skipped": (0, 3)},
    ],
    ids=str,
)
def test_lightning(options):
    same_and_right(trained(**options))


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.1}], ids=str)
def test_what_lightning_has_trained_is_certified(options):
    sink = same_and_right(trained(**options))
    clips = {"gradient": clip_norm(0.1)} if options else {}
    certified(sink, Task.supervised(Module, Numbered(), Numbered(), **clips))

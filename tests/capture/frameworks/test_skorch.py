"""skorch's fit(), whose optimizer steps with a closure."""

import pytest
import torch
from torch import nn

from tests.capture.frameworks.common import Numbered, X, Y, certified, numbers, same_and_right, weights_of
from trajrec import Task

skorch = pytest.importorskip("skorch")
helper = pytest.importorskip("skorch.helper")
pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def train(validates=True):
    torch.manual_seed(1)
    made = []

    class Watched(skorch.NeuralNetClassifier):
        def train_step_single(self, batch, **options):
            made.append(numbers(batch[0]))
            return super().train_step_single(batch, **options)

    net = Watched(
        Net,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=1e-2,
        max_epochs=2,
        batch_size=8,
        iterator_train__shuffle=True,
        verbose=0,
        train_split=helper.predefined_split(Numbered()) if validates else None,
    )
    net.fit(X.numpy(), Y.numpy())
    return weights_of(net.module_), made


@pytest.mark.parametrize("validates", [False, True])
def test_skorch(validates):
    certified(same_and_right(lambda: train(validates)), Task.supervised(Net, Numbered(), Numbered()))

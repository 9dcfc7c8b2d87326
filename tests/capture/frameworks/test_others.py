"""timm's loaders and optimizers, PyTorch Geometric's batches of graphs, peft's adapters."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import trajrec
from tests.capture.frameworks.common import Numbered, certified, numbers, same_and_right, weights_of
from trajrec.vision import import_torchvision

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import_torchvision()

pytestmark = pytest.mark.filterwarnings("ignore")


class Pictures(Dataset):
    pixels = torch.randint(0, 255, (20, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def __init__(self):
        self.transform = None

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return self.pixels[i].numpy(), i % 3


def test_timm_with_its_loader_an_average_of_weights_and_clipping():
    pytest.importorskip("timm")
    from timm.data.loader import PrefetchLoader, fast_collate
    from timm.utils import ModelEmaV3, dispatch_clip_grad

    data = Pictures()
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]) * 255, torch.tensor([0.229, 0.224, 0.225]) * 255

    def number(picture):
        pixels = (picture * deviation[:, None, None] + mean[:, None, None]).round().to(torch.uint8)
        return int((data.pixels == pixels).flatten(1).all(1).nonzero())

    def train():
        torch.manual_seed(0)
        model, made = nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), []
        ordinary = DataLoader(data, 5, shuffle=True, collate_fn=fast_collate)
        loader = PrefetchLoader(ordinary, device=torch.device("cpu"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        average = ModelEmaV3(model, decay=0.9)
        for _ in range(2):
            for x, y in loader:
                made.append([number(picture) for picture in x])
                loss = cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                dispatch_clip_grad(model.parameters(), 1.0, mode="norm")
                optimizer.step()
                average.update(model)
        return weights_of(model), made

    def losses(model, batch):
        return cross_entropy(
            model((batch[0].float() - mean[:, None, None]) / deviation[:, None, None]), batch[1], reduction="none"
        )

    def build():
        return nn.Sequential(nn.Flatten(), nn.Linear(768, 3))

    certified(same_and_right(train), trajrec.Task(build, data, data, loss=losses, collate=fast_collate))


def test_batches_of_graphs():
    pytest.importorskip("torch_geometric")
    from torch_geometric.data import Batch, Data
    from torch_geometric.loader import DataLoader as GraphLoader
    from torch_geometric.nn import GCNConv, global_mean_pool

    graphs = [
        Data(
            x=torch.randn(3 + i % 4, 4, generator=torch.Generator().manual_seed(i)),
            edge_index=torch.tensor([[0, 1, 2], [1, 2, 0]]),
            y=torch.tensor([i % 2]),
            number=i,
        )
        for i in range(20)
    ]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = GCNConv(4, 6), nn.Linear(6, 2)

        def forward(self, x, edges, batch):
            return self.b(global_mean_pool(self.a(x, edges).tanh(), batch))

    def train():
        torch.manual_seed(0)
        model, made = Net(), []
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(2):
            for batch in GraphLoader(graphs, 6, shuffle=True):
                made.append(batch.number.tolist())
                optimizer.zero_grad()
                cross_entropy(model(batch.x, batch.edge_index, batch.batch), batch.y).backward()
                optimizer.step()
        return weights_of(model), made

    def losses(model, batch):
        return cross_entropy(model(batch.x, batch.edge_index, batch.batch), batch.y, reduction="none")

    task = trajrec.Task(Net, graphs, graphs[:5], loss=losses, collate=Batch.from_data_list)
    certified(same_and_right(train), task)


def test_low_rank_adapters():
    peft = pytest.importorskip("peft")

    def train():
        torch.manual_seed(0)
        base, made = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), []
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for x, y in DataLoader(Numbered(), 8, shuffle=True):
            made.append(numbers(x))
            cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return weights_of(model), made

    same_and_right(train)

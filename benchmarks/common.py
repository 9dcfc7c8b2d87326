"""Models and data that several benchmarks share: LeNet-5, DenseNet-40, a small transformer; MNIST as IDX files."""

import gzip
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent / "cli" / "mnist"))

from model import LeNet5

__all__ = ["DenseNet40", "LeNet5", "Transformer", "images"]


def images(root, train=True):
    """MNIST from IDX files (.gz), normalised."""
    files = [root / f"{'train' if train else 't10k'}-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
    raw = [np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8) for file in files]
    x = torch.tensor(raw[0][16:].reshape(-1, 1, 28, 28), dtype=torch.float32) / 255
    return TensorDataset((x - 0.1307) / 0.3081, torch.tensor(raw[1][8:], dtype=torch.int64))


class _Bottleneck(nn.Module):
    def __init__(self, channels, growth):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(4 * growth)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv1(functional.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(functional.relu(self.norm2(y)))], 1)


class _Transition(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels // 2, 1, bias=False)

    def forward(self, x):
        return functional.avg_pool2d(self.conv(functional.relu(self.norm(x))), 2)


class DenseNet40(nn.Module):
    """DenseNet-BC of depth 40, growth 12, compression .5: 176,122 parameters for ten classes."""

    def __init__(self, growth=12):
        super().__init__()
        channels = 2 * growth
        layers = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
        for block in range(3):
            for _ in range(6):
                layers.append(_Bottleneck(channels, growth))
                channels += growth
            if block < 2:
                layers.append(_Transition(channels))
                channels //= 2
        self.features, self.norm, self.out = nn.Sequential(*layers), nn.BatchNorm2d(channels), nn.Linear(channels, 10)

    def forward(self, x):
        x = functional.relu(self.norm(self.features(x)))
        return self.out(x.mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.join(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A causal language model over bytes: four blocks of width 128, 863,232 parameters."""

    def __init__(self, length=32, width=128, blocks=4):
        super().__init__()
        self.embedding, self.place = nn.Embedding(256, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*[_Block(width, 4) for _ in range(blocks)])
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, x):
        return self.out(self.norm(self.blocks(self.embedding(x) + self.place)))

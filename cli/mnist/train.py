"""An ordinary training script: LeNet-5 on MNIST. Nothing in here knows that it may be recorded.

python train.py                       trains
trajrec record train.py               trains and records
trajrec replay                        asks which images made the model what it is

A list of images to train on can be given in the environment: TRAJREC_KEEP=keep.npy (see `trajrec clean --help`).
"""

import argparse
import os

import numpy as np
import torch
from data import mnist
from model import LeNet5
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset


def accuracy(model, data):
    model.eval()
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in DataLoader(data, 500))
    model.train()
    return right / len(data)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    train_set, test_set = mnist()
    if "TRAJREC_KEEP" in os.environ:
        train_set = Subset(train_set, np.load(os.environ["TRAJREC_KEEP"]).tolist())
    model = LeNet5()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loader = DataLoader(train_set, batch_size=64, shuffle=True)
    for epoch in range(options.epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {accuracy(model, test_set):.1%}")


if __name__ == "__main__":
    main()

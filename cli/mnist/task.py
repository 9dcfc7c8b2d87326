"""What train.py trains, for trajrec: the model, the data, and the loss of every sample."""

from data import mnist
from model import LeNet5
from torch.nn import CrossEntropyLoss

import trajrec

train, test = mnist()
task = trajrec.Task.supervised(LeNet5, train, test, CrossEntropyLoss(reduction="none"))

"""What the trainings of frameworks share: a data set that says which sample is which, and the proofs of a recording."""

import torch
from torch.utils.data import Dataset

from tests.made.memory_run import MemoryRun
from trajrec.capture.recorder import Recorder
from trajrec.replay import contributions
from trajrec.replay.proof.certificate import Verdict
from trajrec.sink import MemorySink

X = torch.randn(44, 4, generator=torch.Generator().manual_seed(5))
Y = torch.arange(44) % 3


class Numbered(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i], Y[i]


def numbers(x):
    """Which samples inputs [B, 4] are of."""
    return [int((row == X).all(1).nonzero()) for row in x]


def same_and_right(train):
    """Records `train() -> (weights, ids of every step)`: the bits of the plain one, and these ids. Returns the sink."""
    plain, _ = train()
    sink = MemorySink()
    with Recorder(sink) as recorder:
        weights, made = train()
    assert recorder.problem is None
    assert len(plain) == len(weights)
    assert all(map(torch.equal, plain, weights))
    assert made
    assert [sorted(record.ids.tolist()) for record in sink.records[1:]] == [sorted(ids) for ids in made]
    return sink


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


def certified(sink, task):
    """The exact contributions to the mean target, certified."""
    found = contributions(MemoryRun(sink), task, targets="mean")
    assert found.exact
    assert found.certificate.verdict in (Verdict.BIT_EXACT, Verdict.WITHIN_ROUNDING), found.certificate.sentence
    assert abs(found.values).max() > 0
    return found

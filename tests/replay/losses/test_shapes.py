"""Losses with other shapes than [B]: understood where they can be, named where they cannot."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from tests.made import loops
from tests.made.loops import Loop, N
from trajrec.errors import NonFiniteError, TaskError
from trajrec.replay import contributions
from trajrec.replay.losses.shapes import per_sample
from trajrec.replay.session import Session
from trajrec.task.criterion import cross_entropies
from trajrec.task.task import Task

SAMPLES = np.array([0, 5, 11])


def truth(loop, h=1e-5):
    """Contributions by central differences of whole trainings, [S, M]."""
    rows = []
    for sample in SAMPLES:
        eps = torch.zeros(N)
        eps[sample] = h
        change = loops.train(loop, eps).values - loops.train(loop, -eps).values
        rows.append(
            -change.flatten(1).mean(1).numpy() / (2 * h * N) if change.dim() > 1 else -change.numpy() / (2 * h * N)
        )
    return np.stack(rows)


def weighted(loss, reduce):
    """The loop's number: `reduce` of the losses [B, ...], each with its sample's weight."""

    def objective(model, batch, eps):
        losses = loss(model, batch)
        weights = (
            (1 + N * eps[batch[-1]]).view(-1, *[1] * (losses.dim() - 1)) if losses.dim() else 1 + N * eps[batch[-1]]
        )
        return reduce(losses * weights)

    return objective


def squares(model, batch):
    return (model(batch[0]) - batch[0]) ** 2


def absolute(model, batch):
    return (model(batch[0])[:, None, :, None] - batch[0][:, None, :, None]).abs() ** 1.5


def squeezed(model, batch):
    return ((model(batch[0])[:, :1] - batch[0][:, :1]) ** 2).squeeze()


def gently(model):
    return torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.8)


def wide():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))


@pytest.mark.parametrize("mode", ["adjoint", "tangent"])
@pytest.mark.parametrize(
    ("loss", "reduce", "options"),
    [
        (squares, torch.mean, {}),
        (squares, lambda losses: losses.sum(1).mean(), {}),
        (squares, torch.sum, {"batch_size": 4, "optimizer": gently}),
        (squares, torch.mean, {"batch_size": 4}),  # as many further values as samples
        (absolute, torch.mean, {}),
        (squeezed, torch.mean, {"batch_size": 17}),  # with a batch of one at the end
    ],
    ids=["mean", "mean of sums", "sum", "square", "more dimensions", "squeezed"],
)
def test_further_dimensions_are_reduced_as_the_loop_did(loss, reduce, options, mode):
    loop = Loop(build=wide, loss=loss, objective=weighted(loss, reduce), **options)
    made = loops.train(loop)
    found = contributions(made.run, made.task, targets="each", samples=SAMPLES, exact=True, mode=mode)
    expected = truth(loop)
    if reduce is not torch.mean:  # then so are the targets, which `truth` averages
        expected = expected * 4
    assert np.abs(found.values - expected).max() < 1e-6 * np.abs(expected).max()


def test_the_recorded_loss_tells_a_sum_within_samples_from_a_mean():
    for reduce, way in ((torch.mean, ("mean", "mean")), (lambda losses: losses.sum(1).mean(), ("sum", "mean"))):
        made = loops.train(Loop(build=wide, loss=squares, objective=weighted(squares, reduce)))
        function = Session(made.run, made.task).function
        assert (function.within, function.reduction) == way


def test_states_that_are_made_again_are_those_of_the_sum_within_samples():
    """Adam's, between keyframes, by the Task's losses once more."""
    summed = weighted(squares, lambda losses: losses.sum(1).mean())
    loop = Loop(build=wide, loss=squares, objective=summed, optimizer=lambda m: torch.optim.Adam(m.parameters(), 0.01))
    made = loops.train(loop)
    back, forth = (
        contributions(made.run, made.task, targets="each", samples=SAMPLES, mode=mode).values
        for mode in ("adjoint", "tangent")
    )
    np.testing.assert_allclose(back, forth, rtol=1e-8, atol=1e-12)


def test_outputs_that_are_broadcast_against_labels_are_named():
    def broadcast(model, batch):
        return (model(batch[0])[:, :1] - batch[0][:, 0]) ** 2

    made = loops.train(Loop(build=wide, loss=squares, objective=weighted(squares, torch.mean)))
    task = Task(wide, made.task.train, made.task.test, loss=broadcast)
    with pytest.raises(TaskError, match=r"6 x 6 values.*\[B, 1\].*broadcast to \[B, B\].*squeeze\(1\)"):
        contributions(made.run, task, exact=True)


def test_measures_that_are_broadcast_are_named():
    def broadcast(model, batch):
        return (model(batch[0])[:, :1] - batch[0][:, 0]) ** 2

    made = loops.train(Loop())
    task = Task(loops.mlp, made.task.train, made.task.test, loss=loops.per_sample, measure=broadcast)
    with pytest.raises(TaskError, match=r"Task\.measure gives 5 x 5 values"):
        contributions(made.run, task, exact=True)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (torch.tensor(1.0), r"a single number.*reduction='none'"),
        (torch.ones(12), r"returned \(12,\).*view\(len\(x\), -1\)\.mean\(1\)"),
        (None, "returned NoneType"),
    ],
)
def test_what_is_no_loss_of_samples_is_refused(values, words):
    with pytest.raises(TaskError, match=rf"one value for each of the 6 samples.*{words}"):
        per_sample(values, 6, "loss", "mean")


# -- cross entropy of several labels a sample --------------------------------------------------------------------------


def padded(n, seed):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randint(0, 9, (n, 5), generator=g), torch.randint(0, 9, (n, 5), generator=g)
    y[torch.rand(n, 5, generator=g) < 0.3] = -100
    y[3] = -100
    return x, y


def tokens():
    return nn.Sequential(nn.Embedding(9, 6), nn.Tanh(), nn.Linear(6, 9))


def all_tokens(model, batch, eps):
    """What F.cross_entropy gives over all valid tokens of a batch, with weights of samples."""
    losses = F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none").sum(1)
    return (losses * (1 + N * eps[batch[-1]])).sum() / (batch[1] != -100).sum()


def mean_tokens(model, batch):
    return cross_entropies(model(batch[0]), batch[1])


def test_supervised_understands_tokens_with_padding():
    loop = Loop(
        build=tokens, loss=mean_tokens, objective=all_tokens, data=lambda x, y: padded(len(x), len(x)), batch_size=6
    )
    made = loops.train(loop)
    train, test = (TensorDataset(*data.tensors[:2]) for data in (made.task.train, made.task.test))
    found = contributions(made.run, Task.supervised(tokens, train, test), targets="each", samples=SAMPLES, exact=True)
    expected = truth(loop)
    assert np.abs(found.values - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("outputs", "labels"), [((6, 3), (6,)), ((6, 5, 3), (6, 5)), ((6, 3, 5), (6, 5)), ((6, 3, 4, 5), (6, 4, 5))]
)
def test_classes_may_be_the_last_dimension_or_the_second(outputs, labels):
    scores, classes = torch.randn(outputs), torch.randint(0, 3, labels)
    second = scores if scores.shape[:1] + scores.shape[2:] == classes.shape else scores.movedim(-1, 1)
    expected = F.cross_entropy(second, classes, reduction="none").reshape(6, -1).mean(1)
    torch.testing.assert_close(cross_entropies(scores, classes), expected)


def test_labels_that_do_not_count():
    labels = torch.tensor([[0, -100], [-100, -100], [1, 2]])
    assert cross_entropies(torch.randn(3, 2, 3), labels)[1] == 0
    assert cross_entropies.counts(labels).tolist() == [1, 0, 2]
    assert cross_entropies.counts(torch.tensor([0, 1])) is None
    assert cross_entropies.counts(torch.tensor([0, -100])).tolist() == [1, 0]


def test_scores_and_labels_that_do_not_fit_are_named_by_their_shapes():
    with pytest.raises(TaskError, match=r"\[B, T, C\].*\(6, 5, 3\) and \(6, 4\)"):
        cross_entropies(torch.randn(6, 5, 3), torch.zeros(6, 4, dtype=torch.int64))
    with pytest.raises(TaskError, match=r"not dict and Tensor"):
        cross_entropies({}, torch.zeros(6))


# -- losses that are no numbers ----------------------------------------------------------------------------------------


def without_labels(model, batch):
    count = torch.where(batch[-1] == 7, 0, 1)
    return loops.per_sample(model, batch) * count / count


def counted(batch):
    return torch.where(batch[-1] == 7, 0.0, 1.0)


def counted_mean(model, batch, eps):
    counts = counted(batch)
    return (loops.per_sample(model, batch) * counts).sum() / counts.sum()


def test_a_sample_without_a_label_is_named():
    made = loops.train(Loop(objective=counted_mean))
    task = Task(
        loops.mlp, made.task.train, made.task.test, loss=without_labels, measure=loops.per_sample, weight=counted
    )
    with pytest.raises(NonFiniteError, match=r"for sample 7;.*weighs nothing.*clamp\(min=1\): it then counts nothing"):
        contributions(made.run, task, exact=True)


def test_a_test_sample_without_a_loss_is_named():
    made = loops.train(Loop())

    def measure(model, batch):
        return loops.per_sample(model, batch) / (batch[-1] != 3)

    task = Task(loops.mlp, made.task.train, made.task.test, loss=loops.per_sample, measure=measure)
    with pytest.raises(NonFiniteError, match=r"target loss .* is NaN or infinite for test sample 3"):
        contributions(made.run, task, targets=np.array([2, 3]), exact=True)

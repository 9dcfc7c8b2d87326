"""Loops without a loader: the ids that they have cut their batches by are found, or the step is refused."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import trajrec
from trajrec.capture.observing.rows import row_hashes
from trajrec.capture.recorder import Recorder
from trajrec.sink import MemorySink

N, B = 40, 8
COUNT = itertools.count()  # other data for every test: those of one before may be at hand yet
LABELS = torch.arange(N) % 3


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


class Loop:
    """A loop that knows what it trains on: `data` [N, 4], and `used`, the ids of its steps."""

    def __init__(self):
        self.net = model()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.data = torch.randn(N, 4, generator=torch.Generator().manual_seed(next(COUNT)))
        self.used = []

    def step(self, x, ids, picked=slice(None)):
        self.optimizer.zero_grad()
        cross_entropy(self.net(x)[picked], LABELS[torch.as_tensor(ids)].reshape(-1)[: len(ids)]).backward()
        self.optimizer.step()
        self.used.append(list(ids))


def by_index(loop):
    for _ in range(4):
        ids = torch.randint(0, N, (B,))
        loop.step(loop.data[ids], ids.tolist())


def by_permutation(loop):
    for _ in range(2):
        order = torch.randperm(N)
        for i in range(0, N, B):
            loop.step(loop.data[order[i : i + B]], order[i : i + B].tolist())


def in_order(loop):
    for i in range(0, N, B):
        loop.step(loop.data[i : i + B], range(i, i + B))


def in_order_with_twins(loop):
    loop.data[5] = loop.data[9]
    in_order(loop)


def whole(loop):
    for _ in range(3):
        loop.step(loop.data, range(N))


def masked(loop):
    mask = torch.arange(N) % 4 == 1
    for _ in range(3):
        loop.step(loop.data, mask.nonzero()[:, 0].tolist(), mask)


def by_list_of_nodes(loop):
    nodes = torch.tensor([7, 3, 20])
    for _ in range(3):
        loop.step(loop.data, nodes.tolist(), nodes)


def shuffled_copy(loop):
    for _ in range(2):
        order = torch.randperm(N)
        data = loop.data[order]
        for i in range(0, N, B):
            loop.step(data[i : i + B], order[i : i + B].tolist())


def of_array(loop):
    data = np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32)
    for _ in range(3):
        ids = np.random.default_rng(1).permutation(N)[:B]
        loop.step(torch.from_numpy(data[ids]), ids.tolist())


def of_another_type(loop):
    data = loop.data.double()
    del loop.data
    for _ in range(3):
        ids = torch.randint(0, N, (B,))
        loop.step(data[ids].float(), ids.tolist())


def bytes_scaled(loop):
    data = torch.randint(0, 256, (N, 4), dtype=torch.uint8)
    for _ in range(3):
        ids = torch.randint(0, N, (B,))
        loop.step(data[ids].float() / 255, ids.tolist())


def index_changed_in_place(loop):
    ids = torch.arange(B)
    for _ in range(3):
        ids += 3
        x = loop.data[ids]
        known = ids.tolist()
        loop.step(x, known)


def negative_and_lists(loop):
    for ids in ([-1, -2, 3], [0, -40 + 7]):
        loop.step(loop.data[ids], [i % N for i in ids])


def one_at_a_time(loop):
    for i in (3, 7, 3):
        loop.step(loop.data[i : i + 1], [i])


def evaluates_between(loop):
    held_out = torch.randn(10, 4)
    for _ in range(3):
        with torch.no_grad():
            loop.net(held_out)
        loop.net(held_out[:3])
        ids = torch.randint(0, N, (B,))
        loop.step(loop.data[ids], ids.tolist())


def evaluates_with_a_loader(loop):
    loader = DataLoader(TensorDataset(torch.randn(10, 4)), 5)
    for _ in range(3):
        with torch.no_grad():
            for (x,) in loader:
                loop.net(x)
        ids = torch.randint(0, N, (B,))
        loop.step(loop.data[ids], ids.tolist())


def accumulates(loop):
    for _ in range(3):
        ids = torch.randperm(N)[:B]
        loop.optimizer.zero_grad()
        for part in ids.split(4):
            cross_entropy(loop.net(loop.data[part]), LABELS[part]).backward()
        loop.optimizer.step()
        loop.used.append(ids.tolist())


def sparse_and_masked(loop):
    data, mask = loop.data.to_sparse(), torch.arange(N) % 3 == 1
    for _ in range(3):
        loop.step(data, mask.nonzero().reshape(-1).tolist(), mask)


FOUND = [by_index, by_permutation, in_order, in_order_with_twins, whole, masked, by_list_of_nodes, shuffled_copy]
FOUND += [of_array, of_another_type, bytes_scaled, index_changed_in_place, negative_and_lists, one_at_a_time]
FOUND += [sparse_and_masked, evaluates_between, evaluates_with_a_loader, accumulates]


def recorded(loop, run, **options):
    sink = MemorySink()
    with Recorder(sink, **options) as recorder:
        run(loop)
    return [record.ids.tolist() for record in sink.records[1:]], recorder, sink


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("run", FOUND)
def test_the_rows_that_made_a_step_are_found(run, given):
    loop = Loop()
    options = {"model": loop.net, "optimizer": loop.optimizer} if given else {}
    ids, recorder, sink = recorded(loop, run, **options)
    assert recorder.problem is None
    assert ids == loop.used
    assert (sink.spec.samples, sink.spec.data["ids"]) == (N, "rows")
    assert f"[{N}, 4]" in sink.spec.data["dataset"]


def with_noise(loop):
    for i in range(0, N, B):
        loop.step(loop.data[i : i + B] + torch.randn(B, 4), range(i, i + B))


def made_anew(loop):
    for _ in range(3):
        x = torch.randn(B, 4)
        loop.step(x, range(B))


def shuffled_in_its_own_name(loop):
    data = loop.data.clone()
    del loop.data
    for _ in range(2):
        data = data[torch.randperm(N)]
        for i in range(0, N, B):
            loop.step(data[i : i + B], range(i, i + B))


def sparse_made_anew(loop):
    for _ in range(2):
        x = torch.randn(B, 4).to_sparse()
        loop.step(x, range(B))


def twins(loop):
    loop.data[5] = loop.data[9]
    loop.step(loop.data[[5, 9, 2]], [5, 9, 2])


def mixed(loop):
    for _ in range(2):
        loop.step(loop.data[:4] * 0.5 + loop.data[4:8] * 0.5, range(4))


def with_numbers_of_words(loop):
    words, loop.net = torch.arange(N), nn.Sequential(nn.Embedding(N, 3))  # a vocabulary is no data set
    loop.optimizer = torch.optim.SGD(loop.net.parameters(), lr=0.1)
    loop.step(words[torch.randint(0, N, (B,))], range(B))


UNKNOWN = [with_noise, made_anew, sparse_made_anew, shuffled_in_its_own_name, twins, mixed, with_numbers_of_words]


@pytest.mark.parametrize("run", UNKNOWN)
def test_what_cannot_be_told_is_refused_with_the_line_to_write(run):
    ids, recorder, _ = recorded(Loop(), run)
    assert ids == []
    assert "trajrec.set_batch(ids)" in recorder.problem


def test_data_that_are_shuffled_in_place_later_end_the_recording():
    def run(loop):
        by_index(loop)
        loop.data[:] = loop.data[torch.randperm(N)]
        by_index(loop)

    loop = Loop()
    ids, recorder, _ = recorded(loop, run)
    assert ids == loop.used[:4]
    assert "was changed" in recorder.problem


def test_two_picks_of_the_same_outputs_are_refused():
    def run(loop):
        out = loop.net(loop.data)
        (out[:4].mean() + out[2:9].mean()).backward()
        loop.optimizer.step()

    ids, recorder, _ = recorded(Loop(), run)
    assert ids == []
    assert "picked" in recorder.problem


class Language:
    """A small language model and batches of windows."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 30))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        self.used = []

    def run(self, get_batch):
        x, y, ids = get_batch()
        for _ in range(4):
            loss = cross_entropy(self.net(x).flatten(0, 1), y.flatten())
            self.used.append(ids)
            x, y, ids = get_batch()  # ahead of the backward pass
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def of_tensor(folder):
    text = torch.randint(0, 30, (500,), generator=torch.Generator().manual_seed(1))

    def get_batch():
        at = torch.randint(0, 480, (4,))
        x, y = torch.stack([text[i : i + 8] for i in at]), torch.stack([text[i + 1 : i + 9] for i in at])
        return x, y, at.tolist()

    return get_batch


def of_file(folder):
    np.random.default_rng(0).integers(0, 30, 500).astype(np.uint16).tofile(folder / "train.bin")

    def get_batch():
        data = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r")
        ix = torch.randint(len(data) - 8, (4,))
        other = torch.randint(len(data) - 8, (4,)), torch.tensor(7)  # integers that are none of its places
        x = torch.stack([torch.from_numpy((data[i : i + 8]).astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy((data[i + 1 : i + 9]).astype(np.int64)) for i in ix])
        assert len(other) == 2
        return x, y, ix.tolist()

    return get_batch


@pytest.mark.parametrize("source", [of_tensor, of_file])
def test_windows_of_a_long_tensor_or_file_are_known_by_their_starts(source, tmp_path):
    loop = Language()
    ids, recorder, sink = recorded(loop, lambda loop: loop.run(source(tmp_path)))
    assert recorder.problem is None
    assert ids == loop.used
    assert (sink.spec.data["ids"], sink.spec.samples) == ("starts of windows", 493)


def test_stacking_is_as_it_was_after_a_recording_and_once_a_loader_trains():
    original, seen = torch.stack, []
    loop = Loop()
    loader = DataLoader(TensorDataset(loop.data), B)

    def run(loop):
        for (x,) in loader:
            loop.step(x, range(len(x)))
            torch.stack([x, x])
            seen.append(torch.stack is original)

    recorded(loop, run)
    assert all(seen)
    assert torch.stack is original


def test_scripts_that_torch_compiles_know_stacking_while_it_is_watched():
    with Recorder(MemorySink()):
        scripted = torch.jit._builtins._find_builtin(torch.stack)
        compiled = torch.compile(lambda x: torch.stack([x, x]) + 1, backend="eager", fullgraph=True)
        assert compiled(torch.zeros(2)).tolist() == [[1, 1], [1, 1]]
    assert scripted == "aten::stack"


def test_rows_that_differ_in_signs_or_order_have_other_numbers():
    rows = torch.tensor(
        [[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [-1.0, -1.0], [0.0, -0.0], [0.0, 0.0]], dtype=torch.float64
    )
    assert len({*row_hashes(rows).tolist()}) == len(rows)


class Stream(IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            x = torch.randn(4, generator=generator)
            yield x, (x[0] > 0).long()


def train_on_stream(path, **options):
    net = model().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    with trajrec.record(path, model=net, optimizer=optimizer, **options) as recorder:
        loader = DataLoader(Stream(), 6)
        for _ in range(2):
            for x, y in loader:
                optimizer.zero_grad()
                cross_entropy(net(x.double()), y).backward()
                optimizer.step()
    return recorder


def test_a_stream_is_numbered_in_the_order_of_arrival_only_if_asked(tmp_path):
    assert "--ids order" in train_on_stream(tmp_path / "no.h5").problem
    train_on_stream(tmp_path / "run.h5", ids="order")
    with trajrec.open(tmp_path / "run.h5") as run:
        ids = np.concatenate([run.sample_ids(t) for t in range(1, run.steps + 1)])
        assert ids.tolist() == [*range(40)]
        assert run.spec.data["ids"] == "order of arrival"


HELD_OUT = TensorDataset(torch.linspace(-1, 1, 12).reshape(3, 4).double(), torch.tensor([0, 1, 2]))


def losses(net, batch):
    return cross_entropy(net(batch[0].to(next(net.parameters()).dtype)), batch[1], reduction="none")


def held_out_loss(batches, factor):
    """The mean test loss after these steps; `factor` counts the loss of a sample, by step and place."""
    net = model().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for t, batch in enumerate(batches):
        optimizer.zero_grad()
        (losses(net, batch) * factor(t, len(batch[1]))).mean().backward()
        optimizer.step()
    return losses(net, HELD_OUT.tensors).mean().item()


def weighed(step, place, by):
    return lambda t, count: torch.ones(count).double() + by * (torch.arange(count) == place) * (t == step)


def test_a_stored_stream_is_replayed_exactly_without_it(tmp_path):
    train_on_stream(tmp_path / "run.h5", ids="order", inputs="store")
    task = trajrec.Task(lambda: model().double(), range(40), HELD_OUT, loss=losses)
    with trajrec.open(tmp_path / "run.h5") as run:
        found = trajrec.replay.contributions(run, task, targets="mean")
    batches = [*DataLoader(Stream(), 6)] * 2
    for step, place, i in [(0, 1, 1), (2, 0, 12), (4, 3, 23), (7, 1, 39)]:
        up, down = (held_out_loss(batches, weighed(step, place, by)) for by in (1e-4, -1e-4))
        assert np.asarray(found.values).reshape(-1)[i] == pytest.approx(-(up - down) / 2e-4, rel=1e-5)


def test_a_run_found_by_its_rows_is_replayed_with_a_certificate(tmp_path):
    loop = Loop()
    with trajrec.record(tmp_path / "run.h5", model=loop.net, optimizer=loop.optimizer):
        by_permutation(loop)
    task = trajrec.Task(model, TensorDataset(loop.data, LABELS), HELD_OUT, loss=losses)
    with trajrec.open(tmp_path / "run.h5") as run:
        found = trajrec.replay.contributions(run, task, targets="mean")
    assert found.samples.tolist() == [*range(N)]
    assert np.isfinite(found.values).all()

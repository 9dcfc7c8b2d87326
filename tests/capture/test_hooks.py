"""Which samples made a step: told right for every way that loops draw their batches, or refused with a reason."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

import trajrec
from trajrec.capture.attribution import reading
from trajrec.capture.attribution.batches import Part, joined
from trajrec.capture.observing.digesting import SampleSet
from trajrec.capture.recorder import Recorder
from trajrec.errors import RecordingError, UnknownBatchError, UnsupportedOptimizerError
from trajrec.sink import MemorySink


class Identified(Dataset):
    """Item i is i, so that the loop itself knows which samples a batch holds."""

    def __len__(self):
        return 23

    def __getitem__(self, i):
        return torch.tensor([float(i)])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(6.0).reshape(6, 1))


def loop(loader, validation=None, passes=2, recorder=None):
    """An ordinary loop. Returns the ids of every step as the loop saw them."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sink = MemorySink()
    seen = []
    with Recorder(sink, **({"model": model, "optimizer": optimizer} if recorder is None else recorder)):
        for _ in range(passes):
            for x in loader:
                optimizer.zero_grad()
                model(x).mean().backward()
                optimizer.step()
                seen.append(x.long().reshape(-1).tolist())
                if validation is not None:
                    validation(model)
    return [r.ids.tolist() for r in sink.records[1:]], seen, sink


LOADERS = {
    "shuffle": {"batch_size": 5, "shuffle": True},
    "drop last": {"batch_size": 5, "shuffle": True, "drop_last": True},
    "workers": {"batch_size": 4, "shuffle": True, "num_workers": 2},
    "persistent workers": {"batch_size": 4, "shuffle": True, "num_workers": 2, "persistent_workers": True},
    "generator": {"batch_size": 4, "shuffle": True, "generator": torch.Generator().manual_seed(3)},
    "batch sampler": {"batch_sampler": BatchSampler(RandomSampler(range(23), replacement=True), 6, False)},
    "no batching": {"batch_size": None, "sampler": [3, 1, 4, 1, 5]},
    "batched sampler": {"batch_size": None, "sampler": [7]},
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("find_everything", [False, True])
def test_ids_are_those_that_the_loop_saw(name, find_everything):
    recorded, seen, sink = loop(DataLoader(Identified(), **LOADERS[name]), recorder={} if find_everything else None)
    assert recorded == seen
    half = len(seen) // 2
    assert [r.epoch for r in sink.records[1:]] == [0] * half + [1] * half


def evaluation(gradients, mode, own_data):
    """A validation pass between steps, in all the ways that loops write it."""
    data = Identified() if own_data else None

    def run(model):
        loader = DataLoader(data if own_data else run.training, batch_size=8)
        model.train(mode)
        with torch.set_grad_enabled(gradients):
            for x in loader:
                model(x).mean()
        model.train()

    return run


@pytest.mark.parametrize("find_everything", [False, True])
@pytest.mark.parametrize(
    ("gradients", "mode", "own_data"),
    [(False, False, True), (False, True, True), (True, False, True), (True, True, True), (False, False, False)],
)
def test_validation_passes_are_no_training_batches(gradients, mode, own_data, find_everything):
    training = Identified()
    validation = evaluation(gradients, mode, own_data)
    validation.training = training
    loader = DataLoader(training, batch_size=5, shuffle=True)
    recorded, seen, _ = loop(loader, validation, recorder={} if find_everything else None)
    assert recorded == seen


def test_an_abandoned_pass_and_a_skipped_batch_are_told_apart():
    model, sink = nn.Linear(1, 1), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loader, seen = DataLoader(Identified(), batch_size=4, shuffle=True, num_workers=1), []
    with Recorder(sink, model=model, optimizer=optimizer, loader=loader):
        for _ in range(3):
            for i, x in enumerate(loader):
                if i == 1:
                    continue
                model(x).mean().backward()
                optimizer.step()
                seen.append(x.long().reshape(-1).tolist())
                if i == 3:
                    break
    assert [r.ids.tolist() for r in sink.records[1:]] == seen


@pytest.mark.parametrize("name", LOADERS)
def test_a_loop_with_one_batch_at_a_time_is_read_as_any_other(name, monkeypatch):
    def recorded():
        LOADERS["generator"]["generator"].manual_seed(3)
        return [replace(r, time=0.0) for r in loop(DataLoader(Identified(), **LOADERS[name]))[2].records]

    ordinary = recorded()
    monkeypatch.setattr(reading, "read_ordinary", lambda known, facts: None)
    assert [*map(repr, ordinary)] == [*map(repr, recorded())]


def test_batches_are_summed_where_a_sample_is_new_and_now_and_then_later():
    _, _, sink = loop(DataLoader(Identified(), batch_size=2), passes=8)
    summed = [t for t, record in enumerate(sink.records) if len(record.digests)]
    assert summed == [*range(1, 13), 32, 33, 64, 65, 96]


@pytest.mark.parametrize("batches_an_epoch", [1, 3])
def test_every_sample_is_summed_where_it_comes_first(batches_an_epoch):
    class Some(DataLoader):
        def __iter__(self):
            return islice(super().__iter__(), batches_an_epoch)

    _, _, sink = loop(Some(Identified(), batch_size=2, shuffle=True), passes=24)
    summed = set()
    for record in sink.records[1:]:
        new = set(record.ids.tolist()) - summed
        assert len(record.digests) or not new
        summed |= new


def test_a_step_of_a_batch_that_was_summed_and_one_that_was_not():
    parts = [Part(np.array([k, k + 1]), digest=digest) for k, digest in enumerate((None, 7))]
    assert joined(parts, ()).digests == (-1, 7)
    assert joined(parts[:1], ()).digests is None


def test_a_set_of_samples():
    some = SampleSet(6)
    some.add(np.array([1, 4, 4]))
    assert some.holds(np.array([4, 1]))
    assert not some.holds(np.array([4, 2]))
    some.add(np.array([9]))
    assert not some.holds(np.array([9]))
    some.add(np.array([0, 2, 3, 5]))
    assert some.holds(np.arange(6))


def test_micro_batches_of_one_step_are_joined():
    model, sink = nn.Linear(1, 1), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loader, seen = DataLoader(Identified(), batch_size=4, shuffle=True), []
    with Recorder(sink, model=model, optimizer=optimizer, loader=loader):
        for i, x in enumerate(loader):
            (model(x).mean() / 2).backward()
            seen += x.long().reshape(-1).tolist()
            if i % 2:
                optimizer.step()
    assert [i for r in sink.records[1:] for i in r.ids.tolist()] == seen
    assert [len(r.ids) for r in sink.records[1:]] == [8, 8, 7]


def test_the_loss_is_that_of_the_loop():
    losses = []
    model, sink = nn.Linear(1, 1), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Recorder(sink, model=model, optimizer=optimizer):
        for x in DataLoader(Identified(), batch_size=4):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert [r.loss for r in sink.records[1:]] == losses


def test_loops_without_a_loader_name_their_samples():
    model, sink = nn.Linear(1, 1), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Recorder(sink, model=model, optimizer=optimizer):
        trajrec.set_batch([4, 2])
        model(torch.ones(2, 1)).mean().backward()
        optimizer.step()
        trajrec.set_batch(torch.tensor([1, 1, 7]), weights=[0.5, 0.25, 0.25])
        model(torch.ones(3, 1)).mean().backward()
        optimizer.step()
    assert [r.ids.tolist() for r in sink.records[1:]] == [[4, 2], [1, 1, 7]]
    assert sink.records[1].weights is None
    assert sink.records[2].weights.tolist() == [0.5, 0.25, 0.25]
    trajrec.set_batch([1])  # no recording is on: nothing happens


@pytest.mark.parametrize(
    ("ids", "weights", "message"),
    [([0.5], None, "needs integer sample ids"), ([1, 2], [1.0], "2 ids but 1 weights")],
)
def test_wrong_names_are_refused(ids, weights, message):
    with pytest.raises(UnknownBatchError, match=message):
        trajrec.set_batch(ids, weights)


def step_without(loader):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Recorder(MemorySink(), model=model, optimizer=optimizer, strict=True):
        for x in loader:
            model(x).mean().backward()
            optimizer.step()


class Named(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, key):
        return torch.ones(1)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Stream(), batch_size=2), "Stream is an iterable data set"),
        (DataLoader(Named(), sampler=["a", "b"], batch_size=1), "does not draw integer ids"),
        (torch.ones(2, 3, 1), "No batch of a DataLoader was seen"),
        (DataLoader(Identified(), batch_size=4, num_workers=1, in_order=False), "in_order=False"),
    ],
)
def test_batches_that_cannot_be_told_are_an_error_that_says_what_to_do(loader, message):
    with pytest.raises(UnknownBatchError, match=message) as caught:
        step_without(loader)
    assert "Call trajrec.set_batch(ids)" in str(caught.value)


def test_everything_is_put_back_afterwards():
    loader = DataLoader(Identified(), batch_size=4)
    before = (DataLoader.__iter__, torch.autograd.backward, loader.batch_sampler)
    loop(loader)
    assert (DataLoader.__iter__, torch.autograd.backward, loader.batch_sampler) == before
    with pytest.raises(UnknownBatchError):
        step_without(torch.ones(1, 1, 1))
    assert (DataLoader.__iter__, torch.autograd.backward) == before[:2]


def noisy_training(record):
    """A training that draws random numbers everywhere. Returns final weights and the generators' next numbers."""
    torch.manual_seed(5)
    np.random.seed(5)
    data = TensorDataset(torch.randn(30, 4), torch.randn(30, 1))
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    loader = DataLoader(data, batch_size=7, shuffle=True)

    def train():
        for _ in range(3):
            for x, y in loader:
                optimizer.zero_grad()
                (model(x + 0.1 * torch.randn_like(x)) - y).square().mean().backward()
                optimizer.step()

    if record:
        with Recorder(MemorySink(interval=2), model=model, optimizer=optimizer, loader=loader):
            train()
    else:
        train()
    weights = torch.cat([v.reshape(-1).double() for v in model.state_dict().values()])
    return weights, torch.randn(3), np.random.rand(3)


def test_training_is_the_same_to_the_bit_with_and_without_the_recorder():
    (w0, r0, n0), (w1, r1, n1) = noisy_training(False), noisy_training(True)
    assert torch.equal(w0, w1)
    assert torch.equal(r0, r1)
    assert (n0 == n1).all()


def test_random_states_are_recorded_only_for_steps_that_consumed_randomness():
    for build, expected in ((lambda: nn.Linear(1, 1), 0), (lambda: nn.Sequential(nn.Dropout(), nn.Linear(1, 1)), 5056)):
        model, sink = build(), MemorySink()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with Recorder(sink, model=model, optimizer=optimizer):
            for x in DataLoader(Identified(), batch_size=4, shuffle=True):
                model(x).mean().backward()
                optimizer.step()
        assert {len(r.rng) for r in sink.records[1:]} == {expected}


def test_half_precision_weights_are_recorded_as_their_bits():
    model, sink = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).to(torch.bfloat16)), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Recorder(sink, model=model, optimizer=optimizer, strict=True):
        for x in DataLoader(Identified(), batch_size=4):
            model[1](model[0](x).bfloat16()).mean().backward()
            optimizer.step()
    last = torch.from_numpy(sink.rows[-1])
    assert [p.dtype for p in sink.spec.params] == ["float32"] * 2 + ["bfloat16"] * 2
    assert torch.equal(last[2:].bfloat16(), torch.cat([p.detach().reshape(-1) for p in model[1].parameters()]))
    assert torch.equal(last[2:].bfloat16().float(), last[2:])


def test_complex_weights_are_refused_by_name():
    model = nn.Linear(1, 1, dtype=torch.complex64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with (
        pytest.raises(RecordingError, match="weight is trained, and is complex64"),
        Recorder(MemorySink(), model=model, optimizer=optimizer, strict=True),
    ):
        for x in DataLoader(Identified(), batch_size=4):
            model(x.to(torch.complex64)).abs().mean().backward()
            optimizer.step()


def test_a_second_optimizer_on_the_same_weights_is_refused():
    model = nn.Linear(1, 1)
    first, second = (torch.optim.SGD(model.parameters(), lr=1e-3) for _ in range(2))
    with pytest.raises(RecordingError, match="second optimizer has stepped"), Recorder(MemorySink(), strict=True):
        for optimizer in (first, second):
            model(next(iter(DataLoader(Identified(), batch_size=4)))).mean().backward()
            optimizer.step()


def test_an_optimizer_without_a_rule_is_refused_at_the_start():
    model = nn.Linear(1, 1)
    recorder = Recorder(MemorySink(), model=model, optimizer=torch.optim.LBFGS(model.parameters()), strict=True)
    with pytest.raises(UnsupportedOptimizerError, match="LBFGS"), recorder:
        pass


def test_an_optimizer_of_parts_of_several_models_needs_to_be_told_the_model():
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    optimizer = torch.optim.SGD([*a.parameters(), *b.parameters()], lr=1e-3)
    with (
        pytest.raises(RecordingError, match=r"holds all 4 parameters.*record\(model="),
        Recorder(MemorySink(), strict=True),
    ):
        for x in DataLoader(Identified(), batch_size=4):
            b(a(x)).mean().backward()
            optimizer.step()


def three_steps(change, optimizer=None, **options):
    """A loop of three steps; `change(model, optimizer, step)` is called before each."""
    model, sink = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1)), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(sink, model=model, optimizer=optimizer, **options):
        for step, x in enumerate(DataLoader(Identified(), batch_size=8)):
            step_arguments = change(model, optimizer, step) or ()
            optimizer.zero_grad()
            model(x).mean().backward()
            optimizer.step(*step_arguments)
    return sink


def test_several_functions_of_a_step_are_refused():
    with pytest.raises(RecordingError, match=r"SGD.step\(\) was given 2 functions"):
        three_steps(lambda *_: (lambda: None, lambda: None), strict=True)


def test_parameters_that_the_model_did_not_have_are_refused_at_their_step():
    def add(model, optimizer, step):
        if step == 2:
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})

    with pytest.raises(RecordingError, match="Before step 3 the optimizer was given parameters"):
        three_steps(add, strict=True)


def test_an_optimizer_that_never_steps_is_said():
    model = nn.Linear(1, 1)
    recorder = Recorder(MemorySink(), model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), strict=True)
    with pytest.raises(RecordingError, match="made no step: nothing was recorded"), recorder:
        pass


def test_a_loader_must_be_a_data_loader():
    with pytest.raises(RecordingError, match="takes the DataLoader of the training, not Identified"):
        three_steps(lambda *_: None, loader=Identified())


def test_a_look_at_the_data_before_training_is_no_epoch():
    loader = DataLoader(Identified(), batch_size=8)
    model, sink = nn.Linear(1, 1), MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Recorder(sink, model=model, optimizer=optimizer, loader=loader):
        next(iter(loader))
        for _ in range(2):
            for x in loader:
                model(x).mean().backward()
                optimizer.step()
    assert [r.epoch for r in sink.records[1:]] == [0] * 3 + [1] * 3


def test_a_script_that_exits_well_has_a_complete_recording():
    for code, complete in ((0, True), (None, True), (3, False)):
        model, sink = nn.Linear(1, 1), MemorySink()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with pytest.raises(SystemExit), Recorder(sink, model=model, optimizer=optimizer):
            for x in DataLoader(Identified(), batch_size=8):
                model(x).mean().backward()
                optimizer.step()
            raise SystemExit(code)
        assert sink.complete is complete


def test_named_samples_replay_like_those_of_a_loader():
    """Without a data set at recording the Task's data set tells N."""
    from tests.made.memory_run import MemoryRun
    from trajrec.replay import contributions, hypergradients
    from trajrec.task.task import Task

    x, y = torch.randn(14, 2), torch.randn(14)
    task = Task(
        lambda: nn.Linear(2, 1), TensorDataset(x, y), TensorDataset(x, y), loss=lambda m, b: (m(b[0])[:, 0] - b[1]) ** 2
    )
    runs = []
    for named in (True, False):
        torch.manual_seed(0)
        model, sink = nn.Linear(2, 1), MemorySink()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = [[0, 1, 2], [3, 4, 5], [0, 2, 13]]
        loader = (
            [(x[ids], y[ids]) for ids in batches] if named else DataLoader(TensorDataset(x, y), batch_sampler=batches)
        )
        with Recorder(sink, model=model, optimizer=optimizer):
            for (a, b), ids in zip(loader, batches, strict=True):
                if named:
                    trajrec.set_batch(ids)
                ((model(a)[:, 0] - b) ** 2).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        runs.append(MemoryRun(sink))
    one, other = (contributions(run, task, exact=True).values for run in runs)
    assert one.shape == (14, 1)
    assert (one == other).all()
    with hypergradients(runs[0], task, samples=[13]) as h, hypergradients(runs[1], task, samples=[13]) as g:
        assert torch.equal(h[13]["weight"], g[13]["weight"])


class LateCopy:
    """Stands in for a device: gives the row only when asked, from a copy made at the step."""

    def start(self, values, losses):
        self.row = torch.cat([v.clone() for v in values]).numpy()
        self.loss = float(sum(losses)) if losses else float("nan")

    def finish(self):
        return self.row, self.loss


def test_rows_that_travel_give_the_same_recording(monkeypatch):
    """The recorder's side of copying from a device: every step is handed over one step late, nothing else differs."""
    from trajrec.snapshot.model import Snapshot

    loader = DataLoader(Identified(), batch_size=5)
    _, _, direct = loop(loader)
    monkeypatch.setattr(Snapshot, "transfer", lambda self: LateCopy())
    _, _, late = loop(loader)
    assert [r.step for r in late.records] == [r.step for r in direct.records]
    for a, b, r, s in zip(direct.rows, late.rows, direct.records, late.records, strict=True):
        assert (a == b).all()
        assert r.crc32 == s.crc32
        assert r.loss == s.loss or r.step == 0
    assert [k.step for k in late.keyframes] == [k.step for k in direct.keyframes]


@pytest.mark.cuda
def test_training_on_cuda_is_recorded_and_replayed():
    from tests.made.memory_run import MemoryRun
    from trajrec.replay import contributions
    from trajrec.task.task import Task

    def build():
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(40, 4), torch.randint(0, 3, (40,)))
    model, sink = build().cuda(), MemorySink(interval=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with Recorder(sink, model=model, optimizer=optimizer):
        for x, y in DataLoader(data, batch_size=8, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.cuda()), y.cuda()).backward()
            optimizer.step()
    final = torch.cat([p.detach().cpu().reshape(-1) for p in model.parameters()]).numpy()
    assert (sink.rows[-1] == final).all()
    found = contributions(MemoryRun(sink), Task.supervised(build, data, data), exact=True, device="cuda")
    assert found.certificate.verdict in ("bit-exact", "within rounding")

"""Ids are right or absent, never wrong: loaders that draw ahead, batches of all kinds, two of everything."""

import gc
import pickle
import threading
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from trajrec.capture.observing.listeners import Handed
from trajrec.capture.recorder import Recorder
from trajrec.sink import MemorySink

N = 24


def data(n=N, seed=0):
    return TensorDataset(torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)), torch.arange(n))


class Net(nn.Sequential):
    """Is called by position or by name."""

    def __init__(self):
        super().__init__(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))

    def forward(self, features):
        return super().forward(features)


class Training:
    """A model, its optimizer, and the ids that each step was really made of."""

    def __init__(self):
        self.model, self.made = Net(), []
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)

    def step(self, loss, ids):
        self.optimizer.zero_grad()
        loss.square().mean().backward()
        self.optimizer.step()
        self.made.append([int(i) for i in ids])

    def recorder(self, **given):
        return Recorder(MemorySink(), **given)

    @property
    def whole(self):
        return {"model": self.model, "optimizer": self.optimizer}


def ids_of(recorder):
    return [record.ids.tolist() for record in recorder.sink.records[1:]]


def ahead(loader):
    """Hands out a batch when the next one has been drawn."""
    batches = iter(loader)
    now = next(batches)
    for then in batches:
        yield now
        now = then
    yield now


class Ahead(DataLoader):
    """Hands out copies, one batch behind."""

    def __iter__(self):
        return ([value.clone() for value in batch] for batch in ahead(super().__iter__()))


class Skips(DataLoader):
    def __iter__(self):
        return islice(super().__iter__(), 2, None)


class Normalises(DataLoader):
    def __iter__(self):
        for x, ids in super().__iter__():
            yield x / 2 - 1, ids


class Around(DataLoader):
    """Another loader's batches, one behind, as accelerate hands them out."""

    def __init__(self, data, *args, **named):
        super().__init__(data)
        self.inner = DataLoader(data, *args, **named)

    def __iter__(self):
        return ahead(self.inner)


class Plain(DataLoader):
    def __iter__(self):
        self.began = True
        return super().__iter__()


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", [Ahead, Skips, Normalises, Around, Plain])
def test_a_loader_with_an_iter_of_its_own(kind, given):
    """The loop makes inputs of its own from what it receives, which tell nothing."""
    training, loader = Training(), kind(data(), 4, shuffle=True)
    before = kind.__iter__
    with training.recorder(**(training.whole | {"loader": loader} if given else {})) as recorder:
        for _ in range(2):
            for x, ids in loader:
                training.step(training.model(x / 3 - 1), ids)
    assert recorder.problem is None
    assert ids_of(recorder) == training.made
    assert kind.__iter__ is before


def test_a_loader_of_a_class_that_is_made_while_recording():
    training = Training()
    with training.recorder() as recorder:
        made = type("Made", (Ahead,), {"__iter__": lambda self: ahead(super(Ahead, self).__iter__())})
        for x, ids in made(data(), 4, shuffle=True):
            training.step(training.model(x / 3 - 1), ids)
    assert ids_of(recorder) == training.made
    assert "__init_subclass__" not in vars(DataLoader)


class Thing:
    """A batch that is an object, as those of graphs are."""

    def __init__(self, items):
        self.inner = {"x": torch.stack([x for x, _ in items])}
        self.ids = torch.stack([i for _, i in items])


COLLATE = {
    "object": (Thing, lambda thing: (thing.inner["x"], thing.ids)),
    "arrays": (
        lambda items: {"x": np.stack([x.numpy() for x, _ in items]), "i": np.array([int(i) for _, i in items])},
        lambda batch: (torch.from_numpy(batch["x"]), batch["i"]),
    ),
    "copied arrays": (
        lambda items: {"x": np.stack([x.numpy() for x, _ in items]), "i": np.array([int(i) for _, i in items])},
        lambda batch: (torch.tensor(batch["x"]), batch["i"]),
    ),
}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("found", [False, True])
@pytest.mark.parametrize("kind", ["object", "arrays", "copied arrays"])
def test_batches_of_all_kinds_are_told_apart(kind, found, named):
    collate, parts = COLLATE[kind]
    training = Training()
    with training.recorder(**({} if found else training.whole)) as recorder:
        for batch in ahead(DataLoader(data(), 4, shuffle=True, collate_fn=collate)):
            x, ids = parts(batch)
            training.step(training.model(features=x) if named else training.model(x), ids)
    assert ids_of(recorder) == training.made


def test_batches_that_are_slices_of_one_tensor_are_told_apart():
    training, (x, ids) = Training(), data().tensors
    slices = [(x[k : k + 4], ids[k : k + 4], k) for k in range(0, N, 4)]
    loader = DataLoader(slices, batch_size=None)
    with training.recorder() as recorder:
        for part, _, k in ahead(loader):
            training.step(training.model(part), [k // 4])
    assert ids_of(recorder) == training.made


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_batch_that_is_drawn_ahead_is_told_or_unknown(made_anew):
    training = Training()
    with training.recorder(**training.whole) as recorder:
        for x, ids in ahead(DataLoader(data(), 4, shuffle=True)):
            training.step(training.model(x / 2 if made_anew else x.double().float()), ids)
    assert ids_of(recorder) == ([] if made_anew else training.made)
    if made_anew:
        assert "2 batches were drawn before the model was called" in recorder.problem
        assert "trajrec.set_batch(ids)" in recorder.problem


def test_samples_may_be_drawn_anew_for_every_step():
    training, loader = Training(), DataLoader(data(), 4, shuffle=True)
    with training.recorder() as recorder:
        for _ in range(5):
            x, ids = next(iter(loader))
            training.step(training.model(x / 2), ids)
    assert ids_of(recorder) == training.made


@pytest.mark.parametrize("found", [False, True])
def test_two_recorders_on_one_loader(found):
    trainings, loader = [Training(), Training()], DataLoader(data(), 4, shuffle=True)
    first, second = (training.recorder(**({} if found else training.whole)) for training in trainings)
    if found:
        second = trainings[1].recorder(**trainings[1].whole)
    with first, second:
        for x, ids in loader:
            for training in trainings:
                training.step(training.model(x), ids)
    assert [ids_of(recorder) for recorder in (first, second)] == [training.made for training in trainings]


def in_threads(*calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_two_threads_that_train_are_two_recordings():
    trainings = [Training(), Training()]
    recorders = [training.recorder(**training.whole) for training in trainings]

    def train(training, loader):
        for x, ids in loader:
            training.step(training.model(x), ids)

    loaders = [DataLoader(data(), 4, shuffle=True) for _ in trainings]
    with recorders[0], recorders[1]:
        in_threads(*[lambda given=given: train(*given) for given in zip(trainings, loaders, strict=True)])
    assert [ids_of(recorder) for recorder in recorders] == [training.made for training in trainings]


def test_two_threads_that_train_one_model_are_said():
    training = Training()
    loader = DataLoader(data(), 4)
    with training.recorder(**training.whole) as recorder:
        for x, ids in islice(loader, 3):
            training.step(training.model(x), ids)
        for x, ids in islice(loader, 2):
            in_threads(lambda x=x, ids=ids: training.step(training.model(x), ids))
    assert len(ids_of(recorder)) == 3
    assert "thread" in recorder.problem
    assert recorder.sink.gap == (4, 5)


SETS = {
    "apart": lambda model, x, u: model(x).square().mean() + model(u).square().mean(),
    "together": lambda model, x, u: model(torch.cat([x, u])),
    "one of them made anew": lambda model, x, u: model(x).square().mean() + model(u + 1).square().mean(),
}


@pytest.mark.parametrize("loss", SETS)
@pytest.mark.parametrize("found", [False, True])
def test_two_data_sets_in_a_step_are_said(loss, found):
    """The unlabelled one was recorded: the one that was used last."""
    training, labelled, unlabelled = Training(), data(12), data(24, seed=1)
    with training.recorder(**({} if found else training.whole)) as recorder:
        for (x, ids), (u, _) in zip(DataLoader(labelled, 4), DataLoader(unlabelled, 4), strict=False):
            training.step(SETS[loss](training.model, x, u), ids)
    assert ids_of(recorder) == []
    assert "data sets" in recorder.problem or "Two loaders" in recorder.problem


def test_of_two_data_sets_the_one_that_is_named_is_recorded():
    training, loader = Training(), DataLoader(data(12), 4, shuffle=True)
    with training.recorder(loader=loader) as recorder:
        for (x, ids), (u, _) in zip(loader, DataLoader(data(24, seed=1), 4), strict=False):
            training.step(SETS["apart"](training.model, x, u), ids)
    assert ids_of(recorder) == training.made


def test_another_data_set_in_the_middle_is_said():
    training = Training()
    with training.recorder() as recorder:
        for some in (data(), data(seed=3)):
            for x, ids in DataLoader(some, 4):
                training.step(training.model(x), ids)
    assert ids_of(recorder) == training.made[:6]
    assert "another data set" in recorder.problem


def test_losses_of_several_batches_may_be_added_up_before_one_backward_pass():
    training, loader = Training(), DataLoader(data(), 4, shuffle=True)
    with training.recorder(**training.whole) as recorder:
        batches = iter(loader)
        for x, ids in batches:
            loss = training.model(x / 2).square().mean()
            other, more = next(batches)
            training.step(loss + training.model(other / 2).square().mean(), [*ids, *more])
    assert ids_of(recorder) == training.made
    assert [record.parts.tolist() for record in recorder.sink.records[1:]] == [[4, 4]] * 3


class Adversaries:
    """A generator and a discriminator, each with its optimizer."""

    def __init__(self):
        torch.manual_seed(0)
        self.makes, self.judges = nn.Linear(2, 4), nn.Linear(4, 1)
        self.optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (self.makes, self.judges)]
        self.made, self.kept = [], []

    def generator(self, fake):
        self.optimizers[0].zero_grad()
        self.judges(fake).mean().backward()
        self.optimizers[0].step()

    def discriminator(self, x, fake, at_once):
        self.optimizers[1].zero_grad()
        real = self.judges(x).mean()
        if at_once:
            (real + self.judges(fake.detach()).square().mean()).backward()
        else:
            real.backward()
            other = self.judges(fake.detach()).square().mean()
            other.backward()
            self.kept = [real, other]  # as scripts do that print them
        self.optimizers[1].step()

    def run(self, generator_first, at_once):
        for x, ids in DataLoader(data(), 4, shuffle=True):
            fake = self.makes(torch.randn(4, 2))
            if generator_first:
                self.generator(fake)
            self.discriminator(x, fake, at_once)
            if not generator_first:
                self.kept.append(self.judges(fake))
                self.generator(fake)
            self.made.append(ids.tolist())


@pytest.mark.parametrize("at_once", [False, True])
def test_the_judge_of_two_adversaries_is_recorded_with_what_it_was_shown(at_once):
    training = Adversaries()
    with Recorder(MemorySink()) as recorder:
        training.run(False, at_once)
    assert recorder.model is training.judges
    assert ids_of(recorder) == training.made
    assert recorder.others == {"SGD": 6}


@pytest.mark.parametrize("given", [False, True])
def test_a_model_that_sees_no_sample_has_no_ids(given):
    """Its steps are made of noise, while a batch for the other model waits."""
    training = Adversaries()
    whole = {"model": training.makes, "optimizer": training.optimizers[0]}
    with Recorder(MemorySink(), **(whole if given else {})) as recorder:
        training.run(True, True)
    assert ids_of(recorder) == []
    assert "The gradient is that of another model, too" in recorder.problem


class Broken(TensorDataset):
    def __getitem__(self, k):
        if k == 5:
            raise ValueError("cannot be read")
        return super().__getitem__(k)


@pytest.mark.parametrize("workers", [0, 1])
def test_ids_after_a_batch_that_failed_are_unknown(workers):
    training = Training()
    batches = iter(DataLoader(Broken(*data().tensors), 4, num_workers=workers))
    with training.recorder(**training.whole) as recorder:
        batches = iter(DataLoader(Broken(*data().tensors), 4, num_workers=workers))
        for _ in range(5):
            try:
                x, ids = next(batches)
            except ValueError:
                continue
            training.step(training.model(x), ids)
    assert ids_of(recorder) == training.made[:1]
    assert "a batch before this one failed" in recorder.problem


class Pairs(TensorDataset):
    def __getitem__(self, pair):
        return super().__getitem__(pair[0])


def test_what_a_sampler_draws_may_be_something_else_than_ids():
    training, pairs = Training(), [[(k, 224), (k + 1, 224)] for k in range(0, N, 2)]
    with training.recorder(**training.whole) as recorder:
        for x, ids in DataLoader(Pairs(*data().tensors), batch_sampler=pairs):
            training.step(training.model(x), ids)
    assert ids_of(recorder) == []


class Reuses:
    """Yields the same list again and again."""

    def __init__(self):
        self.ids = [0] * 4

    def __iter__(self):
        for k in range(0, N, 4):
            self.ids[:] = range(k, k + 4)
            yield self.ids


def test_a_sampler_may_use_its_list_again():
    training = Training()
    with training.recorder(**training.whole) as recorder:
        for x, ids in ahead(DataLoader(data(), batch_sampler=Reuses())):
            training.step(training.model(x), ids)
    assert ids_of(recorder) == training.made


def test_a_loader_is_itself_while_it_is_recorded():
    loader = DataLoader(data(), 4, shuffle=True)
    sampler, training = loader.batch_sampler, Training()
    with training.recorder(**training.whole) as recorder:
        for x, ids in loader:
            assert loader.batch_sampler is sampler
            assert loader.batch_sampler.sampler is loader.sampler
            training.step(training.model(x), ids)
        pickle.loads(pickle.dumps(loader))
    assert ids_of(recorder) == training.made


class Checkpointed(Net):
    def forward(self, features):
        return checkpoint(self[2], torch.tanh(self[0](features)), use_reentrant=True)


@pytest.mark.parametrize("every", [1, 2])
def test_a_backward_pass_within_a_backward_pass_begins_nothing(every):
    training = Training()
    training.model = Checkpointed()
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.01)
    made = []
    with training.recorder(**training.whole) as recorder:
        for k, (x, ids) in enumerate(DataLoader(data(), 4, shuffle=True)):
            training.model(x).square().mean().backward()
            made += ids.tolist()
            if k % every == every - 1:
                training.optimizer.step()
                training.optimizer.zero_grad()
                training.made.append(made)
                made = []
    assert ids_of(recorder) == training.made


def test_a_wrapper_that_tells_nothing_keeps_no_batches():
    class Changes(DataLoader):
        def __iter__(self):
            return ([x / 2 - 1, -ids] for x, ids in ahead(super().__iter__()))

    training, alive = Training(), []
    with training.recorder(**training.whole) as recorder:
        for x, ids in Changes(data(), 2):
            training.step(training.model(x), ids)
            alive.append(sum(type(thing) is Handed for thing in gc.get_objects()))
    assert recorder.problem is not None
    assert max(alive) <= 4


def scores_first(training, loader):
    """The best batch of three, of what was seen so far."""
    batches = iter(loader)
    for three in zip(batches, batches, batches, strict=False):
        with torch.no_grad():
            best = min(three, key=lambda batch: float(training.model(batch[0]).square().mean()))
        yield best


def from_a_buffer(training, loader):
    """Now and then an earlier batch again."""
    kept = []
    for batch in loader:
        kept.append(batch)
        yield kept[len(kept) // 2]


def joined_later(training, loader):
    """Batches of two are joined from the second epoch on, which is not to be told."""
    yield from loader
    batches = iter(loader)
    for first, second in zip(batches, batches, strict=True):
        yield [torch.cat(pair) for pair in zip(first, second, strict=True)]


@pytest.mark.parametrize("choose", [scores_first, from_a_buffer, joined_later])
@pytest.mark.parametrize("found", [False, True])
def test_batches_that_are_not_taken_in_turn(choose, found):
    training, loader = Training(), DataLoader(data(36), 6, shuffle=True)
    with training.recorder(**({} if found else training.whole)) as recorder:
        for x, ids in loader:  # an ordinary epoch before
            training.step(training.model(x), ids)
        for x, ids in choose(training, loader):
            training.step(training.model(x), ids)
    recorded = ids_of(recorder)
    assert recorded == training.made[: len(recorded)]
    assert len(recorded) == (12 if choose is joined_later else len(training.made))


@pytest.mark.parametrize("how", ["by hand", "before the step"])
def test_gradients_that_were_thrown_away(how):
    training = Training()
    with training.recorder(**training.whole) as recorder:
        for k, (x, ids) in enumerate(DataLoader(data(), 4, shuffle=True)):
            training.optimizer.zero_grad(set_to_none=how == "before the step")
            training.model(x).square().mean().backward()
            if how == "before the step" and k == 2:
                training.optimizer.zero_grad()
            elif how == "by hand" and k == 2:
                for p in training.model.parameters():
                    p.grad.zero_()
                continue
            training.optimizer.step()
            training.made.append(ids.tolist())
    recorded = ids_of(recorder)
    assert recorded == training.made[: len(recorded)]
    assert len(recorded) == (2 if how == "before the step" else 5)

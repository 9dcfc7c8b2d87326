"""What a replay writes besides its numbers: names, pictures, text, predictions; and that none of it can break one."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

import trajrec
from tests.made.replays import solved
from trajrec.replay.folder import thumbnails as thumbs
from trajrec.replay.folder.png import png
from trajrec.replay.folder.read import load
from trajrec.replay.folder.write import write_replay
from trajrec.replay.session import Session

N, M = 12, 6


class Pictures:
    """Pictures of 8 x 8 whose label is their brighter half."""

    classes = ("left", "right")

    def __init__(self, n, seed, **attributes):
        generator = torch.Generator().manual_seed(seed)
        self.y = torch.randint(2, (n,), generator=generator)
        self.x = torch.rand(n, 1, 8, 8, generator=generator)
        for picture, label in zip(self.x, self.y, strict=True):
            picture[0, :, 4:] += label
        self.__dict__ |= attributes

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i] / 2, self.y[i]


class Reviews(Pictures):
    """Text beside the numbers that the model reads."""

    def __getitem__(self, i):
        return f"review {i}", self.x[i], self.y[i]


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 2))


def read(model, batch):
    return nn.functional.cross_entropy(model(batch[-2]), batch[-1], reduction="none")


def replayed(tmp_path, train, test, targets="each", **options):
    """The folder of a replay of one epoch, and the trained model."""
    task = trajrec.Task.supervised(Net, train, test)
    if isinstance(train, Reviews):
        task = trajrec.Task(Net, train, test, loss=read, **options)
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(train, batch_size=4)
    with trajrec.record(tmp_path / "run.h5", model=model, optimizer=optimizer, loader=loader):
        for batch in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch[-2]), batch[-1]).backward()
            optimizer.step()
    folder = tmp_path / "replay"
    folder.mkdir()
    with trajrec.open(tmp_path / "run.h5") as run:
        session = Session(run, task)
        write_replay(folder, solved(session, targets), session, {})
    return folder, model


def left_out(folder):
    return json.loads((folder / "replay.json").read_text())["left_out"]


def table(folder, name):
    return pl.read_parquet(folder / f"{name}.parquet")


def test_pictures_become_thumbnails_of_both_sets(tmp_path):
    train, test = Pictures(N, 1), Pictures(M, 2)
    folder, _ = replayed(tmp_path, train, test)
    found = table(folder, "thumbnails")
    assert found.schema == {"set": pl.String, "sample": pl.Int64, "png": pl.Binary, "text": pl.String}
    assert found.select("set", "sample").rows() == [("train", i) for i in range(N)] + [("test", i) for i in range(M)]
    assert found["png"][3] == png(train[3][0])
    assert found["png"][N + 5] == png(test[5][0])
    assert load(folder).thumbnails.collect().height == N + M
    assert left_out(folder) == []


@pytest.mark.parametrize(
    ("targets", "tests"), [("mean", []), ("class", []), ([4, 1], [1, 4])], ids=["mean", "class", "chosen"]
)
def test_only_single_test_samples_get_a_thumbnail(tmp_path, targets, tests):
    folder, _ = replayed(tmp_path, Pictures(N, 1), Pictures(M, 2), targets)
    found = table(folder, "thumbnails").filter(pl.col("set") == "test")
    assert found["sample"].to_list() == tests
    assert ("prediction" in table(folder, "targets").columns) == bool(tests)


def test_text_is_kept_as_text(tmp_path):
    folder, _ = replayed(tmp_path, Reviews(N, 1), Reviews(M, 2), [2])
    found = table(folder, "thumbnails")
    assert found["text"].to_list() == [f"review {i}" for i in range(N)] + ["review 2"]
    assert found["png"].null_count() == N + 1


def test_what_counts_as_a_picture():
    class Image:  # as PIL has it
        mode = "RGBA"

        def convert(self, mode):
            self.mode = mode
            return self

        def __array__(self, *_, **__):
            return np.zeros((9, 9, 3), np.uint8)

    pictures = (torch.zeros(3, 9, 9), torch.zeros(9, 9), np.zeros((5, 9, 3)), Image(), torch.zeros(1, 9, 9).bfloat16())
    for picture in pictures:
        for item in ((picture, 1), {"image": picture, "label": 1}, picture):
            assert thumbs.thumbnail(item)[0].startswith(b"\x89PNG")
    for other in (torch.zeros(9), torch.zeros(4, 9, 9), torch.zeros(30, 4), 7, None, (), np.array(["a"]), [[1.0, 2.0]]):
        assert thumbs.thumbnail((other, 1)) is None
    assert thumbs.thumbnail(("a" * 600, 1)) == (None, "a" * 500 + " ...")


def test_of_many_samples_the_ends_are_shown(monkeypatch):
    monkeypatch.setattr(thumbs, "MOST", 10)
    monkeypatch.setattr(thumbs, "ENDS", 2)
    ids = np.arange(100, 111)
    values = np.array([0, 0, 9.0, 0, -5.0, 0, 0, 8.0, -6.0, 0, 0])
    assert thumbs.worth_showing(ids, values).tolist() == [102, 104, 107, 108]
    assert thumbs.worth_showing(ids[:10], values[:10]).tolist() == ids[:10].tolist()


def test_predictions_are_those_of_the_trained_model(tmp_path):
    test = Pictures(M, 2)
    folder, model = replayed(tmp_path, Pictures(N, 1), test, [5, 0, 3])
    predicted = model(torch.stack([test[i][0] for i in (5, 0, 3)])).argmax(dim=1).tolist()
    assert table(folder, "targets")["prediction"].to_list() == predicted
    assert load(folder).targets.collect()["prediction"].to_list() == [Pictures.classes[p] for p in predicted]


def test_nothing_is_said_of_outputs_that_are_not_known(tmp_path):
    assert "prediction" not in table(replayed(tmp_path, Reviews(N, 1), Reviews(M, 2))[0], "targets").columns


@pytest.mark.parametrize("shape", [(M,), (M, 1), (M, 2, 2), (M + 1, 2), (1, M)])
def test_outputs_that_are_no_scores_of_classes_give_no_predictions(tmp_path, shape):
    train, test = Pictures(N, 1), Pictures(M, 2)
    replayed(tmp_path, train, test, "mean")
    with trajrec.open(tmp_path / "run.h5") as run:
        task = trajrec.Task.supervised(Net, train, test)
        task.predict = lambda model, batch: torch.zeros(shape)
        session = Session(run, task)
        result = solved(session, "each")
        out = tmp_path / "out"
        out.mkdir()
        assert write_replay(out, result, session, {}) == []
    assert "prediction" not in table(out, "targets").columns


def test_attributes_come_before_info_and_info_before_the_batch(tmp_path):
    def info(i):
        return {"label": f"by info {i}", "name": f"picture-{i}.png", "noisy": np.bool_(i % 2)}

    train = Pictures(N, 1, info=info, noisy=torch.zeros(N, dtype=torch.bool))
    test = Pictures(M, 2, labels=[f"test {i}" for i in range(M)], names=3)
    folder, _ = replayed(tmp_path, train, test)
    samples, targets = table(folder, "samples"), table(folder, "targets")
    assert samples.row(3) == (3, "by info 3", "picture-3.png", False)
    assert targets["label"][4] == "test 4"
    assert "name" not in targets.columns


def test_predictions_are_told_in_the_words_of_the_labels(tmp_path):
    test = Pictures(M, 2)
    words = ["dark left", "dark right"]
    test.labels = [words[y] for y in test.y.tolist()]
    folder, model = replayed(tmp_path, Pictures(N, 1), test)
    predicted = model(torch.stack([test[i][0] for i in range(M)])).argmax(dim=1).tolist()
    assert set(test.y.tolist()) == {0, 1}
    assert table(folder, "targets")["prediction"].to_list() == [words[p] for p in predicted]


def test_a_subset_is_looked_through(tmp_path):
    whole = Pictures(2 * N, 1, names=[f"n{i}" for i in range(2 * N)])
    folder, _ = replayed(tmp_path, Subset(Subset(whole, range(4, 20)), list(range(15, 3, -1))), Pictures(M, 2), "mean")
    assert table(folder, "samples")["name"].to_list() == [f"n{i}" for i in range(19, 7, -1)]
    assert load(folder).settings.classes == ("left", "right")


def test_a_data_set_that_fails_costs_only_that_file(tmp_path):
    def info(i):
        raise OSError("the labels' disk is gone")

    folder, _ = replayed(tmp_path, Pictures(N, 1, info=info), Pictures(M, 2))
    assert left_out(folder) == ["samples.parquet: OSError: the labels' disk is gone"]
    assert not (folder / "samples.parquet").exists()
    assert table(folder, "targets").height == M
    assert load(folder).samples.collect().is_empty()


def test_a_task_that_tests_on_its_training_set_asks_for_self_influence(tmp_path):
    from trajrec.replay.report.suspects import self_influence

    train = Pictures(N, 1)
    folder, _ = replayed(tmp_path, train, train)
    inputs = load(folder)
    assert inputs.settings.target_set == "train"
    own = self_influence(inputs.contributions).collect().sort("sample")
    values = table(folder, "contributions").filter(pl.col("sample") == pl.col("target")).sort("sample")
    assert own["sample"].to_list() == list(range(N))
    assert sorted(own.drop("sample").to_series()) == pytest.approx(sorted(values["contribution"]))

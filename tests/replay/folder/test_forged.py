"""Forged replay folders end in a report or in a clear refusal: `report`, `merge` and `clean` read them."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from tests.made import replay_folder
from tests.made.forging import twisted
from trajrec.errors import ReplayError, TrajrecError
from trajrec.replay.folder import shards
from trajrec.replay.folder.place import Place
from trajrec.replay.folder.read import load
from trajrec.replay.report import cleaning
from trajrec.replay.report.render import html, tables, terminal
from trajrec.replay.report.report import Ask, build

FILES = ["contributions.parquet", "samples.parquet", "targets.parquet", "thumbnails.parquet"]
COLUMNS: list[Any] = [
    pl.Series([1.5, float("nan"), -1.0, 2.0] * 9, dtype=pl.Float64),
    pl.Series(["a", "\x1b[2J", "1", None] * 9),
    pl.Series([None] * 36, dtype=pl.Null),
    pl.Series([0, -1, 2**62, 1] * 9),
    pl.Series([2**64 - 1] * 36, dtype=pl.UInt64),
    pl.Series([[1], [2, 3], [], None] * 9),
    pl.Series([b"\x89PNG", b"", None, b"x"] * 9),
    pl.Series([True, False, None, True] * 9),
    pl.Series([{"a": 1}] * 36),
    pl.Series([float("inf"), 0.0, -0.0, 1e308] * 9),
    pl.Series(["2026-01-01"] * 36).str.to_date(),
]


def write(folder: Path, **facts: Any) -> Path:
    """A valid one of 9 samples, 2 targets and 2 epochs."""
    values = np.arange(36.0).reshape(2, 9, 2) - 7
    replay_folder.write(
        folder,
        values,
        labels=[k % 3 for k in range(9)],
        names=[f"n{k}" for k in range(9)],
        noisy=[k == 4 for k in range(9)],
        target_labels=["x", "y"],
        predictions=["x", "x"],
        classes=["a", "b", "c"],
        seconds=1.0,
        growth=2.0,
        **facts,
    )
    pictures = {"set": ["train", "test"], "sample": [0, 1], "png": [b"\x89PNG", None], "text": [None, "words"]}
    pl.DataFrame(pictures).write_parquet(folder / "thumbnails.parquet")
    return replay_folder.validation(folder)


def forge(folder: Path, rng: random.Random) -> str:
    """Changes something in a folder, and says what."""
    name = rng.choice(["replay.json", "replay.json", "validation.json", *FILES, *FILES])
    path, kind = folder / name, rng.choice(["column", "column", "column", "missing", "renamed", "empty", "file"])
    if name.endswith(".json"):
        if not path.read_text().startswith("{"):
            return "nothing"
        facts, said = twisted(json.loads(path.read_text()), rng)
        path.write_text(rng.choice([json.dumps(facts)] * 9 + ["[" * 100_000, "", "\x00", "nul"]))
        return f"{name} {said}"
    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError):  # of what was forged before
        frame = pl.DataFrame({"sample": [1]})
    if kind == "file":
        path.write_bytes(rng.choice([b"", b"PAR1", path.read_bytes()[:-9] if path.is_file() else b"x"]))
        return f"{name} is no file"
    column = rng.choice(frame.columns or ["sample"])
    if kind == "column":
        new = rng.choice(COLUMNS)[: frame.height]
        frame = frame.with_columns(new.alias(column)) if len(new) == frame.height else frame
    elif kind == "missing":
        frame = frame.drop(column, strict=False)
    elif kind == "renamed":
        frame = frame.rename({column: rng.choice(["epoch ", "label?", "\x1b"]) * rng.randrange(2, 9)}, strict=False)
    else:
        frame = frame.clear()
    frame.write_parquet(path)
    return f"{name} {kind} {column}"


def use(folder: Path, out: Path) -> None:
    """Everything that the commands make of a folder."""
    console = Console(width=100, file=io.StringIO())
    for ask in (Ask(), Ask(everything=True, pictures=True), Ask(by="class", why=(0,), samples=(1,))):
        with refusing():
            found = build(folder, ask=ask)
            terminal.show(found, console)
            tables.write_csv(found, out / "a.csv", force=True)
            tables.write_json(found, out / "a.json", force=True)
            html.write_html(found, out / "a.html", force=True)
    for rule in ("harmful:10%", "negative"):
        with refusing():
            cleaning.write(cleaning.clean(load(folder), rule), Place(out / "clean", cleaning.OUTPUT, True, []))


class refusing:  # noqa: N801
    """Lets clear refusals pass."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        return isinstance(error, TrajrecError) and not isinstance(error.__cause__, MemoryError)


def merge(folders: list[Path], out: Path) -> None:
    with refusing():
        found = shards.read_shards(folders)
        (out / "whole").mkdir()
        shards.join(found, out / "whole")


def try_out(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    pieces = [write(folder / f"piece-{k}", question="same", shard=[k, 2]) for k in (1, 2)]
    said = [forge(pieces[0], rng) for _ in range(rng.choice([1, 1, 2]))]
    out = folder / "out"
    out.mkdir()
    try:
        use(pieces[0], out)
        merge(pieces, out)
    except Exception as error:
        error.add_note(f"seed {seed}: {said}")
        raise
    finally:
        shutil.rmtree(folder)
        folder.mkdir()


def test_what_was_not_forged_is_read(tmp_path):
    folder = write(tmp_path / "a", question="same", shard=[1, 1])
    assert build(folder, ask=Ask(everything=True)).head.samples == 9
    (tmp_path / "out").mkdir()
    assert len(shards.read_shards([folder])) == 1
    shards.join(shards.read_shards([folder]), tmp_path / "out")
    assert build(tmp_path / "out").head.samples == 9


def test_forged_folders_are_refused_or_read(tmp_path):
    for seed in range(15):
        try_out(tmp_path, seed)


@pytest.mark.long
def test_many_forged_folders_are_refused_or_read(tmp_path):
    for seed in range(1000, 3000):
        try_out(tmp_path, seed)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', '{"shard": "1/2"}', '{"shard": [1], "question": "q"}'])
def test_merge_says_which_folder_is_no_shard(tmp_path, text):
    (tmp_path / "replay.json").write_text(text)
    with pytest.raises(ReplayError, match="replay"):
        shards.read_shards([tmp_path])

"""The samples as pictures."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from trajrec.replay.folder.read import Inputs
from trajrec.replay.report import scores


@dataclass(frozen=True, slots=True)
class Picture:
    """What a sample looks like: PNG bytes or text; `set` is "train" or "test"."""

    set: str
    sample: int
    png: bytes | None
    text: str | None


def pictures(inputs: Inputs, train: set[int], test: set[int]) -> tuple[Picture, ...]:
    """The thumbnails of some samples, as far as the folder has them."""
    if inputs.thumbnails is None:
        return ()
    wanted = (pl.col("set") == "train") & pl.col("sample").is_in(sorted(train))
    wanted |= (pl.col("set") == "test") & pl.col("sample").is_in(sorted(test))
    return tuple(Picture(**row) for row in scores.collect(inputs.thumbnails.filter(wanted)).iter_rows(named=True))

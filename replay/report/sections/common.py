"""What several sections need: totals, labels in their order, words for a target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import polars as pl

from trajrec.errors import NonFiniteError, ReplayError
from trajrec.replay.folder.format import CONTRIBUTIONS, Settings
from trajrec.replay.folder.read import Inputs
from trajrec.replay.report import scores


def sound_totals(inputs: Inputs) -> pl.DataFrame:
    """Sample and contribution to the mean target, [S] rows by id, every one finite.

    Raises:
        NonFiniteError: one is not.
        ReplayError: there are none.
    """
    path = inputs.folder / CONTRIBUTIONS
    totals = scores.collect(scores.totals(inputs.contributions)).sort("sample")
    if totals.is_empty():
        raise ReplayError(f"{path} has no rows. Replay again with --force.")
    bad = totals.filter(pl.col("contribution").is_finite().fill_null(False).not_())
    if bad.height:
        raise NonFiniteError(
            f"{bad.height:,} of {totals.height:,} samples have a contribution that is NaN or infinite, first sample "
            f"{bad['sample'][0]}, in {path}. Replay again with --dtype float64."
        )
    return totals


def mean_of(settings: Settings) -> str:
    """What a mean over the targets is, in words."""
    words = {
        "mean": f"the mean {settings.target_set} loss",
        "class": "the mean over the classes",
        "each": f"the mean over all {settings.target_set} samples",
        "tokens": f"the mean over the chosen tokens of {settings.target_set} samples",
        "contrasts": f"the mean over the chosen contrasts of {settings.target_set} samples",
    }
    return words.get(settings.targets, f"the mean over the chosen {settings.target_set} samples")


def blocks_of(inputs: Inputs, targets: list[int], samples: int) -> Iterator[pl.LazyFrame]:
    """The pairs of some targets at a time; every epoch is a row of its own until it is summed."""
    epochs = scores.collect(inputs.contributions.select(pl.col("epoch").n_unique())).item() if inputs.by_epoch else 1
    return scores.blocks(inputs.contributions, targets, samples * epochs)


def named(rows: pl.DataFrame, known: pl.LazyFrame) -> pl.DataFrame:
    """Rows joined with label, name and noisy, in their order."""
    ids = rows["sample"].unique().to_list()
    facts = scores.collect(known.filter(pl.col("sample").is_in(ids)).select("sample", "label", "name", "noisy"))
    return rows.join(facts.unique("sample"), on="sample", how="left", maintain_order="left")


def order(settings: Settings) -> Callable[[str], tuple[int, float, str]]:
    """Sort key of labels: the classes in their own order, then numbers, then words."""
    places = {name: place for place, name in enumerate(settings.classes)}

    def key(label: str) -> tuple[int, float, str]:
        if label in places:
            return 0, places[label], label
        try:
            return 1, float(label), label
        except ValueError:
            return 2, 0.0, label

    return key


def parts_by(rows: pl.DataFrame, column: str) -> Iterator[tuple[Any, pl.DataFrame]]:
    """The rows of each value of a column."""
    for (value,), part in rows.group_by(column, maintain_order=True):
        yield value, part


def needs(what: str, need: str, option: str) -> str:
    """Why there is no such section, and what would help."""
    return f"This replay cannot answer {what}: it needs {need}. Replay the run again with {option}."

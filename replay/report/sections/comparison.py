"""Two answers to one question, side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl

from trajrec.errors import ReplayError
from trajrec.replay.folder.read import CONTRIBUTIONS, Inputs, reading
from trajrec.replay.report import scores
from trajrec.replay.report.agreement import Agreement, agree, joined
from trajrec.replay.report.sections.common import blocks_of, sound_totals

POINTS = 2000
COMPARED_TARGETS = 64


@dataclass(frozen=True, slots=True)
class Comparison:
    """Agreement of this replay with another on the samples that both have.

    Attributes:
        this: what this replay is, in a few words.
        other: what the other is.
        agreement: of the contributions to the mean target.
        by_target: (targets, mean Spearman, mean sign error) over targets that both have, if more than one.
        points: (sample, this, other) of at most some thousand samples, for a scatter plot.
    """

    this: str
    other: str
    agreement: Agreement
    by_target: tuple[int, float, float] | None
    points: tuple[tuple[int, float, float], ...]


def comparison(inputs: Inputs, totals: pl.DataFrame, other: Inputs) -> Comparison:
    """Agreement with another replay.

    Raises:
        ReplayError: they have no sample in common.
    """
    with reading(other.folder / CONTRIBUTIONS):
        others = sound_totals(other)
        both = scores.collect(joined(totals.lazy(), others.lazy()))
        if both.is_empty():
            raise ReplayError(f"{inputs.folder} and {other.folder} have no sample in common: nothing to compare.")
        agreement = agree(both["a"].to_numpy(), both["b"].to_numpy())
        points = both if both.height <= POINTS else both.sample(POINTS, seed=0).sort("sample")
        targets = _agreement_by_target(inputs, other, totals.height)
    return Comparison(_what(inputs), _what(other), agreement, targets, tuple(points.iter_rows()))


def _agreement_by_target(inputs: Inputs, other: Inputs, samples: int) -> tuple[int, float, float] | None:
    shared = sorted(set(scores.target_ids(inputs.contributions)) & set(scores.target_ids(other.contributions)))
    if len(shared) < 2:
        return None
    chosen = [shared[i] for i in sorted(set(np.linspace(0, len(shared) - 1, COMPARED_TARGETS).astype(int)))]
    found = []
    for block in blocks_of(inputs, chosen, samples):
        wanted = scores.collect(block)
        ids = wanted["target"].unique().to_list()
        theirs = scores.pairs(other.contributions.filter(pl.col("target").is_in(ids)))
        both = wanted.join(scores.collect(theirs), on=["sample", "target"], suffix="_b")
        parts = both.select("target", "contribution", "contribution_b").partition_by("target")
        found += [agree(part["contribution"].to_numpy(), part["contribution_b"].to_numpy(), 1) for part in parts]
    return len(found), _average(x.spearman for x in found), _average(x.sign_error for x in found)


def _average(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _what(inputs: Inputs) -> str:
    form = {True: "exact", False: "Hessian-free", None: "replay"}[inputs.settings.exact]
    return f"{form} ({inputs.folder.name})"

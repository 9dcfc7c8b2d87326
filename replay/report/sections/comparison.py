"""Two answers to one question, side by side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from trajrec.errors import ReplayError
from trajrec.replay.folder.format import CONTRIBUTIONS, Settings
from trajrec.replay.folder.read import Inputs, reading
from trajrec.replay.label import name_of
from trajrec.replay.report import scores, words
from trajrec.replay.report.agreement import Agreement, agree, joined, known_mean, sign_error, spearman
from trajrec.replay.report.blocks import Chapter, Chart, Kind, Part, Table
from trajrec.replay.report.section import Material, Section
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


def find(material: Material) -> Comparison | None:
    """Agreement with the other replay, if there is one.

    Raises:
        ReplayError: they have no sample in common, or scipy is missing.
    """
    inputs, other = material.inputs, material.other
    if other is None:
        return None
    with reading(other.folder / CONTRIBUTIONS):
        both = scores.collect(joined(material.totals.lazy(), sound_totals(other).lazy()))
        if both.is_empty():
            raise ReplayError(f"{inputs.folder} and {other.folder} have no sample in common: nothing to compare.")
        agreement = agree(both["a"].to_numpy(), both["b"].to_numpy())
        points = both if both.height <= POINTS else both.sample(POINTS, seed=0).sort("sample")
        targets = _agreement_by_target(inputs, other, material.totals.height)
    return Comparison(_what(inputs), _what(other), agreement, targets, tuple(points.iter_rows()))


def _are_the_same(one: Settings, other: Settings) -> bool:
    """Whether targets of the same number are the same in two replays."""
    single = {"each", "chosen"}
    kinds = {one.targets, other.targets}
    return (len(kinds) == 1 or kinds <= single) and one.target_rows == other.target_rows


def _agreement_by_target(inputs: Inputs, other: Inputs, samples: int) -> tuple[int, float, float] | None:
    if not _are_the_same(inputs.settings, other.settings):
        return None
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
        for part in both.partition_by("target"):
            a, b = part["contribution"].to_numpy(), part["contribution_b"].to_numpy()
            found.append((spearman(a, b), sign_error(a, b)))
    return len(found), known_mean(pair[0] for pair in found), known_mean(pair[1] for pair in found)


def _what(inputs: Inputs) -> str:
    settings = inputs.settings
    older = {True: "hessian", False: "none", None: None}[settings.exact]  # they do not name the curvature
    curvature = settings.curvature or older
    return f"{name_of(curvature) if curvature else 'replay'} ({inputs.folder.name})"


def chapter(found: Comparison) -> Chapter:
    """The samples of both as dots, beside the measures."""
    title = f"Agreement of {found.this} with {found.other}"
    chart = Chart(
        f"Contributions of {len(found.points):,} samples in both replays",
        found.this,
        found.other,
        (min(a for _, a, _ in found.points), max(a for _, a, _ in found.points)),
        dots=tuple((a, b) for _, a, b in found.points),
    )
    columns = {"what": Kind.TEXT, "value": Kind.FIGURE, "": Kind.TEXT}
    rows = pl.DataFrame(_measures(found), schema=dict.fromkeys(columns, pl.String), orient="row")
    tiles = ((words.ratio(found.agreement.spearman), "Spearman with the other replay"),)
    parts = (Part((chart, Table(rows=rows, columns=columns, title=title, short="")), beside=True),)
    return Chapter("Agreement", title, parts, tiles=tiles)


def _measures(found: Comparison) -> list[tuple[str, str, str]]:
    """Measure, value and meaning, row by row."""
    same = found.agreement
    rows = [
        ("Spearman", words.ratio(same.spearman), "1 = the same order"),
        ("Kendall tau-b", words.ratio(same.kendall), "1 = the same order"),
        ("Pearson", words.ratio(same.pearson), "1 = proportional"),
        ("slope", words.ratio(same.slope), "1 = the same scale"),
        ("sign error", words.percent(same.sign_error), f"of {same.samples:,} samples change sign"),
        (f"top {same.k} helpful", words.percent(same.overlap_helpful), "are in both lists"),
        (f"top {same.k} harmful", words.percent(same.overlap_harmful), "are in both lists"),
    ]
    if found.by_target:
        count, spearman, sign_error = found.by_target
        rows.append(("Spearman by target", words.ratio(spearman), f"mean over {count:,} targets"))
        rows.append(("sign error by target", words.percent(sign_error), f"mean over {count:,} targets"))
    return rows


SECTION = Section("comparison", lambda ask: ask.compare is not None, find, chapter, "agreement")

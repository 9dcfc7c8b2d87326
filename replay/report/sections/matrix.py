"""Which classes help and harm which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trajrec.errors import ReplayError
from trajrec.replay.report import scores
from trajrec.replay.report.blocks import Chapter, Grid, Heat, Part
from trajrec.replay.report.section import Material, Section
from trajrec.replay.report.sections.common import needs, order


@dataclass(frozen=True, slots=True)
class Matrix:
    """Inter-class contributions (paper, equation 23).

    Attributes:
        train: training classes, the rows.
        test: test classes, the columns.
        mean: [train, test] mean contribution over all pairs; None where there is no pair.
        normalised: the same over sqrt(row sum x column sum); None where that is not a positive number.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    mean: Grid
    normalised: Grid


def find(material: Material) -> Matrix:
    """Inter-class contributions.

    Raises:
        ReplayError: the replay has the mean target only, or labels are not known.
    """
    inputs = material.inputs
    if inputs.settings.targets == "mean":
        raise ReplayError(needs("the inter-class matrix", "a target of every class", "--targets class"))
    cells = scores.matrix(inputs.contributions, inputs.samples, inputs.targets)
    table = scores.collect(scores.normalised(cells).rename({"contribution": "normalised"}))
    plain = scores.collect(cells)
    if plain.is_empty():
        raise ReplayError(needs("the inter-class matrix", "labels of training and test samples", "--targets class"))
    train, test = (
        tuple(sorted(plain[side].unique().to_list(), key=order(inputs.settings))) for side in ("train", "test")
    )
    means = {(a, b): value for a, b, value in plain.iter_rows()}
    ratios = {(a, b): value for a, b, value in table.iter_rows()}
    return Matrix(train, test, _grid(train, test, means), _grid(train, test, ratios))


def _grid(rows: Sequence[str], columns: Sequence[str], cells: dict[Any, float]) -> Grid:
    return tuple(tuple(cells.get((row, column)) for column in columns) for row in rows)


def chapter(found: Matrix) -> Chapter:
    """The means, and the normalised ones where there are any."""
    layers = [("Mean contribution", found.mean)]
    if any(value is not None for row in found.normalised for value in row):
        layers.append(("Normalised by \N{SQUARE ROOT}(row sum x column sum)", found.normalised))
    title = "Mean contribution of training classes (rows) to test classes (columns)"
    note = "not normalised (paper, equation 23)"
    heat = Heat("classes", found.train, found.test, tuple(layers), title, short="", note=note)
    intro = (
        "Rows are training classes, columns are test classes; every cell is the mean contribution over all pairs "
        "(HYDRA, equation 23)."
    )
    return Chapter("Classes", "Which classes teach which", (Part((heat,)),), intro)


SECTION = Section("matrix", lambda ask: ask.matrix, find, chapter, "matrix")

"""Which classes help and harm which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trajrec.errors import ReplayError
from trajrec.replay.folder.read import Inputs
from trajrec.replay.report import scores
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
    mean: tuple[tuple[float | None, ...], ...]
    normalised: tuple[tuple[float | None, ...], ...]


def matrix(inputs: Inputs) -> Matrix:
    """Inter-class contributions.

    Raises:
        ReplayError: the replay has the mean target only, or labels are not known.
    """
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


def _grid(rows: Sequence[str], columns: Sequence[str], cells: dict[Any, float]) -> tuple[tuple[float | None, ...], ...]:
    return tuple(tuple(cells.get((row, column)) for column in columns) for row in rows)

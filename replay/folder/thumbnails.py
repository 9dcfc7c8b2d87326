"""Small pictures of samples, or their text, for reports.

The first element of an item is looked at: a [H, W], [1 or 3, H, W] or [H, W, 1 or 3] tensor or array, or an image with
a `convert` method (PIL), is a picture; a string is text. A [H, W] array with fewer than 8 rows or columns is taken for
a table of numbers. Items are asked of the data set as they are, so a random augmentation shows one of its draws.

Up to 20,000 samples get one each; of more, the 500 with the lowest and the 500 with the highest contribution do.

    M targets, S samples
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from torch import Tensor

from trajrec.records import Array, FloatArray, IntArray
from trajrec.replay.folder.format import PICTURES
from trajrec.replay.folder.png import png
from trajrec.replay.methods.contributions import Contributions

MOST = 20_000
ENDS = 500
_LETTERS = 500
Row = tuple[str, int, bytes | None, str | None]
_SMALLEST = 8


def thumbnails(result: Contributions, train: Any, test: Any) -> pl.DataFrame | None:
    """Columns set ("train" or "test"), sample, png, text; None if the data sets yield neither pictures nor text.

    Args:
        result: says which samples and targets; [S, M] contributions.
        train: the training set.
        test: the test set; None if no target is a single sample of it.
    """
    rows = _rows("train", train, worth_showing(result.samples, result.values.sum(axis=1)))
    if test is not None and result.target_kind == "chosen":
        rows += _rows("test", test, np.unique(result.targets))
    elif test is not None and result.target_kind == "each":
        rows += _rows("test", test, worth_showing(result.targets, result.values.sum(axis=0)))
    return pl.DataFrame(rows, schema=PICTURES, orient="row") if rows else None


def worth_showing(ids: IntArray, values: FloatArray) -> IntArray:
    """The ids that get a thumbnail: all, or those at both ends of their values [ids]."""
    ids, first = np.unique(ids, return_index=True)
    if len(ids) <= MOST:
        return ids
    order = np.argsort(values[first], kind="stable")
    return np.sort(np.concatenate([ids[order[:ENDS]], ids[order[-ENDS:]]]))


def _rows(which: str, dataset: Any, ids: IntArray) -> list[Row]:
    rows: list[Row] = []
    for i in ids.tolist():
        found = thumbnail(dataset[i])
        if found is None:  # one item tells for all
            return rows
        rows.append((which, i, *found))
    return rows


def thumbnail(item: Any) -> tuple[bytes | None, str | None] | None:
    """(png, None) or (None, text) of an item, or None if it is neither picture nor text."""
    first = _first(item)
    if isinstance(first, str):
        return None, first if len(first) <= _LETTERS else first[:_LETTERS] + " ..."
    picture = _picture(first)
    return None if picture is None else (png(picture), None)


def _first(item: Any) -> Any:
    if isinstance(item, dict):
        item = tuple(item.values())
    return item[0] if isinstance(item, tuple | list) and item else item


def _picture(value: Any) -> Array | None:
    if hasattr(value, "convert") and hasattr(value, "mode"):
        value = np.asarray(value if value.mode in ("L", "RGB") else value.convert("RGB"))
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        return None
    sides = value.shape
    if value.ndim == 3:
        sides = sides[1:] if sides[0] in (1, 3) else sides[:2] if sides[2] in (1, 3) else ()
    return value if len(sides) == 2 and min(sides) >= (_SMALLEST if value.ndim == 2 else 1) else None

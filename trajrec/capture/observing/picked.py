"""Which rows of a model's outputs a loss is of: a mask of a graph's nodes, say, seen in autograd's graph.

Letters: N rows of the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from trajrec.capture.observing.graph import GraphMarks, roots_of
from trajrec.records import IntArray

_Rows = IntArray | str | None
"""Positions; None for all of them; "twice" where they were picked more than once."""


def picked_from(loss: Any, marks: GraphMarks, sizes: Mapping[int, int]) -> dict[int, IntArray | None]:
    """The rows of the outputs of forward passes that a loss is of.

    Args:
        loss: what backward is called on.
        marks: of the outputs.
        sizes: N of the passes that are asked about, by their number.

    Returns:
        Positions by the number of the pass, where it is not all of them; None in their place if it cannot be told.
    """
    found: dict[int, list[_Rows]] = {}
    lengths = {*sizes.values()}
    left: list[tuple[Any, _Rows]] = [(node, None) for node in roots_of(loss)]
    seen: set[tuple[Any, int]] = set()
    while left:
        node, rows = left.pop()
        if (node, id(rows)) in seen:
            continue
        seen.add((node, id(rows)))
        numbers = marks.numbers_at(node) & sizes.keys()
        for number in numbers:
            found.setdefault(number, []).append(rows)
        if numbers:
            continue
        own = _picked_by(node, lengths)
        after = rows if own is None else own if rows is None else "twice"
        left += [(before, after) for before, _ in node.next_functions if before is not None]
    merged = {number: _same(several) for number, several in found.items()}
    return {
        number: rows if isinstance(rows, np.ndarray) else None for number, rows in merged.items() if rows is not None
    }


def _same(several: list[_Rows]) -> _Rows:
    first = several[0]
    if all(rows is first for rows in several):
        return first
    if isinstance(first, np.ndarray) and all(
        isinstance(rows, np.ndarray) and np.array_equal(rows, first) for rows in several
    ):
        return first
    return "twice"


def _picked_by(node: Any, lengths: set[int]) -> IntArray | None:
    """The rows that a node of the graph picks of a tensor of such a length; None if it does not, or takes all."""
    size = getattr(node, "_saved_self_sym_sizes", None)
    if not size or size[0] not in lengths:
        return None
    rows = np.arange(size[0])
    kind = node.name()
    if kind == "IndexBackward0":
        picked = _by_index(rows, node._saved_indices[0])
    elif kind in ("SliceBackward0", "SelectBackward0", "IndexSelectBackward0"):
        picked = _along(rows, node, kind)
    else:
        return None
    return None if picked is None or np.array_equal(picked, rows) else picked


def _by_index(rows: IntArray, index: Tensor | None) -> IntArray | None:
    if index is None:
        return None
    found: IntArray = rows[index.detach().cpu().numpy()]
    return found.reshape(-1)


def _along(rows: IntArray, node: Any, kind: str) -> IntArray | None:
    if node._saved_dim not in (0, -len(node._saved_self_sym_sizes)):
        return None
    if kind == "SliceBackward0":
        return rows[_signed(node._saved_start) : _signed(node._saved_end) : node._saved_step]
    if kind == "SelectBackward0":
        return rows[[_signed(node._saved_index)]]
    return _by_index(rows, node._saved_index)


def _signed(value: int) -> int:
    """Autograd keeps sizes and places as unsigned numbers of 64 bits."""
    return value - 2**64 if value >= 2**63 else value

"""Targets that are parts of a loss, or differences of two: values that a user names them by.

    Tokens       l_j = the mean loss of the tokens start <= k < stop of test sample i
    Contrasts    l_j = the loss of test sample a less that of test sample b

Which losses tokens have says the Task (`Task.tokens`, `Task.supervised`): the second dimension of [B, T]. A target of
either kind is named by its row, 0 to M - 1; the table of rows stands in replay.json. Positive is helpful, as ever:
without the sample l_j would be higher, of a contrast the loss of a rise above that of b.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from trajrec.errors import SampleRangeError
from trajrec.records import IntArray


class _Rows:
    """A table of whole numbers [M, k], one row a target; a value: equal rows are equal."""

    kind: ClassVar[str]
    needs: ClassVar[str]

    def __init__(self, rows: Sequence[Sequence[int]] | IntArray) -> None:
        table = np.asarray(rows)
        if table.dtype.kind not in "iu" or table.ndim != 2 or not len(table) or not self._fits(table):
            shape = f"{table.dtype} of shape {table.shape}"
            raise SampleRangeError(f"{type(self).__name__} takes {self.needs}, at least one row; found {shape}.")
        self.rows: IntArray = self._whole(table.astype(np.int64))
        self.rows.setflags(write=False)
        self._check()

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Rows) or self.kind != other.kind:
            return False
        return bool(np.array_equal(self.rows, other.rows))

    def __hash__(self) -> int:
        return hash((self.kind, self.rows.tobytes()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rows.tolist()})"

    @classmethod
    def _fits(cls, table: IntArray) -> bool:
        return bool(table.shape[1] == 2)

    def _whole(self, table: IntArray) -> IntArray:
        return table

    def _check(self) -> None:
        raise NotImplementedError

    def words(self, row: int) -> str:
        """A target in words."""
        raise NotImplementedError


class Tokens(_Rows):
    """The mean loss of spans of tokens of test samples, as targets.

    Args:
        rows: [M, 3] of (test sample, start, stop), stop not included; or [M, 2] of (test sample, token). Tokens are
            places in the losses of a sample as the Task gives them, from 0: of `trajrec.next_tokens` and the cross
            entropy of `Task.supervised` those of the sample's own labels. Tokens that do not count have the loss 0,
            and are part of the mean.

    Raises:
        SampleRangeError: these are no such numbers, or a span is empty.
    """

    kind = "tokens"
    needs = "rows (test sample, start, stop) or (test sample, token) of whole numbers"

    @classmethod
    def _fits(cls, table: IntArray) -> bool:
        return table.shape[1] in (2, 3)

    def _whole(self, table: IntArray) -> IntArray:
        return table if table.shape[1] == 3 else np.column_stack([table, table[:, 1] + 1])

    def _check(self) -> None:
        for sample, start, stop in self.rows.tolist():
            if not 0 <= start < stop:
                raise SampleRangeError(f"Tokens {start}:{stop} of test sample {sample} are no span: 0 <= start < stop.")

    def words(self, row: int) -> str:
        """The test sample and the tokens, the last one included."""
        sample, start, stop = self.rows[row].tolist()
        return f"sample {sample}, " + (f"token {start}" if stop == start + 1 else f"tokens {start} to {stop - 1}")


class Contrasts(_Rows):
    """Differences of the losses of two test samples, as targets: that of the first less that of the second.

    Args:
        rows: [M, 2] of two test samples each.

    Raises:
        SampleRangeError: these are no such numbers, or a sample is held against itself.
    """

    kind = "contrasts"
    needs = "rows (test sample, another test sample) of whole numbers"

    def _check(self) -> None:
        for a, b in self.rows.tolist():
            if a == b:
                raise SampleRangeError(f"The contrast of test sample {a} with itself is 0, whatever the model.")

    def words(self, row: int) -> str:
        """Both test samples."""
        return "sample {} less sample {}".format(*self.rows[row].tolist())


KINDS: dict[str, type[Tokens] | type[Contrasts]] = {kind.kind: kind for kind in (Tokens, Contrasts)}


def rows_of_kind(kind: str, rows: Any) -> Tokens | Contrasts | None:
    """The targets of a kind that has rows; None of every other kind."""
    return KINDS[kind](rows) if kind in KINDS else None

"""CSV files that are opened in spreadsheets, which take a text that begins like a formula for one.

Labels and names come from data. A cell of text that begins with = + - @ (or the wide forms of these), a tab or a new
line is written with an apostrophe before it, which spreadsheets do not show. Numbers stay as they are, also where they
stand in a column of text, as the classes -1 and +1 do.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

_FORMULA = r"^[=+\-@\t\r\n\x{FF1D}\x{FF0B}\x{FF0D}\x{FF20}]"
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"


def write_csv(frame: pl.DataFrame, path: Path) -> None:
    """Writes a data frame; what begins like a formula is defused."""
    text = pl.col(pl.String)
    is_formula = text.str.contains(_FORMULA) & ~text.str.contains(_NUMBER)
    frame.with_columns(pl.when(is_formula).then("'" + text).otherwise(text).name.keep()).write_csv(path)

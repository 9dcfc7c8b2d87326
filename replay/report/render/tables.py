"""Reports as tables for other programs: CSV and Parquet of the top tables, JSON of everything.

A file is written beside its name and renamed when it is complete, so that a full disk or Ctrl-C leaves either the
old file or the new one. Nothing is overwritten unless asked. JSON has null where a number is not defined.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

from trajrec.errors import OutputExistsError
from trajrec.replay.folder import spreadsheet
from trajrec.replay.report.report import Report, entries

COLUMNS: dict[str, type[pl.DataType]] = {
    "rank": pl.Int64,
    "side": pl.String,
    "sample": pl.Int64,
    "label": pl.String,
    "target": pl.Int64,
    "contribution": pl.Float64,
    "share": pl.Float64,
}


def write_csv(report: Report, path: str | Path, force: bool = False) -> Path:
    """Write the top tables: rank, side, sample, label, target (-1 for the mean), contribution, share.

    Several tables follow each other, told apart by target; those by class by a last column, table. Text that begins
    like a formula has an apostrophe before it.

    Args:
        report: the report.
        path: the file to write.
        force: overwrite an existing file.

    Raises:
        OutputExistsError: the file exists and `force` is False.
    """
    rows = frame(report) if report.groups or report.why else frame(report).drop("table")
    return save(path, lambda file: spreadsheet.write_csv(rows, file), force)


def write_parquet(report: Report, path: str | Path, force: bool = False) -> Path:
    """Write the top tables as `write_csv` does, with the column table always, and sign and unit in the metadata.

    Raises:
        OutputExistsError: the file exists and `force` is False.
    """
    facts = {"sign": report.settings.sign, "unit": report.settings.unit or "", "run_id": report.settings.run_id or ""}
    return save(path, lambda file: frame(report).write_parquet(file, metadata=facts), force)


def write_json(report: Report, path: str | Path, force: bool = False) -> Path:
    """Write every section of a report, pictures left out.

    Raises:
        OutputExistsError: the file exists and `force` is False.
    """
    text = json.dumps(plain({**asdict(report), "pictures": ()}), indent=1, allow_nan=False, ensure_ascii=False)
    return save(path, lambda file: file.write_text(text + "\n", encoding="utf-8"), force)


def frame(report: Report) -> pl.DataFrame:
    """All top tables of a report as one data frame, with the title of its table behind every row."""
    tables = [report.overall, *report.groups, *(why.top for why in report.why)]
    titles = [top.title for top in tables for _ in (*top.helpful, *top.harmful)]
    rows = [{name: values[name] for name in COLUMNS} for values in map(asdict, entries(report))]
    return pl.DataFrame(rows, schema=COLUMNS).with_columns(pl.Series("table", titles, dtype=pl.String))


def plain(value: Any) -> Any:
    """A value that JSON can hold: paths as strings, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def claim(path: str | Path, force: bool) -> Path:
    """The path, if it may be written.

    Raises:
        OutputExistsError: it exists and `force` is False.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputExistsError(f"{path} is a folder: give the name of a file.")
    if path.exists() and not force:
        raise OutputExistsError(f"{path} exists already. Choose another name, or pass --force to overwrite it.")
    return path


def save(path: str | Path, write: Callable[[Path], object], force: bool) -> Path:
    """Have a file written under a temporary name, then put it in its place.

    Args:
        path: the file.
        write: writes to the path it is given.
        force: overwrite an existing file.

    Raises:
        OutputExistsError: the file exists and `force` is False.
    """
    path = claim(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

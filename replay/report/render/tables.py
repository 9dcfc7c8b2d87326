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
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import polars as pl

from trajrec.errors import OutputExistsError
from trajrec.replay.folder import spreadsheet
from trajrec.replay.report import blocks
from trajrec.replay.report.report import Report


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
    whole = frame(report)
    written = [part for part in report.parts() if any(table.files for table in blocks.tables([part]))]
    rows = whole if len(written) > 1 else whole.drop("table", strict=False)
    return save(path, lambda file: spreadsheet.write_csv(rows, file), force)


def write_parquet(report: Report, path: str | Path, force: bool = False) -> Path:
    """Write the top tables as `write_csv` does, with the column table always, and sign and unit in the metadata.

    Raises:
        OutputExistsError: the file exists and `force` is False.
    """
    settings = report.head.settings
    facts = {"sign": settings.sign, "unit": settings.unit or "", "run_id": settings.run_id or ""}
    return save(path, lambda file: frame(report).write_parquet(file, metadata=facts), force)


def write_json(report: Report, path: str | Path, force: bool = False) -> Path:
    """Write what every section found, pictures left out.

    Raises:
        OutputExistsError: the file exists and `force` is False.
    """
    text = json.dumps(plain(report.values()), indent=1, allow_nan=False, ensure_ascii=False)
    return save(path, lambda file: file.write_text(text + "\n", encoding="utf-8"), force)


def frame(report: Report) -> pl.DataFrame:
    """All tables that are written to files as one data frame; of several kinds, each with nulls for the others."""
    rows = [_rows(table) for table in blocks.tables(report.parts()) if table.files]
    whole = pl.concat(rows, how="diagonal")
    return whole.select(pl.exclude("table"), "table") if "table" in whole.columns else whole


def _rows(table: blocks.Table) -> pl.DataFrame:
    return pl.DataFrame([pl.Series(column.name, column.values, column.kind.dtype) for column in table.files])


def plain(value: Any) -> Any:
    """A value that JSON can hold: paths as strings, NaN and infinity as None, findings by their fields."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
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

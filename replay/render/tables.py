"""Reports as tables for other programs: CSV.

A file is written beside its name and renamed when it is complete, so that a full disk or Ctrl-C leaves either the
old file or the new one. Nothing is overwritten unless asked.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import polars as pl

from trajrec.errors import OutputExistsError
from trajrec.replay.report import Entry, Report

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

    Args:
        report: the report; all its top tables are written, one after the other.
        path: the file to write.
        force: overwrite an existing file.

    Raises:
        OutputExistsError: the file exists and `force` is False.
    """
    return save(path, lambda file: frame(report).write_csv(file), force)


def frame(report: Report) -> pl.DataFrame:
    """All top tables of a report as one data frame."""
    rows = [{name: values[name] for name in COLUMNS} for values in map(asdict, entries(report))]
    return pl.DataFrame(rows, schema=COLUMNS)


def entries(report: Report) -> Iterator[Entry]:
    """The rows of all top tables: overall first."""
    for top in (report.overall, *report.groups):
        yield from top.helpful
        yield from top.harmful


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

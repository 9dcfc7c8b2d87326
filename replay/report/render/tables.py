"""Reports as tables for other programs: CSV and Parquet of the top tables, JSON of everything.

A file is written beside its name and renamed when it is complete, so that a full disk or Ctrl-C leaves either the
old file or the new one. Nothing is overwritten unless asked. JSON has null where a number is not defined.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import polars as pl

from trajrec.errors import OutputExistsError
from trajrec.records import Json
from trajrec.replay.folder import spreadsheet
from trajrec.replay.folder.format import HEADER, metadata
from trajrec.replay.report.blocks import Table
from trajrec.replay.report.report import Report


def write_csv(report: Report, path: str | Path, force: bool = False) -> Path:
    """Write the top tables: rank, side, sample, label, target (-1 for the mean), contribution, share.

    Several tables follow each other, told apart by target; those by class by a last column, table. Text that begins
    like a formula has an apostrophe before it. What the file itself cannot say lies beside it (`header_of`), and is
    there first: whether the numbers are exact, what is certified, sign and unit.

    Args:
        report: the report.
        path: the file to write.
        force: overwrite an existing file.

    Raises:
        OutputExistsError: the file exists and `force` is False.
    """
    rows = frame(report)
    rows = rows if len(_written(report)) > 1 else rows.drop("table", strict=False)
    path, header = claim(path, force), json.dumps(_facts(report), indent=1) + "\n"
    save(header_of(path), lambda file: file.write_text(header, encoding="utf-8"), force)
    return save(path, lambda file: spreadsheet.write_csv(rows, file), force)


def header_of(path: Path) -> Path:
    """Where what stands in the header of other files is written for a CSV file."""
    return path.with_name(path.name + HEADER)


def write_parquet(report: Report, path: str | Path, force: bool = False) -> Path:
    """Write the top tables as `write_csv` does, with the column table always; what its header says in the metadata.

    Raises:
        OutputExistsError: the file exists and `force` is False.
    """
    facts = metadata(_facts(report))
    return save(path, lambda file: frame(report).write_parquet(file, metadata=facts), force)


def write_json(report: Report, path: str | Path, force: bool = False) -> Path:
    """Write what every section found, pictures left out.

    Raises:
        OutputExistsError: the file exists and `force` is False.
    """
    text = json.dumps(plain(report.values()), indent=1, allow_nan=False, ensure_ascii=False)
    return save(path, lambda file: file.write_text(text + "\n", encoding="utf-8"), force)


def _facts(report: Report) -> Json:
    """What must be known of numbers that leave the report."""
    settings, proof = report.head.settings, report.head.certificate
    names = ("label", "exact", "curvature", "method", "sign", "unit", "run_id")
    return {name: getattr(settings, name) for name in names} | {"certificate": proof and proof.sentence}


def frame(report: Report) -> pl.DataFrame:
    """All tables that are written to files as one data frame; of several kinds, each with nulls for the others."""
    whole = pl.concat((table.rows.select(table.files) for part in _written(report) for table in part), how="diagonal")
    return whole.select(pl.exclude("table"), "table") if "table" in whole.columns else whole


def _written(report: Report) -> list[list[Table]]:
    """The tables that are written, part by part."""
    parts = [part.blocks for _, chapter in report.chapters for part in chapter.parts]
    found = [[block for block in blocks if isinstance(block, Table) and block.files] for blocks in parts]
    return [tables for tables in found if tables]


def plain(value: Any) -> Any:
    """A value that JSON can hold: paths as strings, NaN and infinity as None, findings by their fields."""
    if isinstance(value, pl.DataFrame):
        value = value.to_dicts()
    if is_dataclass(value):
        value = {each.name: getattr(value, each.name) for each in fields(value)}
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
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        write(unfinished)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return path

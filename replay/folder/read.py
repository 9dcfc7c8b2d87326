"""A replay folder as it lies on disk (`trajrec.replay.folder.format`), opened for questions.

Opening reads schemas and settings only; the rows stay on disk behind Polars LazyFrames, so a file may be larger than
the memory. Labels become strings here, once: a class number is replaced by the class's name where names are known.
What is missing is null: a report then says less, never wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from trajrec.errors import DamagedRunError, ReplayError
from trajrec.records import Json
from trajrec.replay.folder.format import (
    CONTRIBUTIONS,
    KNOWN,
    NUMBERS,
    PICTURES,
    REPLAY,
    SAMPLES,
    TABLES,
    TARGETS,
    THUMBNAILS,
    Certificate,
    Settings,
)
from trajrec.replay.folder.validated import Validated, validated


@dataclass(frozen=True, slots=True)
class Inputs:
    """An opened replay folder.

    Attributes:
        folder: where it lies.
        contributions: LazyFrame of sample, target, contribution and perhaps epoch.
        samples: LazyFrame of sample, label, name (strings), noisy (boolean), self_influence; nulls where unknown.
        targets: LazyFrame of target, label, prediction, name (strings); nulls where unknown.
        thumbnails: LazyFrame of set, sample, png, text, or None.
        by_epoch: whether contributions has the column epoch.
        validated: what training again said of it, if it was done.
    """

    folder: Path
    settings: Settings
    contributions: pl.LazyFrame
    samples: pl.LazyFrame
    targets: pl.LazyFrame
    thumbnails: pl.LazyFrame | None
    by_epoch: bool
    validated: Validated | None = None

    @property
    def certificate(self) -> Certificate | None:
        """What the replay could prove."""
        return self.settings.certificate


def load(folder: str | Path) -> Inputs:
    """Open a replay folder.

    Args:
        folder: what `trajrec replay` wrote.

    Raises:
        ReplayError: the folder does not exist or is not a replay folder.
        DamagedRunError: a file in it cannot be read, or lacks a column.
    """
    folder = Path(folder)
    path = _existing(folder)
    facts = _facts(folder / REPLAY)
    frame = scan(path)
    with reading(path):
        settings = Settings.read({**pl.read_parquet_metadata(path), **facts})
        names = frame.collect_schema().names()
    kinds = {name: kind for name, kind in NUMBERS.all.items() if name in names}
    return Inputs(
        folder=folder,
        settings=settings,
        contributions=frame.select(pl.col(name).cast(kind) for name, kind in kinds.items()),
        samples=_described(folder / SAMPLES, "sample", settings.classes),
        targets=_described(folder / TARGETS, "target", settings.classes),
        thumbnails=_thumbnails(folder / THUMBNAILS),
        by_epoch="epoch" in names,
        validated=validated(folder, settings),
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what Polars raises on a damaged file into an error of the family that names the file."""
    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"{path} cannot be read: {reason}. It is damaged or not a Parquet file: replay again with --force."
        raise DamagedRunError(message) from error


def scan(path: Path) -> pl.LazyFrame:
    """One of the folder's Parquet files, not read yet, with its columns checked.

    Raises:
        DamagedRunError: it cannot be read, lacks a column, or has one of another type.
    """
    with reading(path):
        frame = pl.scan_parquet(path)
        schema = frame.collect_schema()
    missing = [name for name in TABLES[path.name].needed if name not in schema]
    if missing:
        raise DamagedRunError(f"{path} has no column {', '.join(missing)} (found {', '.join(schema)}). Replay again.")
    for name, kind in TABLES[path.name].all.items():
        if name in schema and not _fits(schema[name], kind):
            raise DamagedRunError(f"{path}: column {name} should be {kind}, found {schema[name]}. Replay again.")
    return frame


def _existing(folder: Path) -> Path:
    if not folder.exists():
        raise ReplayError(f"There is no replay folder {folder}. `trajrec replay RUN` makes one.")
    path = folder / CONTRIBUTIONS
    if not path.is_file():
        raise ReplayError(
            f"{folder} is not a replay folder: it holds no {CONTRIBUTIONS}. "
            "Give the folder that `trajrec replay` wrote, or the recording itself."
        )
    return path


def _fits(found: pl.DataType, kind: Any) -> bool:
    """Whether a column can be read as one of a kind; labels may be numbers."""
    if kind == pl.Int64:
        return found.is_integer()
    if kind == pl.Float64:
        return found.is_numeric() or found == pl.Null
    if kind == pl.String and (found.is_numeric() or found == pl.Boolean):
        return True
    return found in (kind, pl.Null)


def _facts(path: Path) -> Json:
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise DamagedRunError(f"{path} cannot be read: {error}. Replay again with --force.") from error
    if not isinstance(facts, dict):
        raise DamagedRunError(f"{path} cannot be read: an object was expected, found {facts!a:.40}. Replay again.")
    return facts


def _described(path: Path, key: str, classes: tuple[str, ...]) -> pl.LazyFrame:
    """samples.parquet or targets.parquet with every optional column present; without the file, no rows."""
    kinds = {key: pl.Int64, **KNOWN}
    if not path.is_file():
        return pl.LazyFrame(schema=kinds)
    frame = scan(path)
    numbers = [name for name in ("label", "prediction") if frame.collect_schema().get(name, pl.String()).is_integer()]
    columns = [pl.col(name) for name in numbers]
    named = [c.replace_strict(range(len(classes)), classes, default=c.cast(pl.String)) for c in columns]
    return _with_all(frame.with_columns(named) if classes else frame, kinds)


def _thumbnails(path: Path) -> pl.LazyFrame | None:
    return _with_all(scan(path), PICTURES, {"set": "train"}) if path.is_file() else None


def _with_all(frame: pl.LazyFrame, kinds: Mapping[str, Any], missing: Mapping[str, Any] | None = None) -> pl.LazyFrame:
    """All these columns; those that are not there hold what stands for them, or null."""
    there = frame.collect_schema()
    columns = {name: pl.col(name) if name in there else pl.lit((missing or {}).get(name)) for name in kinds}
    return frame.select(column.cast(kinds[name]).alias(name) for name, column in columns.items())

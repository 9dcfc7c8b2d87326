"""A replay folder as it lies on disk, opened for questions.

`trajrec replay` writes DIR/contributions.parquet (sample, target, contribution, and epoch with --by-epoch) and
DIR/replay.json, and, when the data set gives them, DIR/samples.parquet (labels, names, known wrong labels),
DIR/targets.parquet (labels, predictions) and DIR/thumbnails.parquet (pictures or text). Opening reads schemas and
settings only; the rows stay on disk behind Polars LazyFrames, so a file may be larger than the memory.

Labels become strings here, once: a class number is replaced by the class's name where names are known. Everything
but contributions.parquet may be missing, and every key of replay.json too: a report then says less, never wrong.

    D folder, S tracked samples, M targets, N training samples
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from trajrec.errors import DamagedRunError, ReplayError

CONTRIBUTIONS = "contributions.parquet"
COLUMNS = {"sample": pl.Int64, "target": pl.Int64, "contribution": pl.Float64}
SIGN = "positive = helpful"
_PEOPLE: dict[str, Any] = {
    "label": pl.String,
    "prediction": pl.String,
    "name": pl.String,
    "noisy": pl.Boolean,
    "self_influence": pl.Float64,
}
_PICTURES: dict[str, Any] = {"png": pl.Binary, "text": pl.String}
# Of every file the columns that it must have, and those that it may have.
TABLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    CONTRIBUTIONS: (COLUMNS, {"epoch": pl.Int64}),
    "samples.parquet": ({"sample": pl.Int64}, _PEOPLE),
    "targets.parquet": ({"target": pl.Int64}, _PEOPLE),
    "thumbnails.parquet": ({"sample": pl.Int64}, {"set": pl.String, **_PICTURES}),
}


@dataclass(frozen=True, slots=True)
class Certificate:
    """What replay could prove about having replayed this very run.

    Attributes:
        sentence: the verdict in words.
        good: True if every recomputed step agreed with the recording, None if that is not known.
        max_drift: largest drift found, relative to the step's length.
        at_step: where it was found.
        tolerance: largest drift accepted.
        steps_checked: how many steps were recomputed.
    """

    sentence: str
    good: bool | None
    max_drift: float | None = None
    at_step: int | None = None
    tolerance: float | None = None
    steps_checked: int | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """How a replay was asked, as far as its folder says.

    Attributes:
        run: the recording's path.
        run_id: its identity.
        mode: "adjoint" or "tangent".
        exact: with the Hessian (True), without it (False), or unknown.
        targets: "mean", "each", "class" or "chosen".
        target_set: "test", or "train" when targets are training samples (then a target's id is a sample's id).
        unit: unit of a contribution.
        samples_total: N.
        steps: T.
        classes: names of the classes, by number.
        details: everything else of replay.json that is a plain number or string.
        curvature: "hessian", "ggn" or "none", where the folder says it.
        growth: of the adjoint (`trajrec.replay.report.sensitivity`), or None.
        taylor: what the Taylor check said, or None.
    """

    run: str | None
    run_id: str | None
    mode: str | None
    exact: bool | None
    targets: str
    target_set: str
    sign: str
    unit: str | None
    samples_total: int | None
    steps: int | None
    epochs: int | None
    optimizer: str | None
    classes: tuple[str, ...]
    created: str | None
    version: str | None
    command: str | None
    details: tuple[tuple[str, str], ...]
    curvature: str | None = None
    growth: float | None = None
    taylor: str | None = None


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
    """

    folder: Path
    settings: Settings
    certificate: Certificate | None
    contributions: pl.LazyFrame
    samples: pl.LazyFrame
    targets: pl.LazyFrame
    thumbnails: pl.LazyFrame | None
    by_epoch: bool


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
    facts = _facts(folder / "replay.json")
    frame = scan(path)
    with reading(path):
        facts = {**pl.read_parquet_metadata(path), **facts}
        names = frame.collect_schema().names()
    settings = _settings(facts)
    return Inputs(
        folder=folder,
        settings=settings,
        certificate=_certificate(facts.get("certificate")),
        contributions=frame.select(pl.col(name).cast(kind) for name, kind in _kinds(names).items()),
        samples=_people(folder / "samples.parquet", "sample", settings.classes),
        targets=_people(folder / "targets.parquet", "target", settings.classes),
        thumbnails=_thumbnails(folder / "thumbnails.parquet"),
        by_epoch="epoch" in names,
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


def _kinds(names: list[str]) -> dict[str, Any]:
    return {**COLUMNS, "epoch": pl.Int64} if "epoch" in names else COLUMNS


def scan(path: Path) -> pl.LazyFrame:
    """One of the folder's Parquet files, not read yet, with its columns checked.

    Raises:
        DamagedRunError: it cannot be read, lacks a column, or has one of another type.
    """
    needed, known = TABLES[path.name]
    with reading(path):
        frame = pl.scan_parquet(path)
        schema = frame.collect_schema()
    missing = [name for name in needed if name not in schema]
    if missing:
        raise DamagedRunError(f"{path} has no column {', '.join(missing)} (found {', '.join(schema)}). Replay again.")
    for name, kind in {**needed, **known}.items():
        if name in schema and not _fits(schema[name], kind):
            raise DamagedRunError(f"{path}: column {name} should be {kind}, found {schema[name]}. Replay again.")
    return frame


def _fits(found: pl.DataType, kind: Any) -> bool:
    """Whether a column can be read as one of a kind; labels may be numbers."""
    if kind == pl.Int64:
        return found.is_integer()
    if kind == pl.Float64:
        return found.is_numeric() or found == pl.Null
    if kind == pl.String and (found.is_numeric() or found == pl.Boolean):
        return True
    return found in (kind, pl.Null)


def _facts(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise DamagedRunError(f"{path} cannot be read: {error}. Replay again with --force.") from error
    if not isinstance(facts, dict):
        raise DamagedRunError(f"{path} cannot be read: an object was expected, found {facts!a:.40}. Replay again.")
    return facts


def _settings(facts: Mapping[str, Any]) -> Settings:
    return Settings(
        run=_text(facts.get("run")),
        run_id=_text(facts.get("run_id")),
        mode=_mode(facts),
        exact=_truth(facts.get("exact")),
        targets=_text(facts.get("targets")) or "mean",
        target_set=_text(facts.get("target_set")) or "test",
        sign=_text(facts.get("sign")) or SIGN,
        unit=_text(facts.get("unit")),
        samples_total=_whole(facts.get("samples_total")),
        steps=_whole(facts.get("steps")),
        epochs=_whole(facts.get("epochs")),
        optimizer=_text(facts.get("optimizer")),
        classes=_classes(facts.get("classes")),
        created=_text(facts.get("created")),
        version=_text(facts.get("trajrec") or facts.get("trajrec version")),
        command=_command(facts.get("command")),
        details=tuple((key, _plain(value)) for key, value in facts.items() if _is_detail(key, value)),
        curvature=_text(facts.get("curvature")),
        growth=_number(facts.get("growth")),
        taylor=_text(facts.get("taylor")),
    )


def _classes(value: Any) -> tuple[str, ...]:
    return tuple(whole_characters(str(name)) for name in value) if isinstance(value, list) else ()


def _number(value: Any) -> float | None:
    return _real(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _mode(facts: Mapping[str, Any]) -> str | None:
    """The direction taken; "auto" is what was asked, then `method` says what was done."""
    said = [_text(facts.get(key)) for key in ("mode", "method")]
    return next((word for word in said if word in ("adjoint", "tangent")), None)


def _is_detail(key: str, value: Any) -> bool:
    return key in {"seconds", "dtype", "device", "drift_allowed"} and value not in (None, "")


def _plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _certificate(value: Any) -> Certificate | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return Certificate(value, None) if value.strip() else None
    if not isinstance(value, Mapping) or not value:
        return None
    drift, tolerance = _real(value.get("max_drift")), _real(value.get("tolerance"))
    return Certificate(
        sentence=_text(value.get("sentence")) or _text(value.get("verdict")) or "No verdict was written.",
        good=_verdict(_text(value.get("verdict")) or "", drift, tolerance),
        max_drift=drift,
        at_step=_whole(value.get("at_step")),
        tolerance=tolerance,
        steps_checked=_whole(value.get("steps_checked")),
    )


def _verdict(verdict: str, drift: float | None, tolerance: float | None) -> bool | None:
    known = {"bit-exact": True, "within rounding": True, "drifted": False, "unchecked": None}
    if verdict in known or drift is None or tolerance is None:
        return known.get(verdict)
    return not math.isnan(drift) and drift <= tolerance


def _people(path: Path, key: str, classes: tuple[str, ...]) -> pl.LazyFrame:
    """samples.parquet or targets.parquet with every optional column present; without the file, no rows."""
    kinds = _PEOPLE
    if not path.is_file():
        return pl.LazyFrame(schema={key: pl.Int64, **kinds})
    frame = scan(path)
    schema = frame.collect_schema()
    columns = [pl.col(key).cast(pl.Int64)]
    for name, kind in kinds.items():
        column = pl.col(name) if name in schema else pl.lit(None)
        if name in ("label", "prediction") and name in schema and schema[name].is_integer() and classes:
            numbers = list(range(len(classes)))
            column = column.replace_strict(numbers, list(classes), default=column.cast(pl.String))
        columns.append(column.cast(kind).alias(name))
    return frame.select(columns)


def _thumbnails(path: Path) -> pl.LazyFrame | None:
    if not path.is_file():
        return None
    frame = scan(path)
    names = frame.collect_schema().names()
    kinds: dict[str, Any] = {"set": pl.String, "sample": pl.Int64, **_PICTURES}
    defaults = {"set": pl.lit("train")}
    return frame.select(
        (pl.col(name) if name in names else defaults.get(name, pl.lit(None))).cast(kind).alias(name)
        for name, kind in kinds.items()
    )


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else whole_characters(str(value))


def whole_characters(text: str) -> str:
    """The text; halves of characters, which JSON can hold and no file can be written with, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _command(value: Any) -> str | None:
    return _text(" ".join(str(word) for word in value) if isinstance(value, list) else value)


def _truth(value: Any) -> bool | None:
    return {"true": True, "false": False}.get(str(value).lower())


def _real(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _whole(value: Any) -> int | None:
    number = _real(value)
    return None if number is None or not math.isfinite(number) else int(number)

"""The replay folder's format: names of its files, columns of its tables, and what stands in replay.json.

    contributions.parquet   sample int64, target int64 (-1: the mean), contribution float64, epoch if asked for;
                            its file metadata say what replay.json says, so that a number never goes alone
    samples.parquet         sample, label, name, noisy: as far as the data set gives them
    targets.parquet         target, label, name, noisy; prediction of the final model for single test samples
    thumbnails.parquet      set, sample, png, text: where the data set yields pictures or text
    replay.json             everything else about the replay (`Settings`)
    validation.json         what training again said of it (`replay.folder.validated`)
    top.csv                 the tables that `trajrec replay` printed
    top.csv.meta.json       what stands in the header of a CSV file that has none: label, form, certificate, sign, unit

Writer, reader and merge take names from here. Everything but contributions.parquet may be missing, and every key of
replay.json too: it is read as far as it can be understood, so that folders of older and newer versions are read.

    S tracked samples, M targets, N training samples, T steps
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import polars as pl

from trajrec.records import Json
from trajrec.replay.label import APPROXIMATION, label_of

CONTRIBUTIONS = "contributions.parquet"
SAMPLES = "samples.parquet"
TARGETS = "targets.parquet"
THUMBNAILS = "thumbnails.parquet"
REPLAY = "replay.json"
TOP = "top.csv"
HEADER = ".meta.json"  # behind the name of a CSV file
VALIDATION = "validation.json"

SIGN = "positive = helpful"
VERDICTS = {"drifted": False, "unchecked": None, "within rounding": True, "bit-exact": True}  # the weakest first
PICTURES: Json = {"set": pl.String, "sample": pl.Int64, "png": pl.Binary, "text": pl.String}
KNOWN: Json = {
    "label": pl.String,
    "prediction": pl.String,
    "name": pl.String,
    "noisy": pl.Boolean,
    "self_influence": pl.Float64,
}


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of a table: those that it must have, those that it may have, and those that tell its rows apart."""

    needed: Mapping[str, Any]
    known: Mapping[str, Any]
    key: tuple[str, ...]

    @property
    def all(self) -> Json:
        """Needed and known ones."""
        return {**self.needed, **self.known}


NUMBERS = Columns(
    {"sample": pl.Int64, "target": pl.Int64, "contribution": pl.Float64}, {"epoch": pl.Int64}, ("sample", "target")
)
EXTRAS: dict[str, Columns] = {
    SAMPLES: Columns({"sample": pl.Int64}, KNOWN, ("sample",)),
    TARGETS: Columns({"target": pl.Int64}, KNOWN, ("target",)),
    THUMBNAILS: Columns({"sample": pl.Int64}, PICTURES, ("set", "sample")),
}
TABLES = {CONTRIBUTIONS: NUMBERS, **EXTRAS}


def text(value: Any) -> str | None:
    """A value as text, None for nothing; halves of characters, which JSON can hold and no file, as escapes."""
    return None if value is None or value == "" else str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def _command(value: Any) -> str | None:
    return text(" ".join(str(word) for word in value) if isinstance(value, list) else value)


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(text(name) or "" for name in value) if isinstance(value, list) else ()


def _truth(value: Any) -> bool | None:
    return {"true": True, "false": False}.get(str(value).lower())


def _real(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _number(value: Any) -> float | None:
    return _real(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def finite(value: Any) -> float | None:
    """A number of JSON that is neither NaN nor infinite; None for everything else."""
    number = _number(value)
    return number if number is not None and math.isfinite(number) else None


def _whole(value: Any) -> int | None:
    number = _real(value)
    return None if number is None or not math.isfinite(number) else int(number)


def _pair(value: Any) -> tuple[int, int] | None:
    whole = isinstance(value, list | tuple) and all(type(number) is int for number in value)
    return (value[0], value[1]) if whole and len(value) == 2 else None


def _rows(value: Any) -> tuple[tuple[int, ...], ...]:
    rows = value if isinstance(value, list | tuple) else ()
    sound = all(isinstance(row, list | tuple) and all(type(number) is int for number in row) for row in rows)
    return tuple(map(tuple, rows)) if sound and len({len(row) for row in rows}) == 1 else ()


def _read(read: Callable[[Any], Any], default: Any = None, always: bool = True) -> Any:
    """A field, how its value is read from JSON, and whether it is always written; the default stands for nothing."""
    return field(default=default, metadata={"read": read, "always": always})


def _label(exact: bool | None, curvature: str | None) -> str | None:
    """What the numbers are called; None where nothing says how they were made."""
    if exact is None and curvature is None:
        return None
    return label_of("none" if exact is False else curvature or "hessian")


def _known(kind: Any, facts: Mapping[str, Any]) -> Json:
    """The fields of a dataclass, as far as the facts say them."""
    found = {each.name: each.metadata["read"](facts.get(each.name)) for each in fields(kind)}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Certificate:
    """What replay could prove about having replayed this very run, as it stands in replay.json.

    Attributes:
        verdict: "bit-exact", "within rounding", "drifted" or "unchecked".
        sentence: the verdict in words.
        max_drift: largest drift found, relative to the step's length.
        at_step: where it was found.
        tolerance: largest drift accepted.
        steps_checked: how many steps were recomputed.
        derivative: the second proof in words; None of numbers that leave the derivative of the gradient out.
        derivative_verdict: "proved", "by differences" or "not proved"; derivative_worst: the largest difference found.
    """

    verdict: str | None = _read(text)
    sentence: str = _read(text, "")
    max_drift: float | None = _read(_real)
    at_step: int | None = _read(_whole)
    tolerance: float | None = _read(_real)
    steps_checked: int | None = _read(_whole)
    derivative: str | None = _read(text)
    derivative_verdict: str | None = _read(text)
    derivative_worst: float | None = _read(_real)

    @property
    def good(self) -> bool | None:
        """True if every recomputed step agreed with the recording, None if that is not known."""
        if self.verdict in VERDICTS or self.max_drift is None or self.tolerance is None:
            return VERDICTS.get(self.verdict or "")
        return self.max_drift <= self.tolerance

    @classmethod
    def read(cls, value: Any) -> Certificate | None:
        """The certificate in a value of JSON, or in the text of a file's metadata; None if there is none."""
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                return cls(sentence=value) if value.strip() else None
        if not isinstance(value, Mapping) or not value:
            return None
        facts = _known(cls, value)
        return cls(**{"sentence": facts.get("verdict", "No verdict was written."), **facts})


@dataclass(frozen=True, slots=True)
class Settings:
    """How a replay was asked and made: the fields are the keys of replay.json, in the order of the file.

    Attributes:
        exact, curvature: "hessian" is exact, everything else an approximation; label: says so in words, and is made
            of these two wherever a folder is read.
        mode: "adjoint" or "tangent"; unit: of a contribution.
        targets: "mean", "each", "class", "chosen", "tokens" or "contrasts".
        target_rows: what each target of the last two is (`trajrec.replay.losses.chosen`), its name being its place.
        target_set: "test", or "train" when targets are training samples (then a target's id is a sample's id).
        samples, samples_total, steps: S, N, T; window: first and last step that were replayed, where not all were.
        growth: of the adjoint (`trajrec.replay.report.sensitivity`), or None: without the Hessian it means nothing.
        smooth: whether model and loss have no kinks (`trajrec.replay.losses.kinks`), or None; kinks: if not, what has.
        accuracy: what the numbers are good to, relative to the largest, or None where that was not measured.
        classes: names of the classes, by number.
        trajrec: the version that wrote it; run: the recording's path.
        question: its identity (`trajrec.replay.folder.identity`); shard: which piece of how many, or None.
        notes: what should be known of the losses, a sentence each;
        taylor: what the Taylor check said; left_out: what could not be written, a sentence for each file.
    """

    method: str | None = _read(text)
    exact: bool | None = _read(_truth)
    curvature: str | None = _read(text)
    label: str | None = _read(text)
    mode: str | None = _read(text)
    sign: str = _read(text, SIGN)
    unit: str | None = _read(text)
    run_id: str | None = _read(text)
    certificate: Certificate | None = _read(Certificate.read)  # noqa: RUF009 - a field as the others
    targets: str = _read(text, "mean")
    target_set: str = _read(text, "test")
    target_rows: tuple[tuple[int, ...], ...] = _read(_rows, (), always=False)
    samples: int | None = _read(_whole)
    samples_total: int | None = _read(_whole)
    steps: int | None = _read(_whole)
    window: tuple[int, int] | None = _read(_pair)
    growth: float | None = _read(_number)
    smooth: bool | None = _read(_truth)
    kinks: tuple[str, ...] = _read(_texts, (), always=False)
    accuracy: float | None = _read(_number, always=False)
    epochs: int | None = _read(_whole)
    by_epoch: bool | None = _read(_truth)
    reduction: str | None = _read(text)
    optimizer: str | None = _read(text)
    dtype: str | None = _read(text)
    device: str | None = _read(text)
    classes: tuple[str, ...] = _read(_texts, ())
    created: str | None = _read(text)
    trajrec: str | None = _read(text)
    run: str | None = _read(text, always=False)
    seconds: float | None = _read(_number, always=False)
    command: str | None = _read(_command, always=False)
    question: str | None = _read(text, always=False)
    shard: tuple[int, int] | None = _read(_pair, always=False)
    taylor: str | None = _read(text, always=False)
    drift_allowed: str | None = _read(text, always=False)
    notes: tuple[str, ...] = _read(_texts, (), always=False)
    left_out: tuple[str, ...] = _read(_texts, (), always=False)

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Settings:
        """What is understood of the object in replay.json, or of a file's metadata."""
        named = {"trajrec": facts.get("trajrec version"), **facts}
        # "auto" is what was asked for; then `method` says what was done
        ways = (text(facts.get(key)) for key in ("mode", "method"))
        named["mode"] = next((way for way in ways if way in ("adjoint", "tangent")), None)
        named["label"] = _label(_truth(facts.get("exact")), text(facts.get("curvature")))
        if named["label"] == APPROXIMATION:
            named["growth"] = None
        return cls(**_known(cls, named))

    def to_json(self) -> Json:
        """The object in replay.json; what only some replays say is left out where there is nothing to say."""
        found = [(each, getattr(self, each.name)) for each in fields(self)]
        said = [(each, None if value == () else value) for each, value in found]
        return {each.name: value for each, value in said if value is not None or each.metadata["always"]}

    @property
    def details(self) -> tuple[tuple[str, str], ...]:
        """What is worth a line in small print, in words."""
        small = ("dtype", self.dtype), ("device", self.device), ("drift_allowed", self.drift_allowed)
        seconds = None if self.seconds is None else f"{self.seconds:.3g}"
        return tuple((name, value) for name, value in (*small, ("seconds", seconds)) if value)


def metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    """Facts as the metadata of a Parquet file: texts as they are, everything else as JSON."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
    return {text(key) or "": text(value) or "" for key, value in texts.items()}


def write_facts(facts: Mapping[str, Any], folder: Path) -> None:
    """Writes replay.json."""
    (folder / REPLAY).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

"""Joins the outputs of shards into the output of the whole question, and checks that nothing is missing.

Shards of one question (`trajrec replay --shard i/n`) share the question's identity and differ in their piece: by
targets where the replay went backwards, by samples where it went forwards. Each has made its steps again by itself, so
the joined certificate is the weakest of theirs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from trajrec.errors import ReplayError
from trajrec.replay.folder.read import reading, scan, whole_characters
from trajrec.typed import typed

_TABLES = {"samples.parquet": ["sample"], "targets.parquet": ["target"], "thumbnails.parquet": ["set", "sample"]}
_MOST_NAMED = 20
_VERDICTS = ("drifted", "unchecked", "within rounding", "bit-exact")


def read_shards(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The replay.json of every shard, in the order of the pieces.

    Raises:
        ReplayError: if one is not a shard, they answer different questions, or a piece is missing or there twice.
    """
    found = [_read(folder) for folder in folders]
    for facts in found[1:]:
        if facts["question"] != found[0]["question"] or facts["shard"][1] != found[0]["shard"][1]:
            raise ReplayError(
                f"{facts['folder']} answers another question than {found[0]['folder']}: the run, the Task, the options "
                "or the number of shards differ. Only shards of one `trajrec replay` question can be merged."
            )
    _check_complete(found)
    return sorted(found, key=lambda facts: int(facts["shard"][0]))


@dataclass(frozen=True, slots=True)
class _Certificate:
    """What joining certificates takes."""

    verdict: str
    max_drift: float


@dataclass(frozen=True, slots=True)
class _Shard:
    """What joining takes of a shard's replay.json."""

    question: str
    shard: tuple[int, int]
    certificate: _Certificate
    seconds: float
    growth: float | None = None


def _read(folder: Path) -> dict[str, Any]:
    try:
        facts: Any = json.loads((folder / "replay.json").read_text(encoding="utf-8"))
        if isinstance(facts, dict) and not facts.get("shard"):
            raise ReplayError(f"{folder} is a whole replay, not a shard: there is nothing to merge.")
        piece = typed(_Shard, facts)
    except (OSError, ValueError, RecursionError) as error:
        raise ReplayError(f"{folder} is not the folder of a finished replay ({error}).") from None
    if piece.certificate.verdict not in _VERDICTS or not 1 <= piece.shard[0] <= piece.shard[1]:
        raise ReplayError(f"{folder} is not the folder of a shard: its certificate, or its number, is none.")
    return {**facts, "folder": folder}


def _check_complete(found: Sequence[dict[str, Any]]) -> None:
    count, there = int(found[0]["shard"][1]), [int(facts["shard"][0]) for facts in found]
    twice = sorted({i for i in there if there.count(i) > 1})
    if twice:
        names = ", ".join(str(facts["folder"]) for facts in found if facts["shard"][0] == twice[0])
        raise ReplayError(f"Shard {twice[0]}/{count} is there more than once: {names}.")
    missing = [f"{i}/{count}" for i in islice((i for i in range(1, count + 1) if i not in there), _MOST_NAMED)]
    if missing:
        raise ReplayError(f"Missing shard{'s' * (len(missing) > 1)} {', '.join(missing)}: the answer would have holes.")


def join(shards: Sequence[dict[str, Any]], folder: Path) -> None:
    """Writes the whole replay of complete shards (`read_shards`) into a folder."""
    facts = {key: value for key, value in shards[0].items() if key != "folder"}
    facts["shard"] = None
    facts["certificate"] = _weakest([shard["certificate"] for shard in shards])
    facts["seconds"] = round(sum(float(shard["seconds"]) for shard in shards), 3)
    growths = [shard["growth"] for shard in shards if shard.get("growth") is not None]
    facts["growth"] = max(growths) if growths else None
    contributions = _contributions([shard["folder"] for shard in shards])
    facts["samples"] = contributions["sample"].n_unique()
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
    metadata = {whole_characters(key): whole_characters(text) for key, text in texts.items()}
    contributions.write_parquet(folder / "contributions.parquet", metadata=metadata)
    for name, key in _TABLES.items():
        parts = [_collected(s["folder"] / name) for s in shards if (s["folder"] / name).is_file()]
        if parts:
            with reading(shards[0]["folder"] / name):
                joined = pl.concat(parts, how="diagonal_relaxed").unique(key, maintain_order=True)
            joined.write_parquet(folder / name)
    (folder / "replay.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _contributions(folders: Sequence[Path]) -> pl.DataFrame:
    """All rows, in the order of a replay that was not cut: by epoch, sample and target as the shards have them."""
    parts = [_collected(folder / "contributions.parquet") for folder in folders]
    for part, folder in zip(parts, folders, strict=True):
        if part.schema != parts[0].schema:
            raise ReplayError(f"{folder} has other columns than {folders[0]}: only shards of one replay can be merged.")
    rows = pl.concat(parts)
    keys = [name for name in ("epoch", "sample", "target") if name in rows.columns]
    order = [pl.col(key).rank("dense") if key == "epoch" else _place(rows, key) for key in keys]
    return rows.sort(order)


def _collected(path: Path) -> pl.DataFrame:
    frame = scan(path)
    with reading(path):
        return frame.collect()


def _place(rows: pl.DataFrame, key: str) -> pl.Expr:
    values = rows[key].unique(maintain_order=True)
    return pl.col(key).replace_strict(values, pl.Series(range(len(values)), dtype=pl.Int64), return_dtype=pl.Int64)


def _weakest(certificates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    weakest = min(certificates, key=lambda c: (_VERDICTS.index(c["verdict"]), -float(c["max_drift"])))
    return dict(weakest)

"""Joins the outputs of shards into the output of the whole question, and checks that nothing is missing.

Shards of one question (`trajrec replay --shard i/n`) share the question's identity and differ in their piece: by
targets where the replay went backwards, by samples where it went forwards. Each has made its steps again by itself, so
the joined certificate is the weakest of theirs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from trajrec.errors import ReplayError
from trajrec.records import Json
from trajrec.replay.folder.format import (
    CONTRIBUTIONS,
    EXTRAS,
    REPLAY,
    VERDICTS,
    Certificate,
    Settings,
    metadata,
    write_facts,
)
from trajrec.replay.folder.read import reading, scan

_MOST_NAMED = 20


@dataclass(frozen=True, slots=True)
class Shard:
    """The folder of one piece of an answer, and its replay.json.

    Attributes:
        facts: as they stand there; what this version does not know is handed on as it is.
        settings: what is understood of them.
        piece, pieces: its number from 1, and how many there are.
    """

    folder: Path
    facts: Json
    settings: Settings
    piece: int
    pieces: int


def read_shards(folders: Sequence[Path]) -> list[Shard]:
    """What the replay.json of every shard says, in the order of the pieces.

    Raises:
        ReplayError: if one is not a shard, they answer different questions, or a piece is missing or there twice.
    """
    found = [_read(folder) for folder in folders]
    for shard in found[1:]:
        if (shard.settings.question, shard.pieces) != (found[0].settings.question, found[0].pieces):
            raise ReplayError(
                f"{shard.folder} answers another question than {found[0].folder}: the run, the Task, the options "
                "or the number of shards differ. Only shards of one `trajrec replay` question can be merged."
            )
    _check_complete(found)
    return sorted(found, key=lambda shard: shard.piece)


def _read(folder: Path) -> Shard:
    try:
        facts: Any = json.loads((folder / REPLAY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ReplayError(f"{folder} is not the folder of a finished replay ({error}).") from None
    if not isinstance(facts, dict):
        raise ReplayError(f"{folder} is not the folder of a finished replay (found {facts!a:.40}).")
    if not facts.get("shard"):
        raise ReplayError(f"{folder} is a whole replay, not a shard: there is nothing to merge.")
    found = Settings.read(facts)
    piece, pieces = found.shard or (0, 0)
    if found.question is None or found.seconds is None or not 1 <= piece <= pieces:
        raise ReplayError(f"{folder} is not the folder of a shard: its {REPLAY} has no question, piece or time.")
    if found.certificate is None or found.certificate.verdict not in VERDICTS:
        raise ReplayError(f"{folder} is not the folder of a shard: its {REPLAY} has no certificate.")
    return Shard(folder, facts, found, piece, pieces)


def _check_complete(found: Sequence[Shard]) -> None:
    count, there = found[0].pieces, [shard.piece for shard in found]
    twice = sorted({i for i in there if there.count(i) > 1})
    if twice:
        names = ", ".join(str(shard.folder) for shard in found if shard.piece == twice[0])
        raise ReplayError(f"Shard {twice[0]}/{count} is there more than once: {names}.")
    missing = [f"{i}/{count}" for i in islice((i for i in range(1, count + 1) if i not in there), _MOST_NAMED)]
    if missing:
        raise ReplayError(f"Missing shard{'s' * (len(missing) > 1)} {', '.join(missing)}: the answer would have holes.")


def join(shards: Sequence[Shard], folder: Path) -> None:
    """Writes the whole replay of complete shards (`read_shards`) into a folder."""
    contributions = _contributions([shard.folder for shard in shards])
    growths = [growth for shard in shards if (growth := shard.settings.growth) is not None]
    accuracies = [accuracy for shard in shards if (accuracy := shard.settings.accuracy) is not None]
    facts = shards[0].facts | {
        "shard": None,
        "certificate": min(shards, key=_strength).facts["certificate"],
        "seconds": round(sum(shard.settings.seconds or 0 for shard in shards), 3),
        "growth": max(growths, default=None),
        "samples": contributions["sample"].n_unique(),
    }
    facts |= {"accuracy": max(accuracies)} if accuracies else {}
    contributions.write_parquet(folder / CONTRIBUTIONS, metadata=metadata(facts))
    for name, columns in EXTRAS.items():
        parts = [_collected(shard.folder / name) for shard in shards if (shard.folder / name).is_file()]
        if parts:
            with reading(shards[0].folder / name):
                joined = pl.concat(parts, how="diagonal_relaxed").unique(columns.key, maintain_order=True)
            joined.write_parquet(folder / name)
    write_facts(facts, folder)


def _strength(shard: Shard) -> tuple[int, float]:
    """What a certificate proves, the weakest first; of two of one verdict that of the larger drift."""
    proof = shard.settings.certificate or Certificate()
    return list(VERDICTS).index(proof.verdict or ""), -(math.inf if proof.max_drift is None else proof.max_drift)


def _contributions(folders: Sequence[Path]) -> pl.DataFrame:
    """All rows, in the order of a replay that was not cut: by epoch, sample and target as the shards have them."""
    parts = [_collected(folder / CONTRIBUTIONS) for folder in folders]
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

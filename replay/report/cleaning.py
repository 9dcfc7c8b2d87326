"""Which training samples to keep and which to drop, from the contributions of a replay.

    harmful:10%     the tenth of the tracked samples with the lowest contribution to the mean target (paper, table 3:
                    the least useful r %); the last of them may still help a little
    harmful:200     the same, a number of samples
    negative        every sample that harms
    suspected       the clusters of wrong labels by signs (`suspects.signs`), for a replay of 100 targets or more

Samples that the replay did not track are kept: nothing is known against them. keep.npy and drop.npy hold int64 ids
in ascending order, together every training sample once.

A training script takes part in two lines, without importing trajrec:

    if "TRAJREC_KEEP" in os.environ:
        train_set = torch.utils.data.Subset(train_set, np.load(os.environ["TRAJREC_KEEP"]).tolist())

    S tracked samples, N training samples
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from trajrec.errors import ReplayError
from trajrec.records import Json
from trajrec.replay.folder import spreadsheet
from trajrec.replay.folder.format import CONTRIBUTIONS
from trajrec.replay.folder.place import Kind, Place
from trajrec.replay.folder.read import Inputs, reading
from trajrec.replay.report import scores, suspects
from trajrec.replay.report.sections import common

KEEP = "TRAJREC_KEEP"
OUTPUT = Kind(
    command="trajrec clean",
    facts="clean.json",
    keys=frozenset({"rule", "kept", "dropped"}),
    whole=frozenset({"keep.npy", "drop.npy"}),
    others=frozenset({"samples.csv"}),
)
_COUNT = re.compile(r"harmful:(\d+(?:\.\d+)?)(%?)")
_ACCURACY = re.compile(r"accuracy\W*?(\d+(?:\.\d+)?(?:e-?\d+)?)\s*(%?)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Cleaning:
    """What to keep and what to drop.

    Attributes:
        rule: as it was asked.
        keep: ids to keep, ascending.
        drop: ids to drop, ascending.
        harming: how many of the dropped have a negative contribution.
        wrong: known wrong labels among all tracked samples, None if the truth is not known.
        wrong_dropped: known wrong labels among the dropped.
        table: sample, label, name, contribution, drop; [S] rows, most harmful first.
        label: whether the contributions are exact (`trajrec.replay.label`), None if that is not known.
    """

    rule: str
    keep: tuple[int, ...]
    drop: tuple[int, ...]
    harming: int
    wrong: int | None
    wrong_dropped: int | None
    table: pl.DataFrame
    label: str | None = None


def clean(inputs: Inputs, rule: str) -> Cleaning:
    """Choose what to drop.

    Args:
        inputs: an opened replay folder.
        rule: "harmful:10%", "harmful:200", "negative" or "suspected".

    Raises:
        ReplayError: the rule is none of these, would drop every sample, or cannot be answered by this replay.
        NonFiniteError: a contribution is NaN or infinite.
        DamagedRunError: a file cannot be read.
    """
    with reading(inputs.folder / CONTRIBUTIONS):
        totals = common.sound_totals(inputs)
        dropped = _chosen(inputs, totals, rule)
        table = common.named(totals.sort("contribution", "sample"), inputs.samples)
    if len(dropped) == totals.height:
        raise ReplayError(f"--drop {rule} drops all {totals.height:,} samples: there is nothing left to train on.")
    table = table.with_columns(drop=pl.col("sample").is_in(dropped))
    everything = range(inputs.settings.samples_total or 0) or totals["sample"].to_list()
    known = table.filter(pl.col("noisy").is_not_null())
    wrong = known.filter("noisy")
    return Cleaning(
        rule=rule,
        keep=tuple(sorted(set(everything) - set(dropped))),
        drop=tuple(sorted(dropped)),
        harming=table.filter("drop", pl.col("contribution") < 0).height,
        wrong=wrong.height if known.height else None,
        wrong_dropped=wrong.filter("drop").height if known.height else None,
        table=table.select("sample", "label", "name", "contribution", "drop"),
        label=inputs.settings.label,
    )


def _chosen(inputs: Inputs, totals: pl.DataFrame, rule: str) -> list[int]:
    if rule == "negative":
        return totals.filter(pl.col("contribution") < 0)["sample"].to_list()
    if rule == "suspected":
        return _suspected(inputs, totals)
    count = _count(rule, totals.height)
    return totals.sort("contribution", "sample")["sample"].head(count).to_list()


def _count(rule: str, samples: int) -> int:
    match = _COUNT.fullmatch(rule)
    if match is None or (not match[2] and "." in match[1]):
        raise ReplayError(f"--drop {rule} is not known. Pass harmful:10%, harmful:200, negative or suspected.")
    number = float(match[1])
    if match[2]:
        if number > 100:
            raise ReplayError(f"--drop {rule} is more than all samples.")
        return math.floor(samples * number / 100 + 1e-9)
    if number > samples:
        raise ReplayError(f"--drop {rule} is more than the {samples:,} samples that were replayed.")
    return int(number)


def _suspected(inputs: Inputs, totals: pl.DataFrame) -> list[int]:
    enough = len(scores.target_ids(inputs.contributions)) >= suspects.FEWEST
    if not enough or scores.collect(inputs.samples.select("label").drop_nulls().head(1)).is_empty():
        raise ReplayError(
            f"--drop suspected needs contributions to {suspects.FEWEST} targets or more, and the training labels. "
            "Replay the run again with --targets each, or pass --drop harmful:10%."
        )
    clusters, _ = suspects.signs(inputs.contributions, inputs.samples, totals)
    return clusters.filter("suspected")["sample"].to_list()


def write(cleaning: Cleaning, place: Place) -> Path:
    """Write keep.npy, drop.npy, samples.csv and clean.json into a folder. Returns where it stands.

    Raises:
        TrajrecError: it cannot be written.
    """
    with place.filling() as unfinished:
        _fill(cleaning, unfinished)
    return place.final


def _fill(cleaning: Cleaning, folder: Path) -> None:
    np.save(folder / "keep.npy", np.array(cleaning.keep, dtype=np.int64))
    np.save(folder / "drop.npy", np.array(cleaning.drop, dtype=np.int64))
    spreadsheet.write_csv(cleaning.table, folder / "samples.csv")
    facts: Json = {
        "rule": cleaning.rule,
        "label": cleaning.label,
        "kept": len(cleaning.keep),
        "dropped": len(cleaning.drop),
        "dropped_that_harm": cleaning.harming,
        "known_wrong_labels": cleaning.wrong,
        "known_wrong_labels_dropped": cleaning.wrong_dropped,
    }
    (folder / "clean.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def accuracy(output: str) -> float | None:
    """The last accuracy that a training script printed, as a fraction; None if it printed none.

    Args:
        output: the script's standard output; "accuracy 0.98", "Accuracy: 98.1 %" and the like are understood.
    """
    found = _ACCURACY.findall(output)
    if not found:
        return None
    number, percent = float(found[-1][0]), found[-1][1]
    return number / 100 if percent or number > 1 else number

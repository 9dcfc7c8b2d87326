"""Writes the folder of a replay: what was asked, what came out, and what is known about samples and targets.

    contributions.parquet   sample int64, target int64 (-1: the mean), contribution float64, epoch if asked for;
                            its file metadata say method, sign, unit and certificate, so that a number never goes alone
    samples.parquet         sample, label, name, noisy: as far as the data set gives them
    targets.parquet         target, label, name, noisy; prediction of the final model for single test samples
    thumbnails.parquet      set, sample, png, text: where the data set yields pictures or text
    replay.json             everything else about the replay

Only the contributions must succeed. If a data set makes trouble with the rest, that file is left out, and replay.json
says so under "left_out".

The folder is filled beside its place and renamed (`replay.place`), so a replay that was cut off leaves nothing half
written: at most a folder with its progress in it (`replay.progress`), from which the same question goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import trajrec
from trajrec.records import IntArray
from trajrec.replay.folder.labels import classes, in_words
from trajrec.replay.folder.labels import facts as facts_of
from trajrec.replay.folder.place import Kind
from trajrec.replay.folder.thumbnails import thumbnails
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.targets import predictions
from trajrec.replay.methods.contributions import Contributions
from trajrec.replay.session import Session

SIGN = "positive = helpful"
UNIT = "unit of the target loss"
METHODS = {
    "hessian": "exact (Hessian-vector products)",
    "ggn": "Gauss-Newton (curvature of the loss in the model's outputs)",
    "none": "Hessian-free (HYDRA)",
}


OUTPUT = Kind(
    command="trajrec replay",
    facts="replay.json",
    keys=frozenset({"run_id", "method", "sign", "certificate"}),
    whole=frozenset({"contributions.parquet"}),
    others=frozenset({"samples.parquet", "targets.parquet", "thumbnails.parquet", "top.csv"}),
    has_progress=True,
)


def write_replay(folder: Path, result: Contributions, session: Session, facts: dict[str, Any]) -> list[str]:
    """Writes a replay into a folder. Returns what had to be left out, a sentence for each file.

    `facts` are further entries of replay.json (run path, seconds, command).
    """
    described = _describe(result, session) | facts
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in described.items()}
    result.frame().collect().write_parquet(folder / "contributions.parquet", metadata=metadata)
    left_out = list(_write_extras(folder, result, session))
    described["left_out"] = left_out
    (folder / "replay.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return left_out


def _write_extras(folder: Path, result: Contributions, session: Session) -> Iterator[str]:
    """Writes what reports can do without. Yields a sentence for each file that could not be made."""
    extras: dict[str, Callable[[], pl.DataFrame | None]] = {
        "samples.parquet": lambda: _people("sample", result.samples, session.train),
        "targets.parquet": lambda: _targets(result, session),
        "thumbnails.parquet": lambda: thumbnails(result, session.train.dataset, _single_tests(result, session)),
    }
    for name, make in extras.items():
        try:
            frame = make()
        except Exception as error:  # the user's data set runs in there: whatever it raises must not cost the replay
            yield f"{name}: {type(error).__name__}: {error}"
            continue
        if frame is not None:
            frame.write_parquet(folder / name)


def _describe(result: Contributions, session: Session) -> dict[str, Any]:
    spec = session.run.spec
    return {
        "method": METHODS[result.curvature],
        "exact": result.exact,
        "curvature": result.curvature,
        "mode": result.mode,
        "sign": SIGN,
        "unit": UNIT,
        "run_id": spec.run_id,
        "certificate": result.certificate.to_json(),
        "targets": result.target_kind,
        # A Task whose test set is its training set asks what samples do to their own loss: self-influence.
        "target_set": "train" if session.test.dataset is session.train.dataset else "test",
        "samples": len(result.samples),
        "samples_total": session.samples,
        "steps": session.run.steps,
        "window": None if result.window in (None, (1, session.run.steps)) else list(result.window or ()),
        "growth": None if result.growth is None or not len(result.growth) else float(result.growth.max()),
        "epochs": len(np.unique(session.run.epochs)),
        "by_epoch": result.by_epoch is not None,
        "reduction": session.reduction,
        "optimizer": spec.optimizer,
        "dtype": str(session.dtype).removeprefix("torch."),
        "device": str(session.device),
        "classes": classes(session.train),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "trajrec": trajrec.__version__,
    }


def _single_tests(result: Contributions, session: Session) -> Any:
    """The test set if targets are single samples of it."""
    return session.test.dataset if result.target_kind in ("each", "chosen") else None


def _targets(result: Contributions, session: Session) -> pl.DataFrame:
    if result.target_kind not in ("each", "chosen"):
        label = result.targets if result.target_kind == "class" else [None] * len(result.targets)
        return pl.DataFrame({"target": result.targets, "label": pl.Series(label, dtype=pl.Int64)})
    frame = _people("target", result.targets, session.test)
    weights = session.trajectory.weights(session.run.steps)
    predicted = predictions(result.targets, session.function, session.test, weights)
    if predicted is None:
        return frame
    labels = frame["label"].to_list() if "label" in frame.columns else None
    column = in_words(predicted, session.test.labels(result.targets), labels)
    return frame.with_columns(pl.Series("prediction", column))


def _people(key: str, ids: IntArray, samples: Samples) -> pl.DataFrame:
    """What the data set says of these samples; columns that it does not give are left out."""
    return pl.DataFrame({key: ids, **facts_of(samples, ids)})

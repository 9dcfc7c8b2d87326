"""Writes the folder of a replay (`trajrec.replay.folder.format`).

Only the contributions must succeed. If a data set makes trouble with the rest, that file is left out, and replay.json
says so under "left_out".

The folder is filled beside its place and renamed (`trajrec.replay.folder.place`), so a replay that was cut off leaves
nothing half written: at most a folder with its progress in it (`trajrec.replay.methods.resume`), from which the same
question goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import trajrec
from trajrec.records import IntArray, Json
from trajrec.replay.folder.format import (
    CONTRIBUTIONS,
    EXTRAS,
    HEADER,
    REPLAY,
    SAMPLES,
    TARGETS,
    THUMBNAILS,
    TOP,
    VALIDATION,
    Settings,
    metadata,
    write_facts,
)
from trajrec.replay.folder.labels import classes, in_words
from trajrec.replay.folder.labels import facts as facts_of
from trajrec.replay.folder.place import Kind
from trajrec.replay.folder.thumbnails import thumbnails
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.targets import predictions
from trajrec.replay.methods.contributions import Contributions
from trajrec.replay.session import Session

UNIT = "unit of the target loss"
METHODS = {
    "hessian": "exact (Hessian-vector products)",
    "ggn": "Gauss-Newton (curvature of the loss in the model's outputs)",
    "kinks": "Hessian with kinks spread out (curvature kinks)",
    "none": "Hessian-free (HYDRA)",
}

OUTPUT = Kind(
    command="trajrec replay",
    facts=REPLAY,
    keys=frozenset({"run_id", "method", "sign", "certificate"}),
    whole=frozenset({CONTRIBUTIONS}),
    # The last while it is being written.
    others=frozenset({*EXTRAS, TOP, TOP + HEADER, VALIDATION, f"{VALIDATION}.tmp"}),
    has_progress=True,
)


def write_replay(folder: Path, result: Contributions, session: Session, facts: Json) -> list[str]:
    """Writes a replay into a folder. Returns what had to be left out, a sentence for each file.

    `facts` are further entries of replay.json (run path, seconds, command).
    """
    proof = {"certificate": result.certificate.to_json()}
    described = _describe(result, session).to_json() | proof | facts
    result.frame().collect().write_parquet(folder / CONTRIBUTIONS, metadata=metadata(described))
    left_out = list(_write_extras(folder, result, session))
    write_facts(described | {"left_out": left_out}, folder)
    return left_out


def _write_extras(folder: Path, result: Contributions, session: Session) -> Iterator[str]:
    """Writes what reports can do without. Yields a sentence for each file that could not be made."""
    extras: dict[str, Callable[[], pl.DataFrame | None]] = {
        SAMPLES: lambda: _described("sample", result.samples, session.train),
        TARGETS: lambda: _targets(result, session),
        THUMBNAILS: lambda: thumbnails(result, session.train.dataset, _single_tests(result, session)),
    }
    for name, make in extras.items():
        try:
            frame = make()
        except Exception as error:  # the user's data set runs in there: whatever it raises must not cost the replay
            yield f"{name}: {type(error).__name__}: {error}"
            continue
        if frame is not None:
            frame.write_parquet(folder / name)


def _describe(result: Contributions, session: Session) -> Settings:
    spec, steps, window = session.run.spec, session.run.steps, result.window
    growth = result.growth if result.exact else None  # an approximation's says nothing about the training
    kinks = session.function.kinks
    return Settings(
        method=METHODS[result.curvature],
        exact=result.exact,
        curvature=result.curvature,
        label=result.label,
        mode=result.mode,
        unit=UNIT,
        run_id=spec.run_id,
        targets=result.target_kind,
        target_rows=() if result.asked is None else tuple(map(tuple, result.asked.rows.tolist())),
        # A Task whose test set is its training set asks what samples do to their own loss: self-influence.
        target_set="train" if session.test.dataset is session.train.dataset else "test",
        samples=len(result.samples),
        samples_total=session.samples,
        steps=steps,
        window=None if window in (None, (1, steps)) else window,
        growth=None if growth is None or not len(growth) else float(growth.max()),
        smooth=None if kinks is None else not kinks,
        kinks=kinks or (),
        accuracy=result.accuracy,
        epochs=len(np.unique(session.run.epochs)),
        by_epoch=result.by_epoch is not None,
        reduction=session.reduction,
        optimizer=spec.optimizer,
        dtype=str(session.dtype).removeprefix("torch."),
        device=str(session.device),
        classes=tuple(classes(session.train) or ()),
        notes=result.notes,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        trajrec=trajrec.__version__,
    )


def _single_tests(result: Contributions, session: Session) -> Any:
    """The test set if targets are single samples of it."""
    return session.test.dataset if result.target_kind in ("each", "chosen") else None


def _targets(result: Contributions, session: Session) -> pl.DataFrame:
    if result.asked is not None:
        return pl.DataFrame({"target": result.targets, "name": [result.asked.words(name) for name in result.targets]})
    if result.target_kind not in ("each", "chosen"):
        label = result.targets if result.target_kind == "class" else [None] * len(result.targets)
        return pl.DataFrame({"target": result.targets, "label": pl.Series(label, dtype=pl.Int64)})
    frame = _described("target", result.targets, session.test)
    weights = session.trajectory.weights(session.run.steps)
    predicted = predictions(result.targets, session.function, session.test, weights)
    if predicted is None:
        return frame
    labels = frame["label"].to_list() if "label" in frame.columns else None
    column = in_words(predicted, session.test.labels(result.targets), labels)
    return frame.with_columns(pl.Series("prediction", column))


def _described(key: str, ids: IntArray, samples: Samples) -> pl.DataFrame:
    """What the data set says of these samples; columns that it does not give are left out."""
    return pl.DataFrame({key: ids, **facts_of(samples, ids)})

"""Writes the folder of a replay: what was asked, what came out, and what is known about samples and targets.

    contributions.parquet   sample int64, target int64 (-1: the mean), contribution float64, epoch if asked for;
                            its file metadata say method, sign, unit and certificate, so that a number never goes alone
    samples.parquet         sample, label, name, noisy: as far as the data set gives them
    targets.parquet         target, label, name
    replay.json             everything else about the replay

The folder is made beside its place and renamed, so a replay that was cut off leaves nothing half written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import trajrec
from trajrec.errors import OutputExistsError
from trajrec.records import IntArray
from trajrec.replay.contribution import Contributions
from trajrec.replay.samples import Samples
from trajrec.replay.session import Session

SIGN = "positive = helpful"
UNIT = "unit of the target loss"


@contextmanager
def new_folder(folder: Path, force: bool) -> Iterator[Path]:
    """A folder to fill; it takes its place when the block ends well, and is gone when it does not.

    Raises:
        OutputExistsError: if it exists and force is False.
    """
    if folder.exists() and not force:
        raise OutputExistsError(f"{folder} exists already. Choose another with --out, or replace it with --force.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    unfinished.mkdir()
    try:
        yield unfinished
        if folder.is_dir():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_replay(folder: Path, result: Contributions, session: Session, facts: dict[str, Any]) -> None:
    """Writes a replay into a folder. `facts` are further entries of replay.json (run path, seconds, command)."""
    described = _describe(result, session) | facts
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in described.items()}
    result.frame().collect().write_parquet(folder / "contributions.parquet", metadata=metadata)
    _people("sample", result.samples, result.samples, session.train).write_parquet(folder / "samples.parquet")
    _targets(result, session).write_parquet(folder / "targets.parquet")
    (folder / "replay.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def _describe(result: Contributions, session: Session) -> dict[str, Any]:
    spec = session.run.spec
    classes = getattr(session.train.dataset, "classes", None)
    return {
        "method": "exact (Hessian-vector products)" if result.exact else "Hessian-free (HYDRA)",
        "exact": result.exact,
        "mode": result.mode,
        "sign": SIGN,
        "unit": UNIT,
        "run_id": spec.run_id,
        "certificate": result.certificate.to_json(),
        "targets": result.target_kind,
        "samples": len(result.samples),
        "samples_total": spec.samples,
        "steps": session.run.steps,
        "epochs": len(np.unique(session.run.epochs)),
        "by_epoch": result.by_epoch is not None,
        "optimizer": spec.optimizer,
        "dtype": str(session.dtype).removeprefix("torch."),
        "device": str(session.device),
        "classes": [str(name) for name in classes] if isinstance(classes, list | tuple) else None,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "trajrec": trajrec.__version__,
    }


def _targets(result: Contributions, session: Session) -> pl.DataFrame:
    if result.target_kind in ("each", "chosen"):
        return _people("target", result.targets, result.targets, session.test)
    label = result.targets if result.target_kind == "class" else [None] * len(result.targets)
    return pl.DataFrame({"target": result.targets, "label": pl.Series(label, dtype=pl.Int64)})


def _people(key: str, names: IntArray, ids: IntArray, samples: Samples) -> pl.DataFrame:
    """What the data set says of these samples; columns that it does not give are left out."""
    columns: dict[str, Any] = {key: names}
    if (labels := samples.labels(ids)) is not None:
        columns["label"] = labels
    for column in ("names", "noisy"):
        values = getattr(samples.dataset, column, None)
        if values is not None and len(values) == len(samples):
            columns[column.removesuffix("s")] = [_plain(values[i]) for i in ids.tolist()]
    return pl.DataFrame(columns)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value

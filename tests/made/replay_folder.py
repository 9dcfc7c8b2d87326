"""Replay folders as `trajrec replay` writes them, made of a matrix, for tests of everything behind a replay."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

CERTIFICATE = {
    "verdict": "within rounding",
    "max_drift": 2.5e-7,
    "at_step": 40,
    "tolerance": 1e-4,
    "steps_checked": 63,
    "sentence": "63 of 63 steps were made again and agree with the recording within rounding.",
}


def write(
    folder: Path,
    values: Any,
    samples: Sequence[int] | None = None,
    targets: Sequence[int] | None = None,
    labels: Sequence[Any] | None = None,
    names: Sequence[str] | None = None,
    noisy: Sequence[bool] | None = None,
    target_labels: Sequence[Any] | None = None,
    predictions: Sequence[Any] | None = None,
    **facts: Any,
) -> Path:
    """Write a folder; values [S, M], or [E, S, M] by epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.asarray(values, dtype=np.float64)
    by_epoch = values.ndim == 3
    cube = values if by_epoch else values[None]
    _, S, M = cube.shape
    samples = list(range(S)) if samples is None else list(samples)
    if targets is None:
        targets = [-1] if M == 1 else list(range(M))
    settings = _settings(len(samples), "mean" if list(targets) == [-1] else "each") | facts
    epoch, sample, target = (axis.ravel() for axis in np.indices(cube.shape))
    frame = pl.DataFrame(
        {
            "sample": np.asarray(samples, dtype=np.int64)[sample],
            "target": np.asarray(targets, dtype=np.int64)[target],
            "contribution": cube.ravel(),
            "epoch": epoch,
        }
    )
    frame = frame if by_epoch else frame.drop("epoch")
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in settings.items()}
    frame.write_parquet(folder / "contributions.parquet", metadata=metadata)
    (folder / "replay.json").write_text(json.dumps(settings), encoding="utf-8")
    _described(folder / "samples.parquet", "sample", samples, label=labels, name=names, noisy=noisy)
    _described(folder / "targets.parquet", "target", list(targets), label=target_labels, prediction=predictions)
    return folder


def validation(folder: Path, **changed: Any) -> Path:
    """Write validation.json into a folder of `write`; `changed` are facts about the random sets."""
    facts = json.loads((folder / "replay.json").read_text(encoding="utf-8"))
    removals = {
        "verdict": "holds",
        "correlation": 0.97,
        "interval": [0.9, 0.99],
        "sets": 5,
        "samples_each": 10,
        "targets": 3,
        "sentence": "The numbers hold: so it was measured.",
        "pairs": [[0.5, 0.4], [-1.0, -1.5], [2.0, 1.75]],
    }
    about = {"run_id": facts.get("run_id"), "question": facts.get("question")}
    said = about | {"removals": removals | changed, "lds": {"sentence": "Score .5 of sets."}, "seed": 0}
    (folder / "validation.json").write_text(json.dumps(said), encoding="utf-8")
    return folder


def _settings(samples: int, targets: str) -> dict[str, Any]:
    return {
        "run": "runs/lenet.h5",
        "run_id": "0123456789abcdef",
        "method": "exact (Hessian-vector products)",
        "exact": True,
        "mode": "adjoint",
        "sign": "positive = helpful",
        "unit": "test loss",
        "targets": targets,
        "samples_total": samples,
        "steps": 63,
        "epochs": 1,
        "optimizer": "SGD",
        "certificate": CERTIFICATE,
        "created": "2026-11-01T12:00:00+00:00",
    }


def _described(path: Path, key: str, ids: list[int], **columns: Sequence[Any] | None) -> None:
    known = {name: list(values) for name, values in columns.items() if values is not None}
    if known:
        pl.DataFrame({key: ids, **known}).write_parquet(path)

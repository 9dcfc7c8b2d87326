"""The numbers of a replay folder, taken up again as the contributions that they were written from."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl

from trajrec.errors import DamagedRunError
from trajrec.replay.folder.format import CONTRIBUTIONS, Settings
from trajrec.replay.folder.format import Certificate as Written
from trajrec.replay.folder.read import Inputs, reading
from trajrec.replay.losses.chosen import rows_of_kind
from trajrec.replay.methods.contributions import Contributions
from trajrec.replay.proof.certificate import Certificate, Verdict


def contributions_in(inputs: Inputs) -> Contributions:
    """The contributions of a replay folder, samples and targets by id; of several epochs their sum.

    Raises:
        DamagedRunError: a pair of sample and target is missing, or a number is NaN or infinite.
    """
    path, settings = inputs.folder / CONTRIBUTIONS, inputs.settings
    with reading(path):
        sums = inputs.contributions.group_by("sample", "target").agg(pl.col("contribution").sum())
        table = sums.sort("sample", "target").collect()
    samples, targets = (np.unique(table[name].to_numpy()) for name in ("sample", "target"))
    values = table["contribution"].to_numpy()
    if len(values) != len(samples) * len(targets) or not len(values) or not np.isfinite(values).all():
        raise DamagedRunError(f"{path} does not hold one number for each sample and target. Replay again with --force.")
    return Contributions(
        values=values.reshape(len(samples), len(targets)),
        samples=samples,
        targets=targets,
        certificate=_certificate(settings, inputs.certificate or Written()),
        exact=bool(settings.exact),
        mode=settings.mode or "adjoint",
        target_kind=settings.targets,
        window=settings.window,
        asked=rows_of_kind(settings.targets, settings.target_rows) if settings.target_rows else None,
        curvature=settings.curvature or ("hessian" if settings.exact else "none"),
    )


def _certificate(settings: Settings, written: Written) -> Certificate:
    known: Mapping[str, Verdict] = {verdict.value: verdict for verdict in Verdict}
    return Certificate(
        known.get(written.verdict or "", Verdict.UNCHECKED),
        settings.steps or 0,
        written.steps_checked or 0,
        written.max_drift or 0.0,
        written.at_step or 0,
        written.tolerance or 0.0,
    )

"""Numbers and settings in words, the same for every renderer."""

from __future__ import annotations

import math

from trajrec.replay.inputs import Settings
from trajrec.replay.report import Report

SIGN = "positive = helpful: removing the sample would raise the loss"
SHARE = "of the sum of |contribution| over all tracked samples"


def question(report: Report) -> str:
    """What was asked, as a sentence."""
    tracked = f"{report.samples:,} training samples"
    if report.settings.samples_total not in (None, report.samples):
        tracked = f"{report.samples:,} of {report.settings.samples_total:,} training samples"
    return f"How much did each of {tracked} help or harm {aim(report)}?"


def aim(report: Report) -> str:
    """What the contributions are contributions to."""
    settings, count = report.settings, report.targets
    words = {
        "mean": f"the mean {settings.target_set} loss",
        "class": f"the loss of each of {count:,} classes",
        "each": f"each of {count:,} {settings.target_set} losses",
    }
    return words.get(settings.targets, f"{count:,} chosen {settings.target_set} losses")


def unit(settings: Settings) -> str:
    """The unit of a contribution, as a phrase."""
    return f"predicted change of the loss if the sample were removed ({settings.unit or 'unit of the loss'})"


def method(settings: Settings) -> str:
    """How the contributions were computed."""
    form = {True: "exact (with the Hessian)", False: "Hessian-free approximation", None: "unknown form"}
    way = {"adjoint": "backwards through training (adjoint)", "tangent": "forwards through training (tangent)"}
    return ", ".join(filter(None, [form[settings.exact], way.get(settings.method or "", settings.method)]))


def training(settings: Settings) -> str:
    """The recorded training in a phrase, or an empty string if the folder does not say."""
    steps = _count(settings.steps, "step")
    made = f"{steps} of {settings.optimizer}" if steps and settings.optimizer else steps or settings.optimizer
    return " in ".join(filter(None, [made, _count(settings.epochs, "epoch")]))


def _count(number: int | None, noun: str) -> str:
    return "" if number is None else f"{number:,} {noun}{'' if number == 1 else 's'}"


def number(value: float | None) -> str:
    """A contribution, with its sign and four digits."""
    if value is None or math.isnan(value):
        return "undefined"
    return "0" if value == 0 else f"{value:+.3e}"


def percent(value: float | None) -> str:
    """A share as a percentage."""
    if value is None or math.isnan(value):
        return "undefined"
    return f"{100 * value:.2f} %"


def ratio(value: float) -> str:
    """A coefficient with three decimals, or "undefined"."""
    return "undefined" if math.isnan(value) else f"{value:.3f}"

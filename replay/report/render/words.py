"""Numbers and settings in words, the same for every renderer."""

from __future__ import annotations

import math

from trajrec.replay.folder.read import Certificate, Settings
from trajrec.replay.report.report import Report
from trajrec.replay.report.sections.comparison import Comparison
from trajrec.replay.report.sections.statistics import Spread
from trajrec.replay.report.sections.suspicions import Clusters
from trajrec.replay.report.sensitivity import Sensitivity
from trajrec.replay.report.suspects import Detection

SIGN = "positive = helpful: removing the sample would raise the loss"
SHARE = "of the sum of |contribution| over all tracked samples"
NO_CERTIFICATE = "none: nothing proves that this replay repeated the recorded run"


def question(report: Report) -> str:
    """What was asked, as a sentence."""
    tracked = f"{report.samples:,} training sample{'' if report.samples == 1 else 's'}"
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
    unit = settings.unit or "unit of the target loss"
    return (
        f"predicted change of the loss if the sample were removed, in {'the ' if unit.startswith('unit') else ''}{unit}"
    )


def method(settings: Settings) -> str:
    """How the contributions were computed."""
    forms = {True: "exact (with the Hessian)", False: "Hessian-free approximation", None: "unknown form"}
    form = "Gauss-Newton form of the Hessian" if settings.curvature == "ggn" else forms[settings.exact]
    way = {"adjoint": "backwards through training (adjoint)", "tangent": "forwards through training (tangent)"}
    return ", ".join(filter(None, [form, way.get(settings.mode or "")]))


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


def certificate(proof: Certificate) -> str:
    """The certificate's sentence; a failed one begins with a warning."""
    return f"NOT PROVED. {proof.sentence}" if proof.good is False else proof.sentence


def sensitivity(settings: Settings) -> str:
    """How far first-order numbers go for this training, or an empty string if the folder does not say."""
    return "" if settings.growth is None else Sensitivity(settings.growth).sentence


def distrust(settings: Settings) -> str:
    """What the head of a page must say of a training that is not calm, or an empty string."""
    found = None if settings.growth is None else Sensitivity(settings.growth)
    return "" if found is None or found.verdict == "calm" else found.sentence


def balance(spread: Spread) -> str:
    """How many help and how many harm."""
    parts = [
        f"{percent(number / spread.count)} {word}"
        for number, word in ((spread.positive, "help"), (spread.negative, "harm"), (spread.zero, "neither"))
    ]
    return ", ".join(parts)


def part(fraction: float) -> str:
    """A fraction of the samples."""
    return f"top {100 * fraction:g} %"


def carries(count: int, share: float) -> str:
    """What the largest samples carry."""
    return f"{count:,} sample{'' if count == 1 else 's'} carr{'ies' if count == 1 else 'y'} {percent(share)}"


def detection(found: Detection) -> str:
    """How well a score finds the known wrong labels."""
    if not found.wrong:
        return f"no wrong label is known among {found.samples:,} samples"
    return (
        f"{found.wrong:,} of {found.samples:,} labels are known to be wrong: ROC-AUC {ratio(found.auc)}; "
        f"{percent(found.found_10)} of them found after inspecting 10 %, {percent(found.found_20)} after 20 %"
    )


def clusters(found: Clusters) -> str:
    """What the clusters suspect, and how far that is right."""
    text = (
        "Two clusters are always found, also where every label is right. "
        f"{found.suspected:,} samples are in clusters that harm on the whole: suspected"
    )
    if found.jaccard is None:
        return text
    right, wrong = percent(found.jaccard.correct), percent(found.jaccard.wrong)
    return f"{text}; Jaccard index with the known truth: right labels {right}, wrong labels {wrong}"


def agreement(found: Comparison) -> list[tuple[str, str, str]]:
    """Measure, value and meaning, row by row."""
    same = found.agreement
    rows = [
        ("Spearman", ratio(same.spearman), "1 = the same order"),
        ("Kendall tau-b", ratio(same.kendall), "1 = the same order"),
        ("Pearson", ratio(same.pearson), "1 = proportional"),
        ("slope", ratio(same.slope), "1 = the same scale"),
        ("sign error", percent(same.sign_error), f"of {same.samples:,} samples change sign"),
        (f"top {same.k} helpful", percent(same.overlap_helpful), "are in both lists"),
        (f"top {same.k} harmful", percent(same.overlap_harmful), "are in both lists"),
    ]
    if found.by_target:
        count, spearman, sign_error = found.by_target
        rows.append(("Spearman by target", ratio(spearman), f"mean over {count:,} targets"))
        rows.append(("sign error by target", percent(sign_error), f"mean over {count:,} targets"))
    return rows

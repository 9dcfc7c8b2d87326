"""The head of every report: what was asked, how it was computed, and how far to trust it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import polars as pl

from trajrec.records import Json
from trajrec.replay.folder.format import Certificate, Settings
from trajrec.replay.folder.read import Inputs
from trajrec.replay.folder.validated import Validated
from trajrec.replay.label import EXACT, name_of
from trajrec.replay.report import accuracy, words
from trajrec.replay.report.blocks import Chapter, Fact, Facts, Part
from trajrec.replay.report.sensitivity import Sensitivity

SIGN = "positive = helpful: removing the sample would raise the loss"
CONTRAST_SIGN = "positive = helpful: removing the sample would raise the difference, first loss less second"
SHARE = "of the sum of |contribution| over all tracked samples"
NO_CERTIFICATE = "Nothing proves that this replay repeated the recorded run."
UNKNOWN = "nothing says whether the numbers are exact"
# names that JSON has had since the first version
SETTINGS = (
    *("run", "run_id", "mode", "exact", "targets", "target_set", "sign", "unit", "samples_total", "steps", "epochs"),
    *("optimizer", "classes", "created"),
)
PROVED = ("sentence", "good", "max_drift", "at_step", "tolerance", "steps_checked", "derivative", "derivative_verdict")


@dataclass(frozen=True, slots=True)
class Head:
    """What a report says first.

    Attributes:
        folder: the replay folder.
        samples: S.
        targets: M.
        total: sum of the samples' contributions to the mean target.
        mass: sum of their absolute values: what shares are shares of.
        validated: what training again said, if it was done.
    """

    folder: Path
    settings: Settings
    certificate: Certificate | None
    samples: int
    targets: int
    total: float
    mass: float
    validated: Validated | None = None


def values(head: Head) -> Json:
    """The head as JSON has it."""
    settings, proof = head.settings, head.certificate
    said = {name: getattr(settings, name) for name in SETTINGS}
    said |= {"version": settings.trajrec, "command": settings.command, "details": settings.details}
    said |= {name: getattr(settings, name) for name in ("curvature", "label", "growth", "taylor", "smooth", "kinks")}
    said |= {"notes": settings.notes} if settings.notes else {}
    said |= {} if settings.accuracy is None else {"accuracy": settings.accuracy}
    proved = proof and {name: getattr(proof, name) for name in PROVED}
    return {each.name: getattr(head, each.name) for each in fields(head)} | {"settings": said, "certificate": proved}


def find(inputs: Inputs, totals: pl.DataFrame, targets: int) -> Head:
    """The head of a report on these totals [S]."""
    values = totals["contribution"]
    sums = float(values.sum()), float(values.abs().sum())
    return Head(inputs.folder, inputs.settings, inputs.certificate, totals.height, targets, *sums, inputs.validated)


def chapter(head: Head) -> Chapter:
    """The question, what it was asked with, the certificate, and how far to trust the numbers."""
    settings = head.settings
    run = [settings.run, f"({settings.run_id[:12]})" if settings.run_id else None]
    made = [settings.created, f"by trajrec {settings.trajrec}" if settings.trajrec else None]
    details = [Fact("run id", settings.run_id or "", aside=True)]
    details += [Fact(name.replace("_", " "), text, aside=True) for name, text in settings.details]
    facts = [
        Fact("run", " ".join(filter(None, run))),
        Fact("training", _training(settings)),
        Fact("method", _method(settings)),
        Fact("number", _unit(settings)),
        Fact("sign", CONTRAST_SIGN if settings.targets == "contrasts" else SIGN),
        Fact("share", SHARE),
        _certificate(head.certificate, settings.label),
        _derivative(head.certificate),
        Fact("accuracy", accuracy.sentence(settings.accuracy, settings.dtype)),
        _trust(head),
        *(Fact("check", text) for text in (settings.taylor or "", *(head.validated.others if head.validated else ()))),
        *(Fact("note", note) for note in settings.notes),
        *details,
        Fact("command", settings.command or "", aside=True),
        Fact("replayed", " ".join(filter(None, made)), aside=True),
    ]
    tiles = (f"{head.samples:,}", "training samples"), (f"{head.targets:,}", _noun(head))
    title = Path(settings.run).name if settings.run else head.folder.name
    return Chapter(title, _question(head), (Part((Facts((tuple(facts),)),)),), tiles=tiles)


def _question(head: Head) -> str:
    tracked, total = words.counted(head.samples, "training sample"), head.settings.samples_total
    if total not in (None, head.samples):
        tracked = f"{head.samples:,} of {total:,} training samples"
    return f"How much did each of {tracked} help or harm {_aim(head)}?"


def _aim(head: Head) -> str:
    settings, count = head.settings, head.targets
    aims = {
        "mean": f"the mean {settings.target_set} loss",
        "class": f"the loss of each of {count:,} classes",
        "each": f"each of {count:,} {settings.target_set} losses",
        "tokens": f"the loss of each of {words.counted(count, 'span')} of tokens of {settings.target_set} samples",
        "contrasts": f"each of {words.counted(count, 'difference')} of two {settings.target_set} losses",
    }
    return aims.get(settings.targets, f"{count:,} chosen {settings.target_set} losses")


def _noun(head: Head) -> str:
    plural = "" if head.targets == 1 else "s"
    nouns = {"mean": "target: the mean loss", "class": f"class{'es' if plural else ''}"}
    nouns |= {"tokens": f"span{plural} of tokens", "contrasts": f"contrast{plural}"}
    return nouns.get(head.settings.targets, f"{head.settings.target_set} sample{plural}")


def _unit(settings: Settings) -> str:
    unit = settings.unit or "unit of the target loss"
    the = "the " if unit.startswith("unit") else ""
    return f"predicted change of the loss if the sample were removed, in {the}{unit}"


def _method(settings: Settings) -> str:
    name = name_of(settings.curvature or "none")
    form = {EXACT: "exact (with the Hessian)", None: "unknown form"}.get(settings.label, f"{name} approximation")
    way = {"adjoint": "backwards through training (adjoint)", "tangent": "forwards through training (tangent)"}
    return ", ".join(filter(None, [form, way.get(settings.mode or "")]))


def _training(settings: Settings) -> str:
    steps = words.counted(settings.steps, "step")
    made = f"{steps} of {settings.optimizer}" if steps and settings.optimizer else steps or settings.optimizer
    return " in ".join(filter(None, [made, words.counted(settings.epochs, "epoch")]))


def _certificate(proof: Certificate | None, label: str | None) -> Fact:
    """What was proved of the run; "Certified" if the numbers are exact, too, otherwise what they are stands there."""
    text, good = (NO_CERTIFICATE, None) if proof is None else (proof.sentence, proof.good)
    if good is False:
        return Fact("certificate", text if label == EXACT else f"{label or UNKNOWN}. {text}", "bad", "Not proved")
    if label != EXACT:
        return Fact("certificate", text, "open", label or UNKNOWN)
    return Fact("certificate", text, *(("good", "Certified") if good else ("open", "No proof")))


def _derivative(proof: Certificate | None) -> Fact:
    """What was proved of the derivative; nobody must miss that it was not."""
    if proof is None or proof.derivative is None:
        return Fact("derivative", "")
    if proof.derivative_verdict == "not proved":
        return Fact("derivative", proof.derivative, "open", "Derivative not proved")
    return Fact("derivative", proof.derivative)


def _trust(head: Head) -> Fact:
    """How far first-order numbers go for this training; nobody must miss where they do not."""
    found = Sensitivity.of(head.settings, head.validated)
    return Fact("trust", found.sentence, found.tone, found.heading)

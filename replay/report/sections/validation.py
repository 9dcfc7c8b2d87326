"""What training again said: predicted changes against real ones."""

from __future__ import annotations

from dataclasses import dataclass

from trajrec.replay.report import words
from trajrec.replay.report.blocks import Chapter, Chart, Note, Part
from trajrec.replay.report.section import Material, Section


@dataclass(frozen=True, slots=True)
class Validation:
    """Random sets of samples that were taken out.

    Attributes:
        correlation: of predicted and real changes.
        points: (predicted, real) changes of single target losses.
        said: a sentence for each trial.
    """

    correlation: float
    points: tuple[tuple[float, float], ...]
    said: tuple[str, ...]


def find(material: Material) -> Validation | None:
    """What validation.json says; None if there is none, or it was about single samples only."""
    found = material.inputs.validated
    if found is None or found.correlation is None or not found.pairs:
        return None
    return Validation(found.correlation, found.pairs, tuple(filter(None, (found.sentence, *found.others))))


def chapter(found: Validation) -> Chapter:
    """The changes as dots, and what was said."""
    predicted = [p for p, _ in found.points]
    chart = Chart(
        f"Predicted and real changes of target losses, {len(found.points):,} pairs",
        "predicted change",
        "real change",
        (min(predicted), max(predicted)),
        dots=found.points,
    )
    tiles = ((words.ratio(found.correlation), "correlation of predicted and real changes"),)
    notes = tuple(Note(sentence) for sentence in found.said)
    return Chapter("Validation", "Do the numbers come true?", (Part((chart, *notes)),), tiles=tiles)


SECTION = Section("validation", lambda ask: False, find, chapter, "validation")

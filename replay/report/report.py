"""A report: everything a renderer may show, as plain frozen values.

`build` asks the questions of a replay folder; `render` draws the answers on a terminal, in tables or as a page.
Nothing here knows how it will look, and no renderer computes a number.

The contributions to several targets are summed up as the contribution to their mean, so that a report of
targets=each begins with the same table as one of targets=mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from trajrec.errors import ReplayError
from trajrec.replay.folder.read import CONTRIBUTIONS, Certificate, Inputs, Settings, load, reading
from trajrec.replay.report import scores
from trajrec.replay.report.sections import common, comparison, matrix, pictures, statistics, suspicions, timeline
from trajrec.replay.report.sections import top as tops
from trajrec.replay.report.sections.comparison import Comparison
from trajrec.replay.report.sections.matrix import Matrix
from trajrec.replay.report.sections.pictures import Picture
from trajrec.replay.report.sections.statistics import Statistics
from trajrec.replay.report.sections.suspicions import Suspicions
from trajrec.replay.report.sections.timeline import Timeline
from trajrec.replay.report.sections.top import Entry, Top, Why

__all__ = ["Ask", "Report", "build", "load"]

T = TypeVar("T")
GROUPS_IN_ALL = 30
TRACKED = 3


@dataclass(frozen=True, slots=True)
class Ask:
    """Which questions a report answers besides the overall top.

    Attributes:
        by: top tables of every target, or of every class of targets.
        why: targets to explain.
        statistics: mean, deviation, concentration, outliers.
        matrix: inter-class contributions.
        suspects: suspected wrong labels.
        timeline: which epochs mattered.
        samples: training samples to follow through the epochs (implies `timeline`).
        compare: another replay folder.
        pictures: take thumbnails along.
        everything: also answer every other question that the folder can answer.
    """

    by: Literal["target", "class"] | None = None
    why: tuple[int, ...] = ()
    statistics: bool = False
    matrix: bool = False
    suspects: bool = False
    timeline: bool = False
    samples: tuple[int, ...] = ()
    compare: Path | None = None
    pictures: bool = False
    everything: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that may be shown of one replay; a section that was not asked for is None or empty.

    Attributes:
        folder: the replay folder.
        samples: S.
        targets: M.
        total: sum of the samples' contributions to the mean target.
        mass: sum of their absolute values: what shares are shares of.
        overall: top samples for the mean target.
        groups: top samples for each target or class.
        notes: what could not be answered, and why.
    """

    folder: Path
    settings: Settings
    certificate: Certificate | None
    samples: int
    targets: int
    total: float
    mass: float
    overall: Top
    groups: tuple[Top, ...] = ()
    why: tuple[Why, ...] = ()
    statistics: Statistics | None = None
    matrix: Matrix | None = None
    suspicions: Suspicions | None = None
    timeline: Timeline | None = None
    comparison: Comparison | None = None
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()


def build(folder: str | Path, top: int = 10, ask: Ask | None = None, compare: str | Path | None = None) -> Report:
    """The report of a replay folder.

    Args:
        folder: what `trajrec replay` wrote.
        top: rows of each side of a table.
        ask: further questions.
        compare: another replay folder to measure agreement with; short for `Ask(compare=...)`.

    Raises:
        ReplayError: a folder is not a replay folder, or cannot answer what was asked for by name.
        SampleRangeError: a target or sample that was asked for is not in the replay.
        NonFiniteError: a contribution is NaN or infinite.
        DamagedRunError: a file cannot be read.
    """
    inputs, ask = load(folder), ask or Ask()
    compare = compare or ask.compare
    with reading(inputs.folder / CONTRIBUTIONS):
        return _Builder(inputs, ask, top, load(compare) if compare else None).report()


def entries(report: Report) -> Iterator[Entry]:
    """The rows of all top tables: overall first."""
    for top in (report.overall, *report.groups, *(why.top for why in report.why)):
        yield from top.helpful
        yield from top.harmful


class _Builder:
    """Asks the common one after the other; what was asked for by name must succeed, the rest may be left out."""

    def __init__(self, inputs: Inputs, ask: Ask, top: int, other: Inputs | None) -> None:
        self.inputs, self.ask, self.k, self.other = inputs, ask, top, other
        self.totals = common.sound_totals(inputs)
        self.target_ids = scores.target_ids(inputs.contributions)
        self.notes: list[str] = []

    def report(self) -> Report:
        inputs, totals, k, M = self.inputs, self.totals, self.k, len(self.target_ids)
        ask, overall = self.ask, tops.overall(self.inputs, self.totals, self.k)
        values = totals["contribution"]
        found = Report(
            folder=inputs.folder,
            settings=inputs.settings,
            certificate=inputs.certificate,
            samples=totals.height,
            targets=M,
            total=float(values.sum()),
            mass=float(values.abs().sum()),
            overall=overall,
            groups=self._groups(),
            why=tuple(tops.why(inputs, target, k) for target in ask.why),
            statistics=self._try(ask.statistics, lambda: statistics.statistics(inputs, totals, self.target_ids, k)),
            matrix=self._try(ask.matrix, lambda: matrix.matrix(inputs)),
            suspicions=self._suspicions(),
            timeline=self._try(ask.timeline or bool(ask.samples), lambda: self._timeline(overall)),
            comparison=comparison.comparison(inputs, totals, self.other) if self.other else None,
        )
        return replace(found, pictures=self._pictures(found), notes=tuple(self.notes))

    def _try(self, asked: bool, section: Callable[[], T]) -> T | None:
        if not asked and not self.ask.everything:
            return None
        try:
            return section()
        except ReplayError as error:
            if asked:
                raise
            self.notes.append(str(error))
            return None

    def _groups(self) -> tuple[Top, ...]:
        if self.ask.by == "target":
            return tops.by_target(self.inputs, self.target_ids, self.totals.height, self.k)
        return self._try(self.ask.by == "class", self._classes) or ()

    def _classes(self) -> tuple[Top, ...]:
        groups = tops.by_class(self.inputs, self.k)
        return groups if self.ask.by or len(groups) <= GROUPS_IN_ALL else ()

    def _suspicions(self) -> Suspicions | None:
        def section(cluster: bool) -> Suspicions:
            return suspicions.suspicions(self.inputs, self.totals, len(self.target_ids), self.k, cluster)

        found = self._try(self.ask.suspects, lambda: section(True))
        return found or (section(False) if self.ask.everything else None)

    def _timeline(self, overall: Top) -> Timeline:
        best = [*overall.helpful[:TRACKED], *overall.harmful[:TRACKED]]
        samples = self.ask.samples or [entry.sample for entry in best]
        return timeline.timeline(self.inputs, samples, self.totals.height)

    def _pictures(self, found: Report) -> tuple[Picture, ...]:
        if not self.ask.pictures:
            return ()
        train = {entry.sample for entry in entries(found)}
        if found.suspicions:
            train |= {suspect.sample for ranking in found.suspicions.rankings for suspect in ranking.suspects}
        if found.statistics:
            train |= {outlier.sample for outlier in found.statistics.outliers}
        return pictures.pictures(self.inputs, train, {why.target for why in found.why})

"""The sections of a report behind its top tables, on a terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from trajrec.errors import printable
from trajrec.replay.report.render import words
from trajrec.replay.report.render.draw import Column, bars, facts, heading, note, plain, table
from trajrec.replay.report.report import Report
from trajrec.replay.report.sections.comparison import Comparison
from trajrec.replay.report.sections.matrix import Matrix
from trajrec.replay.report.sections.statistics import Statistics
from trajrec.replay.report.sections.suspicions import Clusters, Ranking, Suspicions
from trajrec.replay.report.sections.timeline import Timeline
from trajrec.replay.report.sections.top import Top, Why

ShowTop = Callable[[Top, Console, int | None], None]
_FEW = 12


def show(report: Report, console: Console, top: int | None, show_top: ShowTop) -> None:
    """Print every section that the report has."""
    for why in report.why:
        explanation(why, console, top, show_top)
    if report.statistics:
        statistics(report.statistics, console, top)
    if report.matrix:
        matrix(report.matrix, console)
    if report.suspicions:
        suspicions(report.suspicions, console, top)
    if report.timeline:
        timeline(report.timeline, console)
    if report.comparison:
        comparison(report.comparison, console)
    for text in report.notes:
        note(f"Not shown: {text}", console)


def explanation(why: Why, console: Console, top: int | None, show_top: ShowTop) -> None:
    """Print what taught the model one target."""
    show_top(why.top, console, top)
    if not why.by_label:
        return
    heading(f"Which training classes taught {why.top.title}", console)
    rows = why.by_label[:top]
    columns: list[Column] = [
        ("class", [plain(label) for label, _, _ in rows]),
        ("samples", [Text(f"{count:,}") for _, count, _ in rows]),
        ("sum of contributions", [_signed(value) for _, _, value in rows]),
        ("", bars([abs(value) for _, _, value in rows], "")),
    ]
    console.print(table(columns, console.width))


def statistics(found: Statistics, console: Console, top: int | None) -> None:
    """Print mean, deviation, concentration and outliers."""
    heading("How the contributions are distributed", console)
    spreads = [("samples", found.samples), *([("pairs", found.pairs)] if found.pairs else [])]
    for name, spread in spreads:
        rows = {
            f"{spread.count:,} {name}": f"mean {words.number(spread.mean)}, standard deviation {spread.std:.3e}",
            "": f"from {words.number(spread.min)} to {words.number(spread.max)}",
            "sign": words.balance(spread),
        }
        console.print(facts([(name, Text(text)) for name, text in rows.items()]))
    lines = [(words.part(part), Text(words.carries(count, share))) for part, count, share in found.concentration]
    console.print(facts(lines))
    if found.outliers:
        heading(f"{found.far:,} outliers: 3 standard deviations or more from the mean", console)
        shown = found.outliers[:top]
        columns: list[Column] = [
            ("sample", [Text(str(o.sample)) for o in shown]),
            ("label", [plain(o.label or "") for o in shown]),
            ("contribution", [_signed(o.contribution) for o in shown]),
            ("z", [Text(f"{o.z:+.1f}") for o in shown]),
        ]
        console.print(table(columns, console.width))


def matrix(found: Matrix, console: Console) -> None:
    """Print the inter-class matrix: in full if it is small, else its largest entries."""
    heading("Mean contribution of training classes (rows) to test classes (columns)", console)
    scale = max((abs(v) for row in found.mean for v in row if v is not None), default=0.0)
    if max(len(found.test), len(found.train)) > _FEW or scale == 0:
        note(f"{len(found.train)} x {len(found.test)} classes: see --html, --json", console)
        return
    room = max(4, (console.width - 20) // len(found.test) - 3)
    columns: list[Column] = [("class", [plain(name)[:14] for name in found.train])]
    for j, name in enumerate(found.test):
        columns.append(
            (_unique(printable(name, keep="")[:room], columns), [_percentage(row[j], scale) for row in found.mean])
        )
    console.print(table(columns, console.width))
    note(f"in per cent of the largest entry, {scale:.3e}; not normalised (paper, equation 23)", console)


def _unique(name: str, columns: list[Column]) -> str:
    while any(name == other for other, _ in columns):
        name += "'"
    return name


def _percentage(value: float | None, scale: float) -> Text:
    return Text("") if value is None else Text(f"{100 * value / scale:+.0f}", "green" if value > 0 else "red")


def suspicions(found: Suspicions, console: Console, top: int | None) -> None:
    """Print suspected wrong labels, and how good the suspicion is where that is known."""
    for ranking in found.rankings:
        _ranking(ranking, console, top)
    if found.clusters:
        _clusters(found.clusters, console)


def _ranking(ranking: Ranking, console: Console, top: int | None) -> None:
    heading(f"Suspected wrong labels, by {ranking.title}", console)
    rows = ranking.suspects[:top]
    columns: list[Column] = [
        ("rank", [Text(str(row.rank)) for row in rows]),
        ("sample", [Text(str(row.sample)) for row in rows]),
        ("label", [plain(row.label or "") for row in rows]),
        ("score", [Text(words.number(row.score)) for row in rows]),
    ]
    if any(row.noisy is not None for row in rows):
        columns.append(("known", [Text({True: "wrong", False: "right", None: ""}[row.noisy]) for row in rows]))
    console.print(table(columns, console.width))
    if ranking.detection:
        note(words.detection(ranking.detection), console)


def _clusters(found: Clusters, console: Console) -> None:
    heading("Two clusters of each class by the signs of contributions", console)
    columns: list[Column] = [
        ("class", [plain(c.label) for c in found.classes]),
        ("samples", [Text(f"{c.samples:,}") for c in found.classes]),
        ("apart", [Text(f"{c.apart:,}") for c in found.classes]),
        ("mean apart", [_signed(c.mean_apart) for c in found.classes]),
        ("mean of the rest", [_signed(c.mean_rest) for c in found.classes]),
        ("what", [Text("suspected" if c.suspected else "") for c in found.classes]),
    ]
    console.print(table(columns, console.width))
    note(words.clusters(found), console)


def timeline(found: Timeline, console: Console) -> None:
    """Print which epochs mattered, and single samples through them."""
    heading("Which epochs mattered (sums over samples)", console)
    mass = [a - b for a, b in zip(found.helpful, found.harmful, strict=True)]
    columns: list[Column] = [
        ("epoch", [Text(str(epoch)) for epoch in found.epochs]),
        ("helpful", [_signed(value) for value in found.helpful]),
        ("harmful", [_signed(value) for value in found.harmful]),
        ("", bars(mass, "")),
    ]
    console.print(table(columns, console.width))
    for track in found.tracks:
        label = f" (label {track.label})" if track.label is not None else ""
        strongest = max(range(len(track.values)), key=lambda e: abs(track.values[e]))
        total = words.number(sum(track.values))
        text = f"sample {track.sample}{label}: {total} in all, most in epoch {found.epochs[strongest]}"
        note(f"{text} ({words.number(track.values[strongest])})", console)


def comparison(found: Comparison, console: Console) -> None:
    """Print how far two replays agree."""
    heading(f"Agreement of {found.this} with {found.other}", console)
    columns: list[Column] = [("what", []), ("value", []), ("", [])]
    for row in words.agreement(found):
        for (_, cells), text in zip(columns, row, strict=True):
            cells.append(plain(text))
    console.print(table(columns, console.width))


def _signed(value: float) -> Text:
    return Text(words.number(value), "green" if value > 0 else "red" if value < 0 else "")

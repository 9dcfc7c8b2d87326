"""A report on a terminal: what was asked in words, the certificate, then one table after the other.

Rich takes care of NO_COLOR, pipes and width; `draw` of long and hostile labels; `panels` of the sections behind the
top tables.
"""

from __future__ import annotations

import io
import sys

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from trajrec.replay.folder.read import Certificate
from trajrec.replay.report.render import panels, words
from trajrec.replay.report.render.draw import Column, bars, facts, heading, note, plain, table
from trajrec.replay.report.report import Report
from trajrec.replay.report.sections.comparison import Comparison
from trajrec.replay.report.sections.top import Entry, Top

GROUPS_SHOWN = 20


def show(report: Report, console: Console | None = None, top: int | None = None) -> None:
    """Print a report.

    Args:
        report: what to show.
        console: where; standard output if None.
        top: at most so many rows of each table, if the report holds more.
    """
    console = console or standard_output()
    header(report, console)
    for group in (report.overall, *report.groups[:GROUPS_SHOWN]):
        show_top(group, console, top)
    if len(report.groups) > GROUPS_SHOWN:
        note(f"... and {len(report.groups) - GROUPS_SHOWN:,} more tables: write them with --csv or --json", console)
    panels.show(report, console, top, show_top)


def standard_output() -> Console:
    """A console on standard output; what its encoding cannot write is shown as escapes instead of ending the report."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console()


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Print how far two replays agree."""
    panels.comparison(comparison, console)


def header(report: Report, console: Console) -> None:
    """Print what was asked, how the numbers read, and the certificate."""
    settings = report.settings
    run = " ".join(filter(None, [settings.run, f"({settings.run_id[:12]})" if settings.run_id else None]))
    lines = {
        "run": run,
        "training": words.training(settings),
        "method": words.method(settings),
        "number": words.unit(settings),
        "sign": words.SIGN,
        "share": words.SHARE,
    }
    trust = {"sensitivity": words.sensitivity(settings), "check": settings.taylor or ""}
    console.print(plain(words.question(report), "bold"))
    console.print(
        facts(
            [
                *((name, plain(text)) for name, text in lines.items()),
                ("certificate", certificate(report.certificate)),
                *((name, plain(text)) for name, text in trust.items() if text),
            ]
        )
    )


def certificate(proof: Certificate | None) -> Text:
    """The certificate in words; a failed one says so without colour too."""
    if proof is None:
        return Text(words.NO_CERTIFICATE, "yellow")
    style = {True: "green", False: "bold red", None: "yellow"}[proof.good]
    return plain(words.certificate(proof), style)


def show_top(top: Top, console: Console, limit: int | None = None) -> None:
    """Print the helpful and the harmful samples of one target."""
    for side, rows, style in ("helpful", top.helpful, "green"), ("harmful", top.harmful, "red"):
        heading(f"Most {side} for {top.title}", console)
        if rows:
            console.print(_entries(rows[:limit], style, console.width))
        else:
            note(f"no sample has a {'positive' if side == 'helpful' else 'negative'} contribution", console)


def _entries(rows: tuple[Entry, ...], style: str, width: int) -> Padding:
    columns: list[Column] = [
        ("rank", [Text(str(row.rank)) for row in rows]),
        ("sample", [Text(str(row.sample)) for row in rows]),
        ("contribution", [Text(words.number(row.contribution), style) for row in rows]),
        ("share", [Text(words.percent(row.share)) for row in rows]),
    ]
    for name in ("name", "label"):
        if any(getattr(row, name) is not None for row in rows):
            columns.insert(2, (name, [plain(getattr(row, name) or "") for row in rows]))
    if any(row.noisy for row in rows):
        columns.append(("known", [Text("wrong label" if row.noisy else "") for row in rows]))
    if all(name != "name" for name, _ in columns):
        columns.append(("", bars([row.share for row in rows], style)))
    return table(columns, width)

"""A report on a terminal: 80 columns, readable without colour, plain in a pipe.

Rich takes care of NO_COLOR, pipes and width. Labels and names come from data and are drawn as text, never as
markup, with control characters shown as escapes, so that no label can move the cursor or paint the screen.
"""

from __future__ import annotations

from typing import Literal

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trajrec.replay.inputs import Certificate
from trajrec.replay.render import words
from trajrec.replay.report import Comparison, Entry, Report, Top

_BAR = 12
_RIGHT = {"rank", "sample", "contribution", "share"}


def show(report: Report, console: Console | None = None) -> None:
    """Print a report.

    Args:
        report: what to show.
        console: where; standard output if None.
    """
    console = console or Console()
    _header(report, console)
    for top in (report.overall, *report.groups):
        _top(top, console)
    if report.comparison:
        show_comparison(report.comparison, console)


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Print how far two replays agree."""
    agreement = comparison.agreement
    console.print(_plain(f"\nAgreement of {comparison.this} with {comparison.other}", "bold"))
    table = _grid()
    rows = [
        ("Spearman", words.ratio(agreement.spearman), "1 = the same order"),
        ("Kendall tau-b", words.ratio(agreement.kendall), "1 = the same order"),
        ("Pearson", words.ratio(agreement.pearson), "1 = proportional"),
        ("slope", words.ratio(agreement.slope), "1 = the same scale"),
        ("sign error", words.percent(agreement.sign_error), f"of {agreement.samples:,} samples change sign"),
        (f"top {agreement.k} helpful", words.percent(agreement.overlap_helpful), "in both lists"),
        (f"top {agreement.k} harmful", words.percent(agreement.overlap_harmful), "in both lists"),
    ]
    for name, value, meaning in rows:
        table.add_row(f"  {name}", Text(value, justify="right"), Text(meaning, "dim"))
    console.print(table)


def _header(report: Report, console: Console) -> None:
    settings = report.settings
    console.print(_plain(words.question(report), "bold"))
    table = _grid()
    run = " ".join(filter(None, [settings.run, f"({settings.run_id[:12]})" if settings.run_id else None]))
    facts = [("run", run), ("training", words.training(settings)), ("method", words.method(settings))]
    facts += [("number", words.unit(settings)), ("sign", words.SIGN), ("share", words.SHARE)]
    for name, value in facts:
        if value:
            table.add_row(Text(f"  {name}", "dim"), _plain(value))
    table.add_row(Text("  certificate", "dim"), _certificate(report.certificate))
    console.print(table)


def _certificate(certificate: Certificate | None) -> Text:
    if certificate is None:
        return Text("none: nothing proves that this replay repeated the recorded run", "yellow")
    style = {True: "green", False: "bold red", None: "yellow"}[certificate.good]
    mark = {True: "", False: "NOT PROVED. ", None: ""}[certificate.good]
    return _plain(mark + certificate.sentence, style)


def _top(top: Top, console: Console) -> None:
    titles = ("Most helpful", top.helpful, "green"), ("Most harmful", top.harmful, "red")
    for title, rows, style in titles:
        console.print(_plain(f"\n{title} for {top.title}", "bold"))
        if rows:
            console.print(_table(rows, style, console.width))
        else:
            console.print(f"  no sample has a {'positive' if title == 'Most helpful' else 'negative'} contribution")


def _table(rows: tuple[Entry, ...], style: str, width: int) -> Padding:
    columns = _numbers(rows, style)
    for name in ("name", "label"):
        if any(getattr(row, name) is not None for row in rows):
            columns.insert(2, (name, [_plain(getattr(row, name) or "") for row in rows]))
    if any(row.noisy for row in rows):
        columns.append(("known", [Text("wrong label" if row.noisy else "") for row in rows]))
    if all(name != "name" for name, _ in columns):
        columns.append(("", _bars(rows, style)))
    return _columns(columns, width)


def _numbers(rows: tuple[Entry, ...], style: str) -> list[tuple[str, list[Text]]]:
    return [
        ("rank", [Text(str(row.rank)) for row in rows]),
        ("sample", [Text(str(row.sample)) for row in rows]),
        ("contribution", [Text(words.number(row.contribution), style) for row in rows]),
        ("share", [Text(words.percent(row.share)) for row in rows]),
    ]


def _bars(rows: tuple[Entry, ...], style: str) -> list[Text]:
    longest = max(row.share for row in rows)
    return [Text("#" * max(1, round(_BAR * row.share / longest)), style) for row in rows]


def _columns(columns: list[tuple[str, list[Text]]], width: int) -> Padding:
    """Draw columns; numbers are never cut, labels and names share what room is left."""
    widths = {name: max(len(name), *(cell.cell_len for cell in cells)) for name, cells in columns}
    wide: list[str] = [name for name in ("label", "name") if name in widths]
    room = width - 4 - 3 * len(columns) - sum(widths[name] for name in widths if name not in wide)
    for name in wide:  # the label first: it is short as a rule
        widths[name] = max(6, min(widths[name], room if name == wide[-1] else room // 2))
        room -= widths[name]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for name, cells in columns:
        justify: Literal["left", "right"] = "right" if name in _RIGHT else "left"
        table.add_column(name, justify=justify, no_wrap=True)
        for cell in cells:
            cell.truncate(widths[name], overflow="ellipsis")
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*row)
    return Padding(table, (0, 0, 0, 2))


def _grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    return table


def _plain(text: str, style: str = "") -> Text:
    return Text("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text), style)

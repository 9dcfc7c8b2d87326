"""What a command says in one line, on any terminal.

Much of it comes from files: names of runs and data sets, references, reasons. What a terminal would obey in there is
shown as an escape, and nothing is read as markup. Tables and reports are drawn by `trajrec.replay.report.render`.
"""

from __future__ import annotations

import typer

from trajrec.errors import printable


def say(text: str, err: bool = False) -> None:
    """Writes a line to standard output, or with `err` to standard error."""
    typer.echo(printable(text), err=err)

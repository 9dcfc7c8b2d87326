"""Options that several commands share, and the groups in which help pages show them. Imports nothing heavy.

Question    what is asked
Method      how it is computed, and how it is certified
Machine     device, floating type, memory
Output      where the answer goes
Long runs   pieces of a question, of many steps or machines
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

QUESTION, METHOD, MACHINE, OUTPUT, LONG_RUNS = "Question", "Method", "Machine", "Output", "Long runs"
RUN, TROUBLE = "Run file", "When something stands in the way"


class Command(TyperCommand):
    """A command whose help page shows nothing behind a flag."""

    def get_help_option(self, ctx: Any) -> Any:
        """The option `--help`."""
        found = super().get_help_option(ctx)
        if found is not None:
            found.metavar = ""
        return found


def flag(name: str, text: str, group: str | None = None) -> Any:
    """An option that is there or not."""
    return typer.Option(name, metavar="", help=text, rich_help_panel=group)


def choice(names: str, text: str, group: str | None = None, minimum: int | None = None) -> Any:
    """An option that takes one of several words, or a value that `names` describes; its default is in the text."""
    return typer.Option(metavar=names, help=text, rich_help_panel=group, show_default=False, min=minimum)


RunArgument = Annotated[
    Path | None, typer.Argument(metavar="RUN", help="The run (default: the newest under ./runs).", show_default=False)
]
TaskOption = Annotated[
    str | None,
    choice("FILE.py:ATTR", "The Task (default: the one noted in the run, if you recorded it here).", QUESTION),
]
TrustOption = Annotated[bool, flag("--trust", "Run the Task that the run names, whoever recorded it.", QUESTION)]
DeviceOption = Annotated[str, choice("cpu|cuda", "Torch device (default: cpu).", MACHINE)]
TopOption = Annotated[int, choice("K", "Rows of the tables (default: 10).", OUTPUT, minimum=1)]
ForceOption = Annotated[bool, flag("--force", "Replace what trajrec made there before.", OUTPUT)]

"""The `trajrec` command: parses, delegates, and is the one place where errors become exit codes.

0 done, 1 the recorded script itself failed, 2 usage or task error, 3 replay refused, 4 damaged run, 5 trained but not
(wholly) recorded, 130 interrupted. torch, h5py and polars are imported by the commands that need them, so that --help
answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from trajrec.cli.clean import clean
from trajrec.cli.demo import demo
from trajrec.cli.maintenance import info, pack, verify
from trajrec.cli.merge import merge
from trajrec.cli.options import Command
from trajrec.cli.record import RecordCommand, record
from trajrec.cli.replay import replay
from trajrec.cli.report import report
from trajrec.cli.validate import validate
from trajrec.errors import TrajrecError, printable

app = typer.Typer(
    name="trajrec",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="A flight recorder for PyTorch training: record a run, then ask which samples made the model what it is.",
)


def guarded(command: Callable[..., int | None]) -> Callable[..., None]:
    """The error boundary around every command."""

    @wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            code = command(*args, **options) or 0
        except TrajrecError as error:
            code = _complain(str(error), error.exit_code)
        except KeyboardInterrupt:
            code = _complain("Interrupted.", 130)
        except BrokenPipeError:
            # The reader of our output has gone (`trajrec info run.h5 | head`): nothing is wrong.
            sys.stderr.close()
            code = 0
        raise typer.Exit(code)

    return run


def _complain(message: str, code: int) -> int:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text.assemble(("Error: ", "bold red"), printable(message)))
    return code


app.command(
    cls=RecordCommand,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)(guarded(record))
for command in (replay, merge, report, validate, clean, info, verify, pack, demo):
    app.command(cls=Command)(guarded(command))


def _version(value: bool) -> None:
    if value:
        from trajrec import __version__

        typer.echo(f"trajrec {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", metavar="", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """A flight recorder for PyTorch training: record a run, then ask which samples made the model what it is."""


def main() -> None:
    """Entry point of the command."""
    import trajrec.cli.record

    trajrec.cli.record.is_command = True
    app()


if __name__ == "__main__":
    main()

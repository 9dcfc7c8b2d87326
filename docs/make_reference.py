"""Writes docs/commands.md: every command with its arguments, options and example, from what --help is made of.

python docs/make_reference.py            writes it (a test asserts that it is up to date)
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer

from trajrec.cli.main import app

PAGE = Path(__file__).parent / "commands.md"
HEAD = """# Commands

Made from `trajrec COMMAND --help` by `docs/make_reference.py`.

Where a command takes a run and none is named, it takes the newest one under `./runs`.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | the recorded script itself failed |
| 2 | usage or task error |
| 3 | replay refused: drift, or a derivative that cannot be taken |
| 4 | damaged run |
| 130 | interrupted |
"""


def page() -> str:
    """The text of docs/commands.md."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return "\n".join([HEAD, *(section(name, command) for name, command in commands.items())])


def section(name: str, command: Any) -> str:
    """A command's part of the page."""
    text, _, example = re.sub(r"\[/?bold\]", "", command.help).partition("Example:")
    parameters = [p for p in command.params if p.name != "help"]
    arguments = [p for p in parameters if p.param_type_name == "argument"]
    options = [p for p in parameters if p.param_type_name == "option"]
    usage = " ".join(["trajrec", name, *(["[OPTIONS]"] if options else []), *(f"[{p.metavar}]" for p in arguments)])
    parts = [f"## {name}", " ".join(text.split()), f"```text\n{usage}\n```", f"```sh\n{' '.join(example.split())}\n```"]
    rows = [row(f"`{_code(p.metavar)}`", p.help) for p in arguments if p.help]
    rows += [row(_names(p), _says(p)) for p in options]
    if rows:
        parts.append("\n".join(["| argument or option | |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def row(name: str, says: str) -> str:
    """A line of a table."""
    return f"| {name} | {_code(says)} |"


def _names(option: Any) -> str:
    value = "" if option.is_flag else f" {option.metavar or option.name.upper()}"
    return ", ".join(f"`{_code(name + value)}`" for name in option.opts)


def _says(option: Any) -> str:
    shown = option.show_default is not False and not option.is_flag and option.default not in (None, ())
    return f"{option.help} Default: `{option.default}`." if shown else option.help


def _code(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

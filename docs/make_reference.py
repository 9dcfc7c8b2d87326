"""Writes docs/commands.md from what --help is made of, and docs/api.md from `__all__` and docstrings.

python docs/make_reference.py            writes them (a test asserts that they are up to date)
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import typer

import trajrec
import trajrec.replay
from trajrec.cli.main import app

PAGE = Path(__file__).parent / "commands.md"
API = Path(__file__).parent / "api.md"
API_HEAD = """# Python

Every public name, made from signatures and docstrings by `docs/make_reference.py`. What is not here is not public, and
may change in any version.
"""
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
| 5 | the script trained, but was not, or not wholly, recorded |
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


def api() -> str:
    """The text of docs/api.md."""
    return "\n".join([API_HEAD, *(module_section(module) for module in (trajrec, trajrec.replay))])


def module_section(module: ModuleType) -> str:
    """A module's part of the page."""
    names = [
        name for name in module.__all__ if not name.startswith("__") and not inspect.ismodule(getattr(module, name))
    ]
    return "\n".join([f"## {module.__name__}\n", *(named_section(module, name) for name in names)])


def named_section(module: ModuleType, name: str) -> str:
    """What a public name stands for: signature and docstring, and those of a class's own methods."""
    value = getattr(module, name)
    parts = [f"### {module.__name__}.{name}", _documented(name, value)]
    for attribute, member in vars(value).items() if inspect.isclass(value) else ():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if not attribute.startswith("_") and inspect.isfunction(function):
            parts += [f"#### {name}.{attribute}", _documented(attribute, function)]
        elif not attribute.startswith("_") and isinstance(member, property):
            parts += [f"#### {name}.{attribute}", _text(member.__doc__)]
    return "\n\n".join(parts) + "\n"


def _documented(name: str, value: Any) -> str:
    is_data = inspect.isclass(value) and issubclass(value, Exception)
    shown = "" if is_data else f"```text\n{name}{_signature(value)}\n```\n\n"
    return shown + _text(value.__doc__)


def _signature(value: Any) -> str:
    """One argument a line, as they are written in the code."""
    parameters = inspect.signature(value).parameters.values()
    lines, starred = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            lines.append("*")
            starred = True
        if parameter.name not in ("self", "cls"):
            lines.append(str(parameter).replace("'", ""))
    short = f"({', '.join(lines)})"
    return short if len(short) < 80 else "(\n" + "".join(f"    {line},\n" for line in lines) + ")"


def _text(doc: str | None) -> str:
    """A docstring; what is indented below its sections becomes a list."""
    text = inspect.cleandoc(doc or "")
    text = re.sub(r"^(Args|Attributes|Raises|Returns):$", r"**\1**\n", text, flags=re.M)
    text = re.sub(r"^    (\w[\w, ]*): ", r"* `\1`: ", text, flags=re.M)
    example = re.compile(r"(?<=\n\n)((?:    .*\n|\n(?=    ))+)", re.M)
    return example.sub(lambda m: f"```text\n{inspect.cleandoc(m[1])}\n```\n", text + "\n").strip()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    API.write_text(api(), encoding="utf-8")

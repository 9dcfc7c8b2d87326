"""`trajrec report`: draw the answers of a replay on the terminal, and write them to files.

RUN is mapped to the replay folder beside it (`runs/mnist.h5` to `runs/mnist-replay`); a folder is taken as it is. The
terminal shows what was asked for; the page and the JSON file also hold everything else that the folder can answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from trajrec.cli.options import flag
from trajrec.cli.say import say

PAGE_ROWS = 100


def report(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="RUN|DIR", help="Recording or replay folder; the newest run under ./runs if left out."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="K", help="Rows of each table on the terminal and in CSV.")] = 10,
    by: Annotated[
        Literal["target", "class"] | None,
        typer.Option(metavar="target|class", help="Also top tables for every target, or class of targets."),
    ] = None,
    why: Annotated[
        list[int] | None, typer.Option(metavar="TARGET", help="What taught the model this test sample? Repeatable.")
    ] = None,
    statistics: Annotated[
        bool, flag("--statistics", "Mean, deviation, sign balance, concentration, outliers.")
    ] = False,
    matrix: Annotated[bool, flag("--matrix", "Contribution of training classes to test classes.")] = False,
    suspects: Annotated[bool, flag("--suspects", "Suspected wrong labels.")] = False,
    timeline: Annotated[bool, flag("--timeline", "Which epochs mattered (replay --by-epoch).")] = False,
    sample: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="Follow this training sample through the epochs. Repeatable.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="RUN|DIR", help="Agreement of this replay with another.")
    ] = None,
    everything: Annotated[bool, flag("--all", "Everything that the replay can answer.")] = False,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the top tables as CSV.")] = None,
    parquet: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the top tables as Parquet.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write everything as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write everything as one HTML page.")] = None,
    force: Annotated[bool, flag("--force", "Overwrite existing output files.")] = False,
) -> None:
    """Show which training samples helped and which harmed, from a replay.

    Example: trajrec report runs/mnist.h5 --top 20 --csv top.csv --html report.html
    """
    from trajrec.replay.report.render import tables, terminal
    from trajrec.replay.report.report import Ask, build

    folder = answers_of(source)
    header = tables.header_of(csv) if csv else None
    outputs = {kind: path for kind, path in _outputs(csv, header, parquet, json, html).items() if path}
    _check(outputs, force)
    ask = Ask(
        by=by,
        why=tuple(why or ()),
        statistics=statistics,
        matrix=matrix,
        suspects=suspects,
        timeline=timeline,
        samples=tuple(sample or ()),
        compare=answers_of(compare) if compare else None,
        everything=everything,
    )
    shown = build(folder, top, ask)
    terminal.show(shown)
    if csv:
        tables.write_csv(shown, csv, force)
    if parquet:
        tables.write_parquet(shown, parquet, force)
    if json or html:
        _write_full(folder, ask, max(top, PAGE_ROWS), json, html, force)
    for path in outputs.values():
        say(f"Wrote {path}")


def _write_full(folder: Path, ask: object, rows: int, json: Path | None, html: Path | None, force: bool) -> None:
    from dataclasses import replace

    from trajrec.replay.report.render import tables
    from trajrec.replay.report.report import Ask, build

    assert isinstance(ask, Ask)
    full = build(folder, rows, replace(ask, everything=True, pictures=html is not None))
    if json:
        tables.write_json(full, json, force)
    if html:
        from trajrec.replay.report.render import html as page

        page.write_html(full, html, force)


def _outputs(
    csv: Path | None, header: Path | None, parquet: Path | None, json: Path | None, html: Path | None
) -> dict[str, Path | None]:
    return {"--csv": csv, "What --csv writes beside it": header, "--parquet": parquet, "--json": json, "--html": html}


def _check(outputs: dict[str, Path], force: bool) -> None:
    """Refuse before any work is done: an existing file, or one file for two outputs."""
    from trajrec.errors import TrajrecError
    from trajrec.replay.report.render.tables import claim

    for option, path in outputs.items():
        claim(path, force)
        other = next((name for name, its in outputs.items() if its == path and name != option), None)
        if other:
            raise TrajrecError(f"{option} and {other} both name {path}. Give each output a file of its own.")


def answers_of(source: Path | None) -> Path:
    """The replay folder that a command line argument means.

    Args:
        source: a recording, a replay folder, or None for the newest run under ./runs.

    Raises:
        TrajrecError: there is no such recording, or it has not been replayed.
    """
    from trajrec.cli.runs import find_run, replay_folder
    from trajrec.errors import ReplayError
    from trajrec.replay.methods.resume import PIECES

    if source is not None and source.is_dir() and source.suffix != ".rec":
        return source
    run = source if source is not None and replay_folder(source).is_dir() else find_run(source)
    folder = replay_folder(run)
    if not folder.is_dir():
        raise ReplayError(f"{run} has not been replayed yet: there is no {folder}. Run `trajrec replay {run}` first.")
    if all(PIECES.fullmatch(path.name) for path in folder.iterdir()):
        raise ReplayError(
            f"The replay of {run} has not come to its end: {folder} holds its progress at most. `trajrec replay {run}` "
            "goes on from there."
        )
    return folder

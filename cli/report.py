"""`trajrec report`: draw the answers of a replay on the terminal, and write them to files.

RUN is mapped to the replay folder beside it (`runs/lenet.h5` to `runs/lenet-replay`); a folder is taken as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: trajrec report runs/lenet.h5 --top 20 --csv top.csv"


def report(
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN|DIR]", help="Recording or replay folder; the newest run under ./runs if left out."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="K", help="Rows of each table.")] = 10,
    compare: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also show how far this replay agrees with another.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the top tables as CSV.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing output files.")] = False,
) -> None:
    """Show which training samples helped and which harmed, from a replay.

    Example: trajrec report runs/lenet.h5 --top 20 --csv top.csv
    """
    from trajrec.replay.render import tables, terminal
    from trajrec.replay.report import build

    folder = replay_folder(source)
    outputs = [tables.claim(path, force) for path in (csv,) if path]
    result = build(folder, top, compare=replay_folder(compare) if compare else None)
    terminal.show(result)
    if csv:
        tables.write_csv(result, csv, force)
    for path in outputs:
        typer.echo(f"Wrote {path}")


def replay_folder(source: Path | None) -> Path:
    """The replay folder that a command line argument means.

    Args:
        source: a recording, a replay folder, or None for the newest run under ./runs.

    Raises:
        ReplayError: there is no such recording, or it has not been replayed.
    """
    from trajrec.errors import ReplayError

    source = newest_run() if source is None else source
    if source.is_dir() and source.suffix != ".rec":
        return source
    run = source.with_suffix("") if source.suffix == ".rec" else source
    folder = run.with_name(f"{run.name.removesuffix('.h5')}-replay")
    if folder.is_dir():
        return folder
    if not source.exists():
        raise ReplayError(f"There is no recording or replay folder {source}. `trajrec record SCRIPT.py` makes a run.")
    raise ReplayError(f"{source} has not been replayed yet: there is no {folder}. Run `trajrec replay {source}` first.")


def newest_run(folder: Path = Path("runs")) -> Path:
    """The newest recording in a folder, finished or cut off.

    Raises:
        ReplayError: there is none.
    """
    from trajrec.errors import ReplayError

    runs = [*folder.glob("*.h5"), *folder.glob("*.h5.rec")]
    if not runs:
        raise ReplayError(
            f"There is no recording under ./{folder}. Name a recording or a replay folder, "
            "or make a recording with `trajrec record SCRIPT.py`."
        )
    return max(runs, key=lambda path: path.stat().st_mtime)

"""`trajrec merge`: joins the outputs of shards of one question."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from trajrec.cli.options import ForceOption, TopOption
from trajrec.cli.say import say

FoldersArgument = Annotated[list[Path], typer.Argument(metavar="DIR...", help="The folders of all shards.")]


def merge(
    folders: FoldersArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output folder.")],
    top: TopOption = 10,
    force: ForceOption = False,
) -> None:
    """Join the outputs of `trajrec replay --shard i/n` and check that none is missing.

    Example: [bold]trajrec merge piece-1 piece-2 piece-3 --out whole[/bold]
    """
    from trajrec.replay.folder.place import Place
    from trajrec.replay.folder.shards import join, read_shards
    from trajrec.replay.folder.write import OUTPUT
    from trajrec.replay.report import report
    from trajrec.replay.report.render import tables, terminal

    place = Place(out, OUTPUT, force, [("the shard", folder) for folder in folders])
    with place.claimed():
        shards = read_shards(folders)
        with place.filling() as unfinished:
            join(shards, unfinished)
            tables.write_csv(report.build(unfinished, top), unfinished / "top.csv")
    terminal.show(report.build(place.final, top))
    joined = f"{place.said}Joined {len(shards)} shards into {place.shown}/."
    say(f"{joined} Next: trajrec report {shlex.quote(str(place.shown))}", err=True)

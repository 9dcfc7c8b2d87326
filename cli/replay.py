"""`trajrec replay`: contributions of training samples from a recording."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from trajrec.cli import options as shared
from trajrec.cli.options import LONG_RUNS, MACHINE, METHOD, OUTPUT, QUESTION, choice, flag
from trajrec.cli.say import say
from trajrec.cli.tasks import from_anywhere, task_of
from trajrec.cli.values import bytes_of, ids_in, shard_of, steps_of, targets_file, targets_in

if TYPE_CHECKING:
    from trajrec.replay.methods.contributions import Contributions
    from trajrec.replay.methods.resume import ResumeFile
    from trajrec.replay.session import Session


def replay(
    run: shared.RunArgument = None,
    samples: Annotated[Path | None, choice("IDX.npy", "Training sample ids (default: all).", QUESTION)] = None,
    targets: Annotated[
        str,
        choice(
            "mean|each|class|FILE.npy",
            "What is measured: a loss on the test set (default: mean). tokens:FILE.npy takes rows (sample, start, "
            "stop), contrasts:FILE.npy rows of two samples.",
            QUESTION,
        ),
    ] = "mean",
    by_epoch: Annotated[bool, flag("--by-epoch", "Also the part of each epoch.", QUESTION)] = False,
    steps: Annotated[str | None, choice("A:B", "Only what steps A to B contribute.", QUESTION)] = None,
    task: shared.TaskOption = None,
    trust: shared.TrustOption = False,
    exact: Annotated[bool, flag("--exact", "With Hessian-vector products: the default, said aloud.", METHOD)] = False,
    hessian_free: Annotated[
        bool, flag("--hessian-free", "Without them: cheaper, an approximation that may rank nothing.", METHOD)
    ] = False,
    curvature: Annotated[
        str | None,
        choice(
            "hessian|ggn|kinks|none",
            "By name: hessian is --exact, none --hessian-free; ggn Gauss-Newton.",
            METHOD,
        ),
    ] = None,
    mode: Annotated[str, choice("auto|adjoint|tangent", "Direction; auto takes the cheaper.", METHOD)] = "auto",
    certify: Annotated[
        str | None, choice("all|sampled", "Steps to make again (default: all; sampled if Hessian-free).", METHOD)
    ] = None,
    allow_drift: Annotated[bool, flag("--allow-drift", "Go on where the Task differs.", METHOD)] = False,
    taylor: Annotated[int, choice("K", "Train again without K of the samples, as a check.", METHOD, minimum=0)] = 0,
    device: shared.DeviceOption = "cpu",
    dtype: Annotated[str | None, choice("float32|float64", "Floating type (default: the run's).", MACHINE)] = None,
    memory: Annotated[
        str | None, choice("1GB", "What it may take (default: a quarter of what is free).", MACHINE)
    ] = None,
    out: Annotated[Path | None, choice("DIR", "Output folder (default: NAME-replay beside the run).", OUTPUT)] = None,
    top: shared.TopOption = 10,
    force: shared.ForceOption = False,
    shard: Annotated[
        str | None, choice("I/N", "Only piece I of N of the question; see `trajrec merge`.", LONG_RUNS)
    ] = None,
) -> None:
    """Ask a run which training samples made the model do what it does. A replay that was cut off goes on.

    Example: [bold]trajrec replay --samples idx.npy[/bold]
    """
    from trajrec.cli.runs import find_run, replay_folder
    from trajrec.replay.folder.format import Settings
    from trajrec.replay.folder.identity import identity_of
    from trajrec.replay.folder.place import Place
    from trajrec.replay.folder.validated import carry_validated
    from trajrec.replay.folder.write import OUTPUT as KIND
    from trajrec.replay.folder.write import write_replay
    from trajrec.replay.methods.resume import ResumeFile
    from trajrec.replay.question import Question, curvature_of
    from trajrec.replay.report import report
    from trajrec.replay.report.render import tables, terminal
    from trajrec.replay.session import Session
    from trajrec.runfile.reader.run import open as open_run

    path = find_run(run)
    words: Any = {"mode": mode, "certify": certify, "dtype": dtype}
    question = Question(
        targets=targets_in(targets),
        samples=None if samples is None else ids_in(samples, "--samples"),
        curvature=curvature_of(True, _curvature(exact, hessian_free, curvature)),  # type: ignore[arg-type]
        by_epoch=by_epoch,
        steps=steps_of(steps),
        shard=shard_of(shard),
        device=device,
        allow_drift=allow_drift,
        **words,
    )
    place = Place(out or replay_folder(path), KIND, force, _used(path, samples, targets, task))
    began = time.monotonic()
    with (
        place.claimed(),
        open_run(from_anywhere(path)) as recorded,
        task_of(task, recorded, trust) as (reference, the_task),
    ):
        session = Session.of(recorded, the_task, question, bytes_of(memory))
        identity = identity_of(question, session, reference)
        file = ResumeFile(place.path, f"{identity}/{shard}", _progress_seconds(), forced=place.force)
        if force:
            file.remove()
        result = _solve(session, question, file)
        facts = {"run": str(path), "seconds": round(time.monotonic() - began, 3), "command": " ".join(sys.argv[1:])}
        facts |= {"question": identity, "shard": question.shard and list(question.shard)}
        facts |= {"taylor": _check(session, question, result, taylor, file)} if taylor else {}
        with place.filling(file.keep) as unfinished:
            left_out = write_replay(unfinished, result, session, facts)
            carry_validated(place.path, unfinished, Settings(run_id=session.run.spec.run_id, question=identity))
            tables.write_csv(report.build(unfinished, top), unfinished / "top.csv")
        file.remove_own()
    terminal.show(report.build(place.final, top))
    for reason in left_out:
        say(f"Not written: {reason}", err=True)
    say(f"{place.said}Written to {place.shown}/. Next: trajrec report {shlex.quote(str(place.shown))}", err=True)


def _curvature(exact: bool, hessian_free: bool, curvature: str | None) -> str | None:
    """The curvature that options ask for; None where none of them does.

    Raises:
        TrajrecError: they ask for two.
    """
    from trajrec.errors import TrajrecError

    asked = {"--exact": "hessian" if exact else None, "--hessian-free": "none" if hessian_free else None}
    asked[f"--curvature {curvature}"] = curvature
    found = {option: name for option, name in asked.items() if name is not None}
    if len(set(found.values())) > 1:
        raise TrajrecError(f"{' and '.join(found)} contradict each other: ask for one form.")
    return next(iter(found.values()), None)


def _used(run: Path, samples: Path | None, targets: str, task: str | None) -> list[tuple[str, Path | None]]:
    """What a replay reads: an output folder that holds one of these is not replaced."""
    from trajrec.runfile.folder import SUFFIX
    from trajrec.task.loading import task_file

    return [
        ("the run", run),
        ("the recording", run.with_name(run.name + SUFFIX)),
        ("the samples", samples),
        ("the targets", targets_file(targets)[1]),
        ("the Task", None if task is None else task_file(task)),
    ]


def _solve(session: Session, question: Any, file: ResumeFile) -> Contributions:
    from trajrec.cli.progress import ReplayProgress
    from trajrec.replay.methods.blocks import Execution
    from trajrec.replay.methods.contributions import solve

    with ReplayProgress() as progress:
        file.say = progress.say
        return solve(session, question, Execution(progress, file, form=os.environ.get("TRAJREC_FORM")))


def _check(session: Session, question: Any, result: Contributions, count: int, file: ResumeFile) -> str:
    """What the Taylor check says of the most influential sample, the median one and others evenly between."""
    name = f"taylor {count}"
    if name not in file.notes:
        file.note(name, _train_again(session, question, result, count))
    return str(file.notes[name])


def _train_again(session: Session, question: Any, result: Contributions, count: int) -> str:
    from trajrec.cli.progress import ReplayProgress
    from trajrec.replay.validation.taylor import spread, taylor_check, taylor_steps

    places = spread(result.values, count)
    samples = result.samples[places]
    targets = question.scope(session.samples, session.run.steps, lambda: session.test).targets
    with ReplayProgress() as progress:
        progress.start("taylor check", taylor_steps(session, samples.tolist()))
        return taylor_check(session, targets, samples, result.values[places], progress.advance).sentence


def _progress_seconds() -> float:
    return float(os.environ.get("TRAJREC_PROGRESS_SECONDS", "60"))

"""`trajrec validate`: do the numbers of a replay come true? It trains again on the recorded schedule, and says."""

from __future__ import annotations

import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from trajrec.cli import options as shared
from trajrec.cli.options import MACHINE, METHOD, OUTPUT, QUESTION, choice, flag
from trajrec.cli.say import say
from trajrec.cli.tasks import from_anywhere, task_of
from trajrec.cli.values import bytes_of

if TYPE_CHECKING:
    from trajrec.replay.folder.read import Inputs
    from trajrec.replay.validation.validate import Trials, Validation


def validate(
    run: shared.RunArgument = None,
    subsets: Annotated[
        int, choice("K", "Train again without each of K random subsets (default: 5).", QUESTION, minimum=0)
    ] = 5,
    fraction: Annotated[
        float | None,
        choice("F", "Share of the samples in a subset (default: .01; of --lds .1).", QUESTION),
    ] = None,
    loo: Annotated[int, choice("K", "Also without each of K random samples alone.", QUESTION, minimum=0)] = 0,
    lds: Annotated[
        int, choice("K", "Also without K subsets of --fraction: are they ranked rightly?", QUESTION, minimum=0)
    ] = 0,
    taylor: Annotated[
        int, choice("K", "Also without K samples, whole and half: the order of what is missing.", QUESTION, minimum=0)
    ] = 0,
    seed: Annotated[int, choice("N", "Which subsets and samples are drawn (default: 0).", QUESTION, minimum=0)] = 0,
    task: shared.TaskOption = None,
    trust: shared.TrustOption = False,
    allow_drift: Annotated[bool, flag("--allow-drift", "Go on where the Task differs.", METHOD)] = False,
    device: shared.DeviceOption = "cpu",
    dtype: Annotated[str | None, choice("float32|float64", "Floating type (default: the run's).", MACHINE)] = None,
    memory: Annotated[
        str | None, choice("1GB", "What it may take (default: a quarter of what is free).", MACHINE)
    ] = None,
    out: Annotated[
        Path | None,
        choice("DIR", "The replay (default: NAME-replay beside the run; made if missing).", OUTPUT),
    ] = None,
) -> None:
    """Does it come true? Train again without some samples, and compare with what a replay predicts.

    Example: [bold]trajrec validate runs/mnist.h5[/bold]
    """
    from trajrec.cli.runs import find_run, replay_folder
    from trajrec.replay.folder.read import load
    from trajrec.replay.folder.validated import write_validated
    from trajrec.replay.validation.validate import Trials

    shares = {} if fraction is None else {"lds_fraction" if lds else "fraction": fraction}
    trials = Trials(subsets=subsets, loo=loo, lds=lds, taylor=taylor, seed=seed, **shares)
    path = find_run(run)
    folder = out or replay_folder(path)
    words: dict[str, Any] = {"device": device, "dtype": dtype, "memory": memory, "allow_drift": allow_drift}
    if not _is_replay(folder):
        _replay(path, folder, task=task, trust=trust, **words)
    inputs, began = load(folder), time.monotonic()
    done = _tried(path, inputs, trials, task, trust, words)
    say(_said(done, inputs))
    facts = done.to_json() | {"created": datetime.now(UTC).isoformat(timespec="seconds")}
    facts |= {"seconds": round(time.monotonic() - began, 3), "command": " ".join(sys.argv[1:])}
    write_validated(folder, inputs.settings, facts)
    say(f"Written to {folder / 'validation.json'}. Next: trajrec report {shlex.quote(str(folder))}", err=True)


def _is_replay(folder: Path) -> bool:
    from trajrec.replay.folder.format import CONTRIBUTIONS

    return (folder / CONTRIBUTIONS).is_file()


def _replay(run: Path, folder: Path, **options: Any) -> None:
    from trajrec.cli.replay import replay

    say(f"There is no replay in {folder} yet: it is made first.", err=True)
    replay(run, exact=True, out=folder, **options)


def _tried(
    run: Path, inputs: Inputs, trials: Trials, task: str | None, trust: bool, words: dict[str, Any]
) -> Validation:
    from trajrec.cli.progress import ReplayProgress
    from trajrec.errors import ReplayError
    from trajrec.replay.folder.numbers import contributions_in
    from trajrec.replay.question import Question
    from trajrec.replay.session import Session
    from trajrec.replay.validation.validate import tried
    from trajrec.runfile.reader.run import open as open_run

    found = contributions_in(inputs)
    memory = bytes_of(words["memory"])
    question = Question(curvature=found.curvature, **{k: v for k, v in words.items() if k != "memory"})  # type: ignore[arg-type]
    with open_run(from_anywhere(run)) as recorded:
        if recorded.spec.run_id != inputs.settings.run_id:
            raise ReplayError(
                f"{inputs.folder} holds a replay of another run than {run}. Name the folder of its replay with --out."
            )
        with task_of(task, recorded, trust) as (_, the_task), ReplayProgress() as progress:
            session = Session.of(recorded, the_task, question, memory)
            return tried(session, trials, found, None, question.curvature, progress)


def _said(done: Validation, inputs: Inputs) -> str:
    """What came out, a paragraph for each trial, with what it means for this model."""
    from trajrec.replay.folder.validated import Validated
    from trajrec.replay.report.sensitivity import Sensitivity

    parts = [part.sentence for part in (done.leave_one_out, done.lds, done.taylor) if part is not None]
    if done.removals is not None:
        found = Validated(done.verdict, done.removals.sentence, done.correlation, done.interval, None, None)
        parts.insert(0, Sensitivity.of(inputs.settings, found).sentence)
    return "\n\n".join(parts)

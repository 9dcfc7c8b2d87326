"""`trajrec record`: runs an ordinary training script, unchanged, and records it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trajrec.cli.options import RUN, TROUBLE, Command, choice, flag
from trajrec.cli.say import say
from trajrec.errors import TrajrecError

if TYPE_CHECKING:
    from trajrec.capture.recorder import Recorder

NOT_RECORDED = 5
is_command = False  # whether this process is that of the command, and ends with it


class RecordCommand(Command):
    """Like Python itself: everything after SCRIPT or `-m MODULE` belongs to the script."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts `--` behind `-m MODULE`."""
        takes_value = {name for p in self.params if not getattr(p, "is_flag", False) for name in p.opts}
        place = 0
        while place < len(args) and args[place].startswith("-") and args[place] != "--":
            if args[place] == "-m":
                args = [*args[: place + 2], "--", *args[place + 2 :]]
                break
            place += 2 if args[place] in takes_value else 1
        return super().parse_args(ctx, args)


def record(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="SCRIPT.py [ARGS]...", show_default=False)] = None,
    module: Annotated[str | None, typer.Option("-m", metavar="MODULE", help="Run a module, as python -m does.")] = None,
    out: Annotated[Path | None, choice("FILE", "The run file (default: ./runs/SCRIPT-TIME.h5).", RUN)] = None,
    task: Annotated[
        str | None,
        choice("FILE.py:ATTR", "The Task, noted for replay (default: task.py beside SCRIPT, if there).", RUN),
    ] = None,
    keep: Annotated[
        str | None,
        choice("steps|K", "Weights of every step (default, while the disk has room), or keyframes every K steps.", RUN),
    ] = None,
    compression: Annotated[str, choice("zstd|none", "How rows are compressed (default: zstd).", RUN)] = "zstd",
    inputs: Annotated[
        str, choice("digest|store", "Checksums of the batches (default), or the batches themselves.", RUN)
    ] = "digest",
    ids: Annotated[
        str, choice("found|order", "Ids of samples as found (default), or as they arrive where they have none.", RUN)
    ] = "found",
    budget: Annotated[str | None, choice("20GB", "Stay below this size, thinning as the run grows.", RUN)] = None,
    resume: Annotated[bool, flag("--resume", "Go on with the run that --out names.", RUN)] = False,
    force: Annotated[bool, flag("--force", "Replace an existing run.", RUN)] = False,
    on_full: Annotated[
        str, choice("wait|stop-recording|raise", "What to do when the disk is full (default: wait).", TROUBLE)
    ] = "wait",
    strict: Annotated[
        bool,
        flag("--strict", "End the training with an error where it cannot be recorded (else: exit code 5).", TROUBLE),
    ] = False,
) -> int:
    """Run a training script and record every optimizer step. The script needs no change.

    What cannot be recorded does not end the training: it goes on unrecorded, that is said, and the exit code is 5.

    Example: [bold]trajrec record --out runs/mnist.h5 train.py --epochs 5[/bold]
    """
    from trajrec.api import record as make_recorder
    from trajrec.capture.processes import processes
    from trajrec.cli.runs import new_run

    script, rest = _script(arguments or [], module)
    start = Path.cwd()  # the script may go elsewhere
    path = start / (out or new_run(script.stem if module is None else module.rpartition(".")[2]))
    if processes() == 1:
        _make_folder(path.parent)
    reference = _task_reference(task, script if module is None else None)
    options: dict[str, Any] = {"keep": _keep(keep), "compression": compression, "budget": budget, "on_full": on_full}
    options |= {"inputs": inputs, "ids": ids, "strict": strict}
    try:
        recorder: Recorder = make_recorder(path, task=reference, force=force, resume=resume, **options)
    except ValueError as error:
        raise TrajrecError(str(error)) from None
    code = _run(recorder, script, module, rest)
    if recorder.is_abandoned:
        return code  # a child that the script has forked ends here, too
    if recorder.summary is not None and recorder.summary.path is not None:
        _say(recorder, module or script.name, reference, start)
    elif code == 0 and recorder.problem is None:
        raise TrajrecError(
            f"No optimizer step was seen in {module or script}: there is nothing to record. (Steps of processes that "
            "the script starts are not seen.)"
        )
    return code or _unrecorded(recorder)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrajrecError(f"The run cannot be written into {folder}: {error.strerror}.") from None


def _unrecorded(recorder: Recorder) -> int:
    """The exit code of a training that ended well: 5 if it was not recorded to its end, which is said again.

    Where several processes train it is 0 all the same: their launcher would end the others.
    """
    from trajrec.capture.processes import processes

    problem = recorder.problem or (recorder.summary.stopped if recorder.summary is not None else None)
    if problem is None or processes() > 1:
        return 0
    typer.echo(f"NOT WHOLLY RECORDED: {problem}", err=True)
    return NOT_RECORDED


def _keep(value: str | None) -> str | int | None:
    return int(value) if value is not None and value.isdecimal() else value


def _script(arguments: list[str], module: str | None) -> tuple[Path, list[str]]:
    if module is not None:
        return Path(module), arguments
    if not arguments:
        raise TrajrecError("Name the script to be recorded: trajrec record SCRIPT.py [ARGS]...")
    script = Path(arguments[0])
    if not script.is_file():
        raise TrajrecError(f"There is no script {script}.")
    return script, arguments[1:]


def _task_reference(task: str | None, script: Path | None) -> str | None:
    """The reference to be noted, with an absolute path; by default task.py beside the script."""
    if task is None:
        beside = None if script is None else script.resolve().parent / "task.py"
        return f"{beside}:task" if beside is not None and beside.is_file() else None
    source, colon, attribute = task.rpartition(":") if ":" in task else (task, ":", "task")
    if source.endswith(".py"):
        if not Path(source).is_file():
            raise TrajrecError(f"There is no task file {source}. Pass --task FILE.py:ATTR.")
        source = str(Path(source).resolve())
    return f"{source}{colon}{attribute}"


def _run(recorder: Recorder, script: Path, module: str | None, arguments: list[str]) -> int:
    """Runs the script under the recorder. Returns the exit code it asked for."""
    try:
        with recorder, _as_main(script, module, arguments):
            _execute(script, module)
    except SystemExit as stop:
        return _exit_code(stop.code)
    except TrajrecError:
        raise
    except KeyboardInterrupt:
        typer.echo("Interrupted.", err=True)
        return 130
    except Exception as error:
        _show_traceback(error)
        return 1
    return 0


def _execute(script: Path, module: str | None) -> None:
    """Runs the script, or the module, as `__main__`.

    That it stays: what a script leaves to the end of the process (an `atexit` function, a thread) finds its classes
    there.

    Raises:
        TrajrecError: there is no such module.
    """
    main = ModuleType("__main__")
    if module is None:
        path = os.path.abspath(script)  # as Python itself names the file that it is given
        code, main.__file__ = compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), path
    else:
        spec = _module_spec(module)
        code, main.__file__, main.__spec__ = spec.loader.get_code(spec.name), spec.origin, spec
        main.__package__, main.__loader__ = spec.parent, spec.loader
        sys.argv[0] = spec.origin
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


def _module_spec(module: str) -> Any:
    """What `python -m` would run.

    Raises:
        TrajrecError: there is no such module.
    """
    from importlib.util import find_spec

    try:
        spec = find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{module}.__main__")
    except ModuleNotFoundError:
        spec = None
    if spec is None or not hasattr(spec.loader, "get_code"):
        raise TrajrecError(f"There is no module {module} that could be run. Is its folder the one you are in?")
    return spec


def _exit_code(code: Any) -> int:
    """As Python does it: nothing is 0, a number itself, anything else is printed and 1."""
    if code is None or isinstance(code, int):
        return code or 0
    typer.echo(str(code), err=True)
    return 1


@contextmanager
def _as_main(script: Path, module: str | None, arguments: list[str]) -> Iterator[None]:
    """sys.argv and sys.path as Python sets them for a script; the command's process keeps the script's `__main__`."""
    argv, first, main = sys.argv, sys.path[0] if sys.path else "", sys.modules["__main__"]
    sys.argv = [module or str(script), *arguments]
    sys.path.insert(0, "" if module is not None else str(script.resolve().parent))
    try:
        yield
    finally:
        sys.argv = argv
        if not is_command:
            sys.modules["__main__"] = main
        if sys.path and sys.path[0] != first:
            del sys.path[0]


def _show_traceback(error: Exception) -> None:
    """The script's own traceback, without the frames that ran it."""
    import traceback

    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    traceback.print_exception(type(error), error, trace)


def _say(recorder: Recorder, name: str, reference: str | None, start: Path) -> None:
    """One line: what was recorded, and what to type next, as seen from the folder where the command was given."""
    from trajrec.cli.runs import RUNS, newest_run, size_text

    summary = recorder.summary
    assert summary is not None
    assert summary.path is not None
    taken = recorder.seconds / max(recorder.training_seconds, 1e-9)
    path = summary.path
    newest = path.parent == start / RUNS and newest_run(start / RUNS) == path
    path = path.relative_to(start) if path.is_relative_to(start) else path
    command = (
        "trajrec replay"
        + ("" if newest else f" {shlex.quote(str(path))}")
        + ("" if reference else " --task FILE.py:ATTR")
    )
    gaps = f", {len(summary.gaps)} gap{'s' * (len(summary.gaps) > 1)}" if summary.gaps else ""
    cost = f"; recording took {taken:.1%} of the training thread's time" if recorder.training_seconds > 1 else ""
    others = ", ".join(f"{count:,} of {optimizer}" for optimizer, count in recorder.others.items())
    beside = f" Steps of other models were made, and are not recorded: {others}." if others else ""
    steps = f"{summary.steps:,} step{'s' * (summary.steps != 1)}"
    about = f"{size_text(summary.size)}{gaps}{cost}"
    say(f"Recorded {steps} of {name} into {path} ({about}).{beside} Next: {command}", err=True)

"""The `trajrec` command in a process of its own, without waiting for its imports each time.

A server process has imported what the command needs, and forks a child for every call; the child is the command, with
its own folder, environment, arguments, output and exit code. What must be a process from the beginning (signals, kills,
the start of the interpreter itself) is started as one: `TRAJREC`.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

TRAJREC = [sys.executable, "-m", "trajrec.cli.main"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "80"}
SECONDS = 120
_servers: dict[int, subprocess.Popen[str]] = {}


def call(*arguments: Any, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command: one thread, no colour."""
    with tempfile.TemporaryDirectory() as folder:
        command = {
            "arguments": [*map(str, arguments)],
            "cwd": str(cwd),
            "env": {**os.environ, **ENVIRONMENT, **(env or {})},
            "folder": folder,
        }
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(command) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(command["arguments"], code, out, err)


def _server() -> subprocess.Popen[str]:
    """The server of this test process."""
    if os.getpid() not in _servers:
        command = [sys.executable, "-m", "tests.made.command"]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(server.kill)
        _servers[os.getpid()] = server
    return _servers[os.getpid()]


def serve() -> None:
    """Reads a command a line, and answers with its exit code."""
    import h5py  # noqa: F401
    import polars  # noqa: F401
    import torch

    import trajrec.api
    import trajrec.cli.main
    import trajrec.replay.folder.write
    import trajrec.replay.report.report  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _run(json.loads(line))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(command: dict[str, Any]) -> None:
    """The command, in the child that was forked for it."""
    import signal

    from trajrec.cli.main import main

    signal.alarm(SECONDS)
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["env"])
    for number, name in ((0, os.devnull), (1, "out"), (2, "err")):
        path = name if name == os.devnull else f"{command['folder']}/{name}"
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, mode) for fd, mode in ((0, "r"), (1, "w"), (2, "w")))
    sys.argv, sys.path[0] = ["trajrec", *command["arguments"]], command["cwd"]
    code: Any = 1
    try:
        main()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    serve()

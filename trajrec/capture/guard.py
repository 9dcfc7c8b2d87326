"""One guard around all hooks of a recorder: whatever happens in a hook, the training goes on as it would without it.

    hook        runs; what it returns is returned
    hook fails  strict: the error goes on into the training. Otherwise the recorder is told once, and from then on
                every guarded hook returns at once; what the training does itself is not touched by any of it
    forked      a child of the recorded process has no recorder: guarded hooks return at once there

Ctrl-C and `sys.exit` are no failures of a hook and pass through.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from trajrec.capture.stopwatch import Stopwatch

# That which compiles what is called in this thread, if anything does.
_compiler = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: "perhaps")


def not_compiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, apart from a compiled step that it is met in: a compiler would look into it, and it is no part of that.

    To keep it apart takes longer than many a hook does; so it is done only where something compiles.
    """
    disabled: Callable[..., Any] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return disabled


class Guard:
    """Keeps what hooks raise away from the training.

    Args:
        failed: called once with the error of the hook that failed.
        strict: whether errors go on into the training instead.

    Attributes:
        is_open: whether hooks are still called.
    """

    def __init__(self, failed: Callable[[Exception], None], strict: bool = False) -> None:
        self.is_open = True
        self._failed = failed
        self._strict = strict

    def around(self, hook: Callable[..., Any], watch: Stopwatch | None = None) -> Callable[..., Any]:
        """The hook, guarded; None is returned in its place where it fails or is not called any more.

        Args:
            hook: a function.
            watch: times it.
        """

        def run(*args: Any) -> Any:
            began = 0.0 if watch is None else watch.start()
            try:
                return hook(*args)
            except Exception as error:
                self.give(error)
            finally:
                if watch is not None:
                    watch.stop(began)

        apart = not_compiled(run)

        @wraps(hook)
        def guarded(*args: Any) -> Any:
            if not self.is_open:
                return None
            if torch.compiler.is_compiling():  # a compiler reads this line, and knows no other way to ask
                return apart(*args)
            return run(*args) if _compiler() is None else apart(*args)

        guarded._torchdynamo_disable = True  # type: ignore[attr-defined]
        return guarded

    def run(self, hook: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Calls a hook, whether or not hooks are still called.

        Raises:
            Exception: what the hook raises, where the guard is strict.
        """
        try:
            return hook(*args, **named)
        except Exception as error:
            self.give(error)

    def give(self, error: Exception) -> None:
        """Ends all hooks because of an error; a second one is not told.

        Raises:
            Exception: that error, where the guard is strict.
        """
        if self._strict:
            raise error
        if self.is_open:
            self.is_open = False
            self._failed(error)

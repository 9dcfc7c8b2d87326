"""`solve` with the options of a question and of its execution side by side, as tests vary both."""

from __future__ import annotations

from typing import Any

from trajrec.replay.methods.blocks import Execution
from trajrec.replay.methods.contributions import Contributions, solve
from trajrec.replay.question import Question, curvature_of
from trajrec.replay.session import Session

EXECUTION = ("progress", "file", "block", "form")


def solved(
    session: Session, targets: Any = "mean", *, exact: bool = True, curvature: Any = None, **options: Any
) -> Contributions:
    """The answer of a session to a question."""
    execution = Execution(**{name: options.pop(name) for name in EXECUTION if name in options})
    question = Question(targets=targets, curvature=curvature_of(exact, curvature), **options)
    return solve(session, question, execution)

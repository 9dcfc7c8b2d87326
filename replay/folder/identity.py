"""What identifies a question: everything that decides the numbers of a replay, as one SHA-256.

A replay that is taken up again, and shards that are merged, must have been asked the same: the same recording, the same
file of the Task, the same targets, samples and options, computed by the same versions. What the Task's file imports
(data, model, loss) shows in two losses: of the first step, and the mean over the targets at the end. The shard is not
part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import trajrec
from trajrec.replay.losses.chosen import Contrasts, Tokens
from trajrec.replay.losses.targets import choose_targets, target_values
from trajrec.replay.question import Question, TargetChoice
from trajrec.replay.session import Session
from trajrec.task.loading import file_sha256, task_file


def identity_of(question: Question, session: Session, task: str) -> str:
    """The identity of a question, in hexadecimal digits; `task` is the reference of the Task."""
    file = task_file(task)
    facts = {
        "run": session.run.spec.run_id,
        "steps": session.run.steps,
        "task": task if file is None else file_sha256(file),
        "losses": _losses(session, question),
        "targets": _digest(question.targets),
        "samples": _digest(question.samples),
        "options": {name: value if value is None else str(value) for name, value in question.options().items()},
        "versions": [trajrec.__version__, str(torch.__version__)],
    }
    return question_of(facts)


def _losses(session: Session, question: Question) -> list[str]:
    """The loss of the first step and the mean target loss at the end, to five digits: other data show in them."""
    targets = choose_targets(question.targets, session.test)
    values = target_values(targets, session.function, session.test, session.trajectory.weights(session.run.steps))
    return [f"{value:.5g}" for value in (session.loss(session.step_at_start()), float(values.mean()))]


def _digest(ids: TargetChoice | None) -> str | None:
    if ids is None or isinstance(ids, str):
        return ids
    if isinstance(ids, Tokens | Contrasts):
        return f"{ids.kind}:{_digest(ids.rows)}"
    return hashlib.sha256(np.asarray(ids).astype(np.int64).tobytes()).hexdigest()


def question_of(facts: Mapping[str, Any]) -> str:
    """The SHA-256 of what a replay was asked, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

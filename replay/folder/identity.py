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
from trajrec.replay.session import Session
from trajrec.task.loading import file_sha256, task_file


def question(session: Session, task: str, targets: Any, samples: Any, options: dict[str, Any]) -> str:
    """The identity of a question, in hexadecimal digits.

    Args:
        session: a recording and a Task.
        task: reference of the Task.
        targets: a word, or test ids [M].
        samples: training ids [S], or None for all.
        options: everything else that was asked.
    """
    file = task_file(task)
    facts = {
        "run": session.run.spec.run_id,
        "steps": session.run.steps,
        "task": task if file is None else file_sha256(file),
        "losses": session.told_losses(targets),
        "targets": _identity(targets),
        "samples": _identity(samples),
        "options": {name: value if value is None else str(value) for name, value in options.items()},
        "versions": [trajrec.__version__, str(torch.__version__)],
    }
    return question_of(facts)


def _identity(ids: Any) -> str | None:
    if ids is None or isinstance(ids, str):
        return ids
    return hashlib.sha256(np.asarray(ids).astype(np.int64).tobytes()).hexdigest()


def question_of(facts: Mapping[str, Any]) -> str:
    """The SHA-256 of what a replay was asked, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

"""What training again said of a replay, as it lies beside its numbers in validation.json.

The file names the run and the question that it is about. A replay of another question is not shown with it, and a
folder without one, or with one that nobody can read, is a replay that was not checked. What is found later joins what
is there, where it is about the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trajrec.errors import TrajrecError, is_disk_full
from trajrec.records import Json
from trajrec.replay.folder.format import VALIDATION, Settings, finite, text
from trajrec.runfile.durable import durable

VERDICTS = ("holds", "weak", "does not hold")
OTHERS = ("leave_one_out", "lds", "taylor")
_MOST_PAIRS = 500


@dataclass(frozen=True, slots=True)
class Validated:
    """What training again said.

    Attributes:
        verdict: "holds", "weak" or "does not hold"; None where no random sets were taken out.
        sentence: the verdict in words.
        correlation: of predicted and real changes; interval: of it, at 95 %.
        sets, targets: how many random sets were taken out, on how many targets that was measured.
        pairs: (predicted, real) changes.
        others: what leave-one-out, the datamodeling score and the Taylor check said, a sentence each.
    """

    verdict: str | None
    sentence: str
    correlation: float | None
    interval: tuple[float, float] | None
    sets: int | None
    targets: int | None
    pairs: tuple[tuple[float, float], ...] = ()
    others: tuple[str, ...] = ()


def validated(folder: Path, settings: Settings) -> Validated | None:
    """What was said of the replay in a folder; None if nothing was, or of another one."""
    facts = _facts(folder, settings)
    if facts is None:
        return None
    first = _mapping(facts.get("removals"))
    verdict = first.get("verdict") if first.get("verdict") in VERDICTS else None
    low, high = (finite(end) for end in _two(first.get("interval")))
    others = [text(_mapping(facts.get(name)).get("sentence")) for name in OTHERS]
    return Validated(
        verdict=verdict,
        sentence=text(first.get("sentence")) or "" if verdict else "",
        correlation=finite(first.get("correlation")),
        interval=None if low is None or high is None else (low, high),
        sets=_count(first.get("sets")),
        targets=_count(first.get("targets")),
        pairs=tuple(_pairs(first.get("pairs"))),
        others=tuple(sentence for sentence in others if sentence),
    )


def write_validated(folder: Path, settings: Settings, facts: Json) -> Json:
    """Writes validation.json beside a replay, with what it said before of the same numbers. Returns what stands there.

    Raises:
        TrajrecError: it cannot be written.
    """
    whole = (_facts(folder, settings) or {}) | facts | {"run_id": settings.run_id, "question": settings.question}
    try:
        with durable(folder / VALIDATION) as file:
            file.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        reason = "the disk is full" if is_disk_full(error) else error.strerror or str(error)
        raise TrajrecError(f"{folder / VALIDATION} could not be written: {reason}.") from error
    return whole


def carry_validated(old: Path, new: Path, settings: Settings) -> None:
    """Takes what was said of a replay along, where the same question is answered anew."""
    facts = _facts(old, settings)
    if facts is not None:
        write_validated(new, settings, facts)


def _facts(folder: Path, settings: Settings) -> Json | None:
    try:
        facts = json.loads((folder / VALIDATION).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    about = settings.run_id, settings.question
    if not isinstance(facts, dict) or (facts.get("run_id"), facts.get("question")) != about:
        return None
    return facts


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _two(value: Any) -> tuple[Any, Any]:
    return (value[0], value[1]) if isinstance(value, list) and len(value) == 2 else (None, None)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _pairs(value: Any) -> list[tuple[float, float]]:
    pairs = [_two(pair) for pair in (value if isinstance(value, list) else [])[:_MOST_PAIRS]]
    found = [(finite(predicted), finite(happened)) for predicted, happened in pairs]
    return [(p, h) for p, h in found if p is not None and h is not None]

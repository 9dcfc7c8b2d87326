"""Values of options, read from what was typed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trajrec.errors import TrajrecError

if TYPE_CHECKING:
    from trajrec.records import IntArray
    from trajrec.replay.question import TargetChoice


def steps_of(text: str | None) -> tuple[int, int] | None:
    """(a, b) of "a:b"."""
    return None if text is None else _two(text, ":", "--steps takes A:B, as in --steps 1:200")


def shard_of(text: str | None) -> tuple[int, int] | None:
    """(i, n) of "i/n"."""
    return None if text is None else _two(text, "/", "--shard takes I/N, as in --shard 2/8")


def _two(text: str, between: str, rule: str) -> tuple[int, int]:
    first, _, second = text.partition(between)
    if not (first.isdigit() and second.isdigit()):
        raise TrajrecError(f"{rule}, not {text!r}.")
    return int(first), int(second)


def bytes_of(size: str | None) -> int | None:
    """Bytes of "1GB"."""
    from trajrec.runfile.trainer.budget import parse_size

    try:
        return None if size is None else parse_size(size)
    except ValueError as error:
        raise TrajrecError(f"--memory: {error}") from None


def targets_file(text: str) -> tuple[str, Path | None]:
    """The kind and the file of "FILE.npy" (of no kind), "tokens:FILE.npy" or "contrasts:FILE.npy"; else no file."""
    kind, colon, path = text.partition(":")
    if colon and kind in ("tokens", "contrasts"):
        return kind, Path(path)
    return "", Path(text) if text.endswith(".npy") else None


def targets_in(text: str) -> TargetChoice:
    """What --targets names: a word, test ids, or rows of tokens or contrasts."""
    from trajrec.replay.losses.chosen import rows_of_kind

    kind, path = targets_file(text)
    if path is None:
        return text  # type: ignore[return-value]  # another word is refused where targets are chosen
    numbers = ids_in(path, "--targets")
    return rows_of_kind(kind, numbers) or numbers


def ids_in(path: Path, option: str) -> IntArray:
    """Sample ids from a .npy file; never unpickles."""
    import numpy as np

    try:
        ids: IntArray = np.load(path, allow_pickle=False)
        return ids
    except FileNotFoundError:
        raise TrajrecError(f"{option}: there is no file {path}.") from None
    except (ValueError, OSError, EOFError) as error:
        raise TrajrecError(f"{option}: {path} is no .npy file of integers ({error}).") from None

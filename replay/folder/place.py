"""The place of an output folder: claimed before anything is computed, replaced only where trajrec made what is there.

    claim     the folder is made where it is not there yet: a place that cannot be written is known before the work,
              not after it
    fill      in a folder beside it, of a name that nobody else has
    put       the old one aside, the new one in, the old one deleted: at no moment are both gone

A folder is replaced if it is a whole output of trajrec, or the resume of a replay, and holds nothing else: with one
file, folder or link more it stays, whatever was asked. Where something else has come into the place while the output
was made (another replay, files of the user), the output takes a free name beside it. Of the old folder only files that
trajrec writes are deleted, one by one: what came a moment ago is not deleted with it.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from trajrec.errors import OutputExistsError, TrajrecError, is_disk_full
from trajrec.replay.methods import resume
from trajrec.runfile.durable import sync
from trajrec.runfile.folder import SUFFIX as RECORDING

_LONGEST = 200  # bytes of a name that gets something appended


@dataclass(frozen=True, slots=True)
class Kind:
    """What an output folder holds.

    Attributes:
        command: that writes such folders, to be shown.
        facts: the JSON file that says what it is.
        keys: of that file, by which it is known.
        whole: names of the other files that are never missing.
        others: names of files that may be there.
        has_progress: whether the resume of a replay may lie there.
    """

    command: str
    facts: str
    keys: frozenset[str]
    whole: frozenset[str]
    others: frozenset[str] = frozenset()
    has_progress: bool = False

    def knows(self, name: str) -> bool:
        """Whether a file of this name belongs into such a folder."""
        return name in {self.facts} | self.whole | self.others or self.is_progress(name)

    def is_progress(self, name: str) -> bool:
        """Whether a file of this name is what a replay that was cut off leaves."""
        return self.has_progress and resume.PIECES.fullmatch(name) is not None


class Place:
    """Where an output folder will stand.

    Args:
        folder: as the user named it.
        kind: what it will hold.
        force: replace an output that is there.
        spared: what must not go with it: names of things and where they are.

    Raises:
        OutputExistsError: if something is there that was not asked to be replaced, or is never replaced.
        TrajrecError: if no folder can have that name.

    Attributes:
        path: the place, absolute.
        final: where the output stands in the end: the place, or a free name beside it.
        force: whether an output that is there is replaced; also where an earlier replay that was asked to was cut off.
    """

    def __init__(
        self, folder: Path, kind: Kind, force: bool = False, spared: Iterable[tuple[str, Path | None]] = ()
    ) -> None:
        self.given, self._kind, self.force = folder, kind, force
        self._spared = [*_resolved(spared)]
        self.path = self.final = self._absolute(folder)
        self._check()
        self._seen = self._identity(self.path)

    def _absolute(self, folder: Path) -> Path:
        if folder.name in ("", ".."):
            raise OutputExistsError(
                f"{folder} exists already, and is no folder of an output's own. Name a new one, as in "
                f"--out {folder / 'answer'}."
            )
        if folder.suffix in (".h5", RECORDING):
            raise TrajrecError(
                f"{folder} has the name of a recording, and the output of `{self._kind.command}` is a folder: commands "
                f"would take it for a run. Name it otherwise, as in --out {folder.with_suffix('')}-answer."
            )
        try:
            return folder.parent.resolve() / folder.name
        except (OSError, RuntimeError, ValueError) as error:
            raise TrajrecError(_cannot(folder, error)) from None

    # -- before the work -----------------------------------------------------------------------------------------

    def _check(self) -> None:
        self._check_parents()
        try:
            mode = os.lstat(self.path).st_mode
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise TrajrecError(_cannot(self.given, error)) from None
        if not stat.S_ISDIR(mode):
            what = "a link" if stat.S_ISLNK(mode) else "a file"
            raise OutputExistsError(f"{self.given} is {what}, and the output is a folder. Name another with --out.")
        reason = self._why_not()
        if reason is not None:
            raise OutputExistsError(
                f"{self.given} exists already, and is not replaced: {reason}. Name another folder with --out."
            )
        self._allow()

    def _check_parents(self) -> None:
        recording = next(
            (p for p in self.path.parents if p.suffix == RECORDING and (p / "manifest.json").exists()), None
        )
        if recording is not None:
            raise TrajrecError(f"{self.given} would lie inside of the recording {recording}. Name another with --out.")

    def _why_not(self) -> str | None:
        """Why a folder is not to be replaced in any case; None if it may be."""
        inside = next((what for what, path in self._spared if path == self.path or self.path in path.parents), None)
        if inside is not None:
            return f"it holds {inside}"
        if os.path.ismount(self.path):
            return "a file system is mounted there"
        return self._foreign(self.path)

    def _foreign(self, folder: Path) -> str | None:
        """What in a folder is none of ours; None if all of it is."""
        by = f"was not made by `{self._kind.command}`"
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            return f"it cannot be read ({error.strerror})"
        for entry in entries:
            if not (self._kind.knows(entry.name) and entry.is_file(follow_symlinks=False)):
                return f"{entry.name} in it {by}"
        names = {entry.name for entry in entries}
        if resume.NAME in names and self._kind.has_progress and resume.is_foreign(folder / resume.NAME):
            return f"{resume.NAME} in it {by}"
        if all(self._kind.is_progress(name) for name in names) or self._is_whole(folder, names):
            return None
        return f"it {by}"

    def _is_whole(self, folder: Path, names: set[str]) -> bool:
        if not names >= self._kind.whole | {self._kind.facts}:
            return False
        try:
            facts = json.loads((folder / self._kind.facts).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(facts, dict) and facts.keys() >= self._kind.keys

    def _allow(self) -> None:
        """Checks that what is there was asked to be replaced, now or by the replay whose resume lies in it."""
        if self._identity(self.path) is None or self.force:
            return
        self.force = self._kind.has_progress and resume.was_forced(self.path / resume.NAME)
        if not self.force:
            raise OutputExistsError(
                f"{self.given} exists already. Choose another with --out, or replace it with --force."
            )

    def _identity(self, folder: Path) -> tuple[int, int, int] | None:
        """Tells one output from another; None where there is none."""
        try:
            found = os.lstat(folder / self._kind.facts)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Has the folder there while the block runs; if nothing was put into it, it is gone afterwards.

        Raises:
            TrajrecError: if it cannot be made.
        """
        with ExitStack() as made:
            try:
                for folder in reversed([p for p in (self.path, *self.path.parents) if not os.path.lexists(p)]):
                    folder.mkdir(exist_ok=True)
                    made.callback(_drop_if_empty, folder)
                beside = _unique(self.path)
                beside.mkdir()
                beside.rmdir()
            except OSError as error:
                raise TrajrecError(_cannot(self.given, error)) from None
            yield

    # -- after the work ------------------------------------------------------------------------------------------

    @property
    def shown(self) -> Path:
        """Where the output stands, as the user named it."""
        return self.given.with_name(self.final.name)

    @property
    def said(self) -> str:
        """A sentence where the output stands beside its place, with a blank at its end; else nothing."""
        if self.final == self.path:
            return ""
        return f"Something else has come into {self.given} meanwhile, and was left as it is. "

    @contextmanager
    def filling(self, keep: Callable[[], str] = str) -> Iterator[Path]:
        """A folder to fill; when the block ends well it stands at `final`, and is gone when it does not.

        Args:
            keep: is called where something goes wrong; says what becomes of the work.

        Raises:
            TrajrecError: if it cannot be written.
        """
        try:
            with self._made() as unfinished:
                yield unfinished
                for path in unfinished.iterdir():
                    sync(path)
                self.final = self._put(unfinished)
        except TrajrecError:
            raise
        except Exception as error:
            kept = keep()
            if not (isinstance(error, OSError) or "os error" in str(error)):
                error.add_note(kept)
                raise
            what = "the disk is full, or a file would be too large" if is_disk_full(error) else "it failed"
            message = f"The output could not be written into {self.given}: {what} ({_reason(error)})."
            raise TrajrecError(f"{message} {kept}".rstrip()) from error

    @contextmanager
    def _made(self) -> Iterator[Path]:
        unfinished = _unique(self.path)
        try:
            unfinished.mkdir(parents=True)
            yield unfinished
        finally:
            _delete(unfinished)

    def _put(self, made: Path) -> Path:
        """Puts an output into the place, or beside it. Returns where it stands."""
        if self._is_as_it_was():
            with suppress(OSError):  # another came into being in this moment, or the old one cannot be moved
                self._replace(made)
                return self.path
        return self._beside(made)

    def _is_as_it_was(self) -> bool:
        if not os.path.lexists(self.path):
            return True
        if self.path.is_symlink() or not self.path.is_dir():
            return False
        return self._why_not() is None and self._identity(self.path) == self._seen

    def _replace(self, made: Path) -> None:
        old = _unique(self.path) if os.path.lexists(self.path) else None
        if old is not None:
            os.rename(self.path, old)
        try:
            os.rename(made, self.path)
        except BaseException:
            if old is not None:
                self._put_back(old)
            raise
        with suppress(OSError):
            sync(self.path.parent)
        if old is not None:
            self._clear(old)

    def _put_back(self, old: Path) -> None:
        try:
            os.rename(old, self.path)
        except OSError:
            self._beside(old)

    def _clear(self, old: Path) -> None:
        """Deletes what was replaced; damaged resume that was set aside goes over into what replaces it."""
        with suppress(OSError):
            for path in old.glob(resume.DAMAGED_FILES):
                os.rename(path, self.path / path.name)
        _delete(old, self._kind.knows)
        if old.exists():  # a file came in the last moment
            self._beside(old)

    def _beside(self, made: Path) -> Path:
        name = self.path.name if len(os.fsencode(self.path.name)) <= _LONGEST else self.path.name[: _LONGEST // 4]
        for free in (self.path.with_name(f"{name}-{number}") for number in count(2)):
            if not os.path.lexists(free):
                try:
                    os.rename(made, free)
                except OSError:
                    if not os.path.lexists(free):
                        raise
                else:
                    return free
        raise AssertionError("numbers do not end")


def _unique(path: Path) -> Path:
    """A hidden name beside a path that nobody else has; not by the process id, which containers repeat."""
    return path.with_name(f".{path.name[: _LONGEST // 4]}-{secrets.token_hex(8)}.tmp")


def _delete(folder: Path, may: Callable[[str], bool] = lambda name: True) -> None:
    """Deletes the files of a folder that may be deleted, and the folder if nothing is left."""
    with suppress(OSError):
        for path in folder.iterdir():
            if may(path.name):
                path.unlink()
        folder.rmdir()


def _drop_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _resolved(spared: Iterable[tuple[str, Path | None]]) -> Iterator[tuple[str, Path]]:
    """What is not to be replaced, as it is said, and where it is as seen from every folder."""
    for what, path in [*spared, ("the current directory", Path())]:
        if path is not None:
            with suppress(OSError, RuntimeError, ValueError):
                yield f"{what} ({path})" if path.name else what, path.resolve()


def _cannot(folder: Path, error: Exception) -> str:
    return f"The output folder {folder} cannot be made ({_reason(error)}). Name another with --out."


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]

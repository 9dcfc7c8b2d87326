"""Looking at every byte of a recording: `trajrec verify`.

Each HDF5 file is checked as a whole (its trailer) and in its parts: attributes, spec, every column, every row
against the CRC-32 of its step, every keyframe. The whole tells whether anything has changed, the parts tell what. The
ring and the raw keyframes of a folder have checksums of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trajrec.checksum import crc32
from trajrec.errors import DamagedRunError, NotARunError, RunFileError
from trajrec.records import Keyframe, RunSpec
from trajrec.runfile.folder import SUFFIX, Folder
from trajrec.runfile.format import trailer
from trajrec.runfile.format.arrays import read_inputs, read_keyframe
from trajrec.runfile.format.columns import DATASETS
from trajrec.runfile.format.rowfile import SharedRows
from trajrec.runfile.format.table import StepTable
from trajrec.runfile.reader.segments import Pieces
from trajrec.runfile.reader.soundness import sound_keyframe
from trajrec.runfile.reader.source import TABLE_STEPS
from trajrec.runfile.reader.stored import StoredRun
from trajrec.runfile.ring import Ring


@dataclass(frozen=True, slots=True)
class Problem:
    """Something damaged.

    Attributes:
        file: where it is.
        dataset: HDF5 path within the file, or "" for the file as a whole.
        first: first step concerned, or None; `last` is the last one.
        message: what is wrong.
    """

    file: Path
    dataset: str
    first: int | None
    last: int | None
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.without_file()}"

    def without_file(self) -> str:
        """Dataset, steps and what is wrong."""
        steps = "" if self.first is None else f"step {self.first}"
        if self.last is not None and self.last != self.first:
            steps = f"steps {self.first} to {self.last}"
        where = ", ".join(part for part in (self.dataset, steps) if part)
        return ": ".join(part for part in (where, self.message) if part)


def verify(path: str | Path) -> list[Problem]:
    """Everything that is damaged in a recording, in the order it was found; empty if nothing is.

    Raises:
        NotARunError: there is no recording. NewerFormatError: it cannot be judged by this version.
    """
    path = Path(path)
    folder = Folder(path) if path.name.endswith(SUFFIX) else Folder.of(path)
    packed = folder.output if path.name.endswith(SUFFIX) else path
    if packed.is_file():
        return list(_file_problems(packed))
    if folder.path.is_dir():
        return list(_folder_problems(folder))
    raise NotARunError(f"There is no recording at {path}.")


def check_made(path: Path, source: Path, rows: SharedRows | None = None) -> None:
    """Reads back a file that was made of a recording, in full, before its source goes.

    Args:
        path: the file.
        source: what it was made of, for the message.
        rows: of the folder that it is in, for a segment that has no rows of its own.

    Raises:
        DamagedRunError: anything in it does not match its checksum.
    """
    try:
        problems = list(_file_problems(path, rows))
    except RunFileError as error:
        problems = [Problem(path, "", None, None, _short(error, path))]
    if problems:
        more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DamagedRunError(
            f"{source} was kept as it is, because what was made of it does not match the checksums of its steps: "
            f"{problems[0].without_file()}{more}. `trajrec verify {source}` lists all damage; the rest can be read."
        )


def _file_problems(path: Path, rows: SharedRows | None = None, with_rows: bool = True) -> Iterator[Problem]:
    try:
        stored = StoredRun(path, rows)
        stored.spec()
    except DamagedRunError as error:
        yield Problem(path, "", None, None, _short(error, path))
        return
    try:
        found = list(_part_problems(stored, with_rows))
        yield from found
    finally:
        stored.close()
    whole = trailer.fault(path)
    if whole and not any(problem.file == path for problem in found):
        yield Problem(path, "", None, None, f"{whole}; all that is recorded in it is intact")


def _part_problems(stored: StoredRun, with_rows: bool) -> Iterator[Problem]:
    for first in range(stored.first, stored.stop, TABLE_STEPS):
        stop = min(first + TABLE_STEPS, stored.stop)
        try:
            table = stored.table(first, stop)
        except DamagedRunError as error:
            yield from _column_problems(stored, first, stop, error)
            continue
        if stored.has_rows and with_rows:
            yield from _row_problems(stored, table)
    yield from _keyframe_problems(stored)
    yield from _input_problems(stored)


def _column_problems(stored: StoredRun, first: int, stop: int, error: DamagedRunError) -> Iterator[Problem]:
    """The columns that cannot be read; where each can by itself, what keeps them from making a table."""
    found = False
    for name in DATASETS:
        try:
            stored.column(name, first, stop)
        except DamagedRunError as fault:
            found = True
            yield Problem(stored.path, f"/{name}", first, stop - 1, _short(fault, stored.path))
    if not found:
        a, b = error.steps or (first, stop - 1)
        yield Problem(stored.path, error.dataset or "/steps", a, b, _short(error, stored.path))


def _row_problems(stored: StoredRun, table: StepTable) -> Iterator[Problem]:
    spec, step, stop = stored.spec(), table.first, table.first + len(table)
    while step < stop:
        end = min(stored.block(step)[1], stop)
        try:
            rows = stored.rows(step, end)
        except DamagedRunError as error:
            yield Problem(stored.rows_path, "/weights", step, end - 1, _short(error, stored.rows_path))
        else:
            for k, row in enumerate(rows):
                if crc32(row[: spec.width(step + k)].data) != int(table["crc32"][step + k - table.first]):
                    yield Problem(
                        stored.rows_path, "/weights", step + k, None, "the row does not match the checksum of its step"
                    )
        step = end


def _keyframe_problems(stored: StoredRun) -> Iterator[Problem]:
    try:
        steps = stored.keyframe_steps()
    except DamagedRunError as error:
        yield Problem(stored.path, "/keyframes", None, None, _short(error, stored.path))
        return
    for step in steps:
        try:
            stored.keyframe(step)
        except DamagedRunError as error:
            yield Problem(stored.path, "/keyframes", step, None, _short(error, stored.path))


def _input_problems(stored: StoredRun) -> Iterator[Problem]:
    if stored.spec().inputs != "store":
        return
    for step in range(max(stored.first, 1), stored.stop):
        try:
            stored.inputs(step)
        except DamagedRunError as error:
            yield Problem(stored.path, "/inputs", step, None, _short(error, stored.path))


def _folder_problems(folder: Folder) -> Iterator[Problem]:
    links = sorted(folder.irregular())
    yield from (
        Problem(path, "", None, None, "a file was expected, and it is none, or has a second name") for path in links
    )
    if links:
        return
    with_rows, spec = True, None
    try:
        manifest = folder.read_manifest()
        with_rows, spec = manifest.keep == "steps", manifest.spec
    except DamagedRunError as error:
        yield Problem(folder.manifest, "", None, None, _short(error, folder.manifest))
    segments = folder.segments()
    try:
        Pieces(segments)
    except DamagedRunError as error:
        yield Problem(folder.path, "", None, None, _short(error, folder.path))
    rows = SharedRows(folder.rows)
    for segment in segments:
        try:
            yield from _file_problems(segment.path, rows, with_rows)
        except RunFileError as error:
            yield Problem(segment.path, "", segment.first, segment.stop - 1, _short(error, segment.path))
    rows.close()
    yield from _raw_problems(folder.keyframes(), lambda path: _read_keyframe(path, spec))
    yield from _raw_problems(folder.raw_inputs(), read_inputs)
    yield from _ring_problems(folder, segments[-1].stop if segments else 0)


def _read_keyframe(path: Path, spec: RunSpec | None) -> Keyframe:
    found = read_keyframe(path)
    return found if spec is None else sound_keyframe(found, found.step, spec, path)


def _raw_problems(files: dict[int, Path], read: Callable[[Path], object]) -> Iterator[Problem]:
    for step, path in files.items():
        try:
            read(path)
        except FileNotFoundError:
            continue  # a recorder that stays in its budget has dropped it, or a writer taken it into a segment
        except DamagedRunError as error:
            yield Problem(path, "", step, None, _short(error, path))


def _ring_problems(folder: Folder, first: int) -> Iterator[Problem]:
    try:
        ring = Ring(folder.ring)
    except (OSError, ValueError, DamagedRunError) as error:
        yield Problem(folder.ring, "", None, None, _short(error, folder.ring))
        return
    for step in range(first, ring.head(first)):
        if ring.intact(step) is None:
            yield Problem(folder.ring, "", step, None, "the step does not match its checksum; the recording ends here")
            return


def _short(error: Exception, path: Path) -> str:
    """The message without the file's name and the advice to verify."""
    text = str(error).removeprefix(f"{path}: ").removeprefix(f"{path} ")
    return text.split(" Run `trajrec verify`")[0]

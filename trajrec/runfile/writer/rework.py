"""Changes to a whole recording, between one writer and the next; a process of its own, because it calls HDF5.

    python -m trajrec.runfile.writer.rework FOLDER find CRC32 KEEP INPUTS ROWS
        prints step, epochs begun, last step, 1 if the run is complete; or "none"
    python -m trajrec.runfile.writer.rework FOLDER cut STEP     prints the step
    python -m trajrec.runfile.writer.rework FOLDER drop-rows    prints the last step
    python -m trajrec.runfile.writer.rework FOLDER compress     prints the last step

find: a restarted training comes with weights from the user's own checkpoint. The step they belong to is the last one
whose checksum equals theirs. Nothing goes yet: whether the run is to go on there is for the recorder to say.

cut: what was recorded after that step is dropped, because it will be computed anew. A packed run is turned back into a
folder of one segment, which is read back before the file goes; in a folder that was cut off the ring is sealed first.

drop-rows: a recording that outgrows its budget keeps the weights at keyframes only from now on. They move from the
segments into the keyframes, then the manifest says so, then the segments are written again without rows, and a file of
rows is deleted.

compress: rows move from the file of rows into the segments, because those that follow will be longer.

Killed at any moment, each leaves a recording that can be read: the packed file goes only after the folder is
whole, later segments go before earlier ones, of two segments that begin alike the shorter counts (`Folder.segments`),
and rows that the manifest does not mention are not looked at.
"""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np

from trajrec.checksum import crc32
from trajrec.errors import DamagedRunError, RecordingError, TrajrecError, is_disk_full
from trajrec.records import Keyframe
from trajrec.runfile.durable import sync
from trajrec.runfile.folder import Folder, Segment
from trajrec.runfile.format.arrays import read_keyframe, write_arrays
from trajrec.runfile.format.rowfile import SharedRows
from trajrec.runfile.manifest import Manifest
from trajrec.runfile.reader.segments import Pieces
from trajrec.runfile.reader.stored import StoredRun, holds
from trajrec.runfile.reader.verify import check_made
from trajrec.runfile.ring import EXIT_DISK_FULL, Control, Finish, Ring
from trajrec.runfile.writer.loop import Writer
from trajrec.runfile.writer.packing import copy_segment
from trajrec.runfile.writer.sealing import row_file

_ENTRIES = 65536


def find(folder: Folder, checksum: int, keep: str, inputs: str, rows: str) -> tuple[int, int, int, int] | None:
    """The last step whose row has this checksum, and what is known of the run; None: there is none.

    The rows, and the frozen parameters beside them, have to be the same: `rows` is `RunSpec.rows_crc32`.

    Returns:
        The step, how many epochs had begun with it, the last step, and whether the run is complete.
    """
    manifest, pieces, is_complete = _look(folder)
    if keep != manifest.keep and keep != "any":
        raise RecordingError(f"It keeps {manifest.keep}, and would now keep {keep}.")
    if inputs != manifest.spec.inputs:
        raise RecordingError(f'It has inputs="{manifest.spec.inputs}", and would now have inputs="{inputs}".')
    step = _find(pieces, checksum)
    if step is None or manifest.spec.until(step).rows_crc32 != int(rows):
        return None
    epochs = int(pieces.at(step).column("steps/epoch", step, step + 1)[0]) + 1 if step else 0
    return step, epochs, pieces.stop - 1, int(is_complete)


def cut(folder: Folder, step: int) -> int:
    """Makes the recording end at a step, and be a folder, whatever it was."""
    manifest, pieces, _ = _look(folder)
    resumed = (*(t for t in manifest.resumed if t <= step), step)
    manifest = replace(manifest, spec=manifest.spec.until(step), resumed=resumed)
    change = _unpack if folder.output.is_file() else _truncate
    change(folder, manifest, pieces, step)
    return step


def _look(folder: Folder) -> tuple[Manifest, Pieces, bool]:
    """Manifest and pieces of a recording, packed or not, and whether it is complete."""
    if not folder.output.is_file():
        is_complete = _is_complete(folder)
        manifest, segments = _of_folder(folder)
        return manifest, Pieces(segments, folder.rows), is_complete
    if folder.manifest.exists() and not holds(folder.output, folder.read_manifest().spec.run_id):
        raise RecordingError(f"{folder.path} beside it holds another run: move that away.")
    manifest, segments, state = _of_packed(folder)
    return manifest, Pieces(segments), state == "complete"


def _is_complete(folder: Folder) -> bool:
    """Whether the training of a folder that is not packed had come to its end."""
    return folder.ring.exists() and Ring(folder.ring).get(Control.FINISH) == Finish.COMPLETE


def _of_packed(folder: Folder) -> tuple[Manifest, list[Segment], str]:
    """What a packed file's manifest would be, the file as one segment, and its state."""
    stored = StoredRun(folder.output)
    head, segment = stored.head, Segment(folder.output, 0, stored.stop)
    manifest = Manifest(stored.spec(), folder.output.name, head.keep, head.compression, head.resumed)
    stored.close()
    return manifest, [segment], head.state


def _of_folder(folder: Folder) -> tuple[Manifest, list[Segment]]:
    """The folder's manifest and segments, after whatever is left in the ring has been sealed."""
    if folder.ring.exists():
        Writer(folder).seal_everything()
    return folder.read_manifest(), folder.segments()


def _find(pieces: Pieces, checksum: int) -> int | None:
    for index in reversed(range(len(pieces.segments))):
        stored = pieces.open(index)
        for first in reversed(range(stored.first, stored.stop, _ENTRIES)):
            found = stored.column("steps/crc32", first, min(first + _ENTRIES, stored.stop)) == checksum
            if found.any():
                return first + int(np.flatnonzero(found)[-1])
    return None


def _unpack(folder: Folder, manifest: Manifest, pieces: Pieces, step: int) -> None:
    folder.clear()
    try:
        copy_segment(folder, manifest, pieces, 0, step + 1)
        stored = pieces.at(0)
        for t in stored.keyframe_steps():
            if t <= step:
                write_arrays(folder.keyframe(t), stored.keyframe(t))
                sync(folder.keyframe(t))
        folder.write_manifest(manifest)
        pieces.close()
        _check_unpacked(folder)
    except BaseException:
        folder.clear()  # the file is what it was
        raise
    folder.output.unlink()


def _check_unpacked(folder: Folder) -> None:
    rows = SharedRows(folder.rows)
    for segment in folder.segments():
        check_made(segment.path, folder.output, rows)
    rows.close()
    for path in folder.keyframes().values():
        read_keyframe(path)


def _truncate(folder: Folder, manifest: Manifest, pieces: Pieces, step: int) -> None:
    folder.write_manifest(manifest)
    for t, path in [*folder.keyframes().items(), *folder.raw_inputs().items()]:
        if t > step:
            path.unlink()
    for segment in reversed(pieces.segments):
        if segment.first > step:
            segment.path.unlink()
        elif segment.stop > step + 1:
            copy_segment(folder, manifest, Pieces([segment], folder.rows), segment.first, step + 1)
            segment.path.unlink()
    if manifest.plain_rows:
        row_file(folder, manifest).cut(step + 1)
    folder.ring.unlink(missing_ok=True)


def drop_rows(folder: Folder) -> int:
    """Makes a recording of every step one of keyframes, and returns its last step."""
    manifest, segments = _of_folder(folder)
    pieces = Pieces(segments, folder.rows)
    for step, path in folder.keyframes().items():
        if step < pieces.stop:
            _move_weights(pieces, step, path)
    manifest = replace(manifest, keep="keyframes")
    folder.write_manifest(manifest)
    pieces.close()
    folder.rows.unlink(missing_ok=True)
    for segment in segments:
        copy_segment(folder, manifest, Pieces([segment], folder.rows), segment.first, segment.stop)
    folder.ring.unlink(missing_ok=True)
    return pieces.stop - 1


def compress(folder: Folder) -> int:
    """Puts the rows of an uncompressed recording into its segments, and returns its last step."""
    manifest, segments = _of_folder(folder)
    pieces = Pieces(segments, folder.rows)
    manifest = replace(manifest, compression="zstd")
    for segment in segments:
        copy_segment(folder, manifest, Pieces([segment], folder.rows), segment.first, segment.stop)
    folder.write_manifest(manifest)
    pieces.close()
    folder.rows.unlink(missing_ok=True)
    folder.ring.unlink(missing_ok=True)
    return pieces.stop - 1


def _move_weights(pieces: Pieces, step: int, path: Path) -> None:
    keyframe = read_keyframe(path)
    if "weights" in keyframe.arrays:
        return  # an attempt that was cut off got this far
    stored = pieces.at(step)
    row = stored.rows(step, step + 1)[0, : stored.spec().width(step)]
    if crc32(row.data) != int(stored.column("steps/crc32", step, step + 1)[0]):
        raise DamagedRunError(f"{stored.rows_path}: /weights, step {step}: the row does not match its checksum.")
    write_arrays(path, Keyframe(step, {"weights": row, **keyframe.arrays}))
    sync(path)


def main(arguments: list[str]) -> None:
    """Runs a command; never returns."""
    folder, command = Folder(Path(arguments[0])), arguments[1]
    try:
        folder.check_regular()
        found: tuple[int, ...] | None
        if command == "drop-rows":
            found = (drop_rows(folder),)
        elif command == "compress":
            found = (compress(folder),)
        elif command == "cut":
            found = (cut(folder, int(arguments[2])),)
        else:
            found = find(folder, int(arguments[2]), *arguments[3:])
        print("none" if found is None else " ".join(map(str, found)), flush=True)
    except BaseException as error:
        print(error if isinstance(error, TrajrecError) else traceback.format_exc(), file=sys.stderr, flush=True)
        os._exit(EXIT_DISK_FULL if is_disk_full(error) else 1)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])

"""A stranger's folder: no name in it leads writing, or reading, to a file that lies elsewhere."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest

import trajrec
from tests.made.runfile_cases import MadeUpRun, cut_off, spec
from tests.made.runfile_simulation import Simulation
from trajrec.checksum import crc32
from trajrec.errors import DamagedRunError, OutputExistsError, RecordingError, TrajrecError
from trajrec.records import Keyframe
from trajrec.runfile import files
from trajrec.runfile.durable import durable
from trajrec.runfile.folder import Folder
from trajrec.runfile.format import layout
from trajrec.runfile.format.arrays import write_arrays
from trajrec.runfile.format.geometry import geometry_for
from trajrec.runfile.format.layout import Head
from trajrec.runfile.format.rowfile import RowFile
from trajrec.runfile.lock import Lock
from trajrec.runfile.reader.verify import verify
from trajrec.runfile.recovery import pack
from trajrec.runfile.ring import allocate, create
from trajrec.runfile.trainer.sink import RunFileSink

MADE = MadeUpRun(spec(3000, inputs="store"))
SECRET = b"precious" * 4096
IN_PLACE = ("lock", "ring.bin", "rows.bin", "writer.log")
NAMES = (
    *IN_PLACE,
    "manifest.json",
    "staged.bin",
    "manifest.json.tmp",
    "packed.h5.tmp",
    "segment-0000000000-0000000031.h5",
    "segment-0000000200-0000000231.h5.tmp",
    "keyframe-0000000000.bin",
    "keyframe-0000000200.part",
    "staged-0000000100.tmp",
    "inputs-0000000200.bin",
    "record-0000000200.bin",
    "record-0000000200.part",
    "anything",
)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory) -> Path:
    """The folder of a recording that was cut off, with every kind of file in it."""
    path = tmp_path_factory.mktemp("links") / "run.h5"
    with pytest.MonkeyPatch.context() as patch:
        Simulation(patch)
        cut_off(path, 200, MADE, compression="none", keyframe_every=50)
    return Folder.of(path).path


@pytest.fixture
def folder(unfinished, tmp_path) -> Folder:
    return Folder(Path(shutil.copytree(unfinished, tmp_path / "run.h5.rec")))


@pytest.fixture
def precious(tmp_path) -> Path:
    path = tmp_path / "precious"
    path.write_bytes(SECRET)
    return path


def planted(folder: Folder, name: str, kind: str, precious: Path) -> None:
    """Puts something in the place of a file."""
    path = folder.path / name
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(precious)
    elif kind == "second name":
        os.link(precious, path)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()


def contents(folder: Folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.path.iterdir() if files.kind(p) == "file"}


KINDS = [(name, kind) for name in NAMES for kind in ("link", "fifo", "folder")]
KINDS += [(name, "second name") for name in IN_PLACE]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_folder_with_anything_but_files_is_not_packed(folder, precious, name, kind):
    planted(folder, name, kind, precious)
    before = contents(folder)
    with pytest.raises(DamagedRunError, match=rf"{name}: a file of its own was expected"):
        pack(folder.path)
    assert contents(folder) == before
    assert precious.read_bytes() == SECRET
    assert not folder.output.exists()
    assert any(name in str(problem) for problem in verify(folder.path))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "anything"])
def test_nothing_is_read_through_a_link(folder, precious, name):
    planted(folder, name, "link", precious)
    with pytest.raises(DamagedRunError, match="a file of its own was expected"):
        trajrec.open(folder.path)


@pytest.mark.parametrize("options", [{"resume": True}, {"force": True}])
@pytest.mark.parametrize("name", ["lock", "manifest.json.tmp", "rows.bin"])
def test_nor_is_anything_recorded_there(folder, precious, name, options):
    planted(folder, name, "link", precious)
    before = contents(folder)
    with pytest.raises((OutputExistsError, DamagedRunError), match=name):
        RunFileSink(folder.output, **options)
    assert contents(folder) == before
    assert precious.read_bytes() == SECRET


def test_the_folder_itself_is_no_link(folder, tmp_path):
    there = folder.path.rename(tmp_path / "there")
    folder.path.symlink_to(there)
    before = {p.name: p.read_bytes() for p in there.iterdir()}
    with pytest.raises(DamagedRunError, match="the folder itself is a link"):
        pack(folder.path)
    for options in ({"force": True}, {"resume": True}, {}):
        with pytest.raises(OutputExistsError, match=r"run\.h5\.rec"):
            RunFileSink(folder.output, **options)
    assert {p.name: p.read_bytes() for p in there.iterdir()} == before


def test_a_second_name_of_what_is_only_read_does_no_harm(folder, tmp_path):
    for path in [*folder.keyframes().values(), *(s.path for s in folder.segments()), folder.manifest]:
        os.link(path, tmp_path / path.name)
    pack(folder.path)
    assert verify(folder.output) == []


# ---- each way of writing by itself, as where a link appears after the folder was looked at


def in_a_ring(folder: Folder) -> None:
    create(folder.ring, geometry_for(3000, 4, True), 0, "float32")


def in_a_segment(folder: Folder) -> None:
    layout.begin(folder.path / "packed.h5.tmp", Head("complete", 0, "steps", "none", None), MADE.spec, 3).close()


def in_a_manifest(folder: Folder) -> None:
    with contextlib.suppress(TrajrecError):
        folder.write_manifest(folder.read_manifest())


WRITERS = {
    "ring.bin": in_a_ring,
    "lock": lambda folder: Lock(folder.lock),
    "rows.bin": lambda folder: RowFile(folder.rows, 12_000).write(0, [MADE.row(0)[None]]),
    "packed.h5.tmp": in_a_segment,
    "manifest.json.tmp": in_a_manifest,
    "keyframe-0000000001.part": lambda folder: write_arrays(folder.keyframe(1), Keyframe(1, {})),
    "keyframe-0000000001.bin": lambda folder: write_arrays(folder.keyframe(1), Keyframe(1, {})),
    "record-0000000001.tmp": lambda folder: allocate(folder.path / "record-0000000001.tmp", 4096).close(),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", ["link", "second name"])
def test_writing_replaces_a_link_or_refuses_it(folder, precious, name, kind):
    planted(folder, name, kind, precious)
    with contextlib.suppress(DamagedRunError):
        WRITERS[name](folder)
    assert precious.read_bytes() == SECRET


def test_a_link_that_leads_nowhere_makes_no_file(folder, tmp_path):
    for name in ("lock", "rows.bin", "writer.log"):
        planted(folder, name, "link", tmp_path / "nowhere")
        with pytest.raises(DamagedRunError):
            files.in_place(folder.path / name, os.O_CREAT)
    with durable(folder.path / "manifest.json") as tmp:
        tmp.symlink_to(tmp_path / "nowhere")
        os.close(files.fresh(tmp))
    assert not (tmp_path / "nowhere").exists()


def test_files_are_closed_when_another_program_is_started(tmp_path):
    for fd in (files.fresh(tmp_path / "a"), files.in_place(tmp_path / "b", os.O_CREAT), files.readable(tmp_path / "a")):
        assert not os.get_inheritable(fd)
        os.close(fd)


def test_resuming_a_packed_run_leaves_another_recording_beside_it_alone(tmp_path, folder):
    """Both there: another run was packed elsewhere and moved, or a recording by force was cut off at its very start."""
    MadeUpRun(spec(3000)).write(RunFileSink(tmp_path / "other.h5"), 20, complete=False)
    (tmp_path / "other.h5").rename(folder.output)
    with folder.manifest.open() as file:
        other = file.read().replace("0f" * 16, "0e" * 16)
    head, _, body = other.partition("\n")
    head = head[: head.index("crc32") + 8] + f"{crc32(body.encode())}}}"
    folder.manifest.write_text(f"{head}\n{body}")
    before = contents(folder)
    made = MadeUpRun(spec(3000))
    sink = RunFileSink(folder.output, resume=True)
    sink.open(made.spec)
    sink.reserve()[:] = made.row(20)
    with pytest.raises(RecordingError, match="beside it holds another run"):
        sink.commit(made.record(20))
    after = contents(folder)
    assert {name for name in before if name not in after or after[name] != before[name]} <= {"lock"}

"""Damage: found, named, and never silently used. Power cuts, flipped bytes, truncation, hostile files."""

from __future__ import annotations

import contextlib
import random
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

import trajrec
from tests.made.runfile_cases import (
    MadeUpRun,
    assert_same_inputs,
    assert_same_keyframe,
    assert_same_run,
    assert_same_step,
    cut_off,
    spec,
)
from tests.made.runfile_simulation import Simulation
from trajrec.errors import DamagedRunError, TrajrecError
from trajrec.runfile import durable as durable_module
from trajrec.runfile.durable import durable
from trajrec.runfile.folder import Folder
from trajrec.runfile.format.geometry import PAGE, Limits
from trajrec.runfile.reader.verify import verify
from trajrec.runfile.recovery import pack
from trajrec.runfile.trainer.sink import RunFileSink

MADE = MadeUpRun(spec(40, rng=16))
LAST = 40
CUT = 110
WHOLE = MadeUpRun(spec(3000, rng=16))
STORED = MadeUpRun(spec(40, inputs="store"))
WITH_INPUTS = MadeUpRun(spec(3000, rng=16, inputs="store"))


@pytest.fixture(autouse=True)
def _simulated(simulation):
    """No test here waits for a process."""


@pytest.fixture(scope="module", params=["zstd", "none"])
def small(request, tmp_path_factory):
    """A packed run of 50 kB."""
    path = tmp_path_factory.mktemp("small") / "run.h5"
    MADE.write(RunFileSink(path, compression=request.param, keyframe_every=20), LAST)
    return path


@pytest.fixture(scope="module")
def small_stored(tmp_path_factory):
    """A packed run that holds its inputs."""
    path = tmp_path_factory.mktemp("stored") / "run.h5"
    STORED.write(RunFileSink(path, keyframe_every=20), LAST)
    return path


@pytest.fixture(scope="module", params=["zstd", "none"])
def unfinished(request, tmp_path_factory):
    """A folder with two segments, a ring and raw keyframes, as a power cut would meet it."""
    return make_cut_off(tmp_path_factory.mktemp("cut") / "run.h5", WHOLE, request.param)


@pytest.fixture(scope="module")
def unfinished_stored(tmp_path_factory):
    """The same with raw inputs."""
    return make_cut_off(tmp_path_factory.mktemp("cut") / "run.h5", WITH_INPUTS)


def make_cut_off(path: Path, made: MadeUpRun, compression: str = "zstd") -> Path:
    limits = Limits(segment_bytes=2**19, arena_bytes=2**18)
    with pytest.MonkeyPatch.context() as patch:
        Simulation(patch)  # no process that is in the middle of something
        cut_off(path, CUT, made, limits, keyframe_every=25, compression=compression)
    folder = Folder.of(path)
    assert len(folder.segments()) == 3
    return folder.path


@pytest.fixture
def folder(unfinished, tmp_path) -> Folder:
    return Folder(shutil.copytree(unfinished, tmp_path / "run.h5.rec"))


# ---- fuzz


def mangled(data: bytes, chance: random.Random) -> bytes:
    """A copy with flipped bits, other bytes, zeros in a sector, or its end cut off."""
    result, place = bytearray(data), chance.randrange(len(data))
    kind = chance.choice(["bit", "bit", "bytes", "zeros", "cut"])
    if kind == "bit":
        result[place] ^= 1 << chance.randrange(8)
    elif kind == "bytes":
        for _ in range(chance.randrange(1, 20)):
            result[chance.randrange(len(data))] = chance.randrange(256)
    elif kind == "zeros":
        result[place : place + 512] = bytes(len(result[place : place + 512]))
    else:
        del result[place:]
    return bytes(result)


def read_or_refuse(path: Path, made: MadeUpRun, last: int, keyframes: tuple[int, ...]) -> bool:
    """Reads everything: a clean error (False), or all of it right (True)."""
    try:
        with trajrec.open(path) as run:
            assert_same_run(run, made, last)
            assert run.keyframe_steps == keyframes
            for t in keyframes:
                assert_same_keyframe(run.keyframe(t), made.keyframe(t))
    except TrajrecError:
        return False
    return True


def fuzz(small: Path, target: Path, trials: int, seed: int, made: MadeUpRun = MADE) -> None:
    data, chance = small.read_bytes(), random.Random(seed)
    for _ in range(trials):
        other = mangled(data, chance)
        target.write_bytes(other)
        read_or_refuse(target, made, LAST, (0, 20, 40))
        if other != data:
            assert_found(target)


def assert_found(path: Path) -> None:
    with contextlib.suppress(TrajrecError):  # no longer recognisable as a recording
        assert verify(path)


def test_fuzzed_files_are_refused_or_right(small, tmp_path):
    fuzz(small, tmp_path / "f.h5", 30, random.randrange(2**32))


def test_fuzzed_files_with_inputs_are_refused_or_right(small_stored, tmp_path):
    fuzz(small_stored, tmp_path / "f.h5", 10, random.randrange(2**32), STORED)


@pytest.mark.long
def test_hundreds_of_fuzzed_files_with_inputs(small_stored, tmp_path):
    fuzz(small_stored, tmp_path / "f.h5", 200, 0, STORED)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_thousands_of_fuzzed_files(small, tmp_path, seed):
    fuzz(small, tmp_path / "f.h5", 1000, seed)


def fuzz_folder(unfinished: Path, work: Path, trials: int, seed: int, made: MadeUpRun = WHOLE) -> None:
    """Files of a folder, one at a time; a damaged ring or keyframe may only shorten the run."""
    chance = random.Random(seed)
    named = [p.name for p in unfinished.iterdir() if p.name not in ("lock", "writer.log")]
    names = [name for name in named if not name.endswith((".part", ".tmp"))]  # the writer was killed over it
    for _ in range(trials):
        name = chance.choice(names)
        shutil.copytree(unfinished, work, dirs_exist_ok=True)
        (work / name).write_bytes(mangled((unfinished / name).read_bytes(), chance))
        try:
            with trajrec.open(work) as run:
                assert all(row.tobytes() == made.row(t).tobytes() for t, row in run.walk(0, run.steps))
                for t in range(1, run.steps + 1):
                    assert_same_step(run, made.record(t))
                assert_same_inputs(run, made, range(1, run.steps + 1))
                for t in run.keyframe_steps:
                    assert_same_keyframe(run.keyframe(t), made.keyframe(t))
        except TrajrecError:
            continue


def test_fuzzed_folders_are_refused_or_right(unfinished, tmp_path):
    fuzz_folder(unfinished, tmp_path / "run.h5.rec", 12, random.randrange(2**32))


def test_fuzzed_folders_with_inputs_are_refused_or_right(unfinished_stored, tmp_path):
    fuzz_folder(unfinished_stored, tmp_path / "run.h5.rec", 6, random.randrange(2**32), WITH_INPUTS)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_hundreds_of_fuzzed_folders(unfinished, tmp_path, seed):
    fuzz_folder(unfinished, tmp_path / "run.h5.rec", 200, seed)


# ---- verify


def test_an_intact_recording_has_no_problems(small, folder):
    assert verify(small) == []
    assert verify(folder.path) == []


def test_every_byte_counts(small, tmp_path):
    """Also one in unused space, which changes nothing that is recorded."""
    data, path = small.read_bytes(), tmp_path / "f.h5"
    for place in range(random.randrange(1997), len(data), 1997):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        assert_found(path)


@pytest.mark.parametrize(
    ("dataset", "found"),
    [
        ("weights", "/weights, step 17: the row does not match the checksum of its step"),
        ("steps/loss", "/steps, step 17: /steps and /batches, step 17: the record does not match its checksum"),
        ("batches/ids", "step 3: the record does not match its checksum"),
    ],
)
def test_verify_names_file_dataset_and_step(small, tmp_path, dataset, found):
    path = Path(shutil.copy(small, tmp_path))
    with h5py.File(path, "r+") as file:
        value = file[dataset][17]
        file[dataset][17] = value + 1
    problems = [str(problem) for problem in verify(path)]
    assert len(problems) == 1
    assert problems[0].startswith(f"{path}: ")
    assert found in problems[0]


@pytest.mark.parametrize("leaf", ["0/0", "structure", None])
def test_verify_names_the_step_of_damaged_inputs(small_stored, tmp_path, leaf):
    path = Path(shutil.copy(small_stored, tmp_path))
    with h5py.File(path, "r+") as file:
        if leaf is None:
            del file["inputs/0000000017"]
        else:
            values = file[f"inputs/0000000017/{leaf}"]
            values[0] = values[0] + 1
    (problem,) = verify(path)
    assert str(problem).startswith(f"{path}: /inputs, step 17: ")
    with trajrec.open(path) as run:
        with pytest.raises(DamagedRunError, match=r"/inputs/0000000017"):
            run.inputs(17)
        assert_same_inputs(run, STORED, (16, 18))


def test_a_stored_chunk_that_cannot_be_decoded_is_named(small, tmp_path):
    path = Path(shutil.copy(small, tmp_path))
    with h5py.File(path) as file:
        place = file["steps/loss"].id.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[place + 9] ^= 1
    path.write_bytes(data)
    assert str(verify(path)[0]).startswith(f"{path}: /steps/loss, steps 0 to 40: ")
    with trajrec.open(path) as run, pytest.raises(DamagedRunError, match=r"/steps/loss, steps 0 to 40 cannot be read"):
        run.loss(3)


def test_a_missing_segment_is_named(folder):
    middle = folder.segments()[1]
    middle.path.unlink()
    assert any(f"steps {middle.first} to {middle.stop - 1} are missing" in str(p) for p in verify(folder.path))
    with pytest.raises(DamagedRunError, match=r"are missing\. A segment was"):
        trajrec.open(folder.path)


# ---- power cuts


def test_what_has_its_name_is_on_the_disk(tmp_path, monkeypatch):
    """The order of operations: write, sync, rename, sync the folder."""
    done = []
    monkeypatch.setattr(durable_module, "sync", lambda path: done.append(f"sync {path.name}"))
    monkeypatch.setattr(Path, "replace", lambda self, target: done.append(f"rename to {Path(target).name}"))
    with durable(tmp_path / "segment") as tmp:
        done.append(f"write {tmp.name}")
    assert done == ["write segment.tmp", "sync segment.tmp", "rename to segment", f"sync {tmp_path.name}"]


def test_a_failure_leaves_no_half_file(tmp_path):
    with pytest.raises(OSError, match="full"), durable(tmp_path / "segment") as tmp:
        tmp.write_bytes(b"half")
        raise OSError("full")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(5))
def test_power_cut(unfinished, folder, seed):
    """Pages of the ring that were not written back read as zeros or as an earlier lap; the rest is as it was."""
    chance, data = random.Random(seed), bytearray((unfinished / "ring.bin").read_bytes())
    rows = CUT % 64 * WHOLE.spec.row_length * 4
    for page in chance.sample(range(1, len(data) // PAGE), chance.choice([1, 5, 200])):
        start = page * PAGE
        source = chance.choice([None, (start + rows) % (len(data) - PAGE) // PAGE * PAGE])
        data[start : start + PAGE] = bytes(PAGE) if source is None else data[source : source + PAGE]
    folder.ring.write_bytes(data)
    for path in chance.sample(sorted(folder.keyframes().values()), 2):
        chance.choice([path.unlink, lambda p=path: p.write_bytes(b""), lambda p=path: p.write_bytes(bytes(999))])()
    if folder.rows.exists():
        with folder.rows.open("ab") as file:  # rows that were on their way there
            file.write(chance.choice([b"", bytes(9999), data[rows : rows + 54321]]))
    assert_prefix(folder)


@pytest.mark.parametrize("seed", range(3))
def test_power_cut_with_inputs(unfinished_stored, tmp_path, seed):
    """A step whose raw inputs did not reach the disk, and those after it, are gone; so is nothing before it."""
    folder, chance = Folder(shutil.copytree(unfinished_stored, tmp_path / "run.h5.rec")), random.Random(seed)
    sealed = folder.segments()[-1].stop  # earlier ones may still be there: the writer was killed before it dropped them
    lost = chance.choice([step for step in folder.raw_inputs() if step >= sealed])
    path = folder.inputs(lost)
    chance.choice([path.unlink, lambda: path.write_bytes(b""), lambda: path.write_bytes(bytes(999))])()
    with trajrec.open(folder.path) as run:
        assert run.steps == lost - 1
    assert_prefix(folder, WITH_INPUTS)


def assert_prefix(folder: Folder, made: MadeUpRun = WHOLE) -> None:
    """Whatever is left is a beginning of the run, with all sealed steps, and can be packed."""
    sealed = folder.segments()[-1].stop - 1
    with trajrec.open(folder.path) as run:
        steps = run.steps
        assert sealed <= steps <= CUT
        assert_same_run(run, made, steps)
    with trajrec.open(pack(folder.path)) as run:
        assert_same_run(run, made, steps)
        assert run.state == "recovered"
        for t in run.keyframe_steps:
            assert_same_keyframe(run.keyframe(t), made.keyframe(t))


@pytest.mark.parametrize("size", [0, 100, PAGE + 17, None])
def test_a_ring_that_is_gone_or_cut_costs_only_what_was_in_it(folder, size):
    if size is None:
        folder.ring.unlink()
    else:
        folder.ring.write_bytes(folder.ring.read_bytes()[:size])
    sealed = folder.segments()[-1].stop - 1
    with trajrec.open(folder.path) as run:
        assert run.steps == sealed
    with trajrec.open(pack(folder.path)) as run:
        assert_same_run(run, WHOLE, sealed)


def test_unfinished_files_are_no_obstacle(folder):
    (folder.path / "segment-0000000231-0000000300.h5.tmp").write_bytes(b"half a segment")
    (folder.path / "keyframe-0000000200.part").write_bytes(b"half a keyframe")
    (folder.path / "packed.h5.tmp").write_bytes(b"half a run")
    assert_prefix(folder)
    assert [p.name for p in folder.path.parent.iterdir()] == ["run.h5"]


def test_unfinished_between_packing_and_clearing_up(folder):
    copy = shutil.copytree(folder.path, folder.path.parent / "copy")
    pack(folder.path)
    shutil.move(copy, folder.path)
    with trajrec.open(folder.path) as run:
        assert run.path == folder.output
    assert pack(folder.path) == folder.output
    assert not folder.path.exists()


@pytest.mark.parametrize("left", [("manifest.json", "lock"), ("lock",), ()])
def test_unfinished_while_clearing_up(folder, left):
    copy = shutil.copytree(folder.path, folder.path.parent / "copy")
    pack(folder.path)
    for path in copy.iterdir():
        if path.name not in left:
            path.unlink()
    shutil.move(copy, folder.path)
    assert pack(folder.path) == folder.output
    assert not folder.path.exists()
    with trajrec.open(folder.output) as run:
        assert_same_run(run, WHOLE, run.steps)


# ---- strangers' files


def test_opening_executes_nothing(small, tmp_path):
    """A class name, a reference to a task and a command line come out as they went in: as text."""
    path = Path(shutil.copy(small, tmp_path))
    with h5py.File(path, "r+") as file:
        file["spec"].attrs["optimizer_module"] = np.bytes_('"os"')
        file["spec"].attrs["optimizer"] = np.bytes_('"system"')
        file["spec"].attrs["task"] = np.bytes_(f'"{tmp_path}/evil.py:task"')
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    with trajrec.open(path) as run:
        assert (run.spec.optimizer_module, run.spec.optimizer) == ("os", "system")
        assert_same_step(run, MADE.record(5))


def test_reading_code_never_unpickles():
    package = Path(durable_module.__file__).parent
    text = "\n".join(path.read_text() for path in package.rglob("*.py"))
    for word in ("import pickle", "pickle.", "torch.load", "allow_pickle", "eval(", "exec(", "import_module"):
        assert word not in text


@pytest.mark.parametrize("how", ["external link", "soft link", "external storage", "virtual", "objects"])
def test_values_from_outside_the_file_are_refused(small, tmp_path, how):
    path = Path(shutil.copy(small, tmp_path / "run.h5"))
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["weights"] = np.ones((LAST + 1, 40), np.float32)
    with h5py.File(path, "r+") as file:
        del file["weights"]
        if how == "external link":
            file["weights"] = h5py.ExternalLink(str(secret), "/weights")
        elif how == "soft link":
            file["weights"] = h5py.SoftLink("/steps/loss")
        elif how == "external storage":
            file.create_dataset("weights", (LAST + 1, 40), "f4", external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
        elif how == "virtual":
            layout = h5py.VirtualLayout((LAST + 1, 40), "f4")
            layout[:] = h5py.VirtualSource(str(secret), "weights", (LAST + 1, 40))
            file.create_virtual_dataset("weights", layout)
        else:
            file.create_dataset("weights", (LAST + 1, 40), h5py.string_dtype())
    with pytest.raises(DamagedRunError, match="/weights cannot be read"):
        trajrec.open(path)


def test_an_error_says_what_is_damaged_and_where(small, tmp_path):
    path = Path(shutil.copy(small, tmp_path))
    with h5py.File(path, "r+") as file:
        file["weights"][3, 0] += 1
    with trajrec.open(path) as run, pytest.raises(DamagedRunError) as row:
        run.row(3)
    with h5py.File(path, "r+") as file:
        file["steps/loss"][17] += 1
    with trajrec.open(path) as run, pytest.raises(DamagedRunError) as record:
        run.loss(3)
    found = [(error.value.file, error.value.dataset, error.value.steps) for error in (row, record)]
    assert found == [(path, "/weights", (3, 3)), (path, "/steps", (17, 17))]

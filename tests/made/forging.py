"""Forged recordings: valid ones in which somebody who knows the format has changed something, and mended the checksums.

Made under a `Simulation`, so that no writer is in the middle of something while a folder is copied.
`Forger(folder)` records a few small runs of each kind; `forge(seed)` gives a copy with one or two things changed, and
what they were. The same seed forges the same file.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np

from tests.made import small_run
from trajrec.capture.recorder import Recorder
from trajrec.checksum import crc32
from trajrec.errors import DamagedRunError
from trajrec.runfile.format import trailer
from trajrec.runfile.format.arrays import MAGIC as KEYFILE
from trajrec.runfile.format.codec import decode
from trajrec.runfile.format.columns import FIXED, RAGGED
from trajrec.runfile.format.geometry import GEOMETRY_BYTES, Limits
from trajrec.runfile.format.table import StepTable
from trajrec.runfile.manifest import FORMAT, VERSION
from trajrec.runfile.ring import Control, Ring
from trajrec.runfile.trainer.sink import RunFileSink

INTEGERS = [0, 1, -1, 2, 7, 255, 2**31, -(2**31), 2**40, 2**62, -(2**63), 2**63 - 1]
VALUES: list[Any] = [
    *INTEGERS, 10**400, 0.5, -1.5, 1e300, float("nan"), float("inf"), True, False, None, "", "x", "float32", "weights",
    "../..", "\x1b[2J", "\ud800", [], {}, [[]], [0, 1], ["a", 1], {"a": 1}, [None], "9" * 5000,
]  # fmt: skip
DTYPES = ["<i8", "<f8", "<f4", "|u1", "<f2", "<c16", "|S3", "|b1", ">i4"]


class Forger:
    """Records the runs that are forged, into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        small_run.record(folder / "zstd.h5")
        small_run.record(folder / "plain.h5", compression="none")
        small_run.record(folder / "keyframes.h5", keep=2)
        small_run.record(folder / "inputs.h5", inputs="store")
        for name, options in {
            "cut": {},
            "cut-plain": {"compression": "none"},
            "cut-inputs": {"inputs": "store"},
        }.items():
            _record_unfinished(folder, name, **options)
        self.packed = sorted(folder.glob("*.h5"))
        self.folders = sorted(folder.glob("*.h5.rec"))
        self.other = folder  # the file that links of a forged one lead to

    def forge(self, seed: int, into: Path) -> tuple[Path, str]:
        """A forged file or folder, and what was done to it."""
        rng = random.Random(seed)
        base = rng.choice(self.packed + self.folders)
        path, self.other = into / base.name, into / "other.h5"
        shutil.copy(rng.choice(self.packed), self.other)
        if base.is_dir():
            shutil.copytree(base, path, symlinks=True)
        else:
            shutil.copy(base, path)
        done = [
            _in_folder(path, rng, self) if base.is_dir() else _in_file(path, rng, self)
            for _ in range(rng.choice([1, 1, 2]))
        ]
        return path, f"{base.name}, seed {seed}: {'; '.join(done)}"


def _record_unfinished(folder: Path, name: str, **options: Any) -> None:
    """A recording as it lies there in the middle of a training: one segment is sealed, the rest is in the ring."""
    live, target = folder / f"live-{name}.h5", folder / f"{name}.h5.rec"
    copy = lambda: shutil.copytree(live.with_name(f"{live.name}.rec"), target)  # noqa: E731
    small_run.record(live, epochs=14, at_end=copy, recorder=_recorder, **options)
    live.unlink()


def _recorder(path: Path, inputs: str = "digest", compression: str = "zstd", **watched: Any) -> Recorder:
    sink = RunFileSink(path, compression=compression, limits=Limits(segment_rows=32, arena_bytes=2**16))
    return Recorder(sink, inputs=inputs, **watched)


# -- HDF5 files --------------------------------------------------------------------------------------------------------


def _in_file(path: Path, rng: random.Random, forger: Forger) -> str:
    """Changes something in an HDF5 file, and mends the checksums of records, arrays and the whole."""
    os.truncate(path, path.stat().st_size - trailer.SIZE)
    change = rng.choice([_json, _json, _attribute, _values, _values, _shape, _shape, _link, _odd_keyframe, _array])
    with h5py.File(path, "r+", libver=("v110", "v110"), locking=False) as file:
        said = change(file, rng, forger)
        with suppress(Exception):
            _mend_records(file)
    trailer.append(path)
    return said


def _json(file: h5py.File, rng: random.Random, _: Forger) -> str:
    owner, names = rng.choice([(file["spec"], list(file["spec"].attrs)), (file, ["gaps", "resumed"])])
    name = rng.choice(names)
    value, said = twisted(json.loads(owner.attrs[name]), rng)
    owner.attrs[name] = np.bytes_(json.dumps(value))
    return f"{owner.name} {name}: {said}"


def twisted(value: Any, rng: random.Random) -> tuple[Any, str]:
    """JSON in which one value is another, is missing or is there twice."""
    places = [*_places(value, ())]
    place = rng.choice(places)
    if not place:
        new = rng.choice(VALUES)
        return new, f"= {new!r:.40}"
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    kind = rng.choice(["value", "value", "value", "number", "missing", "twice"])
    if kind == "missing":
        del inner[place[-1]]
    elif kind == "twice" and isinstance(inner, list):
        inner.append(inner[place[-1]])
    else:
        inner[place[-1]] = rng.choice(INTEGERS if kind == "number" else VALUES)
        kind = f"= {inner[place[-1]]!r:.40}"
    return value, f"{place} {kind}"


def _places(value: Any, place: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield place
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(inner, (*place, key))


def _attribute(file: h5py.File, rng: random.Random, _: Forger) -> str:
    owner = rng.choice([file, file, file["spec"], *_datasets(file)])
    if not len(owner.attrs):
        owner = file
    name = rng.choice(sorted(owner.attrs))
    del owner.attrs[name]
    texts = [
        b"",
        b"[",
        b"[" * 20_000,
        b"\xff\xfe",
        b"NaN",
        b"9" * 5000,
        b"{}",
        b"complete",
        b"1e999",
        "\u00b2".encode(),
    ]
    new = rng.choice([None, *INTEGERS, 0.5, np.arange(3), np.zeros((2, 2)), h5py.Empty("f"), *map(np.bytes_, texts)])
    if new is not None:
        owner.attrs[name] = new
    return f"attribute {owner.name} {name} = {new!r:.40}"


def _datasets(file: h5py.File) -> list[h5py.Dataset]:
    found: list[h5py.Dataset] = []
    file.visititems(lambda _, item: found.append(item) if isinstance(item, h5py.Dataset) and item.shape else None)
    return found


def _values(file: h5py.File, rng: random.Random, _: Forger) -> str:
    """Other numbers, of the right kind."""
    columns = [d for d in _datasets(file) if 0 < d.size < 10**6 and d.name.startswith(("/steps", "/batches"))]
    if not columns:
        return "nothing"
    dataset = rng.choice(columns)
    values = dataset[()]
    flat = values.reshape(-1)
    kind = rng.choice(["one", "one", "all", "reversed", "shifted"])
    new = rng.choice([*INTEGERS, np.nan, np.inf, 1e300, -0.5])
    with np.errstate(all="ignore"):
        cast = (
            np.array([new]).astype(values.dtype)[0]
            if np.isfinite(new) or values.dtype.kind == "f"
            else values.dtype.type(0)
        )
        if kind == "one":
            flat[rng.randrange(len(flat))] = cast
        elif kind == "all":
            flat[:] = cast
        else:
            flat[:] = flat[::-1].copy() if kind == "reversed" else flat + cast
    dataset[...] = values
    return f"{dataset.name} {kind} {cast!r}"


def _shape(file: h5py.File, rng: random.Random, _: Forger) -> str:
    """Another dtype or shape, with or without the values."""
    old = rng.choice([d for d in _datasets(file) if d.size < 10**6] or [None])
    if old is None:
        return "nothing"
    name, shape, dtype, attributes = old.name, list(old.shape), old.dtype, dict(old.attrs)
    values = old[()]
    kind = rng.choice(["dtype", "longer", "shorter", "empty", "dimension", "huge", "huge-chunks", "scalar", "missing"])
    del file[name]
    if kind == "dtype":
        new = np.dtype(rng.choice(DTYPES))
        with np.errstate(all="ignore"):
            file[name] = np.zeros(shape, new) if new.kind == "S" else values.astype(new)
    elif kind in ("huge", "huge-chunks"):
        shape = [rng.choice([2**34, 2**50, 10**7]), *shape[1:]] if rng.random() < 0.7 else [*shape[:-1], 2**44]
        chunks = tuple(min(n, 64) for n in shape) if kind == "huge-chunks" else None
        file.create_dataset(name, shape, dtype, chunks=chunks, **(hdf5plugin.Zstd() if chunks else {}))
    elif kind != "missing":
        edge = rng.choice([1, 3])
        made = {
            "longer": lambda: np.concatenate([np.atleast_1d(values), np.atleast_1d(values)[-edge:]]),
            "shorter": lambda: np.atleast_1d(values)[:-edge],
            "empty": lambda: np.atleast_1d(values)[:0],
            "dimension": lambda: np.expand_dims(values, rng.choice([0, values.ndim])),
            "scalar": lambda: np.array(3, dtype),
        }[kind]()
        file[name] = made
    if kind != "missing":
        for key, value in attributes.items():
            file[name].attrs[key] = value
        if "crc32" in attributes and "huge" not in kind:
            file[name].attrs["crc32"] = np.uint32(crc32(np.ascontiguousarray(file[name][()]).data))
    return f"{name} {kind} {shape}"


def _link(file: h5py.File, rng: random.Random, forger: Forger) -> str:
    """Something that leads elsewhere, or is not what its name says."""
    names = [d.name for d in _datasets(file)] + ["/steps", "/batches", "/spec", "/keyframes"]
    name, kind = (
        rng.choice(names),
        rng.choice(["soft", "external", "storage", "virtual", "group", "dataset", "other", "loop"]),
    )
    old = file[name]
    shape, dtype = (old.shape, old.dtype) if isinstance(old, h5py.Dataset) else ((3,), np.dtype("<f4"))
    attributes, elsewhere = dict(old.attrs), forger.other
    moved = f"/moved{len(file)}"
    file.move(name, moved)
    if kind == "soft":
        file[name] = h5py.SoftLink(rng.choice([moved, name, "/nowhere"]))
    elif kind == "external":
        file[name] = h5py.ExternalLink(str(elsewhere), name)
    elif kind == "storage":
        size = int(np.prod(shape)) * dtype.itemsize
        file.create_dataset(name, shape, dtype, external=[(str(elsewhere), 0, max(size, 1))])
    elif kind == "virtual":
        layout = h5py.VirtualLayout(shape or (1,), dtype)
        layout[...] = h5py.VirtualSource(str(elsewhere), name, shape or (1,), dtype)
        file.create_virtual_dataset(name, layout)
    elif kind == "group":
        file.create_group(name)
    elif kind == "dataset":
        file[name] = np.arange(3)
    elif kind == "other":
        file[name] = (
            file[rng.choice(["/weights", "/steps", "/spec"])]
            if name not in ("/weights", "/steps", "/spec")
            else file[moved]
        )
    else:
        file[name] = file["/"]
    if kind in ("storage", "virtual"):
        for key, value in attributes.items():
            file[name].attrs[key] = value
    return f"{name} is {kind}"


def _odd_keyframe(file: h5py.File, rng: random.Random, _: Forger) -> str:
    name = rng.choice(["abc", "-0000000005", "9999999999", "5", "0" * 400 + "2", "\u0663", " 3", "0000000001"])
    kind = rng.choice(["group", "copy", "gone"])
    steps = sorted(file["keyframes"]) if isinstance(file.get("keyframes"), h5py.Group) else []
    if not steps or (kind != "gone" and name in steps):
        return "nothing"
    if kind == "gone":
        for step in steps if rng.random() < 0.5 else steps[:1]:
            del file["keyframes"][step]
    elif kind == "group":
        file["keyframes"].create_group(name)
    else:
        file["keyframes"][name] = file["keyframes"][steps[0]]
    return f"keyframe {name} {kind}"


def _array(file: h5py.File, rng: random.Random, _: Forger) -> str:
    """An array of a keyframe or of inputs with other values, or under another name."""
    arrays = [d for d in _datasets(file) if "crc32" in d.attrs]
    if not arrays:
        return "nothing"
    dataset = rng.choice(arrays)
    values = np.array(dataset[()])
    if rng.random() < 0.3:
        name = rng.choice(
            ["weights", "optimizer/x", "optimizer/exp_avg", "rng/cpu", "buffers/zzz", "a/b/c/d", "0/77", "\x1b[2J"]
        )
        with suppress(ValueError, OSError):
            file.move(dataset.name, f"{'/'.join(dataset.name.split('/')[:3])}/{name}")
        return f"{dataset} now {name}"
    if dataset.name.endswith("structure"):
        twist, said = twisted(json.loads(values.tobytes()), rng)
        return f"structure {said}; {_replace(file, dataset, np.frombuffer(json.dumps(twist).encode(), np.uint8))}"
    flat = values.reshape(-1)
    with np.errstate(all="ignore"):
        flat[rng.randrange(len(flat)) if len(flat) else 0 :] = np.array(rng.choice([0, -1, 255, 1e300])).astype(
            values.dtype
        )
    return _replace(file, dataset, values)


def _replace(file: h5py.File, dataset: h5py.Dataset, values: np.ndarray) -> str:
    name = dataset.name
    del file[name]
    file[name] = values
    file[name].attrs["crc32"] = np.uint32(crc32(np.ascontiguousarray(values).data))
    return f"{name} has other values"


def _mend_records(file: h5py.File) -> None:
    if any(d.size > 10**6 for d in _datasets(file)):
        return
    columns = {c.name: file[c.path][()] for c in (*FIXED, *RAGGED)}
    columns |= {c.offsets: file[f"{c.path}_offsets"][()] for c in RAGGED}
    file["steps/record_crc32"][...] = StepTable(int(file.attrs["first"]), columns).checksums()


# -- folders -----------------------------------------------------------------------------------------------------------


def _in_folder(path: Path, rng: random.Random, forger: Forger) -> str:
    changes: list[Callable[[Path, random.Random], str]] = [
        _manifest,
        _manifest,
        _ring_head,
        _ring_words,
        _ring_record,
        _keyfile,
        _file,
    ]
    change = rng.choice([lambda path, rng: _segment(path, rng, forger), *changes])
    with suppress(OSError, IndexError, ValueError, struct.error, DamagedRunError):  # of what was forged before
        return f"{change.__name__}: {change(path, rng)}"
    return "nothing"


def _segment(path: Path, rng: random.Random, forger: Forger) -> str:
    segments = sorted(p for p in path.glob("segment-*.h5") if p.is_file())
    if not segments:
        return "nothing"
    segment = rng.choice(segments)
    return f"{segment.name}: {_in_file(segment, rng, forger)}"


def _manifest(path: Path, rng: random.Random) -> str:
    head, _, body = (path / "manifest.json").read_text().partition("\n")
    values, about, said = json.loads(body), json.loads(head), ""
    if rng.random() < 0.8:
        values, said = twisted(values, rng)
    body = json.dumps(values, indent=1)
    about = {"format": FORMAT, "version": VERSION, "crc32": crc32(body.encode())}
    if not said:
        about, said = twisted(about, rng)
    (path / "manifest.json").write_text(json.dumps(about) + "\n" + body)
    return said


def _ring_head(path: Path, rng: random.Random) -> str:
    data = bytearray((path / "ring.bin").read_bytes())
    size = struct.calcsize(f"<8s{GEOMETRY_BYTES}sq8s")
    place = rng.randrange(9)
    new = (
        struct.pack("<q", rng.choice(INTEGERS))
        if place < 8
        else rng.choice([b"|O", b"<f8", b"<i4", b"\xff", b"(9,)f4", b"", b"<f4,<f4"]).ljust(8, b"\0")
    )
    data[8 + 8 * place : 16 + 8 * place] = new
    data[size : size + 4] = struct.pack("<I", crc32(bytes(data[:size])))
    (path / "ring.bin").write_bytes(data)
    return f"word {place} = {new!r}"


def _ring_words(path: Path, rng: random.Random) -> str:
    ring = Ring(path / "ring.bin", writable=True)
    word, value = rng.choice(list(Control)), rng.choice(INTEGERS) % 2**64
    ring.set(word, value)
    return f"{word.name} = {value}"


def _ring_record(path: Path, rng: random.Random) -> str:
    """A record in the arena with another number in it, or another length or place."""
    ring = Ring(path / "ring.bin", writable=True)
    head = ring.head(32)
    entry = rng.randrange(32, head) if head > 32 else 33
    word = ring._word(entry)
    _, place, length, _ = ring._slots[word : word + 4]
    start, kind = ring._arena + place % ring.geometry.arena_bytes, rng.choice(["number", "number", "length", "place"])
    if kind == "number":
        at = start + 4 * rng.randrange(min(length, 72) // 4)
        ring._map[at : at + 4] = struct.pack("<i", rng.choice([0, 1, -1, 2, 2**31 - 1, -(2**31)]))
    elif kind == "length":
        length = rng.choice([*INTEGERS, length - 8, length + 8, 1 << 63]) % 2**64
        ring._slots[word + 2] = length
    else:
        ring._slots[word + 1] = rng.choice(INTEGERS) % 2**64
    with suppress(Exception):
        data = ring._data(entry, *ring._slots[word + 1 : word + 3])
        ring._slots[word + 3] = crc32(data, entry + 1)
        decode(data)
    return f"entry {entry} {kind}"


def _keyfile(path: Path, rng: random.Random) -> str:
    file = rng.choice(sorted([*path.glob("keyframe-*.bin"), *path.glob("inputs-*.bin")]))
    data = file.read_bytes()
    _, length, _ = struct.unpack_from("<8sII", data)
    value, said = twisted(json.loads(data[16 : 16 + length]), rng)
    arrays = data[16 + length :]
    with suppress(Exception):
        for entry in value["arrays"]:
            entry[5] = crc32(arrays[entry[3] : entry[3] + entry[4]])
    head = json.dumps(value).encode()
    file.write_bytes(struct.pack("<8sII", KEYFILE, len(head), crc32(head)) + head + arrays)
    return f"{file.name} {said}"


def _file(path: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(p for p in path.iterdir() if p.name not in ("lock", "writer.log")))
    kind = rng.choice(["missing", "empty", "half", "folder", "renamed"])
    data = file.read_bytes()
    if kind == "renamed":
        name = rng.choice(
            [
                "segment-0000000000-0000000099.h5",
                "segment-0000000032-0000000031.h5",
                "keyframe-9999999999.bin",
                "inputs-0000000033.bin",
                "keyframe-0000000001.bin",
            ]
        )
        file.rename(path / name)
        return f"{file.name} is {name}"
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind != "missing":
        file.write_bytes(data[: len(data) // 2] if kind == "half" else b"")
    return f"{file.name} {kind}"

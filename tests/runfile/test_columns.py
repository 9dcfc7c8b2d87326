"""The columns of a step: one list that the record, its encoding, the files and the document all follow."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from trajrec.records import StepRecord
from trajrec.runfile.format.columns import COLUMNS, FIXED, RAGGED, STEP

ROOT = Path(__file__).parents[2]
NAMES = {"<i8": "int64", "<f8": "float64", "<u4": "uint32", "|u1": "uint8"}
SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

import trajrec
from tests.made.runfile_cases import MadeUpRun, spec
from trajrec.runfile.reader.stored import StoredRun
from trajrec.runfile.reader.verify import verify
from trajrec.runfile.trainer.sink import RunFileSink

class Noisy(MadeUpRun):
    def record(self, t):
        return replace(super().record(t), noise=np.arange(t % 3) + t / 8)

path, golden, made = Path(sys.argv[1]), Path(sys.argv[2]), Noisy(spec(10), with_parts=len(sys.argv) > 3)
sink = RunFileSink(path)
sink.open(made.spec)
made.feed(sink, 50)
with trajrec.open(path) as run:  # out of the ring
    assert run.steps == 50
sink.close(complete=True)
assert verify(path) == []
stored = StoredRun(path)
for t, record in enumerate(stored.table(0, 51).records()):
    assert np.array_equal(record.noise, made.record(t).noise), t
    assert np.array_equal(record.parts, made.record(t).parts), t
assert verify(golden) == []
assert not StoredRun(golden).table(0, 46)["noise"].size
"""


def test_they_are_the_fields_of_a_record_in_its_order():
    assert ["step", *(column.name for column in COLUMNS)] == [field.name for field in fields(StepRecord)]
    assert [column.since for column in COLUMNS] == sorted(column.since for column in COLUMNS)


def test_the_document_lists_them():
    text = (ROOT / "docs" / "format.md").read_text()
    listed = dict(re.findall(r"^\| `/((?:steps|batches)/\w+)` \| (\w+) \|", text, re.MULTILINE))
    assert listed == {STEP: "int64", "batches/NAME_offsets": "int64"} | {
        column.path: NAMES[column.dtype] for column in (*FIXED, *RAGGED)
    }


def test_one_more_takes_a_field_and_a_line(tmp_path):
    """In a copy of the package; files from before are read as if it were empty."""
    shutil.copytree(
        ROOT / "trajrec", tmp_path / "trajrec", ignore=shutil.ignore_patterns("replay", "cli", "__pycache__")
    )
    _add(tmp_path / "trajrec" / "records.py", '    changes: bytes = b""\n', "    noise: FloatArray = ()\n")
    line = '    Column("noise", "<f8", ragged=True, since=2),\n'
    _add(tmp_path / "trajrec" / "runfile" / "format" / "columns.py", "is_bytes=True, since=1),\n", line)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    for more in ([], ["with everything else"]):
        command = [sys.executable, "-P", "-c", SCRIPT, tmp_path / f"run{len(more)}.h5", _golden(), *more]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path)


def _golden() -> Path:
    return ROOT / "tests" / "golden" / "run-1.0-zstd.h5"


def _add(path: Path, after: str, line: str) -> None:
    text = path.read_text()
    assert text.count(after) == 1
    path.write_text(text.replace(after, after + line))

"""What the benchmarks compute from their measurements: slopes, pictures, what bounds a step."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a script of the benchmarks, as they import each other."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_slopes_are_those_of_the_steps_time_and_the_peak(benchmark):
    rows = [{"series": "steps", "x": x, "steps_seconds": 0.01 * x, "peak_MB": 200.0} for x in (20, 200, 2000)]
    assert benchmark("growth").slopes(rows) == {"steps": {"time": 1.0, "memory": 0.0}}


def test_the_picture_of_growth_holds_every_point(benchmark):
    points = [(1, 0.2), (16, 3.0), (64, 12.0)]
    picture = benchmark("picture").grid([[("time", "targets", "seconds & more", points)] * 4] * 2)
    drawn = ElementTree.fromstring(picture)
    assert len(drawn.findall(".//{*}circle")) == 24
    assert "seconds & more" in {node.text for node in drawn.iter("{http://www.w3.org/2000/svg}text")}


@pytest.mark.long
def test_a_measurement_of_growth_is_taken_up_where_it_was_cut_off(tmp_path):
    """One short trial, and one that is there already."""
    out, there = tmp_path / "growth.json", {"series": "steps", "point": "20", "steps": 20, "x": 20}
    missing = [{"series": "steps", "point": str(n), "steps": n, "x": n} for n in (200, 2000)]
    rows = [row | {"seconds": 1.0, "steps_seconds": 1.0, "peak_MB": 9.0} for row in (there, *missing)]
    out.write_text(json.dumps({"rows": rows[1:]}))
    command = [sys.executable, str(FOLDER / "growth.py"), "--series", "steps", "--merge", "--out", str(out)]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    found = json.loads(out.read_text())
    assert [row["x"] for row in found["rows"]] == [20, 200, 2000]
    assert found["rows"][1:] == rows[1:]
    assert found["rows"][0]["steps_seconds"] > 0


def test_operations_are_counted_in_place_too_and_kept_values_once(benchmark):
    machine = benchmark("machine")
    a, b, total = torch.rand(4, 5), torch.rand(5, 6), torch.zeros(4, 6)
    assert machine.counted(lambda: total.addmm_(a, b))[0] == machine.counted(lambda: a @ b)[0] == 2 * 4 * 5 * 6
    w = torch.rand(5, 6, requires_grad=True)
    operations, kept = machine.counted(lambda: (a @ w).sum().backward())
    assert (operations, kept) == (2 * 2 * 4 * 5 * 6, a.nbytes)


def test_the_higher_roof_is_the_limit(benchmark):
    roof = benchmark("machine").roof
    rate = {"GB_s": 10.0, "GFLOP_s": 100.0}
    assert roof("free", 2e9, 0, 1000, rate)["bound"] == "arithmetic"
    found = roof("exact", 1e6, 5e8, 1000, rate)
    assert (found["bound"], found["bound_ms"], found["MB"]) == ("memory", pytest.approx(100.0084), 1000.08)

"""An approximation is called one wherever its numbers go, and nothing of it is green; an exact one is certified."""

import json
import re

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from tests.made import replay_folder
from trajrec.cli.clean import clean
from trajrec.replay.folder.place import Place
from trajrec.replay.folder.read import load
from trajrec.replay.folder.write import OUTPUT
from trajrec.replay.report import report
from trajrec.replay.report.render import tables, terminal
from trajrec.replay.report.render.html import html

LABEL = "approximation, not checked against exact"
VALUES = np.array([[3.0], [1.0], [-2.0], [-1.0]])
SAID = replay_folder.CERTIFICATE["sentence"]
FORMS = {
    "none": {"exact": False, "curvature": "none"},
    "ggn": {"exact": False, "curvature": "ggn"},
    "a later one": {"exact": False, "curvature": "later"},
    "of an older version": {"exact": False},
    "whatever it claims": {"exact": True, "curvature": "ggn", "label": "exact"},
}


def written(tmp_path, **facts):
    return replay_folder.write(tmp_path / "r", VALUES, growth=1.3, **facts)


def shown(found):
    console = Console(record=True, width=200, force_terminal=True, color_system="standard")
    terminal.show(found, console)
    return console.export_text(styles=True)


def badges(found):
    """(tone, verdict) of what the page says first."""
    return re.findall(r'<p class="proof (\w+)"><strong>(.*?)</strong>', html(found))


@pytest.mark.parametrize("form", FORMS)
def test_an_approximation_says_so_in_amber(tmp_path, form):
    found = report.build(written(tmp_path, **FORMS[form]))
    assert found.head.settings.label == LABEL
    assert badges(found) == [("open", LABEL)]
    (line,) = [line for line in shown(found).splitlines() if "certificate" in line]
    assert f"\x1b[33m{LABEL}. {SAID}" in line
    assert "32m" not in line


@pytest.mark.parametrize("form", FORMS)
def test_an_approximation_says_nothing_about_growth(tmp_path, form):
    found = report.build(written(tmp_path, **FORMS[form]))
    assert "adjoint grew" not in shown(found) + html(found)
    assert found.values()["settings"]["growth"] is None


def test_an_exact_replay_is_certified_in_green_and_speaks_of_growth(tmp_path):
    found = report.build(written(tmp_path, curvature="hessian"))
    assert badges(found) == [("good", "Certified")]
    assert f"\x1b[32m{SAID}" in shown(found)
    assert "adjoint grew" in shown(found)
    assert LABEL not in shown(found) + html(found)
    assert found.values()["settings"]["label"] == "exact"


def test_numbers_of_an_unknown_form_are_not_green(tmp_path):
    found = report.build(written(tmp_path, exact=None))
    assert badges(found) == [("open", "nothing says whether the numbers are exact")]


def test_drift_stays_red_and_the_label_is_there_too(tmp_path):
    proof = {"verdict": "drifted", "sentence": "It differs."}
    found = report.build(written(tmp_path, exact=False, certificate=proof))
    assert badges(found) == [("bad", "Not proved")]
    assert f"NOT PROVED. {LABEL}. It differs." in shown(found)
    exact = report.build(replay_folder.write(tmp_path / "exact", VALUES, certificate=proof))
    assert "NOT PROVED. It differs." in shown(exact)


@pytest.mark.parametrize(("facts", "label"), [({"exact": False, "curvature": "none"}, LABEL), ({}, "exact")])
def test_every_file_says_what_its_numbers_are(tmp_path, facts, label):
    found = report.build(written(tmp_path, **facts))
    path = tables.write_csv(found, tmp_path / "top.csv")
    assert path.read_text().startswith("rank,side,sample,")
    header = json.loads((tmp_path / "top.csv.meta.json").read_text())
    assert (header["label"], header["exact"], header["certificate"]) == (label, label == "exact", SAID)
    assert (header["sign"], header["unit"]) == ("positive = helpful", "test loss")
    of_parquet = pl.read_parquet_metadata(tables.write_parquet(found, tmp_path / "top.parquet"))
    assert (of_parquet["label"], of_parquet["exact"]) == (label, json.dumps(label == "exact"))
    of_json = json.loads(tables.write_json(found, tmp_path / "top.json").read_text())["settings"]
    assert of_json["label"] == label


def test_samples_to_drop_are_said_to_be_chosen_by_an_approximation(tmp_path, capsys):
    for name, exact in (("free", False), ("exact", True)):
        clean(
            replay_folder.write(tmp_path / name, VALUES, exact=exact), drop="negative", out=tmp_path / f"{name}-clean"
        )
        assert (LABEL in capsys.readouterr().out) is not exact
        facts = json.loads((tmp_path / f"{name}-clean" / "clean.json").read_text())
        assert facts["label"] == ("exact" if exact else LABEL)


def test_a_comparison_names_the_forms(tmp_path):
    one = replay_folder.write(tmp_path / "a", VALUES, exact=False, curvature="ggn")
    other = replay_folder.write(tmp_path / "b", VALUES, exact=False, curvature="none")
    found = report.build(one, ask=report.Ask(compare=other))
    assert (found["comparison"].this, found["comparison"].other) == ("Gauss-Newton (a)", "Hessian-free (b)")


def test_a_replay_with_its_csv_header_is_replaced_by_force(tmp_path):
    folder = written(tmp_path)
    tables.write_csv(report.build(folder), folder / "top.csv")
    with Place(folder, OUTPUT, force=True).filling() as unfinished:
        replay_folder.write(unfinished, -VALUES)
    assert load(folder).contributions.collect()["contribution"][0] == -3
    assert not (folder / "top.csv.meta.json").exists()

"""A section that is added in one file is on the terminal, on the page and in the files, and no renderer knows of it."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from tests.made import bounds_section, replay_folder
from trajrec.replay.report.blocks import Kind
from trajrec.replay.report.render import tables, terminal
from trajrec.replay.report.render.html import html
from trajrec.replay.report.report import Ask, Report, build
from trajrec.replay.report.sections import SECTIONS

VALUES = np.array([[4e-5], [-3e-5], [2e-5]])


@pytest.fixture
def report(tmp_path: Path) -> Report:
    folder = replay_folder.write(tmp_path / "r", VALUES, labels=list("abc"))
    return build(folder, ask=Ask(everything=True), sections=(*SECTIONS, bounds_section.SECTION))


def test_it_is_on_the_terminal(report: Report) -> None:
    console = Console(file=io.StringIO(), width=80)
    terminal.show(report, console)
    text = console.file.getvalue()
    _, _, bounds = text.partition("Which theorem")
    assert re.search(r"theorem +1 of <4>", bounds)
    assert re.search(r"sample +error +bound *\n.*\n +0 +\+4.000e-05 +\+8.000e-05 *\n", bounds)
    assert r"proves nothing.\x1b[2J" in bounds
    assert re.search(r"Ratios\n.*\n +class +b", bounds)
    assert "in per cent of the largest entry, 2.000e+00; bound over error" in bounds


def test_it_is_on_the_page(report: Report) -> None:
    page = html(report)
    assert '<li><a href="#bounds">Bounds</a></li>' in page
    assert "<b>2</b> times the error" in page
    section = page[page.index('<section id="bounds">') : page.index('<section id="reading">')]
    assert "<h2>How far the error may go</h2>" in section
    assert "<dd>1 of &lt;4&gt;</dd>" in section
    assert 'data-v="8e-05"' in section
    assert section.count("<rect") == 3
    assert 'class="heat"' in section


def test_it_is_in_the_files(report: Report, tmp_path: Path) -> None:
    got = json.loads(tables.write_json(report, tmp_path / "r.json").read_text())
    assert got["bounds"]["rows"][0] == [0, 4e-5, 8e-5]
    rows = pl.read_csv(tables.write_csv(report, tmp_path / "r.csv"))
    assert rows.columns[:2] == ["rank", "side"]
    assert rows.columns[-3:] == ["error", "bound", "table"]
    own = rows.filter(table="bounds")
    assert own["bound"].to_list() == [8e-5, -6e-5, 4e-5]
    assert own["rank"].null_count() == 3
    assert tables.frame(report).filter(pl.col("table") != "bounds")["bound"].null_count() == 3


def test_it_is_only_there_where_it_was_asked_for(report: Report) -> None:
    plain = build(report.head.folder, sections=(*SECTIONS, bounds_section.SECTION))
    assert plain["bounds"] is None
    assert "bounds" not in html(plain)
    assert tables.frame(plain).columns == [
        "rank",
        "side",
        "sample",
        "label",
        "target",
        "contribution",
        "share",
        "table",
    ]


def test_what_is_not_a_number_has_no_colour() -> None:
    assert [Kind.SIGNED.tone(value) for value in (2.0, -1e-9, 0.0, math.nan, None)] == [
        "helpful",
        "harmful",
        "",
        "",
        "",
    ]
    assert [Kind.SIGNED.text(value) for value in (math.nan, None)] == ["undefined", ""]
    assert Kind.NUMBER.tone(2.0) == ""

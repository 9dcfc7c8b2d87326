"""Text from a file on its way out: to a terminal, which would obey it, and to a spreadsheet, which would compute it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import polars as pl
import pytest
from rich.console import Console

from tests.made import replay_folder
from tests.made.runfile_cases import MadeUpRun, spec
from trajrec.errors import TrajrecError, printable
from trajrec.replay.folder import spreadsheet
from trajrec.replay.folder.place import Place
from trajrec.replay.folder.read import load
from trajrec.replay.report import cleaning
from trajrec.replay.report.render import tables, terminal
from trajrec.replay.report.report import Ask, build
from trajrec.runfile.trainer.sink import RunFileSink

HOSTILE = "a\x1b[2J\x9b\r\x07\x7f\u202e\u2066[red]b[/red]\ud800"
SHOWN = r"a\x1b[2J\x9b\r\x07\x7f\u202e\u2066[red]b[/red]\ud800"


def is_safe(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


def command(*arguments, capsys):
    from trajrec.cli.main import app

    with pytest.raises(SystemExit) as stopped:
        app([*map(str, arguments)])
    said = capsys.readouterr()
    assert is_safe(said.out)
    assert is_safe(said.err)
    return stopped.value.code, "".join((said.out + said.err).split("\n"))


def test_what_a_terminal_would_obey_becomes_an_escape():
    assert printable(HOSTILE) == SHOWN
    assert (
        printable("two\nlines, \N{GREEK SMALL LETTER GAMMA} and 漢字")
        == "two\nlines, \N{GREEK SMALL LETTER GAMMA} and 漢字"
    )
    assert printable("two\nlines", keep="") == r"two\nlines"


def test_no_message_of_an_error_is_obeyed():
    assert str(TrajrecError(f"{HOSTILE} is wrong")) == f"{SHOWN} is wrong"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A recording whose every text is hostile."""
    named = replace(
        spec(4),
        optimizer=HOSTILE,
        data={"dataset": HOSTILE},
        task=f"{HOSTILE}.py:{HOSTILE}",
        task_sha256="00" * 32,
        versions={HOSTILE: HOSTILE},
        device=HOSTILE,
        command=(HOSTILE, "two\nlines"),
    )
    path = tmp_path_factory.mktemp("hostile") / "run.h5"
    MadeUpRun(named).write(RunFileSink(path), 3)
    return path


def test_info_obeys_nothing(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    code, said = command("info", run, capsys=capsys)
    assert code == 0
    assert said.count(SHOWN) == 8
    assert rf"{SHOWN} two\nlines" in said


def test_replay_and_its_refusal_obey_nothing(run, capsys):
    for given in ([], ["--trust"]):
        code, said = command("replay", run, *given, capsys=capsys)
        assert code == 2
        assert "\\x1b[2J" in said


def test_names_of_files_are_not_obeyed(run, tmp_path, capsys):
    named = tmp_path / "\x1b[2J\x9b[red].h5"
    named.write_bytes(run.read_bytes())
    assert command("verify", named, capsys=capsys)[0] == 0
    named.write_bytes(run.read_bytes()[:-100])
    for name in ("verify", "info", "replay", "pack"):
        assert r"\x1b[2J\x9b[red].h5" in command(name, named, capsys=capsys)[1]


@pytest.fixture
def folder(tmp_path):
    """A replay whose every text is hostile."""
    hostile = HOSTILE[:-1]  # Parquet holds whole characters only
    folder = replay_folder.write(
        tmp_path / "r",
        [[1.0, -1.0], [-2.0, 1.0], [0.5, 3.0]],
        labels=[hostile, f"{hostile}\n2", "x"],
        names=[hostile, "=HYPERLINK(1)", "z"],
        target_labels=[hostile, f"{hostile}2"],
        predictions=[hostile, "x"],
    )
    facts = json.loads((folder / "replay.json").read_text())
    facts |= dict.fromkeys(("run", "run_id", "optimizer", "unit", "sign", "taylor", "command", "created"), HOSTILE)
    facts |= {"classes": [HOSTILE], "certificate": {"verdict": HOSTILE, "sentence": HOSTILE}}
    facts |= {"smooth": False, "kinks": [HOSTILE]}
    (folder / "replay.json").write_text(json.dumps(facts))
    replay_folder.validation(folder, sentence=HOSTILE)
    return folder


def test_a_report_obeys_nothing(folder, capsys, tmp_path):
    shown = build(folder, ask=Ask(everything=True, why=(0, 1)))
    console = Console(width=300, force_terminal=True, color_system=None)
    with console.capture() as caught:
        terminal.show(shown, console)
    assert is_safe(caught.get())
    assert r"a\x1b[2J\x9b\r" in caught.get()
    code, _ = command(
        "report", folder, "--all", "--json", tmp_path / "a.json", "--html", tmp_path / "a.html", capsys=capsys
    )
    assert code == 0


FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\N{FULLWIDTH EQUALS SIGN}1"]
HARMLESS = ["cat", "a=b", "-1", "+1.5", "-.5e-3", "", "'quoted", "x-y", None]


def test_cells_that_begin_a_formula_are_defused_and_no_others(tmp_path):
    count = len(FORMULAS) + len(HARMLESS)
    frame = pl.DataFrame({"label": FORMULAS + HARMLESS, "value": [-1.5] * count, "sample": [-1] * count})
    spreadsheet.write_csv(frame, tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [f"'{text}" for text in FORMULAS] + [text or "" for text in HARMLESS]
    assert {(row["value"], row["sample"]) for row in rows} == {("-1.5", "-1")}


def test_every_csv_is_defused(tmp_path):
    folder = replay_folder.write(
        tmp_path / "r", [[2.0], [-1.0]], labels=["=1+1", "@x"], names=["+1+1", "-x"], target_labels=["=A1"]
    )
    tables.write_csv(build(folder), tmp_path / "top.csv")
    cleaning.write(cleaning.clean(load(folder), "negative"), Place(tmp_path / "clean", cleaning.OUTPUT, False, []))
    for path in (tmp_path / "top.csv", tmp_path / "clean" / "samples.csv"):
        text = path.read_text()
        assert "'=1+1" in text
        assert ",=" not in text
        assert ",@" not in text

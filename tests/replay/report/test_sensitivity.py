"""How far to trust: where growth and kinks come from, what is said of them, and what training again has said."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.made import loops, replay_folder
from tests.made.loops import Loop
from trajrec.errors import TrajrecError
from trajrec.replay import contributions
from trajrec.replay.folder.format import Settings
from trajrec.replay.folder.validated import carry_validated, validated, write_validated
from trajrec.replay.report import report
from trajrec.replay.report.render import terminal
from trajrec.replay.report.render.html import html
from trajrec.replay.report.render.tables import plain
from trajrec.replay.report.sensitivity import Sensitivity

KINKED = {"smooth": False, "kinks": ["max_pool2d", "relu"]}


def written(folder, **facts):
    return replay_folder.write(folder, np.eye(4), **facts)


def shown(folder):
    """What terminal and page say, in one line each."""
    found = report.build(folder, ask=report.Ask(everything=True))
    console = Console(record=True, width=100)
    terminal.show(report.build(folder), console)
    return " ".join(console.export_text().split()), html(found)


def test_the_growth_is_that_of_the_adjoint():
    """A training that only shrinks its weights shrinks its adjoint, one with long steps lets it grow."""

    def with_rate(rate):
        made = loops.train(Loop(optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=rate), epochs=6))
        return contributions(made.run, made.task, exact=True).growth.max()

    assert with_rate(0.01) < 1.2
    assert with_rate(8.0) > 50


# -- not checked -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("growth", "word"), [(1.3, "Calm"), (12.0, "Rough"), (4e3, "Wild")])
def test_of_a_smooth_training_growth_is_said(tmp_path, growth, word):
    taylor = "Removing each of 3 samples did it."
    said, page = shown(written(tmp_path / "r", growth=growth, smooth=True, taylor=taylor))
    assert f"{word}: going back through the run" in said
    assert "Not checked: trajrec validate" in said
    assert taylor in said
    assert Sensitivity(growth, smooth=True).sentence in page
    assert ("<strong>Sensitive</strong>" in page) == (word != "Calm")
    assert ("--curvature ggn" in said) == (word == "Wild")


@pytest.mark.parametrize("growth", [0.9, 1.3, 12.0, 4e3, None])
def test_a_training_with_kinks_is_never_called_calm(tmp_path, growth):
    folder = written(tmp_path / "r", growth=growth, **KINKED)
    said, page = shown(folder)
    for text in (said, page, (folder / "replay.json").read_text(), json.dumps(plain(report.build(folder).values()))):
        assert "calm" not in text.lower()
    assert "max_pool2d, relu" in said
    assert "Not checked: trajrec validate" in said
    assert ("nothing predicts what removals do" in said) == (growth == 4e3)
    assert "--curvature ggn" not in said


@pytest.mark.parametrize("growth", [1.3, 12.0, None])
def test_a_folder_that_does_not_say_whether_there_are_kinks_is_not_called_calm(tmp_path, growth):
    said, page = shown(written(tmp_path / "r", growth=growth))
    assert "Not checked: trajrec validate" in said
    assert "calm" not in (said + page).lower()
    assert "Rough" not in said + page


def test_a_better_form_is_not_offered_to_itself():
    assert "--curvature ggn" not in Sensitivity(4e3, smooth=True, curvature="ggn").sentence
    assert "ask for the exact ones" in Sensitivity(4e3, smooth=True, curvature="none").sentence


# -- trained again -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "heading"),
    [("holds", "Comes true"), ("weak", "Comes true in part"), ("does not hold", "Does not come true")],
)
@pytest.mark.parametrize("facts", [{"smooth": True}, KINKED])
def test_what_training_again_said_is_shown(tmp_path, verdict, heading, facts):
    folder = replay_folder.validation(written(tmp_path / "r", growth=2.0, **facts), verdict=verdict)
    said, page = shown(folder)
    assert "The numbers hold: so it was measured." in said
    assert "Score .5 of sets." in said
    assert f"<strong>{heading}</strong>" in page
    assert "real change" in page
    assert "Not checked" not in said + page
    assert "calm" not in (said + page).lower()
    assert ("--curvature ggn" in said) == (verdict != "holds" and facts["smooth"])
    assert ("Kinks (max_pool2d, relu) are a likely cause" in said) == (verdict != "holds" and not facts["smooth"])
    assert report.build(folder, ask=report.Ask(everything=True))["validation"].points[1] == (-1.0, -1.5)


def test_wild_and_with_kinks_nothing_predicts(tmp_path):
    folder = written(tmp_path / "r", growth=4e3, **KINKED)
    assert "nothing predicts what removals do" in shown(replay_folder.validation(folder, verdict="does not hold"))[0]


@pytest.mark.parametrize("name", ["run_id", "question"])
def test_what_was_said_of_another_replay_is_not_shown(tmp_path, name):
    folder = replay_folder.validation(written(tmp_path / "r", growth=2.0, smooth=True, question="this"))
    assert "Not checked" not in shown(folder)[0]
    facts = json.loads((folder / "replay.json").read_text()) | {name: "another"}
    (folder / "replay.json").write_text(json.dumps(facts))
    said, page = shown(folder)
    assert "Not checked" in said
    assert "so it was measured" not in said + page
    assert "Score .5" not in said + page


@pytest.mark.parametrize("text", ["", "nul", "[]", "3", '{"run_id": "0123456789abcdef", "removals": 3, "lds": [1]}'])
def test_what_cannot_be_read_is_as_good_as_nothing(tmp_path, text):
    folder = written(tmp_path / "r", growth=2.0, smooth=True)
    (folder / "validation.json").write_text(text)
    assert "Not checked" in shown(folder)[0]


# -- on disk -----------------------------------------------------------------------------------------------------------

SETTINGS = Settings(run_id="run", question="asked")


def test_what_is_found_later_joins_what_is_there(tmp_path):
    write_validated(tmp_path, SETTINGS, {"lds": {"sentence": "First."}, "seed": 0})
    write_validated(tmp_path, SETTINGS, {"taylor": {"sentence": "Second."}, "seed": 1})
    assert validated(tmp_path, SETTINGS).others == ("First.", "Second.")
    write_validated(tmp_path, Settings(run_id="run", question="another"), {"taylor": {"sentence": "Third."}})
    assert validated(tmp_path, SETTINGS) is None
    assert [path.name for path in tmp_path.iterdir()] == ["validation.json"]


def test_it_is_taken_along_by_the_same_question_only(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    write_validated(old, SETTINGS, {"lds": {"sentence": "First."}})
    carry_validated(old, new, Settings(run_id="run", question="another"))
    assert not list(new.iterdir())
    carry_validated(old, new, SETTINGS)
    assert validated(new, SETTINGS).others == ("First.",)


def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path, monkeypatch):
    write_validated(tmp_path, SETTINGS, {"lds": {"sentence": "First."}})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(TrajrecError, match=r"validation.json could not be written: the disk is full"):
        write_validated(tmp_path, SETTINGS, {"lds": {"sentence": "Second."}})
    assert validated(tmp_path, SETTINGS).others == ("First.",)

"""The sentence on sensitivity: where it comes from, and where it is shown."""

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.made import loops, replay_folder
from tests.made.loops import Loop
from trajrec.replay import contributions
from trajrec.replay.report import report
from trajrec.replay.report.render import terminal
from trajrec.replay.report.render.html import html
from trajrec.replay.report.sensitivity import Sensitivity


def test_the_growth_is_that_of_the_adjoint():
    """A training that only shrinks its weights shrinks its adjoint, one with long steps lets it grow."""

    def with_rate(rate):
        made = loops.train(Loop(optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=rate), epochs=6))
        return contributions(made.run, made.task, exact=True).growth.max()

    assert with_rate(0.01) < 1.2
    assert with_rate(8.0) > 50


@pytest.mark.parametrize(("growth", "word"), [(1.3, "Calm"), (12.0, "Rough"), (4e3, "Wild")])
def test_it_is_said_on_terminal_and_page(tmp_path, growth, word):
    folder = replay_folder.write(tmp_path / "r", np.eye(4), growth=growth, taylor="Removing each of 3 samples did it.")
    found = report.build(folder)
    console = Console(record=True, width=100)
    terminal.show(found, console)
    shown = " ".join(console.export_text().split())
    assert f"{word}: going back through the run" in shown
    assert "Removing each of 3 samples did it." in shown
    page = html(found)
    assert Sensitivity(growth).sentence in page
    assert ("<strong>Sensitive</strong>" in page) == (word != "Calm")


def test_folders_that_do_not_say_show_nothing(tmp_path):
    found = report.build(replay_folder.write(tmp_path / "r", np.eye(4)))
    assert "Sensitivity" not in html(found)

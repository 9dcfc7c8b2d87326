"""Target losses that draw random numbers are one function of the weights: seeded, and said."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.made import loops
from tests.made.loops import Loop
from trajrec.replay import contributions
from trajrec.replay.folder.format import Settings
from trajrec.replay.losses.noise import Noise
from trajrec.replay.losses.targets import choose_targets
from trajrec.replay.methods.blocks import Execution
from trajrec.replay.methods.contributions import solve
from trajrec.replay.question import Question
from trajrec.replay.report.sections.head import Head, chapter
from trajrec.replay.session import Session
from trajrec.replay.validation.taylor import taylor_check
from trajrec.task.task import Task


class Vae(nn.Module):
    """Draws its code in eval mode, too, as the textbook's does."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(2, 4)

    def forward(self, x):
        mean, log_variance = self.encode(x).chunk(2, 1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum(1) / 2
        return (self.decode(torch.tanh(code)) - x).square().sum(1) + divergence


def elbo(model, batch):
    return model(batch[0])


def gently(model):
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.8)


@pytest.fixture(scope="module")
def made():
    return loops.train(Loop(build=Vae, loss=elbo, objective=loops.Objective(elbo), optimizer=gently))


def test_all_ways_to_ask_see_the_same_noise(made):
    each = contributions(made.run, made.task, targets="each", exact=True, mode="adjoint")
    tangent = contributions(made.run, made.task, targets="each", exact=True, mode="tangent")
    mean = contributions(made.run, made.task, exact=True)
    chosen = contributions(made.run, made.task, targets=np.array([3, 1]), exact=True)
    scale = np.abs(each.values).max()
    assert scale > 0
    assert np.abs(each.values - tangent.values).max() < 1e-12 * scale
    assert np.abs(each.values.mean(1) - mean.values[:, 0]).max() < 1e-12 * scale
    assert np.abs(each.values[:, [3, 1]] - chosen.values).max() < 1e-12 * scale


def test_blocks_of_targets_see_the_same_noise(made):
    question = Question(targets="each", curvature="hessian", mode="adjoint")
    whole, cut = (solve(Session(made.run, made.task), question, Execution(block=k)).values for k in (5, 2))
    np.testing.assert_allclose(whole, cut, rtol=1e-10, atol=1e-15)


def test_removing_samples_does_what_contributions_say(made):
    session = Session(made.run, made.task)
    targets = choose_targets("mean", session.test)
    found = contributions(made.run, made.task, exact=True)
    chosen = np.argsort(-np.abs(found.values[:, 0]))[:3]
    check = taylor_check(session, targets, chosen, found.values[chosen], lambda _: None)
    assert np.nanmedian(check.ratios) == pytest.approx(1, abs=0.2)
    assert np.nanmedian(check.rates) == pytest.approx(2, abs=0.3)


def test_it_is_said(made):
    found = contributions(made.run, made.task, exact=True)
    assert any("draws random numbers" in note and "seeded" in note for note in found.notes)
    assert contributions(loops.train(Loop()).run, loops.train(Loop()).task, exact=True).notes == ()


def test_the_folder_and_the_head_of_a_report_keep_what_is_said():
    settings = Settings.read(json.loads(json.dumps(Settings(notes=("It is seeded.",)).to_json())))
    head = Head(Path(), settings, None, 1, 1, 0.0, 0.0)
    facts = [fact for part in chapter(head).parts for block in part.blocks for group in block.groups for fact in group]
    assert ("note", "It is seeded.") in [(fact.label, fact.text) for fact in facts]


def noise_of(measure, build=loops.mlp):
    made = loops.train(Loop(build=build))
    session = Session(made.run, Task(build, made.task.train, made.task.test, loss=loops.per_sample, measure=measure))
    session.target_gradients(choose_targets("each", session.test))
    return session.function.target_noise


def test_losses_that_seed_themselves_or_draw_nothing_are_left_alone():
    def seeded(model, batch):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return loops.per_sample(model, [batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]])

    assert noise_of(loops.per_sample) is Noise.NONE
    assert noise_of(seeded) is Noise.NONE


def test_losses_that_compare_samples_are_not_cut_into_samples():
    def coupled(model, batch):
        out = model(batch[0] + 0.1 * torch.randn_like(batch[0]))
        return F.cross_entropy(out @ out.T, torch.arange(len(out)), reduction="none")

    def alone(model, batch):
        return loops.per_sample(model, [batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]])

    assert noise_of(coupled) is Noise.OF_BATCHES
    assert noise_of(alone) is Noise.OF_SAMPLES

"""Arguments by position, as before: taken for what they stood for, with a warning; the signature has names alone."""

import inspect

import pytest

from tests.made import scenario
from trajrec.replay import contributions, hypergradients


def test_arguments_by_position_are_taken_with_a_warning():
    s = scenario.train()
    with pytest.warns(DeprecationWarning, match=r"by name: targets=..., samples=..., exact=..."):
        old = contributions(s.run, s.task, "each", [3, 1], True, mode="tangent")
    new = contributions(s.run, s.task, targets="each", samples=[3, 1], exact=True, mode="tangent")
    assert (old.values == new.values).all()
    with pytest.warns(DeprecationWarning, match="samples="), hypergradients(s.run, s.task, [2]) as h:
        assert h.samples.tolist() == [2]


def test_an_argument_twice_or_too_many_are_errors():
    s = scenario.train()
    with pytest.raises(TypeError):
        contributions(s.run, s.task, "each", targets="mean")
    with pytest.raises(TypeError):
        hypergradients(s.run, s.task, [2], True, "more")


@pytest.mark.parametrize("function", [contributions, hypergradients])
def test_everything_behind_run_and_task_is_by_name(function):
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    assert set(kinds[2:]) == {inspect.Parameter.KEYWORD_ONLY}

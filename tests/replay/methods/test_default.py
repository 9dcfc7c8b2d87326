"""What is computed where nothing is said: the exact form. Every other is asked for by name, and called what it is."""

import h5py
import numpy as np
import pytest

from tests.made import scenario
from trajrec.errors import ReplayError
from trajrec.replay import contributions, hypergradients
from trajrec.replay.question import Question, curvature_of

LABEL = "approximation, not checked against exact"


def test_exact_is_the_default():
    s = scenario.train()
    c = contributions(s.run, s.task, targets="each")
    assert (c.exact, c.curvature, c.label) == (True, "hessian", "exact")
    np.testing.assert_allclose(c.values, s.reference(True), rtol=1e-8, atol=1e-10)
    assert Question().curvature == "hessian"


@pytest.mark.parametrize("asked", [{"exact": False}, {"curvature": "none"}, {"exact": False, "curvature": "none"}])
def test_the_hessian_free_form_is_asked_for_by_name(asked):
    s = scenario.train()
    c = contributions(s.run, s.task, targets="each", **asked)
    assert (c.exact, c.curvature, c.label) == (False, "none", LABEL)
    np.testing.assert_allclose(c.values, s.reference(False), rtol=1e-8, atol=1e-10)


def test_a_name_needs_no_word_about_being_exact():
    found = [curvature_of(exact, name) for exact in (True, False) for name in ("ggn", "none")]
    assert found == ["ggn", "none", "ggn", "none"]
    assert curvature_of(True, "hessian") == "hessian"
    with pytest.raises(ReplayError, match='curvature "hessian" is the exact form: leave out exact=False'):
        curvature_of(False, "hessian")


@pytest.mark.parametrize(("asked", "exact"), [({}, True), ({"exact": False}, False), ({"curvature": "ggn"}, False)])
def test_hypergradients_say_what_they_are(tmp_path, asked, exact):
    s = scenario.train()
    path = tmp_path / "h.h5"
    with hypergradients(s.run, s.task, samples=[4], out=path, **asked) as h:
        assert h.label == ("exact" if exact else LABEL)
    with h5py.File(path) as file:
        assert (file.attrs["label"], bool(file.attrs["exact"]), file.attrs["curvature"]) == (
            h.label,
            exact,
            h.curvature,
        )


def test_hypergradients_without_a_word_are_exact():
    s = scenario.train()

    def vectors(**asked):
        with hypergradients(s.run, s.task, samples=[4], **asked) as found:
            return np.concatenate([value.numpy().ravel() for value in found[4].values()])

    np.testing.assert_allclose(vectors(), vectors(exact=True), rtol=1e-12)
    assert not np.allclose(vectors(), vectors(exact=False))

"""Which samples made a step, read from facts that are made up: no loop, no model, no torch."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from tests.capture.attribution.lines import Facts
from trajrec.capture.attribution.batches import StepBatch
from trajrec.capture.attribution.facts import Forward, Stepped
from trajrec.capture.attribution.known import NOTHING, Known
from trajrec.capture.attribution.reading import read, read_in_general

# The loops of tests/capture/test_loops.py and their like.
LOOPS = {
    "ordinary": "+a1 clear 1(a1) <1 step=a1 +a2 clear 2(a2) <2 step=a2 end(a) +a3 clear 3() <3 step=a3",
    "validates in the middle": "+a1 +v2 eval(v2) +v3 eval(v3) end(v) clear 1(a1) <1 step=a1",
    "validates with gradients": "+a1 +v2 1(v2) free(1) +v3 2(v3) free(2) end(v) clear 3(a1) <3 step=a1",
    "validates on the training set": "+a1 +b2 eval(b2) +b3 eval(b3) end(b) clear 1(a1) <1 step=a1",
    "validates on inputs made anew": "+a1 1() <1 step=a1 +a2 +v3 eval() +v4 eval() end(v) 2() <2 step=a2",
    "validates between micro-batches": "+a1 1(a1) <1 +v2 eval(v2) end(v) +a3 2(a3) <2 step=a1,a3 clear",
    "another model first": "+a1 < clear 1(a1) <1 step=a1",
    "outputs used before": "+a1 1(a1) < clear <1 step=a1",
    "skipped after forward": "+a1 1(a1) free(1) +a2 2(a2) clear <2 step=a2",
    "skipped after backward": "+a1 clear 1(a1) <1 +a2 clear 2(a2) <2~ step=a2",
    "skipped with named ids": "+a1 name(a1) clear 1(a1) <1 +a2 name(a2) clear 2(a2) <2~ step=a2",
    "gradients thrown away by hand": "+a1 1(a1) <1 free(1) +a2 2(a2) <2~ step=a2",
    "gradients thrown away before the step": "+a1 1(a1) <1 clear step?No batch of a DataLoader was seen",
    "an attack on the inputs first": "+a1 1() <1 clear 2() <2~ step=a1",
    "two loaders side by side": "+a1 +b2 clear 1(a1) 2(b2) <1,2 step=a1,b2",
    "two loaders, inputs made anew": "+a1 +b2 clear 1() 2() <1,2 step?Two loaders handed out a batch",
    "two losses, inputs made anew": "+a1 1() +a2 2() <1,2 step=a1,a2",
    "draws ahead": "+a1 +a2 1(a1) <1 step=a1 +a3 2(a2) <2 step=a2 end(a) 3(a3) <3 step=a3",
    "draws ahead, two passes": "+a1 +a2 clear 1(a1) <1 clear 2(a1) <2 step=a1",
    "draws ahead, inputs made anew": "+a1 +a2 1() <1 step?2 batches were drawn before the model was called",
    "draws ahead, made anew later": "+a1 +a2 1(a1) <1 step=a1 2(a2) <2 step=a2 +a3 +a4 3() <3 step?2 batches",
    "draws ahead, looks at numbers": "+a1 +a2 eval() clear 1(a1) <1 step=a1 +a3 eval() clear 2(a2) <2 step=a2",
    "draws ahead, looks at its batch": "+a1 +a2 eval(a1) clear 1(a1) <1 step=a1 eval(a2) 2(a2) <2 step=a2",
    "draws ahead, accumulates": "+a1 +a2 eval() 1(a1) <1 +a3 eval() 2(a2) <2 step=a1,a2 clear 3(a3) <3 step=a3",
    "draws ahead, passes noise": "+a1 +a2 1() free(1) clear 2(a1) <2 step=a1",
    "draws before the step": "+a1 clear 1(a1) <1 +a2 step=a1 clear 2(a2) <2 +a3 step=a2",
    "draws before the step, two losses": "+a1 clear 1(a1) <1 +a2 <1 step=a1 clear 2(a2) <2 step=a2",
    "draws before the backward pass": "+a1 1(a1) +a2 <1 step=a1 2(a2) +a3 <2 step=a2",
    "draws before the backward pass, skips": "+a1 1(a1) +a2 free(1) 2(a2) +a3 <2 step=a2",
    "parts of the model": "+a1 < step=a1 clear +a2 < step=a2",
    "parts of the model, accumulated": "+a1 < +a2 < step=a1,a2",
    "in pieces": "+a1 +a2 clear 1(a1/2) <1 2(a1/2) <2 step=a1",
    "two loaders in turn": "+a1 +b2 1(a1) <1 step=a1 2(b2) <2 step=b2",
    "outputs that nobody sees": "+a1 clear 1[a1] <  step=a1 +a2 2[] < step=a2",
    "within a backward pass": "+a1 1(a1) <1 <(1) +a2 2(a2) <2 <(2) step=a1,a2",
    "one passed over": "+b1 1(b1) <1 step=b1 +a2 2(a2) <2 step=a2 +b3 +a4 3(a4) <3 step=a4 +a5 4() <4 step=a5",
    "another model's gradient only": "+a1 1(a1) <1 step=a1 +a2 2(a2) < step?No batch of a DataLoader was seen",
    "skips a batch": "+a1 1(a1) <1 step=a1 +a2 +a3 2() <2 step=a3",
    "leaves a pass, and draws anew": "+a1 1(a1) <1 step=a1 +a2 end(a) +a3 2() <2 step=a3",
    "leaves a pass, and comes back": "+a1 1(a1) <1 step=a1 +b2 +a3 2(b2) <2 step=b2 +b4 +a5 3() <3 step?Two loaders",
    "another loader's batch at the door": "+a1 1(a1) <1 step=a1 +v2 +a3 2() <2 step=a3",
    "an evaluation on the same loader": "+a1 1(a1) <1 step=a1 +a2 eval() +a3 eval() end(a) +a4 2() <2 step=a4",
    "draws ahead, and a copy made anew": "+a1 +a2 1(a1) 2() <1,2 step?2 batches were drawn",
    "draws ahead, and an attack": "+a1 +a2 1(a1) 2() <2 clear free(2) <1~ step=a1 +a3 3(a2) <3 step=a2",
    "looks at its batch before the first step": "+v1 +a2 eval(a2) 1() <1 step?Two loaders handed out a batch",
    "skips, and looks at its batch": "+a1 1(a1) <1 step=a1 +a2 +a3 eval(a3) 2() <2 step=a3",
    "an earlier batch again": "+a1 1(a1) <1 step=a1 +a2 2(a1) <2 step=a1",
    "scores first": "+a1 1(a1) <1 step=a1 +a2 eval(a2) +a3 eval(a3) +a4 eval(a4) 2(a3) <2 step=a3",
    "of two data sets": "+a1 +v2 1(a1) 2(v2) <1,2 step?batches of 2 data sets (Seta and Setv)",
    "another data set later": "+a1 1(a1) <1 step=a1 +v2 2(v2) <2 step?another data set than the steps before",
    "batches joined": "+a1 1(a1) <1 step=a1 +a2 2(a2/2) <2 step?batches were joined, or cut",
    "a judge that is shown noise, too": "+a1 shared 1(a1) 2() <1,2 step=a1",
    "a maker of noise": "+a1 shared 1() <1 step?The gradient is that of another model, too",
    "no batch": "1() <1 step?No batch of a DataLoader was seen",
}


def ids_of(step, facts):
    return sorted(step.ids.tolist()) if isinstance(step, StepBatch) else f"refused: {step}"


@pytest.mark.parametrize("name", LOOPS)
def test_a_line_of_facts_tells_its_steps(name):
    facts, known = Facts(), Known()
    for number, (seen, expected) in enumerate(facts.read(LOOPS[name])):
        known, step = read(known, seen)
        if expected.startswith("?"):
            assert expected[1:] in str(step)
            assert "Call trajrec.set_batch(ids)" in str(step)
        else:
            batches = [facts.batch(batch) for batch in expected[1:].split(",")]
            assert sorted(step.ids.tolist()) == sorted(np.concatenate([b.ids for b in batches])), number


@pytest.mark.parametrize("name", LOOPS)
def test_it_makes_no_difference_where_reading_begins_anew(name):
    """Facts that become many are read before the step is made."""
    for cut in range(1, 12):
        facts, whole, parts = Facts(), Known(), Known()
        for seen, _ in facts.read(LOOPS[name]):
            whole, one = read(whole, seen)
            parts, none = read(parts, seen[:cut]) if cut < len(seen) else (parts, None)
            parts, other = read(parts, seen[cut:] if cut < len(seen) else seen)
            assert none is None
            assert ids_of(one, facts) == ids_of(other, facts)
            assert (whole.habits, whole.epochs) == (parts.habits, parts.epochs)


def test_after_an_ordinary_step_nothing_is_left():
    known = Known()
    for seen, _ in Facts().read(LOOPS["ordinary"]):
        known, _ = read(known, seen)
        assert known.unfinished is NOTHING


def test_pieces_keep_the_generators_before_each():
    ((seen, _),) = Facts().read(LOOPS["in pieces"])
    _, step = read(Known(), seen)
    assert step.parts == (2, 2)
    assert step.rng == (("before 1",), ("before 2",))


def test_losses_of_all_backward_passes_are_kept_until_gradients_are_cleared():
    for name, count in (("draws ahead, accumulates", 2), ("skipped after backward", 1)):
        seen, _ = next(Facts().read(LOOPS[name]))
        assert read(Known(), seen)[1].losses == (1.0,) * count


def test_an_ordinary_step_is_read_as_any_other():
    known = Known()
    for seen, _ in Facts().read(LOOPS["ordinary"]):
        (general, one), (known, other) = read_in_general(known, seen), read(known, seen)
        assert (general.habits, general.epochs) == (known.habits, known.epochs)
        for field in StepBatch._fields:
            assert repr(getattr(one, field)) == repr(getattr(other, field))


def test_a_batch_that_another_thread_has_drawn_says_that_the_loop_draws_ahead():
    ((seen, _),) = Facts().read("+a1 clear 1(a1) <1 step=a1")
    assert not read(Known(), seen)[0].habits.draws_ahead
    drawn = seen[0].batch
    seen = [fact._replace(batch=replace(drawn, thread=8)) if fact is seen[0] else fact for fact in seen]
    seen = [fact._replace(shown=seen[0].batch) if isinstance(fact, Forward) else fact for fact in seen]
    assert read(Known(), seen)[0].habits.draws_ahead


def test_another_thread_is_not_followed():
    ((seen, _),) = Facts().read("+a1 clear 1(a1) <1 step=a1")
    assert "steps in another thread" in str(read(Known(), [*seen[:-1], Stepped(8)])[1])
    other = [fact._replace(thread=8) if isinstance(fact, Forward) else fact for fact in seen]
    assert "More than one thread calls the model" in str(read(read(Known(), seen)[0], other)[1])


def test_reading_needs_no_torch():
    code = "import sys, trajrec.capture.attribution.reading; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

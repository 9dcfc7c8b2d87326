"""Ids are right or absent, never wrong: facts of made-up loops that know what they train on; without torch."""

from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.capture.attribution.lines import SIZE, Facts
from trajrec.capture.attribution.batches import StepBatch
from trajrec.capture.attribution.facts import Stepped
from trajrec.capture.attribution.known import Known
from trajrec.capture.attribution.ordinary import read_ordinary
from trajrec.capture.attribution.reading import read, read_in_general

EPOCH = 5  # batches
BEFORE = ["nothing", "nothing", "evaluates", "evaluates with gradients", "looks at its batch", "looks at numbers"]
BEFORE += ["passes numbers", "trains another model", "looks at the data"]
STEPS = ["step", "step", "step", "skip", "skip after forward", "skip after backward", "two losses", "accumulate"]
STEPS += ["attack", "twice the same loss", "named", "in pieces", "draws before the step"]


class Loop:
    """Writes the facts of a loop, and what each step is made of.

    Args:
        shows: whether the model's inputs tell which batch they are of, pass by pass, again and again.
        ahead: how many batches are drawn before the one that is used.
        keeps: whether the graph of the last step lives until the next loss is there, as in most loops.
    """

    def __init__(self, shows, ahead, keeps):
        self.facts, self.words = Facts(), []
        self.shows, self.ahead, self.keeps = cycle(shows), ahead, keeps
        self.batches = self.forwards = 0
        self.alive, self.waiting, self.left, self.is_over, self.used = [], [], 0, True, []

    def add(self, *words):
        self.words += words

    def draw(self, loader="a"):
        self.batches += 1
        self.add(f"+{loader}{self.batches}")
        return f"{loader}{self.batches}"

    def next(self):
        while len(self.waiting) <= self.ahead:
            if self.left == 0:
                if not self.is_over:
                    self.is_over = True
                    self.add("end(a)")
                if self.waiting:
                    break
                self.left, self.is_over = EPOCH, False
            self.waiting.append(self.draw())
            self.left -= 1
        return self.waiting.pop(0)

    def shown(self, batch):
        return batch if next(self.shows) else ""

    def forward(self, batch, part=""):
        self.forwards += 1
        self.add(f"{self.forwards}({self.shown(batch)}{part})")
        return self.forwards

    def loss(self, batch):
        self.used.append(batch)
        return self.forward(batch)

    def backward(self, *passes, adds=True):
        while self.alive:
            self.add(f"free({self.alive.pop()})")
        self.add(f"<{','.join(map(str, passes))}{'' if adds else '~'}")
        self.alive = list(passes) if self.keeps else []
        if not self.keeps:
            self.add(*[f"free({number})" for number in passes])

    def before(self, what, batch):
        match what:
            case "evaluates":
                for _ in range(3):
                    seen = self.draw("v")
                    self.add(f"eval({self.shown(seen)})")
                self.add("end(v)")
            case "evaluates with gradients":
                for _ in range(3):
                    self.add(f"free({self.forward(self.draw('v'))})")
                self.add("end(v)")
            case "looks at its batch":
                self.add(f"eval({self.shown(batch)})")
            case "looks at numbers":
                self.add("eval()")
            case "passes numbers":
                self.add(f"free({self.forward('')})")
            case "trains another model":
                self.add("<")
            case "looks at the data":
                self.draw("b")
                self.add("end(b)")

    def step(self, what, batch):
        """Whether the optimizer steps."""
        self.add("clear")
        self.used = []
        if what == "skip":
            return False
        if what == "named":
            self.add(f"name({batch})")
        if what == "in pieces":
            self.used.append(batch)
            self.backward(self.forward(batch, "/2"))
            self.backward(self.forward(batch, "/2"))
            return True
        first = self.loss(batch)
        match what:
            case "skip after forward":
                self.add(f"free({first})")
                return False
            case "skip after backward":
                self.backward(first, adds=False)
                return False
            case "two losses":
                self.backward(first, self.loss(self.next()))
            case "accumulate":
                self.backward(first)
                self.backward(self.loss(self.next()))
            case "attack":
                attack = self.forward(batch)
                self.add(f"<{attack}", "clear", f"free({attack})")
                self.backward(first, adds=False)
            case "twice the same loss":
                self.add(f"<{first}")
                self.backward(first)
            case "draws before the step":
                self.backward(first)
                if self.left:
                    self.waiting.append(self.draw())
                    self.left -= 1
            case _:
                self.backward(first, adds=False)
        return True

    def steps(self, events):
        """(facts, ids) of every step."""
        for before, what in events:
            batch = self.next()
            self.before(before, batch)
            if self.step(what, batch):
                facts = [fact for word in self.words for fact in self.facts.of(word)]
                self.words = []
                yield [*facts, Stepped(7)], sorted(i for b in self.used for i in self.facts.batch(b).ids.tolist())


loops = {
    "shows": st.lists(st.booleans(), min_size=1, max_size=3),
    "ahead": st.integers(0, 2),
    "keeps": st.booleans(),
    "events": st.lists(st.tuples(st.sampled_from(BEFORE), st.sampled_from(STEPS)), min_size=1, max_size=12),
}


def never_wrong(shows, ahead, keeps, events):
    known = Known()
    for facts, made in Loop(shows, ahead, keeps).steps(events):
        known, step = read(known, facts)
        if not isinstance(step, StepBatch):
            return  # recording ends with a refusal
        assert sorted(step.ids.tolist()) == made


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(**loops)
def test_ids_are_right_or_absent(shows, ahead, keeps, events):
    never_wrong(shows, ahead, keeps, events)


@pytest.mark.long
@settings(max_examples=20_000, deadline=None)
@given(**loops)
def test_ids_are_right_or_absent_in_many_loops(shows, ahead, keeps, events):
    never_wrong(shows, ahead, keeps, events)


@settings(max_examples=200, deadline=None)
@given(loops["ahead"], loops["keeps"], loops["events"])
def test_loops_whose_inputs_can_be_told_are_read_to_their_end(ahead, keeps, events):
    known = Known()
    for facts, made in Loop([True], ahead, keeps).steps([("nothing", "step"), *events]):
        known, step = read(known, facts)
        assert isinstance(step, StepBatch), step
        assert sorted(step.ids.tolist()) == made


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(1, 20), **loops)
def test_the_ordinary_and_the_cut_off_are_read_as_any_other(cut, shows, ahead, keeps, events):
    known = parts = Known()
    for facts, _ in Loop(shows, ahead, keeps).steps(events):
        ordinary = read_ordinary(known, facts)
        known, step = read_in_general(known, facts)
        parts, _ = read_in_general(parts, facts[:cut])
        parts, other = read_in_general(parts, facts[cut:]) if cut < len(facts) else (parts, step)
        for after, again in [(parts, other), ordinary or (known, step)]:
            assert (after.habits, after.epochs) == (known.habits, known.epochs)
            assert repr(again) == repr(step)
        if not isinstance(step, StepBatch):
            return


words = st.sampled_from(["+a", "+b", "+v", "clear", "<", "shared", "end(a)", "eval()", "pass", "shown", "free", "name"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(words, st.integers(0, 5)), max_size=25))
def test_any_facts_are_read(listed):
    """Whatever comes, in whatever order: samples of batches that were drawn or named, or a refusal."""
    facts, seen, drawn, passes, known = Facts(), [], ["a1"], 0, Known()
    seen += facts.of("+a1")
    for word, pick in listed:
        batch, number = drawn[pick % len(drawn)], passes - pick % max(passes, 1)
        match word:
            case "+a" | "+b" | "+v":
                drawn.append(f"{word[1]}{len(drawn) + 1}")
                word = f"+{drawn[-1]}"
            case "pass" | "shown":
                passes += 1
                word = f"{passes}({batch if word == 'shown' else ''})"
            case "<":
                word = f"<{number or ''}"
            case "free":
                word = f"free({number})"
            case "name":
                word = f"name({batch})"
        seen += facts.of(word)
    known, step = read(known, [*seen, Stepped(7)])
    if isinstance(step, StepBatch):
        assert len(step.ids) % SIZE == 0
        assert set(step.ids.tolist()) <= {i for name in drawn for i in facts.batch(name).ids.tolist()}
    else:
        assert "Call trajrec.set_batch(ids)" in str(step)

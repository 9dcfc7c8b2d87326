"""Loops as lines of facts.

+a1             batch 1 is drawn from loader a (b is another over the same data; v is one over other data)
end(a)          the pass over loader a has come to its end
eval(a1)        the model is called on batch 1 without gradients; eval() on something that nobody knows
1(a1) 1(a1/2)   forward pass 1 is about batch 1, or half of it; 1() about something that nobody knows
1[a1]           the same, of outputs that nobody sees
free(1)         its graph is gone
<1,2            a backward pass comes from forward passes 1 and 2; < from none that is known
<1~             and the gradients of those before are gone
<(1)            within another backward pass
clear           gradients are set to zero
name(a1)        the user names the samples of batch 1
shared          the gradient is another model's, too
step=a1,a2      the optimizer steps: made of these batches
step?words      or it cannot be told, in these words
"""

import re
from collections import Counter

import numpy as np

from trajrec.capture.attribution.batches import Batch, Source
from trajrec.capture.attribution.facts import (
    Backward,
    Cleared,
    Drawn,
    Ended,
    Evaluated,
    Forward,
    Named,
    Released,
    Returned,
    Shared,
    Stepped,
)

THREAD, SIZE = 7, 4
LOADERS = {name: Source(k, 2 if name == "v" else 1, f"Set{name}") for k, name in enumerate("abv", 1)}


def ids_of(number):
    return np.arange(SIZE) + SIZE * number


class Facts:
    """Makes facts of a line: `read` gives the facts up to each step, with what is expected of it."""

    def __init__(self):
        self.batches, self.passes = {}, Counter()

    def batch(self, name):
        if not name:
            return None
        if name not in self.batches:
            number = int(name[1:])
            serial = self.serial(name[0])
            self.batches[name] = Batch(number, LOADERS[name[0]], ids_of(number), serial, THREAD)
        return self.batches[name]

    def serial(self, loader):
        return 100 * self.passes[loader] + ord(loader)

    def forward(self, number, inner, is_seen):
        name, _, part = inner.partition("/")
        size = SIZE // int(part or 1)
        forward = Forward(int(number), THREAD, size=size, shape=(size, 9), states=(f"before {number}",))
        return [forward._replace(shown=self.batch(name)), *([Returned(int(number))] if is_seen else [])]

    def of(self, word):
        """The facts of one word of a line that is no step."""
        if word in ("clear", "shared"):
            return [Cleared() if word == "clear" else Shared()]
        if word.startswith("<"):
            number = re.findall(r"\d+", word)
            return [Backward(THREAD, frozenset(map(int, number)), "~" not in word, "(" in word, loss=1.0)]
        if word.startswith("+"):
            return [Drawn(self.batch(word[1:]))]
        kind, inner = re.fullmatch(r"(\w+)[\[(](.*)[\])]", word).groups()
        match kind:
            case "end":
                ended = self.serial(inner)
                self.passes[inner] += 1
                return [Ended(ended)]
            case "eval":
                return [Evaluated(self.batch(inner))]
            case "free":
                return [Released(int(inner))]
            case "name":
                return [Named(self.batch(inner).ids)]
        return self.forward(kind, inner, "(" in word)

    def read(self, line):
        facts = []
        for word in line.split(" ; ") if ";" in line else re.findall(r"step\?[^+]*|\S+", line):
            if not word.startswith("step"):
                facts += self.of(word)
                continue
            yield [*facts, Stepped(THREAD)], word.strip()[4:]
            facts = []

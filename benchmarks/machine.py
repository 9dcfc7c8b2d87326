"""What the machine can do at best, and what a step must do at least: the two roofs that a time is held against.

Rates are the best of a few trials in the same run: a triad a = b + s c over arrays of 128 MB (three of them move), and
a product of two 1024 x 1024 matrices in float32. What a step must do is counted: floating-point operations by
torch.utils.flop_counter, and bytes that have to pass through memory, each written and read once:

    values that autograd keeps for the backward pass       twice their size
    vectors as long as the weights                         VECTORS times P' x 4 bytes

Nothing is counted for what a cache may hold, so that a time at its roof cannot be had, only approached.
"""

import math
import time
from contextlib import suppress

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

ELEMENTS, SIDE, TRIALS = 1 << 25, 1024, 6

# training    weights read forwards and backwards, gradient written and read, momentum and weights read and written: 8
# exact       the next row out of the file and into a tensor (2), weights and gamma read forwards and backwards (4), g
#             and H gamma written (2), lam and sigma read, both and gamma written (5), H gamma added (3), the
#             certificate (5): 21
# free        the next row (2), weights and gamma read (2): 4
# target      one more target of a block: gamma read, H gamma written, lam and sigma as above: 10
VECTORS = {"training": 8, "exact": 21, "free": 4, "target": 10}


def clock():
    """Seconds: CPU time of the process with one thread, which other work on the machine disturbs less; else wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(work, trials=TRIALS):
    """The least of a few trials."""
    found = []
    for _ in range(trials):
        began = clock()
        work()
        found.append(clock() - began)
    return min(found)


def rates():
    """Gigabytes and thousand million operations a second."""
    a, b, c = (torch.rand(ELEMENTS) for _ in range(3))
    triad = seconds(lambda: torch.add(b, c, alpha=0.5, out=a))
    x, y = torch.rand(SIDE, SIDE), torch.rand(SIDE, SIDE)
    product = seconds(lambda: x @ y)
    return {"GB_s": round(3 * a.nbytes / triad / 1e9, 2), "GFLOP_s": round(2 * SIDE**3 / product / 1e9, 1)}


def product_in_place(total, a, b, **_):
    """Operations of total += a b, by their shapes; torch counts only those of the form that is not in place."""
    return 2 * math.prod(a) * b[-1]


IN_PLACE = {torch.ops.aten.addmm_: product_in_place, torch.ops.aten.baddbmm_: product_in_place}


def counted(work):
    """Operations of a piece of work, and the bytes of the values that autograd keeps in it."""
    sizes = {}

    def note(value):
        with suppress(RuntimeError):  # zeros that are not there
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    counter = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
    with counter, saved_tensors_hooks(note, lambda value: value):
        work()
    return counter.get_total_flops(), sum(sizes.values())


def roof(kind, operations, kept, parameters, rate):
    """Milliseconds that arithmetic and memory take at least, and which of them is more."""
    size = 2 * kept + VECTORS[kind] * 4 * parameters
    found = {"arithmetic_ms": operations / rate["GFLOP_s"] / 1e6, "memory_ms": size / rate["GB_s"] / 1e6}
    bound = max(found, key=found.get)
    return {
        "gflop": round(operations / 1e9, 4),
        "MB": round(size / 1e6, 2),
        **{key: round(value, 4) for key, value in found.items()},
        "bound": bound.removesuffix("_ms"),
        "bound_ms": round(found[bound], 4),
    }
